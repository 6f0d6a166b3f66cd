"""How well a model predicts the labels of events that it has not learned from."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torchmetrics.functional.classification import binary_auroc, binary_calibration_error

from flm_torchrec.data.batch import Batch
from flm_torchrec.data.collate import Assembler
from flm_torchrec.data.lanes import LanePlan
from flm_torchrec.data.loader import Loader, Sharing, TrainLoader
from flm_torchrec.data.negatives import Negatives
from flm_torchrec.data.stream_loader import StreamLoader
from flm_torchrec.data.survey import stream_of
from flm_torchrec.data.weights import label_weights
from flm_torchrec.data.windows import windows
from flm_torchrec.training.job import Job
from flm_torchrec.training.run_events import spans_of

BINS = 15
"""Of predictions, in the expected calibration error."""


def evaluate_labels(job: Job, labels: np.ndarray, check: Callable[[], None] = lambda: None) -> dict[str, float]:
    """Metrics of the predictions for the labelled events; collective.

    * `label/auc`; `label/gauc`, the mean of the users' own AUC, if a user has labels of both kinds; see `gauc`.
    * `label/ne`, normalized entropy: the mean log loss divided by that of the events' own positive rate. A model with
      NE 1 is no better than knowing the rate (He et al., ADKDD 2014).
    * `label/calibration`: the mean prediction divided by the positive rate; 1 is best (the same paper).
    * `label/ece`, expected calibration error: the mean distance of prediction and rate in 15 bins of predictions of the
      same width, weighted by their events (Guo et al., ICML 2017).
    * `label/events`, their number.

    Of several labels, each has these as `label/NAME/…`, and `label/auc` is the mean of their AUC.

    Args:
        labels: [interactions, labels] float32, 1 or 0, NaN where there is none.
        check: called on every rank before each batch; it may raise to end the evaluation.
    """
    names = list(label_weights(job.config.finetune.labels))
    logits, truth, user = _collect(job, _loader(job, labels), check)
    found = [_metrics(logits[:, number], truth[:, number], user) for number in range(len(names))]
    if len(names) == 1:
        return {f"label/{metric}": value for metric, value in found[0].items()}
    mean = {"label/auc": sum(one["auc"] for one in found) / len(found), "label/events": float(len(truth))}
    by_name = zip(names, found, strict=True)
    return mean | {f"label/{name}/{metric}": value for name, one in by_name for metric, value in one.items()}


def _metrics(logits: Tensor, truth: Tensor, user: Tensor) -> dict[str, float]:
    """By name, the metrics of a label; all [events]."""
    rate = truth.mean()
    log_loss = F.binary_cross_entropy_with_logits(logits, truth)
    base = -(rate * rate.log() + (1 - rate) * (1 - rate).log())
    by_user = gauc(logits.numpy(), truth.numpy(), user.numpy())
    return {
        "auc": float(binary_auroc(logits, truth.long())),
        **({} if np.isnan(by_user) else {"gauc": by_user}),
        "ne": float(log_loss / base),
        "calibration": float(logits.sigmoid().mean() / rate),
        "ece": float(binary_calibration_error(logits, truth.long(), n_bins=BINS)),
        "events": float(len(truth)),
    }


def gauc(scores: np.ndarray, labels: np.ndarray, users: np.ndarray) -> float:
    """Mean of the users' AUC, weighted by their events (Zhu et al., KDD 2018); all [events].

    A user whose labels are all alike has no AUC and is left out; NaN where all users are such.
    """
    _, user = np.unique(users, return_inverse=True)
    order = np.lexsort((scores, user))
    scores, positive, user = scores[order], labels[order] > 0, user[order]
    events = np.bincount(user)
    tied = np.r_[False, (np.diff(scores) == 0) & (np.diff(user) == 0)]
    group = np.cumsum(~tied) - 1
    inside = np.arange(len(user)) - np.repeat(np.cumsum(events) - events, events) + 1
    rank = (np.bincount(group, inside) / np.bincount(group))[group]  # from 1; the mean of those that are tied
    positives = np.bincount(user, positive)
    pairs = positives * (events - positives)
    mixed = pairs > 0
    if not mixed.any():
        return float("nan")
    won = np.bincount(user, rank * positive) - positives * (positives + 1) / 2
    return float(np.average(won[mixed] / pairs[mixed], weights=events[mixed]))


def _loader(job: Job, labels: np.ndarray) -> Loader:
    """All events of the users who have a label, without negatives."""
    data, comm, config = job.data, job.comm, job.config
    splits = spans_of(data, labels)
    stats, mask = job.events.stats(data, values=False), splits.train_mask(data)
    assembler = _UserAssembler(data, mask, stats, labels, sketches=job.loader.assembler.sketches)
    none_drawn = Negatives(np.ones(data.schema.items), 0, 1.0)
    sharing = Sharing(config.train.batch_size, 0, comm.rank, comm.world_size)
    if data.units is not None:
        stream = stream_of(data, splits.train_end, mask, stats)
        return StreamLoader(LanePlan(stream, config.data.max_history, sharing), assembler, none_drawn)
    return TrainLoader(windows(data, splits, config.data.max_history), assembler, none_drawn, sharing)


class _UserAssembler(Assembler):
    """Remembers the users of the last batch."""

    def training(self, user: np.ndarray, *spans: Any, **more: Any) -> Batch:
        """As of `Assembler`."""
        self.users = user
        return super().training(user, *spans, **more)


def _collect(job: Job, loader: Loader, check: Callable[[], None]) -> tuple[Tensor, Tensor, Tensor]:
    """[events, labels] logits and labels, [events] users of the events of all ranks, in the same order on each."""
    logits, truth, users = [], [], []
    job.model.eval()
    with torch.no_grad():
        for batch in loader.epoch(0):
            check()
            assert isinstance(loader.assembler, _UserAssembler)
            user = torch.from_numpy(loader.assembler.users).to(batch.lengths)
            moved = batch.to(job.comm.device)
            _, outputs = job.model(moved)
            labelled = ~torch.isnan(moved.label).any(1)  # an event has all labels or none
            assert outputs.logits is not None
            logits.append(outputs.logits[labelled])
            truth.append(moved.label[labelled])
            users.append(user.repeat_interleave(batch.lengths).to(job.comm.device)[labelled])
    job.model.train()
    gathered, real = job.comm.concat(torch.cat([torch.cat(logits), torch.cat(truth)], 1))
    of_user, _ = job.comm.concat(torch.cat(users))
    pairs = gathered[real].cpu()
    count = pairs.shape[1] // 2
    return pairs[:, :count].contiguous(), pairs[:, count:].contiguous(), of_user[real].cpu()
