"""The training loop: steps, validation, early stopping, best checkpoint."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from torch.optim import Optimizer
from torchrec.distributed.model_parallel import DistributedModelParallel

from flm_torchrec.config.schema import TrainConfig
from flm_torchrec.data.loader import Loader
from flm_torchrec.data.prefetch import Prefetch
from flm_torchrec.distributed.comm import Comm
from flm_torchrec.errors import Interrupted
from flm_torchrec.training.checkpoint.manager import Checkpoints, Progress
from flm_torchrec.training.guard import NON_FINITE, Guard, NonFinite, Stopped
from flm_torchrec.training.logger import Record
from flm_torchrec.training.meter import Meter, status
from flm_torchrec.training.schedule import Schedule
from flm_torchrec.training.steps import STEPS

Validate = Callable[[Callable[[], None]], dict[str, float]]
"""Given what to call between two blocks, by which a validation may be left."""


@dataclass(frozen=True)
class Finished:
    """How training ended."""

    steps: int
    best_step: int
    best: float
    seconds: float
    """In steps and their checkpoints, validation left out."""


def fit(
    model: DistributedModelParallel, optimizer: Optimizer, loader: Loader, config: TrainConfig, comm: Comm,
    record: Record, validate: Validate, checkpoints: Checkpoints, progress: Progress, as_found: bool = False,
) -> Finished:  # fmt: skip
    """Train from `progress` on until the epochs or steps are used up, or validation has stopped improving.

    Args:
        as_found: the model as it is given is the first to be validated, and kept if none is better.

    Raises:
        RunError: the loss is no longer a number, or the last checkpoint cannot be written.
        Interrupted: asked to stop by SIGTERM or Ctrl-C; the state is saved.
    """
    total = total_steps(config, len(loader))
    every = config.eval_every or len(loader)
    schedule = Schedule(optimizer, config.warmup_steps, total)
    ahead = Prefetch(islice(loader.after(progress.step), total - progress.step))
    meter = Meter(comm, ahead)
    model.train()
    with (
        Guard(comm, config.non_finite, Path(config.run) / NON_FINITE) as guard,
        closing(checkpoints),
        closing(iter(ahead)) as batches,
    ):
        best = _Best(config.select, record, lambda: validate(guard.check), checkpoints, progress)
        if progress.due or (as_found and progress.step == 0):
            best.judge(total)
            _checkpoint(progress, total, config, checkpoints, record, guard)
        steps = STEPS[comm.device.type](model, optimizer, schedule, comm.device, guard)
        while progress.step < total and not best.done(config.patience):
            began = time.monotonic()
            try:
                outputs = steps.take(batches, progress.step)
            except NonFinite:
                # Backward has not run on any rank: this is the state before the step. Not one to resume from.
                checkpoints.save(progress, Path(config.run) / NON_FINITE)
                checkpoints.wait()
                raise
            progress.step += 1
            if outputs is not None:
                meter.add(outputs)
            if progress.step % config.log_every == 0 or progress.step == total:
                values = meter.read()
                record.scalars(progress.step, {**values, "lr_factor": schedule.factor})
                record.step(progress.step, status(values))
            progress.seconds += time.monotonic() - began
            if progress.step % every == 0 or progress.step == total:
                steps.release()
                best.judge(total)
                meter.restart()
            began = time.monotonic()
            _checkpoint(progress, total, config, checkpoints, record, guard)
            progress.seconds += time.monotonic() - began
        steps.release()
        if progress.best is None:  # resumed at the end, and what was best is damaged
            best.judge(total)
            _checkpoint(progress, total, config, checkpoints, record, guard)
        checkpoints.finish()
    assert progress.best is not None
    return Finished(progress.step, progress.best_step, progress.best, progress.seconds)


def _checkpoint(
    progress: Progress, total: int, config: TrainConfig, checkpoints: Checkpoints, record: Record, guard: Guard
) -> None:
    due = config.checkpoint_every and progress.step % config.checkpoint_every == 0
    due = due or guard.stopping or progress.worn_out(config.patience) or progress.step == total
    if due and progress.step > 0:
        failed = checkpoints.save(progress)
        if failed:
            record.say(f"step {progress.step}: {failed}")
    if guard.stopping and (progress.step < total or progress.due):
        checkpoints.finish()
        raise Interrupted(
            f"stopped as asked at step {progress.step} of {total}, all saved; go on with --train.existing resume"
        )


class _Best:
    """Validates, and saves whatever is better than all before."""

    def __init__(
        self, select: str, record: Record, validate: Callable[[], dict[str, float]], checkpoints: Checkpoints,
        progress: Progress,
    ) -> None:  # fmt: skip
        self.select = select
        self.record = record
        self.validate = validate
        self.checkpoints = checkpoints
        self.progress = progress

    def judge(self, total: int) -> None:
        """Validate, unless asked to stop meanwhile: then it is due when the run goes on."""
        progress = self.progress
        try:
            metrics = self.validate()
        except Stopped:
            progress.due = True
            return
        progress.due = False
        score = metrics[self.select]
        improved = progress.best is None or score > progress.best
        self.record.scalars(progress.step, {f"valid/{name}": value for name, value in metrics.items()})
        mark = "  best so far" if improved else ""
        self.record.say(f"step {progress.step}/{total}  validation {self.select} {score:.4f}{mark}")
        if improved:
            progress.best, progress.best_step, progress.stale = score, progress.step, 0
            self.checkpoints.save_best({"step": progress.step, "valid": metrics})
        else:
            progress.stale += 1

    def done(self, patience: int) -> bool:
        if not self.progress.worn_out(patience):
            return False
        self.record.say(f"stopping early: no gain in {self.progress.stale} validations")
        return True


def total_steps(config: TrainConfig, steps_per_epoch: int) -> int:
    total = config.epochs * steps_per_epoch
    return min(total, config.max_steps) if config.max_steps else total
