"""Exact order statistics of numbers that come in parts and need not fit into memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np

BINS = 2**16
"""Bins of a histogram: two passes find one second in 136 years."""


def order_statistics(scan: Callable[[], Iterator[np.ndarray]], ranks: Sequence[int]) -> list[int]:
    """The integers at these ranks, from 0, of all integers sorted; by finer and finer histograms of BINS bins.

    Args:
        scan: one pass over the integers, part by part; the same at each call, and at least one integer.
    """
    least, most = np.iinfo(np.int64).max, np.iinfo(np.int64).min
    for part in filter(len, scan()):
        least, most = min(least, int(part.min())), max(most, int(part.max()))
    # Of each rank: its number is in low … low + width - 1, and `below` numbers are smaller than low.
    low, width, below = [least] * len(ranks), most - least + 1, [0] * len(ranks)
    while width > 1:
        step = -(-width // BINS)
        counts = np.zeros((len(ranks), BINS), np.int64)
        for part in filter(len, scan()):
            for histogram, start in zip(counts, low, strict=True):
                inside = part[(part >= start) & (part < start + width)]
                histogram += np.bincount((inside - start) // step, minlength=BINS)
        for n, rank in enumerate(ranks):
            upto = below[n] + np.cumsum(counts[n])
            bucket = int(np.searchsorted(upto, rank, "right"))
            below[n] = int(upto[bucket] - counts[n][bucket])
            low[n] += bucket * step
        width = step
    return low
