"""Generalised binary cross-entropy over shared negatives."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F


def gbce(
    query: Tensor, items: Tensor, target: Tensor, absent: Tensor, scale: Tensor, catalogue: int, calibration: float
) -> Tensor:
    """Sum over T queries of -(beta log sigmoid(s+) + sum over negatives of log(1 - sigmoid(s-))) / (C + 1).

    beta = a (t (1 - 1 / a) + 1 / a) with the sampling rate a = negatives / (items - 1), t the calibration: t = 1
    corrects for the sampling in full, t = 0 is plain BCE (Petrov & Macdonald, gSASRec, RecSys 2023).

    Args:
        query: [T, D].
        items: [C, D] vectors of the candidates.
        target: [T] index of each query's true item among the candidates; the others are its negatives.
        absent: [C] bool, candidates that do not count.
    """
    rate = float((~absent).sum() - 1) / max(1, catalogue - 1)
    beta = rate * (calibration * (1 - 1 / rate) + 1 / rate)
    logits = (query * scale) @ items.T  # [T, C]
    own = logits.gather(1, target[:, None]).squeeze(1)
    negative = F.softplus(logits).masked_fill(absent, 0.0).scatter(1, target[:, None], 0.0)
    return (beta * F.softplus(-own).sum() + negative.sum()) / (1 + float((~absent).sum() - 1))
