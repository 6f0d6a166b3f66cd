"""Our chunked sampled softmax beside plain cross-entropy over a [T, C] matrix, interleaved in one run.

Prints the time of forward and backward of each and their ratio. `python tools/benchmarks/softmax.py --help`
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from flm_torchrec.model.softmax import CandidateVectors, sampled_softmax


def plain(query: Tensor, items: Tensor, target: Tensor) -> Tensor:
    """Cross-entropy over the matrix [T, C] of all products."""
    return F.cross_entropy(query @ items.T, target, reduction="sum")


def chunked(query: Tensor, items: Tensor, target: Tensor) -> Tensor:
    """The same loss by our softmax, which never holds that matrix."""
    return sampled_softmax(query, CandidateVectors(items, items.new_zeros(len(items))), target, items.new_ones(()))


def seconds(loss: Callable[[Tensor, Tensor, Tensor], Tensor], *inputs: Tensor) -> float:
    """Time of a forward and a backward pass."""
    started = time.perf_counter()
    loss(*inputs).backward()
    return time.perf_counter() - started


def main() -> None:
    """Measure both in turn and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=1700, help="queries of a step (default: %(default)s, Beauty's)")
    parser.add_argument("--items", type=int, default=12101, help="candidates (default: %(default)s, Beauty's)")
    parser.add_argument("--dim", type=int, default=64, help="width of the space (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=9, help="runs of each, in turn (default: %(default)s)")
    args = parser.parse_args()
    query = torch.randn(args.tokens, args.dim, requires_grad=True)
    items = torch.randn(args.items, args.dim, requires_grad=True)
    target = torch.randint(0, args.items, (args.tokens,))
    for loss in (plain, chunked):
        seconds(loss, query, items, target)
    pairs = [
        (seconds(plain, query, items, target), seconds(chunked, query, items, target)) for _ in range(args.repeats)
    ]
    for name, times in zip(("plain", "chunked"), zip(*pairs, strict=True), strict=True):
        print(f"{name}: median {statistics.median(times) * 1e3:.1f} ms")
    print(f"plain / chunked: median {statistics.median(a / b for a, b in pairs):.2f}")


if __name__ == "__main__":
    main()
