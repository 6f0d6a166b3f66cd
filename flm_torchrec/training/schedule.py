"""Learning rates over the steps."""

from __future__ import annotations

import math
from typing import Any

from torch.optim import Optimizer


def warmup_cosine(step: int, warmup: int, total: int) -> float:
    """Factor on the learning rate: linear from 0 over `warmup` steps, then half a cosine down to 0 at `total` (SGDR:
    Loshchilov & Hutter, ICLR 2017)."""
    if step < warmup:
        return (step + 1) / warmup
    done = min(1.0, (step - warmup) / max(1, total - warmup))
    return 0.5 * (1 + math.cos(math.pi * done))


class Schedule:
    """Sets the learning rates of all parameter groups before each step, also those of the fused optimizer."""

    def __init__(self, optimizer: Optimizer, warmup: int, total: int) -> None:
        self.groups: list[dict[str, Any]] = list(optimizer.param_groups)
        self.peaks = [group["lr"] for group in self.groups]
        self.warmup = min(warmup, total // 10)  # a short run, such as a fine-tuning, must get past the warm-up
        self.total = total
        self.factor = 0.0

    def set(self, step: int) -> None:
        """Set the rates for the step, counted from 0."""
        self.factor = warmup_cosine(step, self.warmup, self.total)
        for group, peak in zip(self.groups, self.peaks, strict=True):
            group["lr"] = peak * self.factor
