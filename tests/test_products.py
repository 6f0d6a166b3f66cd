"""Products of matrices by native code, beside exact ones."""

from __future__ import annotations

import ctypes
from unittest import mock

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from flm_torchrec import machine_code, products
from flm_torchrec.machine_code import processor_instructions
from flm_torchrec.native_code import Unavailable, built
from flm_torchrec.products import add_matmul, matmul, multiplies, why_not_native


def library() -> ctypes.CDLL:
    """The native code, whoever made this processor."""
    if "avx512f" not in processor_instructions():
        pytest.skip("no vectors of 512 bits here")
    try:
        return built(products.SOURCE)
    except Unavailable as error:
        pytest.skip(str(error))


def matrix(rows: int, columns: int, kind: str) -> Tensor:
    """Random numbers, neighbours in a row or in a column, with or without a gap."""
    if kind == "columns":
        return torch.randn(columns, rows).T
    return torch.randn(rows, columns + 3)[:, :columns] if kind == "gap" else torch.randn(rows, columns)


KINDS = st.sampled_from(["rows", "columns", "gap"])


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 70), st.integers(0, 90), st.integers(0, 120), st.tuples(KINDS, KINDS, KINDS), st.integers(1, 3))
@example(300, 1100, 50, ("rows", "columns", "rows"), 2)
@example(9, 513, 300, ("columns", "rows", "gap"), 3)
@example(57, 1, 10, ("rows", "rows", "rows"), 1)
def test_products_are_exact_to_rounding(
    rows: int, terms: int, columns: int, kinds: tuple[str, str, str], threads: int
) -> None:
    torch.manual_seed(rows)
    left, right = matrix(rows, terms, kinds[0]), matrix(terms, columns, kinds[1])
    start = torch.randn(columns)
    out = torch.randn(rows, columns + 2)[:, :columns] if kinds[2] == "gap" else torch.empty(rows, columns)
    found, before = library(), torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with mock.patch.multiple(products, LEAST=0, _library=lambda: found):
            assert multiplies(left, right)
            assert matmul(left, right, start, out) is out
            first = out.clone()
            add_matmul(out, left, right)
            alone, some = matmul(left, right), matmul(left[rows // 2 :], right[:, columns // 3 :])
    finally:
        torch.set_num_threads(before)
    exact = left.double() @ right.double()
    pairs = [(first, exact + start.double()), (out, 2 * exact + start.double()), (alone, exact)]
    # What float32 may be wrong by, whatever the order of the sum (Higham, "Accuracy and Stability", 2002, section 3.1).
    bound = 2**-24 * (terms + 3) * (2 * (left.double().abs() @ right.double().abs()) + start.double().abs())
    assert all(((ours.double() - expected).abs() <= bound).all() for ours, expected in pairs)
    assert torch.equal(some, alone[rows // 2 :, columns // 3 :])


def test_what_native_code_does_not_multiply_pytorch_does() -> None:
    """Other types, other shapes, and matrices for which a call costs more than it saves."""
    wide, deep = torch.randn(300, 300), torch.randn(2, 300, 300)
    found = mock.MagicMock()
    with mock.patch.object(products, "_library", lambda: found):
        assert multiplies(wide, wide)
        assert not multiplies(wide[:3], wide[:, :3]) and not multiplies(deep, wide)
        assert not multiplies(wide.double(), wide.double()) and not multiplies(wide.bfloat16(), wide.bfloat16())
        low = wide.bfloat16()
        assert torch.equal(matmul(low, low), low @ low)
        total = wide[:3].clone()
        add_matmul(total, wide[:3], wide)
        assert torch.equal(total, torch.addmm(wide[:3], wide[:3], wide))
    found.flm_product.assert_not_called()


@pytest.mark.parametrize(
    ("vendor", "instructions", "wanted"),
    [("AuthenticAMD", {"avx512f"}, True), ("AuthenticAMD", {"avx2"}, False), ("GenuineIntel", {"avx512f"}, False)],
)
def test_native_code_is_for_processors_whose_vectors_pytorch_does_not_use(
    monkeypatch: pytest.MonkeyPatch, vendor: str, instructions: set[str], wanted: bool
) -> None:
    """Where it is wanted and cannot be built, a line tells why; elsewhere there is nothing to tell."""
    monkeypatch.setattr(products, "processor_vendor", lambda: vendor)
    monkeypatch.setattr(products, "processor_instructions", lambda: instructions)
    monkeypatch.setattr(products, "built", mock.Mock(side_effect=Unavailable("there is no C++ compiler")))
    for asked in (products.is_wanted, products._library):
        asked.cache_clear()
    try:
        assert why_not_native(torch.device("cpu")) == ("there is no C++ compiler" if wanted else "")
        assert why_not_native(torch.device("cuda")) == ""
    finally:
        for asked in (products.is_wanted, products._library):
            asked.cache_clear()


def test_the_vendor_of_a_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine_code, "_cpu_info", lambda: "processor\t: 0\nvendor_id\t: AuthenticAMD\nflags\t: fpu\n")
    assert machine_code.processor_vendor() == "AuthenticAMD" and processor_instructions() == {"fpu"}
    monkeypatch.setattr(machine_code, "_cpu_info", lambda: "CPU implementer\t: 0x41\n")
    assert machine_code.processor_vendor() == ""
