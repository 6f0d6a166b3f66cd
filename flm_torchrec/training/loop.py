"""The training loop: steps, validation, early stopping, best checkpoint."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from itertools import count, islice

import torch
from torch import Tensor
from torch.optim import Optimizer
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.train_pipeline import TrainPipelineSparseDist

from flm_torchrec.config.schema import TrainConfig
from flm_torchrec.data.batch import Batch
from flm_torchrec.data.loader import Prefetch, TrainLoader
from flm_torchrec.distributed.comm import Comm
from flm_torchrec.errors import RunError
from flm_torchrec.model.pretrain import Outputs
from flm_torchrec.training.record import Record
from flm_torchrec.training.schedule import Schedule

Validate = Callable[[], dict[str, float]]
Save = Callable[[int, dict[str, float]], None]


@dataclass(frozen=True)
class Finished:
    """How training ended."""

    steps: int
    best_step: int
    best: float
    seconds: float
    """In steps alone, validation left out."""


def fit(
    model: DistributedModelParallel, optimizer: Optimizer, loader: TrainLoader, config: TrainConfig, comm: Comm,
    record: Record, validate: Validate, save: Save, as_found: bool = False,
) -> Finished:  # fmt: skip
    """Train until the epochs or steps are used up, or validation has not improved for `patience` times.

    Args:
        as_found: the model as it is given is the first to be validated, and kept if none is better.

    Raises:
        RunError: the loss is no longer a number.
    """
    total = total_steps(config, len(loader))
    every = config.eval_every or len(loader)
    schedule = Schedule(optimizer, config.warmup_steps, total)
    best = _Best(config.select, record, validate, save)
    spent, step = 0.0, 0
    if as_found:
        best.judge(0, total)
    meter = _Meter(comm)
    model.train()
    began = time.monotonic()
    steps = pipelined_steps if comm.device.type == "cuda" else plain_steps
    with closing(iter(Prefetch(_batches(loader, total)))) as batches:
        for step, outputs in enumerate(steps(model, optimizer, schedule, batches, comm.device), start=1):
            meter.add(outputs)
            if step % config.log_every == 0 or step == total:
                values = meter.read(step)
                record.scalars(step, {**values, "lr_factor": schedule.factor})
                record.step(step, _status(values))
            if step % every and step != total:
                continue
            spent += time.monotonic() - began
            best.judge(step, total)
            if config.patience and best.stale >= config.patience:
                record.say(f"stopping early: no gain in {best.stale} validations")
                break
            began = time.monotonic()
    return Finished(step, best.step, best.score, spent)


class _Best:
    """Validates, and saves whatever is better than all before."""

    def __init__(self, select: str, record: Record, validate: Validate, save: Save) -> None:
        self.select = select
        self.record = record
        self.validate = validate
        self.save = save
        self.score, self.step, self.stale = -math.inf, 0, 0

    def judge(self, step: int, total: int) -> None:
        metrics = self.validate()
        score = metrics[self.select]
        improved = score > self.score
        self.record.scalars(step, {f"valid/{name}": value for name, value in metrics.items()})
        mark = "  best so far" if improved else ""
        self.record.say(f"step {step}/{total}  validation {self.select} {score:.4f}{mark}")
        if improved:
            self.score, self.step, self.stale = score, step, 0
            self.save(step, metrics)
        else:
            self.stale += 1


def total_steps(config: TrainConfig, steps_per_epoch: int) -> int:
    total = config.epochs * steps_per_epoch
    return min(total, config.max_steps) if config.max_steps else total


def _batches(loader: TrainLoader, total: int) -> Iterator[Batch]:
    """Epoch after epoch, `total` batches in all."""
    return islice((batch for epoch in count() for batch in loader.epoch(epoch)), total)


def plain_steps(
    model: DistributedModelParallel,
    optimizer: Optimizer,
    schedule: Schedule,
    batches: Iterator[Batch],
    device: torch.device,
) -> Iterator[Outputs]:
    """Train on each batch and yield its outputs."""
    for step, batch in enumerate(batches):
        schedule.set(step)
        optimizer.zero_grad()
        loss, outputs = model(batch.to(device))
        loss.backward()
        optimizer.step()
        yield outputs


def pipelined_steps(
    model: DistributedModelParallel,
    optimizer: Optimizer,
    schedule: Schedule,
    batches: Iterator[Batch],
    device: torch.device,
) -> Iterator[Outputs]:
    """The same, the next batch's copy to the device and its input distribution overlapping this one's compute."""
    pipeline = TrainPipelineSparseDist(model, optimizer, device, execute_all_batches=True)
    for step in range(schedule.total):
        schedule.set(step)
        yield pipeline.progress(batches)


class _Meter:
    """Mean losses since the last reading, over all ranks, and the rate of samples."""

    def __init__(self, comm: Comm) -> None:
        self.comm = comm
        self._reset()

    def _reset(self) -> None:
        self.total: dict[str, Tensor] = {}
        self.steps = 0
        self.sequences = 0
        self.since = time.monotonic()

    def add(self, outputs: Outputs) -> None:
        for name, loss in outputs.losses.items():
            self.total[name] = self.total.get(name, 0.0) + loss
        self.steps += 1
        self.sequences += outputs.sequences

    def read(self, step: int) -> dict[str, float]:
        counts = torch.tensor(float(self.sequences), device=self.comm.device)
        sums = self.comm.all_reduce_sum(torch.stack([counts, *self.total.values()]))
        sequences, *losses = sums.tolist()
        for name, loss in zip(self.total, losses, strict=True):
            if not math.isfinite(loss):
                raise RunError(f"step {step}: the {name} loss is {loss}; lower train.dense_lr or train.sparse_lr")
        values = {f"loss/{name}": loss / self.steps for name, loss in zip(self.total, losses, strict=True)}
        values["samples_per_second"] = sequences / max(1e-9, time.monotonic() - self.since)
        self._reset()
        return values


def _status(values: dict[str, float]) -> str:
    losses = "  ".join(f"{k.removeprefix('loss/')} {v:.3f}" for k, v in values.items() if k.startswith("loss/"))
    return f"{values['samples_per_second']:.0f} samples/s  {losses}"
