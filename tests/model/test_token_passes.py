"""Native passes over tokens beside the same by PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from unittest import mock

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from flm_torchrec.model import token_passes
from flm_torchrec.model.dropout import Dropout
from flm_torchrec.model.elapsed import BUCKETS
from flm_torchrec.model.layout import Jagged
from flm_torchrec.model.token_passes import add_at, gather, sum_by, take

native = pytest.mark.skipif(not token_passes.is_native(torch.zeros(1)), reason="no native code here")
LENGTHS = st.lists(st.integers(0, 40), min_size=1, max_size=8)


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def both(made: Callable[[], Tensor], learned: list[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
    """What native code and what PyTorch makes, and their gradients."""

    def found() -> list[Tensor]:
        out = made()
        towards = torch.randn(out.shape, generator=torch.Generator().manual_seed(0))
        return [out.detach(), *torch.autograd.grad(out, learned, towards)]

    ours = found()
    with mock.patch.object(token_passes, "_library", lambda: "none"):
        theirs = found()
    return zip(ours, theirs, strict=True)


def near(ours: Tensor, theirs: Tensor, terms: int = 1) -> bool:
    """Within the rounding of float32, of sums of so many terms, which may nearly cancel."""
    return ours.shape == theirs.shape and float((ours - theirs).norm()) <= 1e-5 * float(theirs.norm()) + 1e-6 * terms


@native
@settings(max_examples=30)
@given(st.lists(st.integers(0, 8), max_size=60), st.sampled_from([1, 3, 16, 50]), st.integers(1, 3))
@example([], 4, 2)
@example([8] * 60, 64, 3)
def test_rows_by_number_and_their_sums(numbers: list[int], width: int, count: int) -> None:
    torch.manual_seed(len(numbers))
    at, rows = torch.tensor(numbers, dtype=torch.int64), torch.randn(9, width, requires_grad=True)
    x = torch.randn(len(at), width, requires_grad=True)
    with threads(count):
        assert all(near(*pair) for pair in both(lambda: gather(rows, at), [rows]))
        assert all(near(*pair) for pair in both(lambda: sum_by(x, at, 9), [x]))
        assert torch.equal(take(rows, at), rows.detach()[at])
        added = rows.detach().clone()
        add_at(added, at, x, -2.0)
        assert near(added, rows.detach().index_add(0, at, x.detach(), alpha=-2.0))


@native
@pytest.mark.parametrize("count", [2, 5])
def test_the_bits_of_sums_and_of_dropout_are_those_of_one_thread(count: int) -> None:
    torch.manual_seed(0)
    at, x = torch.randint(0, 30, (500,)), torch.randn(500, 20)

    def found(count: int) -> list[Tensor]:
        torch.manual_seed(1)
        with threads(count):
            return [sum_by(x.requires_grad_(), at, 30), Dropout(0.3)(x)]

    assert all(torch.equal(*pair) for pair in zip(found(1), found(count), strict=True))


@native
@pytest.mark.parametrize("number", [-1, 9])
def test_a_row_that_is_not_there_is_refused(number: int) -> None:
    rows, at = torch.zeros(9, 4), torch.tensor([0, number])
    with pytest.raises(IndexError, match="a number of a row is not below 9"):
        take(rows, at)
    with pytest.raises(IndexError, match="a number of a row is not below 9"):
        add_at(rows, at, torch.ones(2, 4))
    assert not rows.any()


@native
@settings(max_examples=30)
@given(LENGTHS, st.sampled_from([1, 8, 20]), st.booleans(), st.integers(1, 3))
@example([0, 0], 8, True, 2)
@example([1, 1], 8, False, 1)
@example([40] * 40, 8, True, 2)
def test_means_and_recent_sums_are_those_of_pytorch(lengths: list[int], width: int, timed: bool, count: int) -> None:
    torch.manual_seed(sum(lengths))
    layout = Jagged(torch.tensor(lengths), torch.randint(0, 10**7, (sum(lengths),)).sort().values)
    items = torch.randn(sum(lengths), width, requires_grad=True)
    keep = torch.rand(1, requires_grad=True)
    old = torch.rand(1, BUCKETS, requires_grad=True) if timed else None
    learned = [items, keep, *([] if old is None else [old])]
    with threads(count):
        assert all(near(*pair) for pair in both(lambda: layout.mean(items), [items]))
        made, of_items, *of_biases = both(lambda: layout.recent(items, keep, old), learned)
        assert near(*made) and near(*of_items) and all(near(*pair, terms=items.numel()) for pair in of_biases)


@native
@settings(max_examples=20)
@given(st.lists(st.integers(0, 30), min_size=1, max_size=2), st.sampled_from([0.1, 0.5, 0.9]), st.integers(0, 9))
def test_dropout_drops_the_same_elements_with_native_code_and_without(shape: list[int], p: float, seed: int) -> None:
    x = torch.randn(shape, requires_grad=True)

    def dropped() -> Tensor:
        torch.manual_seed(seed)
        return Dropout(p)(x)

    assert all(torch.equal(*pair) for pair in both(dropped, [x]))


def test_dropout_drops_its_share_and_keeps_the_mean() -> None:
    torch.manual_seed(0)
    found = Dropout(0.3)(torch.ones(400, 500))
    assert float((found == 0).float().mean()) == pytest.approx(0.3, abs=0.005)
    assert float(found.mean()) == pytest.approx(1.0, abs=0.01)
    columns, rows = ((found == 0).float().mean(axis) for axis in (0, 1))
    assert float(columns.std()) == pytest.approx((0.3 * 0.7 / 400) ** 0.5, rel=0.15)
    assert float(rows.std()) == pytest.approx((0.3 * 0.7 / 500) ** 0.5, rel=0.15)
