"""Our sampled softmax, in chunks, in tiles and natively, beside plain cross-entropy over a [T, C] matrix, in turn.

`products` are the three products of matrices that a softmax and its gradients need, by PyTorch, alone.

Prints the time of forward and backward of each, and ratios. `python tools/benchmarks/softmax.py --help`

On a processor with AMX, as one that has avx512_bf16 alone would do it:

    ONEDNN_MAX_CPU_ISA=AVX512_CORE_BF16 python tools/benchmarks/softmax.py --precision bf16 --without-amx \
        --ways native chunks
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from unittest import mock

import torch
from torch import Tensor
from torch.nn import functional as F

from flm_torchrec.model import fused_softmax, softmax
from flm_torchrec.model.fused_softmax import is_meant, why_not_fused
from flm_torchrec.model.softmax import CandidateVectors, sampled_softmax
from flm_torchrec.native_code import built

Way = Callable[[Tensor, Tensor, Tensor], Tensor]


def plain(query: Tensor, items: Tensor, target: Tensor) -> Tensor:
    """Cross-entropy over the matrix [T, C] of all products."""
    return F.cross_entropy(query @ items.T, target, reduction="sum")


def products(precision: torch.dtype) -> Way:
    """The products alone, of the whole [T, C] matrix; the result is no loss."""

    def multiply(query: Tensor, items: Tensor, target: Tensor) -> Tensor:
        with torch.no_grad():
            low, low_items = query.to(precision), items.to(precision)
            shares = low @ low_items.T
            _ = shares @ low_items, shares.T @ low
        return torch.zeros((), requires_grad=True)

    return multiply


def ours(most_bytes: int, precision: torch.dtype, native: bool = False) -> Way:
    """The same loss by our softmax, in chunks where the logits of 128 queries take no more, else in tiles."""

    def loss(query: Tensor, items: Tensor, target: Tensor) -> Tensor:
        candidates = CandidateVectors(items, items.new_zeros(len(items)), precision=precision)
        fused = softmax.can_fuse if native else lambda *_: False
        with mock.patch.multiple(softmax, MOST_BYTES={"cpu": most_bytes}, can_fuse=fused):
            return sampled_softmax(query, candidates, target, items.new_ones(()))

    return loss


def seconds(loss: Way, *inputs: Tensor) -> float:
    """Processor time of a forward and a backward pass; wall time with several threads."""
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    started = clock()
    loss(*inputs).backward()
    return clock() - started


def main() -> None:
    """Measure all in turn and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=1700, help="queries of a step (default: %(default)s, Beauty's)")
    parser.add_argument("--items", type=int, default=12101, help="candidates (default: %(default)s, Beauty's)")
    parser.add_argument("--dim", type=int, default=64, help="width of the space (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=9, help="runs of each, in turn (default: %(default)s)")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="of ours (default: %(default)s)")
    parser.add_argument(
        "--ways", nargs="+", default=["plain", "chunks", "tiles"], help="and native, products; default: %(default)s"
    )
    parser.add_argument("--without-amx", action="store_true", help="the native code does not use AMX")
    args = parser.parse_args()
    precision = torch.bfloat16 if args.precision == "bf16" else torch.float32
    reason = why_not_fused(precision, torch.device("cpu"))
    if "native" in args.ways and (reason or not is_meant(precision)):
        parser.error(f"native: {reason or 'on this processor with --precision bf16 alone'}")
    if args.without_amx:
        library = built(fused_softmax.SOURCE, fused_softmax.WITHOUT_AMX)
        mock.patch.object(fused_softmax, "_library", lambda: library).start()
    known = {
        "plain": plain,
        "chunks": ours(2**62, precision),
        "tiles": ours(0, precision),
        "native": ours(2**62, precision, native=True),
        "products": products(precision),
    }
    # Cosines at the temperature that training starts with: other logits would need a pass for the largest of them.
    query = (F.normalize(torch.randn(args.tokens, args.dim), dim=1) / 0.07).requires_grad_()
    items = F.normalize(torch.randn(args.items, args.dim), dim=1).requires_grad_()
    target = torch.randint(0, args.items, (args.tokens,))
    times: dict[str, list[float]] = {way: [] for way in args.ways}
    for repeat in range(args.repeats + 1):
        for way in args.ways:
            taken = seconds(known[way], query, items, target)
            if repeat:  # the first is to warm up
                times[way].append(taken)
    first, *others = args.ways
    for way in args.ways:
        middle = statistics.median(times[way])
        print(f"{way}: median {middle * 1e3:.1f} ms, {middle / args.tokens / args.items * 1e9:.2f} ns a pair")
    for way in others:
        ratios = [a / b for a, b in zip(times[first], times[way], strict=True)]
        print(f"{first} / {way}: median {statistics.median(ratios):.2f}")


if __name__ == "__main__":
    main()
