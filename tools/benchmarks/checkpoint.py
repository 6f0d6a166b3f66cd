"""The cost of a checkpoint every N steps: blocks of N steps, in turn with and without writing one.

    python tools/benchmarks/checkpoint.py --config configs/beauty.yaml --every 100 --pairs 4

A block with a checkpoint copies the state, trains N steps while a thread writes it, and waits until it is written.
Prints seconds and processor seconds of each block, and the ratios of their sums. On a busy machine trust the second.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Sequence
from contextlib import closing
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory

from flm_torchrec.config import add_config_arguments, config_from_arguments
from flm_torchrec.data.prefetch import Prefetch
from flm_torchrec.errors import FlmError
from flm_torchrec.training.checkpoint.manager import Checkpoints, Progress
from flm_torchrec.training.guard import Guard
from flm_torchrec.training.job import Job, open_job
from flm_torchrec.training.schedule import Schedule
from flm_torchrec.training.steps import STEPS

ORDER = (True, False, False, True)
"""Whether a block writes a checkpoint. Neither kind is always first."""


def measure_blocks(
    job: Job, folder: Path, every: int, pairs: int
) -> tuple[dict[bool, list[tuple[float, float]]], float]:
    """Seconds and processor seconds of each block, by whether it wrote; seconds of a checkpoint without training."""
    costs: dict[bool, list[tuple[float, float]]] = {True: [], False: []}
    checkpoints = Checkpoints(folder, job.model, job.optimizer, job.comm, job.data.fingerprint)
    schedule = Schedule(job.optimizer, job.config.train.warmup_steps, (2 * pairs + 1) * every)
    job.model.train()
    steps = STEPS[job.comm.device.type](
        job.model, job.optimizer, schedule, job.comm.device, Guard(job.comm, "stop", folder)
    )
    with closing(iter(Prefetch(islice(job.loader.after(0), schedule.total)))) as batches:

        def block(number: int) -> None:
            for step in range(number * every, (number + 1) * every):
                steps.take(batches, step)

        block(0)  # the first steps include warm-up
        for number in range(2 * pairs):
            saves = ORDER[number % len(ORDER)]
            began, worked = time.monotonic(), time.process_time()
            if saves:
                checkpoints.save(Progress(number))
            block(number + 1)
            checkpoints.finish()
            costs[saves].append((time.monotonic() - began, time.process_time() - worked))
        steps.release()
    alone = []
    for number in range(5):
        began = time.monotonic()
        checkpoints.save(Progress(number))
        checkpoints.finish()
        alone.append(time.monotonic() - began)
    return costs, statistics.median(alone)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--every", type=int, default=100, help="steps of a block (default: 100)")
    parser.add_argument("--pairs", type=int, default=4, help="blocks with one, and as many without (default: 4)")
    add_config_arguments(parser)
    args = parser.parse_args(argv)
    try:
        config = config_from_arguments(args)
        with open_job(config) as job, TemporaryDirectory() as own:
            comm = job.comm
            folder = Path(comm.gather(own)[0])
            costs, alone = measure_blocks(job, folder, args.every, args.pairs)
            newest = max(folder.glob("checkpoints/step-*"))
            size = sum(file.stat().st_size for file in newest.iterdir())
            comm.barrier()
            if not comm.main:
                return 0
    except FlmError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    print(f"{args.every} steps, seconds (processor seconds); a checkpoint has {size / 2**20:.1f} MiB")
    for saves, name in ((True, "with a checkpoint"), (False, "without")):
        print(f"{name}: " + "  ".join(f"{wall:.2f} ({cpu:.2f})" for wall, cpu in costs[saves]))
    ratios = [sum(block[kind] for block in costs[True]) / sum(block[kind] for block in costs[False]) for kind in (0, 1)]
    print(f"with / without: {ratios[0]:.4f} in time, {ratios[1]:.4f} in processor time")
    shortest = min(block[0] for block in costs[False])
    print(f"written without training, one takes {alone:.3f} s: {alone / shortest:.2%} of the shortest block")
    return 0


if __name__ == "__main__":
    sys.exit(main())
