"""Learned numbers by the time between two events, for each power of two of seconds (HSTU: Zhai et al., ICML 2024)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

BUCKETS = 33
"""In log2 seconds."""


@dataclass
class Clock:
    """The times of padded sequences."""

    seconds: Tensor  # [B, L]

    @cached_property
    def between(self) -> Tensor:
        """[B, L, L] `elapsed` of every two tokens of a sequence."""
        return elapsed(self.seconds, self.seconds)


def elapsed(now: Tensor, then: Tensor) -> Tensor:
    """[B, Q] and [B, L] seconds → [B, Q, L] int32 from 0 to BUCKETS - 1: the time from `then` to `now`."""
    seconds = (now.unsqueeze(2) - then.unsqueeze(1)).abs() + 1
    return seconds.float().log2().clamp(max=BUCKETS - 1).int()


def by_elapsed(numbers: Tensor, between: Tensor) -> Tensor:
    """[n, BUCKETS] numbers, […] of `elapsed` → [n, …]."""
    return _Taken.apply(numbers, between) if torch.is_grad_enabled() else _take(numbers, between)


def _take(numbers: Tensor, at: Tensor) -> Tensor:
    return numbers.index_select(1, at.flatten()).view(len(numbers), *at.shape)


class _Taken(torch.autograd.Function):
    """[n, R] numbers, […] indices → [n, …]. Autograd would sort the indices for the gradient, or copy it."""

    @staticmethod
    def forward(ctx, numbers: Tensor, at: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(at)
        ctx.shape = numbers.shape
        return _take(numbers, at)

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        (at,) = ctx.saved_tensors
        total = grad.new_zeros(ctx.shape)
        for row, part in zip(total, grad, strict=True):
            row.index_add_(0, at.flatten(), part.flatten())
        return total, None
