"""Rows of length 1: the values and gradients that autograd makes of the formula."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from flm_torchrec.model.scale import softened_unit, unit

KNOWN = torch.tensor([1.0, 1.0, 0.0, 1.0, 1.0]).unsqueeze(1)


def written_out(x: Tensor) -> Tensor:
    known = x * KNOWN.to(x.dtype)
    return known * torch.rsqrt((known**2).sum(1, keepdim=True) + 0.01)


def rows(dtype: torch.dtype) -> Tensor:
    x = torch.randn(5, 24, generator=torch.Generator().manual_seed(0), dtype=dtype)
    x[3] /= 1000
    return x.requires_grad_()


@pytest.mark.parametrize(
    ("fast", "plain"),
    [
        (unit, F.normalize),
        (lambda x: unit(x, 0.1), lambda x: F.normalize(x, eps=0.1)),
        (lambda x: softened_unit(x, 0.01, KNOWN.to(x.dtype)), written_out),
    ],
    ids=["unit", "longer", "softened"],
)
def test_values_and_gradients_are_those_of_the_formula(
    fast: Callable[[Tensor], Tensor], plain: Callable[[Tensor], Tensor]
) -> None:
    assert torch.autograd.gradcheck(fast, (rows(torch.float64),))
    x, wanted = rows(torch.float32), rows(torch.float32)
    towards = torch.randn(5, 24, generator=torch.Generator().manual_seed(1))
    found, right = fast(x), plain(wanted)
    torch.testing.assert_close(found, right, rtol=1e-6, atol=1e-7)
    found.backward(towards)
    right.backward(towards)
    torch.testing.assert_close(x.grad, wanted.grad, rtol=1e-5, atol=1e-6)


def test_a_unit_vector_has_the_bits_of_normalize_and_zeros_stay() -> None:
    x = torch.cat([rows(torch.float32).detach(), torch.zeros(1, 24)])
    assert torch.equal(unit(x), F.normalize(x, dim=1))
    with torch.no_grad():
        assert torch.equal(unit(x), F.normalize(x, dim=1))


def test_rows_of_zeros_have_gradients_of_a_bounded_length_where_softened() -> None:
    x = torch.zeros(5, 24, requires_grad=True)
    softened_unit(x, 0.01, KNOWN).sum().backward()
    torch.testing.assert_close(x.grad, (KNOWN / 0.1).expand(5, 24))
