"""The kernels of a GPU's softmax: by Triton's interpreter where there is no GPU, and compiled for GPUs not here.

The interpreter must be chosen before the first import of Triton, so its tests run in a process of their own.
"""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from flm_torchrec.model import attention_softmax, softmax
from flm_torchrec.model.attention_softmax import block_of, difference, why_not_attended
from flm_torchrec.model.softmax import LEAST_ROWS, MOST_BYTES, why_pytorch
from tests.conftest import ROOT
from tests.model.test_fused_softmax import Case, errors

triton = pytest.importorskip("triton")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
INTERPRETED = "TRITON_INTERPRET" in os.environ
by_kernels = pytest.mark.skipif(DEVICE.type == "cpu" and not INTERPRETED, reason="run by the interpreter, see below")
compiled = pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")
SMALL_GPU = 99 * 1024
"""Bytes of shared memory that a kernel can have on every GPU since compute capability 8.0."""


@pytest.fixture
def attending(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every softmax is made by the kernels."""
    monkeypatch.setattr(softmax, "can_fuse", lambda *_: False)
    monkeypatch.setattr(softmax, "tile_shape", lambda *_: (1, 1))
    monkeypatch.setattr(softmax, "can_attend", lambda *_: True)
    monkeypatch.setattr(softmax, "_in_tiles", lambda *_: pytest.fail("no kernels"))


@pytest.fixture
def untried() -> Iterator[None]:
    """No GPU was tried yet."""
    attention_softmax._problem.cache_clear()
    yield
    attention_softmax._problem.cache_clear()


@by_kernels
@pytest.mark.usefixtures("attending")
@pytest.mark.parametrize(("queries", "items", "dim", "domains"), [(1, 4, 5, 1), (70, 300, 40, 3), (130, 500, 64, 1)])
def test_loss_and_gradients_are_those_of_cross_entropy(queries: int, items: int, dim: int, domains: int) -> None:
    case = Case(queries, items, dim, domains=domains)
    assert max(errors(case.found(torch.float32), case.exact())) < 2e-6


@by_kernels
@pytest.mark.usefixtures("attending")
def test_queries_in_turn_and_parts_of_the_work_change_nothing_but_rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(150, 400, 24)
    whole = case.found(torch.float32)
    monkeypatch.setattr(attention_softmax, "BITS_BYTES", 1)
    monkeypatch.setattr(attention_softmax, "BLOCKS", 1)
    assert max(errors(case.found(torch.float32), whole)) < 2e-6


@by_kernels
@pytest.mark.usefixtures("attending")
def test_bits_repeat_and_without_anything_hidden_a_part_of_the_items_is_taken_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """All candidates of the first part are out; its shares are 0, not 0 / 0."""
    monkeypatch.setattr(attention_softmax, "BLOCKS", 8)
    case = Case(20, 200, 16)
    case.target = case.target % 40 + 150
    case.log_q[:150] = math.inf
    case.log_q[150:] = -1
    case.hidden[:] = False
    first, second = case.found(torch.float32), case.found(torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert max(errors(first, case.exact())) < 2e-6


@by_kernels
def test_the_check_of_the_first_use_finds_kernels_equal() -> None:
    assert difference(40, torch.float32, DEVICE) < 2e-6


@pytest.mark.usefixtures("untried")
def test_kernels_that_differ_or_do_not_fit_are_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = torch.device("cuda")

    def fails(*_: Any) -> float:
        raise triton.runtime.errors.OutOfResources(200_000, 100_000, "shared memory")

    monkeypatch.setattr(attention_softmax, "difference", fails)
    assert why_not_attended(32, torch.bfloat16, gpu).startswith(
        "the kernels cannot be built: out of resource: shared memory"
    )
    monkeypatch.setattr(attention_softmax, "difference", lambda *_: 0.5)
    assert why_not_attended(64, torch.bfloat16, gpu) == "the kernels differ from PyTorch by 50.0% here"
    monkeypatch.setattr(attention_softmax, "difference", lambda *_: 0.0)
    assert why_not_attended(128, torch.bfloat16, gpu) == ""
    assert why_not_attended(512, torch.bfloat16, gpu) == "vectors are wider than 256"
    assert why_not_attended(512, torch.float32, gpu) == why_not_attended(512, torch.bfloat16, torch.device("cpu")) == ""


@compiled
@pytest.mark.parametrize(
    ("capability", "dim", "precision"), [(80, 256, torch.bfloat16), (80, 256, torch.float32), (90, 64, torch.bfloat16)]
)
def test_kernels_compile_for_gpus_and_fit_into_the_memory_of_a_small_one(
    capability: int, dim: int, precision: torch.dtype
) -> None:
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from flm_torchrec.model import attention_kernels

    block = block_of(dim, precision)
    vector = "*bf16" if precision == torch.bfloat16 else "*fp32"
    types = {"outputs": ("*fp32", "*fp32"), "sizes": ("i32",) * 4}
    types["side"] = ("*fp32", "*i64", "*fp32", "*i32", "*i64", "*i64")
    fixed = {"DIM": dim, "WIDE": dim, "HIDE": True, "APART": True, **block}
    for kernel, vectors in ((attention_kernels.queries_kernel, 2), (attention_kernels.items_kernel, 3)):
        types["vectors"] = (vector,) * vectors
        names = kernel.arg_names
        signature = {name: types.get(name, "constexpr") for name in names}
        given = {(names.index(name),): fixed[name] for name in names if name not in types}
        source = ASTSource(fn=kernel, signature=signature, constexprs=given)
        options = {name: block[name] for name in ("num_warps", "num_stages")}
        made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
        assert 0 < made.metadata.shared <= SMALL_GPU


def test_why_pytorch_makes_a_softmax_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels take over where a block of logits would not fit."""
    monkeypatch.setattr(softmax, "why_not_attended", lambda *_: "no kernels")
    many = MOST_BYTES["cuda"] // LEAST_ROWS // 2 + 1
    gpu = torch.device("cuda")
    assert [why_pytorch(count, 64, torch.bfloat16, gpu) for count in (many - 1, many)] == ["", "no kernels"]


@compiled
@pytest.mark.skipif(DEVICE.type == "cuda", reason="the tests above ran on the GPU")
def test_by_the_interpreter() -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
    settings = {**os.environ, "TRITON_INTERPRET": "1", "PYTEST_ADDOPTS": ""}
    done = subprocess.run(command, env=settings, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "8 passed" in done.stdout, done.stdout
