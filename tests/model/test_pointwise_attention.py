"""HSTU's attention as native code, beside that of PyTorch."""

from __future__ import annotations

import math
from collections.abc import Iterator
from unittest import mock

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from flm_torchrec.config.schema import ModelConfig
from flm_torchrec.machine_code import processor_instructions
from flm_torchrec.model import pointwise_attention, transformer
from flm_torchrec.model.layout import Jagged
from flm_torchrec.model.pointwise_attention import why_not_native
from flm_torchrec.model.transformer import CausalTransformer
from flm_torchrec.native_code import OPTIONS, Unavailable, built

native = pytest.mark.skipif(bool(why_not_native(torch.device("cpu"))), reason="no native attention here")


@pytest.fixture(params=["native", "x86-64-v3", "x86-64"], scope="module")
def processor(request: pytest.FixtureRequest) -> Iterator[None]:
    """Registers of 512, 256 and 128 bits, where this processor has them."""
    if request.param == "x86-64-v3" and "avx2" not in processor_instructions():
        pytest.skip("a processor without AVX2")
    options = tuple(f"-march={request.param}" if option == "-march=native" else option for option in OPTIONS)
    try:
        library = built(pointwise_attention.SOURCE, options)
    except Unavailable as error:
        pytest.skip(f"another kind of processor: {error}")
    with mock.patch.object(pointwise_attention, "_library", lambda: library):
        yield


@native
@pytest.mark.usefixtures("processor")
@settings(max_examples=20)
@given(
    st.lists(st.integers(0, 70), min_size=1, max_size=8),
    st.sampled_from([(1, 8), (2, 20), (2, 64), (4, 96)]),
    st.booleans(),
    st.integers(1, 2),
)
@example([0, 0], (1, 8), True, 1)
@example([1, 16, 17, 31, 32, 33, 64, 65], (2, 64), True, 2)
def test_native_attention_and_that_of_pytorch_have_the_same_gradients(
    lengths: list[int], shape: tuple[int, int], relative: bool, threads: int
) -> None:
    heads, dim = shape
    torch.manual_seed(sum(lengths))
    config = ModelConfig(dim=dim, attention_heads=heads, block="hstu", layers=2, relative_bias=relative)
    model = CausalTransformer(config, 70).eval()
    for number in model.biases.parameters():
        torch.nn.init.normal_(number)
    x = torch.randn(sum(lengths), dim, requires_grad=True)
    layout = Jagged(torch.tensor(lengths), torch.randint(0, 10**8, (len(x),)).sort().values)
    towards = torch.randn(len(x), dim)

    def found() -> list[Tensor]:
        out = model(x, layout)
        return [out.detach(), *torch.autograd.grad(out, [x, *model.parameters()], towards)]

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        native = found()
        with mock.patch.object(transformer, "can_attend", lambda *_: False):
            plain = found()
    finally:
        torch.set_num_threads(before)
    for ours, theirs in zip(native, plain, strict=True):
        assert float((ours - theirs).norm()) <= 2e-5 * float(theirs.norm()) + 2e-6
        assert not any(x.isnan().any() for x in (ours, theirs))


@native
def test_native_attention_repeats_its_bits_and_passes_nan_on() -> None:
    x, lengths = torch.randn(90, 16), torch.tensor([40, 50])
    model = CausalTransformer(ModelConfig(dim=16, block="hstu"), 50).eval()
    layout = Jagged(lengths, torch.arange(90))
    assert torch.equal(model(x, layout), model(x, layout))
    x[60, 0] = math.nan
    broken = model(x, layout).isnan().any(1)
    assert broken[60:].all() and not broken[:40].any()
