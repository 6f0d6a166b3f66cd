"""How well a model tells the labels of events it has not learnt."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torchmetrics.functional.classification import binary_auroc
from torchrec.distributed.model_parallel import DistributedModelParallel

from flm_torchrec.data.collate import Assembler
from flm_torchrec.data.dataset import PreparedData
from flm_torchrec.data.loader import TrainLoader
from flm_torchrec.data.negatives import Negatives
from flm_torchrec.data.windows import windows
from flm_torchrec.distributed.comm import Comm
from flm_torchrec.training.scope import spans_of


def label_metrics(
    model: DistributedModelParallel, data: PreparedData, labels: np.ndarray, known: np.ndarray, comm: Comm,
    batch_size: int, max_history: int, check: Callable[[], None] = lambda: None,
) -> dict[str, float]:  # fmt: skip
    """`label/auc`, `label/ne` and `label/events` over the labelled events; collective.

    NE, normalized entropy, is the mean log loss over that of the events' own positive rate: 1 is no better than
    knowing the rate (He et al., ADKDD 2014).

    Args:
        labels: [interactions] float32, NaN where there is none.
        known: [interactions] bool, events that made ids known to the model.
        check: called on every rank before each batch; it may raise to end this.
    """
    splits = spans_of(data, labels)
    rows = 0 if comm.world_size == 1 else data.schema.items
    assembler = Assembler(data, splits.fit(data), item_rows=rows, labels=labels, known=known)
    nothing = Negatives(np.ones(data.schema.items), 0, 1.0)
    spans = windows(data, splits, max_history)
    loader = TrainLoader(spans, assembler, nothing, batch_size, 0, comm.rank, comm.world_size)
    logits, truth = _collect(model, loader, comm, check)
    rate = truth.mean()
    log_loss = F.binary_cross_entropy_with_logits(logits, truth)
    base = -(rate * rate.log() + (1 - rate) * (1 - rate).log())
    return {
        "label/auc": float(binary_auroc(logits, truth.long())),
        "label/ne": float(log_loss / base),
        "label/events": float(len(truth)),
    }


def _collect(
    model: DistributedModelParallel, loader: TrainLoader, comm: Comm, check: Callable[[], None]
) -> tuple[Tensor, Tensor]:
    """Logits and labels of all ranks, in the same order on each."""
    logits, truth = [], []
    model.eval()
    with torch.no_grad():
        for batch in loader.epoch(0):
            check()
            moved = batch.to(comm.device)
            _, outputs = model(moved)
            labelled = ~torch.isnan(moved.label)
            assert outputs.logits is not None
            logits.append(outputs.logits[labelled])
            truth.append(moved.label[labelled])
    model.train()
    gathered, real = comm.concat(torch.stack([torch.cat(logits), torch.cat(truth)], 1))
    found = gathered[real].cpu()
    return found[:, 0], found[:, 1]
