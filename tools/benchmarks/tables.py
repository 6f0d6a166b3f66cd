"""The cost of a training step as tables grow, beside FBGEMM's own look-up and update of as many rows.

    python tools/benchmarks/tables.py

The same number of events a step, spread over 10^4 to 10^7 users and as many items, so that every table but the smallest
is touched in rows far apart. Steps of all sizes take turns in one run; prints medians in milliseconds, each beside that
of 10^5 rows. Then, each in a process of its own, the largest memory of a training beside what is counted by hand:
tables, optimizer state, dense part with gradients and moments, activations and the data's arrays.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
    ComputeDevice,
    EmbeddingLocation,
    SplitTableBatchedEmbeddingBagsCodegen,
)
from torch import Tensor

from flm_torchrec.config import Config, load_config
from flm_torchrec.data.dataset import EntityFeatures, PreparedData
from flm_torchrec.data.schema import Schema
from flm_torchrec.distributed.comm import Comm, process_group
from flm_torchrec.training.guard import Guard
from flm_torchrec.training.job import Job, JobInputs
from flm_torchrec.training.schedule import Schedule
from flm_torchrec.training.steps import PlainSteps

SIZES = (10**4, 10**5, 10**6, 10**7)
ACTIVE, EVENTS = 8192, 20
"""Users with events, spread over all, and events of each."""


def made_up(rows: int) -> PreparedData:
    """Data of so many users and items, with no features, in memory alone."""
    rng = np.random.default_rng(0)
    counts = np.zeros(rows, np.int64)
    counts[np.linspace(0, rows - 1, ACTIVE).astype(np.int64)] = EVENTS
    events = int(counts.sum())
    nothing = EntityFeatures({}, np.zeros((rows, 0), np.float32))
    return PreparedData(
        path=Path("made-up"),
        schema=Schema("made-up", "made-up", users=rows, items=rows, interactions=events),
        offsets=np.concatenate([[0], np.cumsum(counts)]),
        item=rng.integers(0, rows, events),
        timestamp=np.arange(events),
        event=np.zeros(events, np.int32),
        value=np.ones(events, np.float32),
        segment=None,
        items=nothing,
        users=nothing,
    )


class Training:
    """Steps of the real trainer."""

    def __init__(self, rows: int, config: Config, comm: Comm, guard: Guard) -> None:
        self.data = made_up(rows)
        self.job = Job(JobInputs.of(config, self.data, comm))
        schedule = Schedule(self.job.optimizer, 10, 10_000)
        self.steps = PlainSteps(self.job.model.train(), self.job.optimizer, schedule, comm.device, guard)
        self.batches = chain.from_iterable(self.job.loader.epoch(n) for n in range(10**6))
        self.number = 0

    def seconds(self) -> float:
        """Time of the next step."""
        batch = next(self.batches)
        began = time.perf_counter()
        self.steps.take(iter([batch]), self.number)
        self.number += 1
        return time.perf_counter() - began


class LookUp:
    """FBGEMM alone: forward, backward and update of `count` rows, spread evenly."""

    def __init__(self, rows: int, dim: int, count: int) -> None:
        self.rows, self.count = rows, count
        self.rng = np.random.default_rng(1)
        spec = [(rows, dim, EmbeddingLocation.HOST, ComputeDevice.CPU)]
        self.table = SplitTableBatchedEmbeddingBagsCodegen(spec, learning_rate=0.1)
        self.table.init_embedding_weights_uniform(-0.1, 0.1)

    def seconds(self) -> float:
        """Time of one forward, backward and update."""
        ids = torch.from_numpy(self.rng.integers(0, self.rows, self.count))
        offsets = torch.arange(self.count + 1)
        began = time.perf_counter()
        self.table(ids, offsets).sum().backward()
        return time.perf_counter() - began


def settings(folder: str, dim: int, *more: str) -> Config:
    """The config of all measurements, with further overrides."""
    return load_config(None, [f"train.run={folder}/run", f"model.dim={dim}", "data.split=time", *more])


def speed(dim: int, rounds: int) -> None:
    """Print the time of a step by number of rows, for training and for FBGEMM alone."""
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        config = settings(folder, dim)
        comm = stack.enter_context(process_group(config.distributed))
        guard = stack.enter_context(Guard(comm, "stop", Path(folder) / "non-finite"))
        trainings = [Training(rows, config, comm, guard) for rows in SIZES]
        look_ups = [LookUp(rows, dim, 8192) for rows in SIZES]
        for title, kinds in (("a step of training", trainings), ("FBGEMM alone, 8,192 rows", look_ups)):
            turns = [[one.seconds() for one in kinds] for _ in range(rounds + 3)][3:]  # type: ignore[attr-defined]
            base = 1
            for index, rows in enumerate(SIZES):
                ratio = statistics.median(turn[index] / turn[base] for turn in turns)
                took = statistics.median(turn[index] for turn in turns)
                print(f"{title}, {rows:>10,} rows: {took * 1e3:8.2f} ms, {ratio:.3f} of 10^5 rows")


def memory(rows: int, dim: int, steps: int) -> dict[str, float]:
    """Bytes: what the process grew by at most, and what can be counted."""
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        config = settings(folder, dim)
        comm = stack.enter_context(process_group(config.distributed))
        guard = stack.enter_context(Guard(comm, "stop", Path(folder) / "non-finite"))
        # The code that the first step loads is no cost of the tables, so a tiny training comes before.
        small = settings(folder, dim, "train.batch_size=2", "loss.negatives=8")
        tiny = Training(ACTIVE, small, comm, guard)
        tiny.seconds()
        del tiny
        gc.collect()
        before = _resident("VmRSS")
        training = Training(rows, config, comm, guard)
        for _ in range(steps):
            training.seconds()
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            training.seconds()
        dense = sum(p.nbytes for p in training.job.model.module.dense.parameters())
        tables = 2 * rows * dim * 4
        arrays = dict(_arrays(training))
    peak = _resident("VmHWM")
    counted = {
        "tables": tables,
        "optimizer": 2 * rows * 4,
        "dense part, gradients, moments": 4 * dense,
        # What autograd keeps, the tables' own rows left out.
        "activations": sum(size for size in kept.values() if size < tables // 2),
        "data": sum(arrays.values()),
    }
    return {"grew by": peak - before, "counted": sum(counted.values()), **counted}


def _resident(what: str) -> int:
    """Bytes: VmRSS, now; VmHWM, at most so far (getrusage's is the parent's, where that had more)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(what))


