"""Milliseconds of a training step on the device at hand, a GPU where there is one.

    python tools/benchmarks/step.py --data data/beauty loss.precision=bf16 train.batch_size=256

Prints the median and the range over turns and, on a GPU, the memory of the largest step. Further arguments are settings
of the config. To compare two commits, run it in a checkout of each on one idle machine.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch

from flm_torchrec.config import load_config
from flm_torchrec.training.job import open_job
from tools.benchmarks.train_ours import Ours

WARM = 12
"""Steps before the first turn: libraries load, kernels are built, memory is taken."""


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="data/beauty", help="prepared folder (default: %(default)s)")
    parser.add_argument("--turns", type=int, default=4, help="(default: %(default)s)")
    parser.add_argument("--steps", type=int, default=8, help="steps of a turn (default: %(default)s)")
    parser.add_argument("settings", nargs="*", help="such as train.batch_size=64")
    args = parser.parse_args()
    config = load_config(None, [f"data.path={args.data}", "train.epochs=100000", *args.settings])
    with open_job(config) as job:
        trainer, device = Ours(job), job.comm.device
        trainer.steps(WARM)
        taken = []
        for _ in range(args.turns):
            _wait(device)
            started = time.perf_counter()
            trainer.steps(args.steps)
            _wait(device)
            taken.append(1e3 * (time.perf_counter() - started) / args.steps)
        print(f"{statistics.median(taken):.1f} ms a step ({min(taken):.1f} to {max(taken):.1f})")
        if device.type == "cuda":
            print(f"{torch.cuda.get_device_name()}, {torch.cuda.max_memory_allocated() / 2**20:.0f} MiB")


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
