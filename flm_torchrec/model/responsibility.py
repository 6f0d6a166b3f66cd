"""How much a target counts for each head, where each event has one cause."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


def weights_by_head(log_probability: Mapping[str, Tensor], mixture: float) -> dict[str, Tensor]:
    """By head, [T] log-probabilities of the targets → [T] what the targets count for it; over the heads, 1 on average.

    At `mixture` 1 the losses so weighted have the gradients of -log (sum over heads k of p_k(target) / K), times K: a
    mixture of softmaxes (Yang et al., ICLR 2018) with equal weights. A head's share of a target is its responsibility
    in expectation maximisation (Dempster, Laird & Rubin 1977). At 0 all weights are 1.
    """
    shares = torch.softmax(torch.stack(list(log_probability.values())), 0)  # [K, T]
    weights = 1 - mixture + mixture * len(shares) * shares
    return dict(zip(log_probability, weights, strict=True))