def _arrays(training: Training) -> Iterator[tuple[int, int]]:
    """Memory of every array that the data and the loader hold, by address."""
    events, loader = training.job.events, training.job.loader
    for holder in (training.data, events, loader, *vars(events).values(), *vars(loader).values()):
        for value in getattr(holder, "__dict__", {}).values():
            if isinstance(value, np.ndarray):
                base = value.base if isinstance(value.base, np.ndarray) else value
                yield base.ctypes.data, base.nbytes


def main() -> None:
    """Measure speed here and memory in new processes, and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dim", type=int, default=64, help="width of the tables (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=20, help="steps of each size (default: %(default)s)")
    parser.add_argument("--memory", type=int, metavar="ROWS", help="measure the memory of one size, in this process")
    args = parser.parse_args()
    if args.memory:
        print(json.dumps(memory(args.memory, args.dim, 5)))
        return
    speed(args.dim, args.rounds)
    for rows in SIZES[1:]:
        again = [sys.executable, __file__, "--dim", str(args.dim), "--memory", str(rows)]
        found = json.loads(subprocess.run(again, check=True, capture_output=True, text=True).stdout.splitlines()[-1])
        shown = ", ".join(f"{name} {size / 2**20:,.0f} MiB" for name, size in found.items())
        print(f"memory, {rows:>10,} rows: {found['grew by'] / found['counted']:.3f} of what is counted ({shown})")


if __name__ == "__main__":
    main()
