"""A step of training with the softmax in fp32, in bf16 by PyTorch and in bf16 by native code, in turn in one process.

And by native code with `loss.mixture`, which asks each softmax for probabilities before.

    python tools/benchmarks/softmax_step.py --data data/beauty data.max_history=50

Prints the time of a step of each, and ratios. Further arguments are settings of the config.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from unittest import mock

import torch

from flm_torchrec.config import load_config
from flm_torchrec.model import losses, softmax
from flm_torchrec.model.fused_softmax import why_not_fused
from flm_torchrec.training.job import open_job
from tools.benchmarks.train_ours import Ours

WAYS = {
    "fp32": (torch.float32, False, 0.0),
    "bf16": (torch.bfloat16, False, 0.0),
    "native": (torch.bfloat16, True, 0.0),
    "native, mixture": (torch.bfloat16, True, 0.8),
}
"""By name, the precision of products, whether native code makes them, and `loss.mixture`."""


@contextmanager
def way(trainer: Ours, name: str) -> Iterator[None]:
    """All softmaxes of the model this way."""
    precision, native, mixture = WAYS[name]
    for part in trainer.job.model.module.dense.losses:
        if isinstance(part, losses.AttributeContrast):
            part.precision = precision
        if isinstance(part, losses.NextItemLoss):
            part.config = replace(part.config, mixture=mixture)
    fused = softmax.can_fuse if native else lambda *_: False
    with mock.patch.dict(losses.PRECISIONS, bf16=precision), mock.patch.object(softmax, "can_fuse", fused):
        yield


def main() -> None:
    """Measure all in turn and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="data/beauty", help="prepared folder (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=7, help="turns of each (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=2, help="steps of a turn (default: %(default)s)")
    parser.add_argument(
        "--threads", type=int, default=1, help="1: processor time; else wall time (default: %(default)s)"
    )
    parser.add_argument("settings", nargs="*", help="such as train.batch_size=64")
    args = parser.parse_args()
    if reason := why_not_fused(torch.bfloat16, torch.device("cpu")):
        parser.error(f"no native code here: {reason}")
    fixed = [f"data.path={args.data}", f"distributed.threads={args.threads}", "distributed.device=cpu"]
    clock = time.process_time if args.threads == 1 else time.perf_counter
    times: dict[str, list[float]] = {name: [] for name in WAYS}
    with open_job(load_config(None, [*fixed, "loss.negatives=all", "loss.precision=bf16", *args.settings])) as job:
        trainer = Ours(job)
        trainer.steps(2)
        for name in list(WAYS) * args.rounds:
            with way(trainer, name):
                started = clock()
                trainer.steps(args.steps)
                times[name].append((clock() - started) / args.steps)
    for name, taken in times.items():
        ratios = [a / b for a, b in zip(taken, times["native"], strict=True)]
        print(f"{name}: median {1e3 * statistics.median(taken):.1f} ms, {statistics.median(ratios):.2f} × native")


if __name__ == "__main__":
    main()
