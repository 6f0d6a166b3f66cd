"""HSTU's attention as native code and by PyTorch on padded sequences, forward and backward, in turn in one process.

    python tools/benchmarks/attention.py --length 50

Prints the time of each, medians over the turns, and the median of the ratios of neighbours. Processor time at one
thread, else wall time.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from unittest import mock

import torch

from flm_torchrec.config.schema import ModelConfig
from flm_torchrec.model import transformer
from flm_torchrec.model.layout import Jagged
from flm_torchrec.model.pointwise_attention import why_not_native

YEAR = 31_536_000
"""Seconds."""


@contextmanager
def by(way: str) -> Iterator[None]:
    """Attention made this way."""
    if way == "native":
        yield
        return
    with mock.patch.object(transformer, "can_attend", lambda *_: False):
        yield


def options() -> argparse.Namespace:
    """Of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sequences", type=int, default=256, help="(default: %(default)s)")
    parser.add_argument("--length", type=int, default=50, help="of the longest; mean 5/8 of it (default: %(default)s)")
    parser.add_argument("--dim", type=int, default=64, help="(default: %(default)s)")
    parser.add_argument("--heads", type=int, default=2, help="(default: %(default)s)")
    parser.add_argument("--without-times", action="store_true", help="no biases by position and time")
    parser.add_argument("--threads", type=int, default=1, help="(default: %(default)s)")
    parser.add_argument("--turns", type=int, default=15, help="(default: %(default)s)")
    if reason := why_not_native(torch.device("cpu")):
        parser.error(f"no native code here: {reason}")
    return parser.parse_args()


def case(args: argparse.Namespace) -> Callable[[], None]:
    """A function that runs a block forward and backward."""
    lengths = torch.randint(args.length // 4, args.length + 1, (args.sequences,)).sort().values
    tokens, timed = int(lengths.sum()), not args.without_times
    sizes = {"dim": args.dim, "attention_heads": args.heads}
    config = ModelConfig(**sizes, layers=1, block="hstu", dropout=0.0, relative_bias=timed)
    model = transformer.CausalTransformer(config, args.length)
    block, bias = model.blocks[0], model.biases[0] if timed else None
    layout = Jagged(lengths, torch.randint(0, YEAR, (tokens,)).sort().values)
    x, towards = torch.randn(tokens, args.dim, requires_grad=True), torch.randn(tokens, args.dim)
    print(f"a block, {tokens} tokens")
    return lambda: block(x, layout, bias).backward(towards)


def main() -> None:
    """Measure and print."""
    args = options()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    step, clock = case(args), time.process_time if args.threads == 1 else time.perf_counter
    times: dict[str, list[float]] = {"native": [], "PyTorch": []}
    for way in list(times) * (args.turns + 1):
        with by(way):
            began = clock()
            step()
            times[way].append(1e3 * (clock() - began))
    times = {way: taken[1:] for way, taken in times.items()}  # the first warms up
    ratios = [b / a for a, b in zip(*times.values(), strict=True)]
    print(", ".join(f"{way} {statistics.median(taken):.1f} ms" for way, taken in times.items()))
    print(f"PyTorch / native: {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})")


if __name__ == "__main__":
    main()
