"""Passes over the tokens of a batch as native code, in training on CPUs; `token_passes.cpp` says which.

Where it cannot be compiled, PyTorch does the same.
"""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from flm_torchrec import native_code
from flm_torchrec.model.spans import Spans
from flm_torchrec.native_code import argument, built, why_none

SOURCE = Path(__file__).with_suffix(".cpp")


class _Sums(ctypes.Structure):
    """`Sums` of token_passes.cpp."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("x", "first", "between", "side", "keep", "old", "grad", "out")),
        *((name, ctypes.c_void_p) for name in ("keep_grad", "old_grad")),
        *((name, ctypes.c_int64) for name in ("sequences", "dim", "buckets", "threads")),
    )


def why_not_native(device: torch.device) -> str:
    """Why PyTorch makes these passes on a CPU, in a few words; empty where it does not, and on other devices."""
    return native_code.why_not_native(_library, device)


def is_native(x: Tensor, dtype: torch.dtype = torch.float32) -> bool:
    """Whether native code takes this tensor, which should be of this type."""
    return x.device.type == "cpu" and x.dtype == dtype and not isinstance(_library(), str)


def gather(rows: Tensor, at: Tensor) -> Tensor:
    """[n, D], [T] int64 → [T, D]: the rows at these numbers, as `F.embedding`; gradients are added up in parallel."""
    if torch.is_grad_enabled() and rows.requires_grad and is_native(rows):
        found: Tensor = _Gathered.apply(rows, at)
        return found
    return F.embedding(at, rows)


def sum_by(x: Tensor, at: Tensor, count: int) -> Tensor:
    """[T, D], [T] int64 → [count, D]: row n is the sum of the rows of x whose number `at` is n."""
    if torch.is_grad_enabled() and x.requires_grad and is_native(x):
        found: Tensor = _Summed.apply(x, at, count)
        return found
    return x.new_zeros(count, x.shape[1]).index_add(0, at, x)


def take(rows: Tensor, at: Tensor) -> Tensor:
    """As `gather`, without a gradient."""
    if not is_native(rows):
        return rows.index_select(0, at)
    rows, at = rows.detach().contiguous(), at.contiguous()
    out = rows.new_empty(len(at), rows.shape[1])
    shape = (len(at), len(rows), rows.shape[1], torch.get_num_threads())
    _check(_native().flm_gather(*_addresses(rows, at, out), *map(ctypes.c_int64, shape)), len(rows))
    return out


def add_at(rows: Tensor, at: Tensor, x: Tensor, factor: float = 1.0) -> None:
    """Add factor times x [T, D] to rows [n, D] at the numbers [T], in place, in the order of x; without a gradient."""
    if not is_native(rows):
        rows.index_add_(0, at, x, alpha=factor)
        return
    assert rows.is_contiguous() and len(x) == len(at)
    x, at = x.contiguous(), at.contiguous()
    shape = (len(at), len(rows), rows.shape[1], torch.get_num_threads())
    found = _native().flm_scatter(*_addresses(x, at, rows), *map(ctypes.c_int64, shape), ctypes.c_float(factor))
    _check(found, len(rows))


class _Gathered(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows: Tensor, at: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(at)
        ctx.shape = rows.shape
        return take(rows, at)

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        total = grad.new_zeros(ctx.shape)
        add_at(total, ctx.saved_tensors[0], grad)
        return total, None


class _Summed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, at: Tensor, count: int) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(at)
        total = x.new_zeros(count, x.shape[1])
        add_at(total, at, x)
        return total

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        return take(grad, ctx.saved_tensors[0]), None, None


def mean_so_far(items: Tensor, spans: Spans) -> Tensor:
    """[T, D] → [T, D]: at each token, the mean over the tokens of its sequence up to it, but for the first."""
    found: Tensor = _Means.apply(items, spans)
    return found


def recent_so_far(items: Tensor, keep: Tensor, old: Tensor | None, spans: Spans) -> Tensor:
    """As `mean_so_far`, but the sum by what a token counts; see `Layout.recent`."""
    found: Tensor = _Recent.apply(items, keep, old, spans)
    return found


class _Means(torch.autograd.Function):
    @staticmethod
    def forward(ctx, items: Tensor, spans: Spans) -> Tensor:  # type: ignore[override]
        ctx.spans = spans
        return _sums(items, spans)

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        return _sums(grad, ctx.spans, grad=grad.contiguous()), None


class _Recent(torch.autograd.Function):
    @staticmethod
    def forward(ctx, items: Tensor, keep: Tensor, old: Tensor | None, spans: Spans) -> Tensor:  # type: ignore[override]
        found = _sums(items, spans, keep=keep, old=old)
        ctx.save_for_backward(found if old is None else items, keep, old)
        ctx.spans = spans
        return found

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        x, keep, old = ctx.saved_tensors
        of_keep, of_old = torch.zeros_like(keep), None if old is None else torch.zeros_like(old)
        of_numbers = {"keep_grad": of_keep, "old_grad": of_old}
        return _sums(x, ctx.spans, keep=keep, old=old, grad=grad.contiguous(), **of_numbers), of_keep, of_old, None


def _sums(x: Tensor, spans: Spans, **given: Tensor | None) -> Tensor:
    """[T, D] what native code makes of the items, or of what came of them and its gradient."""
    out = x.new_empty(x.shape)
    named = {"x": x.detach().contiguous(), "first": spans.first, "out": out, **given}
    old = given.get("old")
    if old is not None:
        named |= spans.between
    held = {name: value.contiguous() for name, value in named.items() if value is not None}
    shape = {"sequences": len(spans.first) - 1, "dim": x.shape[1], "buckets": 0 if old is None else old.numel()}
    _check(_native().flm_sums(argument(_Sums, held, **shape, threads=torch.get_num_threads())), len(x))
    return out


def drop(x: Tensor, seed: int, dropped: int, scale: float) -> Tensor:
    """x times `scale`, but 0 where a number of 16 bits that is drawn for it is below `dropped`; without a gradient."""
    x = x.detach().contiguous()
    out = torch.empty_like(x)
    numbers = (x.numel(), seed, dropped, torch.get_num_threads())
    _native().flm_dropout(*_addresses(x, out), *map(ctypes.c_int64, numbers), ctypes.c_float(scale))
    return out


def differing_pairs(first: Tensor, columns: Tensor, had: Tensor | None, whole: bool) -> tuple[Tensor, Tensor]:
    """Of sequences whose tokens lie one after the other, pairs of tokens whose columns differ, by the first of the two.

    Args:
        first: [B + 1] int64: the first token of each, and how many tokens there are.
        columns: [T] int64.
        had: [T] bool, which tokens may be the other of the two; None: all.
        whole: the other may come after the first; else it is before.

    Returns:
        [P] the first of the two, in order, and [P] the column of the other.
    """
    given = first.contiguous(), columns.contiguous(), None if had is None else had.contiguous()
    found = torch.empty_like(first)
    shape = [ctypes.c_int64(number) for number in (len(first) - 1, whole, torch.get_num_threads())]
    _native().flm_pairs(*_addresses(*given, found, None, None), *shape)
    ends = found[:-1].cumsum(0)
    found[:-1] = ends - found[:-1]
    rows, others = columns.new_empty(2, int(ends[-1]) if len(ends) else 0)
    _native().flm_pairs(*_addresses(*given, found, rows, others), *shape)
    return rows, others


def _addresses(*tensors: Tensor | None) -> list[ctypes.c_void_p]:
    return [ctypes.c_void_p(None if x is None else x.data_ptr()) for x in tensors]


def _check(found: int, rows: int) -> None:
    if found == 1:
        raise MemoryError(f"no memory for a pass over {rows} rows")
    if found == 2:
        raise IndexError(f"a number of a row is not below {rows}")


def _native() -> ctypes.CDLL:
    library = _library()
    assert not isinstance(library, str)
    return library


@cache
def _library() -> ctypes.CDLL | str:
    """The native code; or why there is none, in a few words."""
    return why_none(lambda: built(SOURCE))
