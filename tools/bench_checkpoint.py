"""What checkpoints cost: the same run with one every so many steps and with none, taken in turns.

    python tools/bench_checkpoint.py --config configs/beauty.yaml --every 100 --steps 350 --repeats 3

Prints seconds a step of each repeat (validation and start left out), and the ratio of their medians.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from flm_torchrec.config import add_config_arguments, config_from_arguments
from flm_torchrec.errors import FlmError
from flm_torchrec.training.checkpoint import CHECKPOINTS
from flm_torchrec.training.job import pretrain


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--every", type=int, default=100, help="steps between checkpoints (default: 100)")
    parser.add_argument("--steps", type=int, default=350, help="of each run; both save at the end (default: 350)")
    parser.add_argument("--repeats", type=int, default=3, help="of each of the two (default: 3)")
    add_config_arguments(parser)
    args = parser.parse_args(argv)
    seconds: dict[int, list[float]] = {0: [], args.every: []}
    size = 0
    try:
        config = config_from_arguments(args)
        for number in range(args.repeats):
            # Each goes first in turn, so that neither has the cooler or the warmer machine.
            for every in sorted(seconds, reverse=bool(number % 2)):
                folder = Path(tempfile.mkdtemp(prefix="bench-checkpoint-"))
                train = replace(
                    config.train, run=str(folder / "run"), existing="refuse", max_steps=args.steps, epochs=10**6,
                    eval_every=args.steps, eval_users=100, checkpoint_every=every, patience=0,
                )  # fmt: skip
                seconds[every].append(pretrain(replace(config, train=train)).seconds / args.steps)
                if every:
                    newest = max((folder / "run" / CHECKPOINTS).glob("step-*"))
                    size = sum(file.stat().st_size for file in newest.iterdir())
                shutil.rmtree(folder)
    except FlmError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    for every, found in seconds.items():
        told = f"a checkpoint every {every} steps" if every else "none until the end"
        print(f"{told}: {statistics.median(found):.4f} s a step ({', '.join(f'{s:.4f}' for s in found)})")
    ratio = statistics.median(seconds[args.every]) / statistics.median(seconds[0])
    print(f"a checkpoint of {size / 2**20:.1f} MiB; ratio {ratio:.4f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
