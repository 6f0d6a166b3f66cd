"""The softmax as native code, beside that of PyTorch and beside cross-entropy in double precision."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from flm_torchrec import native_code, products
from flm_torchrec.cli import main
from flm_torchrec.data.dataset import PreparedData
from flm_torchrec.model import fused_softmax, pointwise_attention, softmax, token_passes
from flm_torchrec.model.fused_softmax import why_not_fused
from flm_torchrec.model.softmax import CandidateVectors, Hidden, log_probability, sampled_softmax

BF16, FP32, CPU = torch.bfloat16, torch.float32, torch.device("cpu")
native = pytest.mark.skipif(bool(why_not_fused(BF16, CPU)), reason="no native softmax here")
SHAPES = [(1, 4, 5, 1), (70, 300, 40, 3), (300, 1_000, 64, 1), (70, 17_000, 40, 3)]


def on_shapes(test: Callable[..., None]) -> Callable[..., None]:
    """The test with few and many candidates, each with one thread and two."""
    marked = pytest.mark.parametrize(("queries", "items", "dim", "domains"), SHAPES)(test)
    return pytest.mark.parametrize("threads", [1, 2])(marked)


@pytest.fixture
def unbuilt(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """An empty cache, as on a new machine."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for code in (fused_softmax, pointwise_attention, products, token_passes):
        code._library.cache_clear()
    yield tmp_path
    for code in (fused_softmax, pointwise_attention, products, token_passes):
        code._library.cache_clear()


