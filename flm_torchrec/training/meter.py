"""Losses, rate of samples and time without input, between two lines of metrics."""

from __future__ import annotations

import time

import torch
from torch import Tensor

from flm_torchrec.data.batch import Batch
from flm_torchrec.data.prefetch import Prefetch
from flm_torchrec.distributed.comm import Comm
from flm_torchrec.model.pretrain import Outputs


class Meter:
    """Since the last reading: mean losses over all ranks, samples a second, share of time without input."""

    def __init__(self, comm: Comm, ahead: Prefetch[Batch]) -> None:
        self.comm = comm
        self.ahead = ahead
        self._reset()

    def restart(self) -> None:
        """Leave the time of a validation out of the rate."""
        self.since = time.monotonic()
        self.waited = self.ahead.waited

    def _reset(self) -> None:
        self.total: dict[str, Tensor] = {}
        self.steps = 0
        self.sequences = 0
        self.restart()

    def add(self, outputs: Outputs) -> None:
        """Count a step."""
        for name, loss in outputs.losses.items():
            self.total[name] = self.total.get(name, 0.0) + loss
        self.steps += 1
        self.sequences += outputs.sequences

    def read(self) -> dict[str, float]:
        """By name `loss/…`, `samples_per_second`, `input_wait` (0 to 1), and start again from zero; collective."""
        waited = self.ahead.waited - self.waited
        counts = torch.tensor([float(self.sequences), waited], device=self.comm.device)
        sums = self.comm.all_reduce_sum(torch.stack([*counts, *self.total.values()]))
        sequences, waited, *losses = sums.tolist()
        seconds = max(1e-9, time.monotonic() - self.since)
        values = {f"loss/{name}": loss / self.steps for name, loss in zip(self.total, losses, strict=True)}
        values["samples_per_second"] = sequences / seconds
        values["input_wait"] = waited / self.comm.world_size / seconds
        self._reset()
        return values


def status(values: dict[str, float]) -> str:
    """What `Meter.read` gives, as text for the progress bar."""
    losses = "  ".join(f"{k.removeprefix('loss/')} {v:.3f}" for k, v in values.items() if k.startswith("loss/"))
    return f"{values['samples_per_second']:.0f} samples/s  {losses}"
