"""What may end a run between two steps, as all ranks agree: a request to stop, or a loss that is not a number."""

from __future__ import annotations

import os
import signal
import time
from contextlib import AbstractContextManager
from dataclasses import fields
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

import numpy as np
import torch
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from flm_torchrec.data.batch import Batch
from flm_torchrec.distributed.comm import Comm
from flm_torchrec.errors import RunError
from flm_torchrec.model.pretrain import Outputs

NON_FINITE = "non-finite"
"""Folder of a run: batches whose loss was not a number, and the state before such a step."""
MOST_SKIPPED = 10
"""Maximum of skipped steps in a row: after so many the weights are not numbers, and no batch will help."""
MOST_KEPT = 20
"""Maximum of batches in that folder: enough to find the cause, too few to fill a disk."""
AT_ONCE = 1.0
"""Seconds after the first Ctrl-C before another one ends the process at once. torchrun sends its ranks the signal that
the terminal has already sent them; that second signal comes sooner."""


class Stopped(Exception):
    """A stop was requested during a validation. Every rank leaves it at the same block."""


class NonFinite(RunError):
    """The loss of some rank is not a number. Every rank raises this, and none has learned from the step."""


class Guard(AbstractContextManager["Guard"]):
    """Decides before each backward whether all ranks go on, with one small all-reduce a step.

    After backward it is too late: the tables' optimizer is fused into it, and their rows would be lost.

    Args:
        policy: `train.non_finite`.
        folder: where batches whose loss is not a number are written, for `tools/faults/replay.py`.
    """

    def __init__(self, comm: Comm, policy: str, folder: Path) -> None:
        self.comm = comm
        self.policy = policy
        self.folder = folder
        self.asked = False
        self.since = 0.0
        self.stopping = False
        """Some rank was asked to stop, and all ranks know."""
        self.skipped = 0
        self.remedy = (
            f"batch and state before it are in {folder}; lower train.dense_lr or train.sparse_lr, or leave such batches"
            " out with --train.existing resume --train.non_finite skip"
        )
        """What the message of a loss that is not a number ends with, where the policy is to stop."""

    def __enter__(self) -> Guard:
        self.before = {number: signal.signal(number, self._ask) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.asked and time.monotonic() - self.since > AT_ONCE:
            # Without clean-up, which may wait for other ranks: files under their final names are complete at any time.
            os.write(2, b"error: ended at once by Ctrl-C; go on at the newest checkpoint\n")
            os._exit(128 + number)
        if not self.asked:
            self.asked, self.since = True, time.monotonic()
            if number == signal.SIGINT and self.comm.main:
                os.write(2, b"stopping; what was learnt is saved first (Ctrl-C again: at once)\n")

    def check(self) -> None:
        """Called between the blocks of a validation; collective.

        Raises:
            Stopped: some rank was asked to stop.
        """
        self.stopping = self.stopping or self.comm.any(self.asked)[0]
        if self.stopping:
            raise Stopped

    def passes(self, step: int, batch: Batch, loss: torch.Tensor, outputs: Outputs) -> bool:
        """Whether to learn from the batch; False, on every rank, if the loss of any is not a number. Collective.

        Raises:
            NonFinite: it is not a number, and the policy is to stop, or this was so MOST_SKIPPED times in a row.
        """
        broken = not bool(torch.isfinite(loss))
        self.stopping, skip = self.comm.any(self.asked, broken)
        if not skip:
            self.skipped = 0
            return True
        self.skipped += 1
        reasons = self.comm.gather(self._keep(step, batch, outputs) if broken else "")
        text = f"step {step}: the {' and the '.join(filter(None, reasons))} is not a number"
        if self.policy == "stop":
            raise NonFinite(f"{text}; {self.remedy}")
        if self.skipped == MOST_SKIPPED:
            raise NonFinite(
                f"{text}, for {self.skipped} steps in a row: it is the weights that are none; lower train.dense_lr or"
                " train.sparse_lr and train anew"
            )
        return False

    def _keep(self, step: int, batch: Batch, outputs: Outputs) -> str:
        """Write the batch for replay, unless many are there already → what was wrong with it."""
        bad = [head for head, value in outputs.losses.items() if not bool(torch.isfinite(value))]
        reason = f"{', '.join(bad) or 'summed'} loss of rank {self.comm.rank}"
        try:
            self.folder.mkdir(exist_ok=True)
            if len(list(self.folder.glob("*.npz"))) < MOST_KEPT:
                with (self.folder / f"step-{step:09d}-rank-{self.comm.rank}.npz").open("wb") as file:
                    np.savez(file, **as_arrays(batch))  # type: ignore[arg-type]
        except OSError as error:
            return f"{reason} (its batch is not kept: {error.strerror})"
        return reason


def as_arrays(batch: Batch) -> dict[str, np.ndarray]:
    """A batch as plain arrays, for an archive that holds no code; `from_arrays` reads it."""
    arrays = {}
    for name, value in batch.parts():
        if isinstance(value, KeyedJaggedTensor):
            arrays[f"{name}.keys"] = np.array(value.keys(), np.str_)
            arrays[f"{name}.values"] = value.values().cpu().numpy()
            arrays[f"{name}.lengths"] = value.lengths().cpu().numpy()
        else:
            arrays[name] = value.cpu().numpy()
    return arrays


def from_arrays(arrays: Any) -> Batch:
    """The batch that `as_arrays` took apart."""
    values_by_field: dict[str, Any] = {}
    for field in fields(Batch):
        if field.name in arrays:
            values_by_field[field.name] = torch.from_numpy(arrays[field.name])
            continue
        if f"{field.name}.keys" not in arrays:
            continue
        values, lengths = (torch.from_numpy(arrays[f"{field.name}.{part}"]) for part in ("values", "lengths"))
        values_by_field[field.name] = KeyedJaggedTensor(arrays[f"{field.name}.keys"].tolist(), values, lengths=lengths)
    return Batch(**values_by_field)