@pytest.fixture(params=["the processor's own", "without AMX"])
def instructions(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which the native code has."""
    if request.param == "without AMX":
        library = native_code.built(fused_softmax.SOURCE, fused_softmax.WITHOUT_AMX)
        assert not library.flm_softmax_refused()
        monkeypatch.setattr(fused_softmax, "_library", lambda: library)


class Case:
    """Queries near their targets; some candidates are taken out, hidden, of another domain."""

    def __init__(self, queries: int, items: int, dim: int, seed: int = 0, domains: int = 1) -> None:
        g = torch.Generator().manual_seed(seed)
        self.items = F.normalize(torch.randn(items, dim, generator=g), dim=1)
        self.target = torch.randint(0, items // 2, (queries,), generator=g)
        noise = F.normalize(torch.randn(queries, dim, generator=g), dim=1)
        self.query = F.normalize(noise + 0.5 * self.items[self.target], dim=1)
        self.log_q = -6 * torch.rand(items, generator=g)
        self.log_q[items // 2 :][::3] = math.inf
        self.domain = torch.randint(0, domains, (items,), generator=g)
        left_out = torch.rand(queries, items, generator=g) < 0.1
        left_out[torch.arange(queries), self.target] = False
        self.hidden = left_out
        self.weight = 2 * torch.rand(queries, generator=g)
        self.scale = torch.tensor(14.0)

    def found(self, precision: torch.dtype) -> list[Tensor]:
        """The loss and its gradients by query, items and scale."""
        leaves = [x.clone().requires_grad_() for x in (self.query, self.items, self.scale)]
        candidates = CandidateVectors(leaves[1], self.log_q, self.domain, precision)
        hidden = Hidden(*torch.nonzero(self.hidden).T)
        loss = sampled_softmax(leaves[0], candidates, self.target, leaves[2], hidden, self.weight)
        return [loss.detach(), *torch.autograd.grad(loss, leaves)]

    def log_probability(self, precision: torch.dtype) -> Tensor:
        """[T] of the targets."""
        candidates = CandidateVectors(self.items, self.log_q, self.domain, precision)
        return log_probability(self.query, candidates, self.target, self.scale, Hidden(*torch.nonzero(self.hidden).T))

    def losses(self, *leaves: Tensor) -> Tensor:
        """[T] by cross-entropy, of query, items and scale."""
        logits = leaves[2] * leaves[0] @ leaves[1].T
        own = F.one_hot(self.target, len(self.items)).bool()
        lowered = torch.where(own, logits, logits - self.log_q)
        foreign = self.domain[self.target][:, None] != self.domain
        return F.cross_entropy(lowered.masked_fill(self.hidden | foreign, -math.inf), self.target, reduction="none")

    def exact(self) -> list[Tensor]:
        """What `found` gives, by cross-entropy in double precision."""
        leaves = [x.double().requires_grad_() for x in (self.query, self.items, self.scale)]
        loss = (self.losses(*leaves) * self.weight).sum()
        return [loss.detach(), *torch.autograd.grad(loss, leaves)]


def errors(found: list[Tensor], exact: list[Tensor]) -> list[float]:
    """Of the loss and of each gradient, relative."""
    return [float((a - b).norm() / b.norm()) for a, b in zip(found, exact, strict=True)]


@native
@pytest.mark.usefixtures("instructions")
@on_shapes
def test_native_code_and_pytorch_have_the_loss_and_gradients_of_cross_entropy(
    monkeypatch: pytest.MonkeyPatch, queries: int, items: int, dim: int, domains: int, threads: int
) -> None:
    """bf16 rounds the factors of products to 9 bits; PyTorch also rounds the logits.

    Of a single query and few items, the gradient of the scale is what is left of nearly equal numbers. Many items: two
    passes in place of one.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        case = Case(queries, items, dim, domains=domains)
        exact = [*case.exact(), -case.losses(case.query.double(), case.items.double(), case.scale.double())]
        ours = errors([*case.found(BF16), case.log_probability(BF16)], exact)
        monkeypatch.setattr(softmax, "can_fuse", lambda *_: False)
        plain = errors([*case.found(BF16), case.log_probability(BF16)], exact)
    finally:
        torch.set_num_threads(before)
    of_scale = ours.pop(3) if queries == 1 else 0.0
    assert max(ours) < 8e-3 and max(plain) < 2e-2 and of_scale < 3e-2
    assert queries == 1 or sum(ours) < sum(plain)


@native
@on_shapes
def test_native_code_of_float32_is_as_exact_as_pytorch(
    monkeypatch: pytest.MonkeyPatch, queries: int, items: int, dim: int, domains: int, threads: int
) -> None:
    """Many items: two passes in place of one."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        case = Case(queries, items, dim, domains=domains)
        exact = [*case.exact(), -case.losses(case.query.double(), case.items.double(), case.scale.double())]
        library = fused_softmax._library()
        assert not isinstance(library, str)
        called = mock.Mock(wraps=library.flm_softmax)
        monkeypatch.setattr(fused_softmax, "_library", lambda: SimpleNamespace(flm_softmax=called))
        ours = errors([*case.found(FP32), case.log_probability(FP32)], exact)
        assert called.call_count == 2
        monkeypatch.setattr(softmax, "can_fuse", lambda *_: False)
        plain = errors([*case.found(FP32), case.log_probability(FP32)], exact)
    finally:
        torch.set_num_threads(before)
    assert max(ours) < 1e-6 and max(ours) < 4 * max(plain)


@native
def test_float32_gradients_of_many_candidates_are_no_long_sums() -> None:
    """One sum of float32 over so many would be wrong by 2e-6 of its length."""
    case = Case(40, 17_000, 24)
    assert max(errors(case.found(FP32)[:3], case.exact()[:3])) < 6e-7


@native
@pytest.mark.parametrize("size", [1e7, 1e10])
def test_huge_logits_of_float32_are_those_of_pytorch(monkeypatch: pytest.MonkeyPatch, size: float) -> None:
    """Differences of such logits are rounded by more than the exponentials' range."""
    case = Case(64, 500, 16)
    case.query = size * torch.randn(64, 16, generator=torch.Generator().manual_seed(0))
    found = case.found(FP32)
    monkeypatch.setattr(softmax, "can_fuse", lambda *_: False)
    assert all(x.isfinite().all() for x in found) and max(errors(found[:3], case.found(FP32)[:3])) < 1e-5


@native
@pytest.mark.usefixtures("instructions")
@pytest.mark.parametrize("items", [100, 17_000])
def test_targets_far_below_other_candidates_are_exact_too(items: int) -> None:
    """Exponentials are taken relative to the target's, and would be infinite here."""
    case = Case(40, items, 32)
    case.scale, case.query = torch.tensor(100.0), -case.items[case.target]
    exact, found = case.exact(), case.found(BF16)
    most = -math.log(softmax.TINY) * case.weight.sum()
    assert exact[0] > 1.2 * most
    torch.testing.assert_close(found[0], most)
    assert max(errors(found[1:], exact[1:])) < (8e-3 if items == 100 else 1.5e-2)


@native
@pytest.mark.usefixtures("instructions")
def test_bits_repeat_at_one_thread_and_nan_stays() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        case = Case(100, 500, 64)
        first, second = case.found(BF16), case.found(BF16)
        case.query[3, 0] = math.nan
        broken = case.found(BF16)[0]
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert broken.isnan()


def test_without_a_compiler_it_is_told_and_pytorch_does_it(monkeypatch: pytest.MonkeyPatch, unbuilt: Path) -> None:
    monkeypatch.setattr(fused_softmax, "processor_instructions", lambda: fused_softmax.NEEDED)
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert why_not_fused(BF16, CPU) == "there is no C++ compiler 'no-such-compiler'; install g++, or set CXX"
    monkeypatch.setattr(softmax, "fused_softmax", lambda *_: pytest.fail("no native code"))
    case = Case(70, 300, 40)
    assert max(errors(case.found(BF16), case.exact())) < 2e-2
    assert not list(unbuilt.rglob("*.so"))


def test_training_says_it_once_and_goes_on(
    monkeypatch: pytest.MonkeyPatch, unbuilt: Path, small: PreparedData, tmp_path: Path
) -> None:
    monkeypatch.setattr(fused_softmax, "processor_instructions", set)
    monkeypatch.setattr(products, "is_wanted", lambda: True)
    monkeypatch.setenv("CXX", "no-such-compiler")
    options = [f"--data.path={small.path}", "--model.dim=8", "--train.max_steps=2", f"--train.run={tmp_path / 'run'}"]
    assert main(["train", *options, "--loss.precision=bf16"]) == 0
    log = (tmp_path / "run" / "train.log").read_text()
    assert log.count("attention by PyTorch, which is slower than native code: there is no C++ compiler") == 1
    assert log.count("passes over tokens by PyTorch, which is slower than native code: there is no C++ compiler") == 1
    assert log.count("products of float32 by PyTorch, which is slower than native code: there is no C++ compiler") == 1
    assert log.count("softmax by PyTorch, which is slower than native code: the processor has no avx512_bf16") == 1


def test_another_processor_and_a_failed_build_are_told(monkeypatch: pytest.MonkeyPatch, unbuilt: Path) -> None:
    monkeypatch.setattr(fused_softmax, "processor_instructions", lambda: fused_softmax.NEEDED - {"avx512_bf16"})
    assert why_not_fused(BF16, CPU) == "the processor has no avx512_bf16"
    assert why_not_fused(BF16, torch.device("cuda")) == ""
    assert why_not_fused(FP32, CPU) == ""
    fused_softmax._library.cache_clear()
    monkeypatch.setattr(fused_softmax, "processor_instructions", lambda: fused_softmax.NEEDED)
    compiler = unbuilt / "cxx"
    compiler.write_text("#!/bin/sh\necho 'error: no such option' >&2\nexit 1\n")
    compiler.chmod(0o700)
    monkeypatch.setenv("CXX", str(compiler))
    assert why_not_fused(BF16, CPU) == f"{compiler}: error: no such option"


def test_where_the_system_does_not_allow_amx_the_code_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def built(_source: Path, options: tuple[str, ...]) -> SimpleNamespace:
        asked.append(options)
        refused = not set(fused_softmax.WITHOUT_AMX) <= set(options)
        return SimpleNamespace(flm_softmax_refused=lambda: refused)

    monkeypatch.setattr(fused_softmax, "built", built)
    monkeypatch.setattr(
        fused_softmax, "processor_instructions", lambda: {*fused_softmax.NEEDED, "amx_bf16", "amx_tile"}
    )
    assert not fused_softmax._load().flm_softmax_refused() and len(asked) == 2


@native
def test_processes_that_start_at_once_build_once(monkeypatch: pytest.MonkeyPatch, unbuilt: Path) -> None:
    """Each opens the lock for itself, as two processes do."""
    monkeypatch.delenv("XDG_CACHE_HOME")
    built = Path(fused_softmax._load()._name)
    monkeypatch.setenv("XDG_CACHE_HOME", str(unbuilt))
    builds: list[Path] = []

    def build(_source: Path, code: Path, options: tuple[str, ...]) -> None:
        builds.append(code)
        shutil.copy(built, code)

    monkeypatch.setattr(native_code, "_compile", build)
    with ThreadPoolExecutor(2) as pool:
        libraries = list(pool.map(lambda _: fused_softmax._load(), range(2)))
    assert len(builds) == 1 and [x._name for x in libraries] == [str(builds[0])] * 2
    builds[0].chmod(0o722)
    assert why_not_fused(BF16, CPU) == f"{builds[0]} may be written by others"
