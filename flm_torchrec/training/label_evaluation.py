"""How well a model predicts the labels of events that it has not learned from."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torchmetrics.functional.classification import binary_auroc

from flm_torchrec.data.collate import Assembler
from flm_torchrec.data.loader import Sharing, TrainLoader
from flm_torchrec.data.negatives import Negatives
from flm_torchrec.data.train_stats import TrainStats
from flm_torchrec.data.windows import windows
from flm_torchrec.training.job import Job
from flm_torchrec.training.run_events import spans_of


def evaluate_labels(job: Job, labels: np.ndarray, check: Callable[[], None] = lambda: None) -> dict[str, float]:
    """`label/auc`, `label/ne` and `label/events` over the labelled events; collective.

    NE, normalized entropy, is the mean log loss divided by that of the events' own positive rate: a model with NE 1
    is no better than knowing the rate (He et al., ADKDD 2014).

    Args:
        labels: [interactions] float32, 1 or 0, NaN where there is none.
        check: called on every rank before each batch; it may raise to end the evaluation.
    """
    logits, truth = _collect(job, _loader(job, labels), check)
    rate = truth.mean()
    log_loss = F.binary_cross_entropy_with_logits(logits, truth)
    base = -(rate * rate.log() + (1 - rate) * (1 - rate).log())
    return {
        "label/auc": float(binary_auroc(logits, truth.long())),
        "label/ne": float(log_loss / base),
        "label/events": float(len(truth)),
    }


def _loader(job: Job, labels: np.ndarray) -> TrainLoader:
    """All events of the users who have a label, without negatives."""
    data, comm, config = job.data, job.comm, job.config
    splits = spans_of(data, labels)
    item_rows = 0 if comm.world_size == 1 else data.schema.items
    stats = TrainStats.of(data, job.events.seen, values=False)
    assembler = Assembler(data, splits.train_mask(data), stats, labels, item_stride=item_rows)
    none_drawn = Negatives(np.ones(data.schema.items), 0, 1.0)
    spans = windows(data, splits, config.data.max_history)
    return TrainLoader(spans, assembler, none_drawn, Sharing(config.train.batch_size, 0, comm.rank, comm.world_size))


def _collect(job: Job, loader: TrainLoader, check: Callable[[], None]) -> tuple[Tensor, Tensor]:
    """[events] logits and [events] labels of all ranks, in the same order on each."""
    logits, truth = [], []
    job.model.eval()
    with torch.no_grad():
        for batch in loader.epoch(0):
            check()
            moved = batch.to(job.comm.device)
            _, outputs = job.model(moved)
            labelled = ~torch.isnan(moved.label)
            assert outputs.logits is not None
            logits.append(outputs.logits[labelled])
            truth.append(moved.label[labelled])
    job.model.train()
    gathered, real = job.comm.concat(torch.stack([torch.cat(logits), torch.cat(truth)], 1))
    pairs = gathered[real].cpu()
    return pairs[:, 0], pairs[:, 1]
