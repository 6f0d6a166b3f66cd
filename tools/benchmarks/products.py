"""Products of float32 matrices by native code beside PyTorch's, in turns in one run.

    python tools/benchmarks/products.py --threads 2

Prints for each product [M, K] @ [K, N] the milliseconds of both, medians, and the median (range) of the paired ratios.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from flm_torchrec.products import matmul, multiplies

SHAPES = {
    "scores: 512 users, 12,101 items": (512, 256, 12101),
    "a layer, forward": (10500, 64, 256),
    "its gradient of the inputs": (10500, 256, 64),
    "its gradient of the weights": (256, 10500, 64),
    "a layer of width 128": (1700, 128, 512),
}


def factors(rows: int, terms: int, columns: int) -> tuple[Tensor, Tensor]:
    """As a layer or scores have them: [M, K], and [N, K] seen as [K, N]."""
    return torch.randn(rows, terms), torch.randn(columns, terms).T


def seconds(multiply: Callable[[Tensor, Tensor], Tensor], left: Tensor, right: Tensor) -> float:
    """Of one product; five where it is short."""
    times = 5 if left.numel() * right.shape[1] < 1e9 else 1
    began = time.perf_counter()
    for _ in range(times):
        multiply(left, right)
    return (time.perf_counter() - began) / times


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1, help="(default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=15, help="turns of each (default: %(default)s)")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    for name, shape in SHAPES.items():
        left, right = factors(*shape)
        if not multiplies(left, right):
            parser.exit(1, "PyTorch multiplies here: native code is for AMD's processors with AVX-512\n")
        ways = (matmul, torch.mm)
        turns = [[seconds(way, left, right) * 1e3 for way in ways] for _ in range(args.rounds + 1)][1:]
        ratios = [theirs / ours for ours, theirs in turns]
        ours, theirs = (statistics.median(column) for column in zip(*turns, strict=True))
        print(
            f"{name}: {ours:.3f} ms, by PyTorch {theirs:.3f} ms,"
            f" {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        )


if __name__ == "__main__":
    main()
