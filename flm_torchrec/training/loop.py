"""The training loop: steps, validation, early stopping, best checkpoint."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.optim.keyed import CombinedOptimizer

from flm_torchrec.config.schema import TrainConfig
from flm_torchrec.data.batch import Batch
from flm_torchrec.data.loader import Loader
from flm_torchrec.data.prefetch import Prefetch
from flm_torchrec.distributed.comm import Comm
from flm_torchrec.errors import Interrupted
from flm_torchrec.training.checkpoint.manager import Checkpoints, Progress
from flm_torchrec.training.guard import NON_FINITE, Guard, NonFinite, Stopped
from flm_torchrec.training.logger import RunLogger
from flm_torchrec.training.meter import Meter, status
from flm_torchrec.training.profile import profiled
from flm_torchrec.training.schedule import Schedule
from flm_torchrec.training.steps import STEPS

Validate = Callable[[Callable[[], None]], dict[str, float]]
"""Metrics of the model as it is. The argument is called between two blocks of examples; it raises to end validation."""


@dataclass(frozen=True)
class TrainingParts:
    """What the loop trains, and where the loop logs and saves."""

    model: DistributedModelParallel
    optimizer: CombinedOptimizer
    loader: Loader
    config: TrainConfig
    comm: Comm
    logger: RunLogger
    checkpoints: Checkpoints
    about: Callable[[], dict[str, Any]] = dict
    """What a best checkpoint says of its model, beside its metrics."""

    @cached_property
    def total_steps(self) -> int:
        """Steps of the whole training."""
        return total_steps(self.config, len(self.loader))


@dataclass(frozen=True)
class Finished:
    """How training ended."""

    steps: int
    best_step: int
    best: float
    seconds: float
    """In steps and their checkpoints, validation left out."""


def run_loop(parts: TrainingParts, validate: Validate, progress: Progress, validate_first: bool = False) -> Finished:
    """Train from `progress` on until the epochs or steps are used up, or validation has stopped improving; collective.

    Args:
        validate_first: validate the model as it is before the first step, and keep it if none is better.

    Raises:
        RunError: the loss is no longer a number, or the last checkpoint cannot be written.
        Interrupted: asked to stop by SIGTERM or Ctrl-C; the state is saved.
    """
    config, comm, logger, checkpoints = parts.config, parts.comm, parts.logger, parts.checkpoints
    total = parts.total_steps
    every = config.eval_every or len(parts.loader)
    schedule = Schedule(parts.optimizer, config.warmup_steps, total)
    loaded = islice(parts.loader.after(progress.step), total - progress.step)
    # Only a copy from pinned memory runs beside a GPU's work.
    ahead = Prefetch(map(Batch.pin_memory, loaded) if comm.device.type == "cuda" else loaded)
    meter = Meter(comm, ahead)
    parts.model.train()
    with (
        Guard(comm, config.non_finite, Path(config.run) / NON_FINITE) as guard,
        closing(checkpoints),
        closing(iter(ahead)) as batches,
        profiled(config.profile, Path(config.run), comm) as after_step,
    ):
        best = _BestModel(parts, progress, lambda: validate(guard.check))
        if progress.due or (validate_first and progress.step == 0):
            best.update()
            _save_if_due(parts, progress, guard)
        steps = STEPS[comm.device.type](parts.model, parts.optimizer, schedule, comm.device, guard)
        while progress.step < total and not best.stale():
            began = time.monotonic()
            try:
                outputs = steps.take(batches, progress.step)
            except NonFinite:
                # Backward has not run on any rank: this is the state before the step. No run resumes from it.
                checkpoints.save(progress, Path(config.run) / NON_FINITE)
                checkpoints.wait()
                raise
            progress.step += 1
            after_step()
            if outputs is not None:
                meter.add(outputs)
            if progress.step % config.log_every == 0 or progress.step == total:
                _log(logger, progress.step, {**meter.read(), "lr_factor": schedule.factor})
            progress.seconds += time.monotonic() - began
            if progress.step % every == 0 or progress.step == total:
                steps.release()
                best.update()
                meter.restart()
            began = time.monotonic()
            _save_if_due(parts, progress, guard)
            progress.seconds += time.monotonic() - began
        steps.release()
        if progress.best is None:  # resumed at the end, and the best model was damaged
            best.update()
            _save_if_due(parts, progress, guard)
        checkpoints.finish()
    assert progress.best is not None
    return Finished(progress.step, progress.best_step, progress.best, progress.seconds)


def _log(logger: RunLogger, step: int, values: dict[str, float]) -> None:
    logger.scalars(step, values)
    logger.step(step, status(values))


def _save_if_due(parts: TrainingParts, progress: Progress, guard: Guard) -> None:
    """Save the state where it is time to, and leave the loop where the run was asked to stop."""
    config, checkpoints, total = parts.config, parts.checkpoints, parts.total_steps
    due = config.checkpoint_every and progress.step % config.checkpoint_every == 0
    due = due or guard.stopping or progress.worn_out(config.patience) or progress.step == total
    if due and progress.step > 0:
        failed = checkpoints.save(progress)
        if failed:
            parts.logger.say(f"step {progress.step}: {failed}")
    if guard.stopping and (progress.step < total or progress.due):
        checkpoints.finish()
        raise Interrupted(
            f"stopped as asked at step {progress.step} of {total}, all saved; go on with --train.existing resume"
        )


class _BestModel:
    """Validates, and saves a model that is better than all before."""

    def __init__(self, parts: TrainingParts, progress: Progress, validate: Callable[[], dict[str, float]]) -> None:
        self.parts = parts
        self.progress = progress
        self.validate = validate

    def update(self) -> None:
        """Validate, and save the model if it is the best; a validation that a stop ends is due at the next start."""
        progress, logger, select = self.progress, self.parts.logger, self.parts.config.select
        try:
            metrics = self.validate()
        except Stopped:
            progress.due = True
            return
        progress.due = False
        score = metrics[select]
        improved = progress.best is None or score > progress.best
        logger.scalars(progress.step, {f"valid/{name}": value for name, value in metrics.items()})
        mark = "  best so far" if improved else ""
        logger.say(f"step {progress.step}/{self.parts.total_steps}  validation {select} {score:.4f}{mark}")
        if improved:
            progress.best, progress.best_step, progress.stale = score, progress.step, 0
            self.parts.checkpoints.save_best({"step": progress.step, "valid": metrics, **self.parts.about()})
        else:
            progress.stale += 1

    def stale(self) -> bool:
        """Whether `train.patience` validations have brought no gain."""
        if not self.progress.worn_out(self.parts.config.patience):
            return False
        self.parts.logger.say(f"stopping early: no gain in {self.progress.stale} validations")
        return True


def total_steps(config: TrainConfig, steps_per_epoch: int) -> int:
    """Steps of a whole training: all epochs, or `train.max_steps` where that is fewer."""
    total = config.epochs * steps_per_epoch
    return min(total, config.max_steps) if config.max_steps else total
