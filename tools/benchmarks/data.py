"""Speed of our loaders, from disk and from memory, beside reading Parquet alone and a plain PyTorch DataLoader.

    python tools/benchmarks/data.py --rows 4000000                     # made-up data, 40 events a user
    python tools/benchmarks/data.py --data data/beauty                 # prepared data
    python tools/benchmarks/data.py --train configs/synthetic.yaml  # also the share of training spent waiting for data

All contestants run complete epochs in turn, in one process, so trust the ratios. The floor only reads the columns of
the same row groups with pyarrow. The plain Dataset has its data in memory, makes one window at a time in __getitem__
and pads in collate. Unlike ours it reads no features, draws no negatives and finds no distinct items. Then each of our
loaders runs an epoch in a process of its own, to measure its memory.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, Dataset

from flm_torchrec.config import load_config
from flm_torchrec.data.collate import Assembler
from flm_torchrec.data.dataset import PreparedData, load_prepared
from flm_torchrec.data.event_files import EVENT_COLUMNS
from flm_torchrec.data.lanes import LanePlan
from flm_torchrec.data.loader import Sharing, TrainLoader
from flm_torchrec.data.negatives import Negatives
from flm_torchrec.data.schema import Schema
from flm_torchrec.data.splits import SplitSettings, split
from flm_torchrec.data.stream_loader import StreamLoader
from flm_torchrec.data.survey import load_streamed
from flm_torchrec.data.windows import windows
from flm_torchrec.errors import FlmError
from flm_torchrec.training.trainer import pretrain

EVENTS, ITEMS, GROUP = 40, 20_000, 131_072
HISTORY, BATCH, DRAWN, POWER = 50, 256, 2048, 0.5
"""History length, batch size, negatives and their power, as in training by default."""
VALIDATED = 1000
"""Validation users, which streaming keeps in memory."""


class OneByOne(Dataset):
    """Gives one window at a time: item, event, time, gap and value of each of its events."""

    def __init__(self, data: PreparedData) -> None:
        self.data = data
        self.spans = windows(data, split(data, "leave-one-out", 0.1), HISTORY)

    def __len__(self) -> int:
        return len(self.spans)

    def __getitem__(self, index: int) -> tuple[Tensor, ...]:
        start, end = int(self.spans.start[index]), int(self.spans.end[index])
        timestamp = self.data.timestamp[start:end]
        columns = (self.data.item[start:end], self.data.event[start:end], timestamp, np.diff(timestamp, prepend=0))
        return tuple(torch.as_tensor(np.array(c, np.int64)) for c in (*columns, self.data.value[start:end]))


def padded(rows: list[tuple[Tensor, ...]]) -> list[Tensor]:
    """B windows → lengths [B] and the columns [B, L], padded with zeros."""
    lengths = torch.tensor([len(row[0]) for row in rows])
    return [lengths, *(pad_sequence(list(column), batch_first=True) for column in zip(*rows, strict=True))]


Epoch = Callable[[int], Iterator[tuple[int, int]]]
"""Number of the epoch → sequences and events of each of its batches."""
DISK, MEMORY = "ours, from disk", "ours, from memory"


def from_memory(data: PreparedData) -> TrainLoader:
    """Our loader of data in memory."""
    splits = split(data, "leave-one-out", 0.1)
    fit = splits.train_mask(data)
    negatives = Negatives(data.item_counts(fit), DRAWN, POWER)
    return TrainLoader(windows(data, splits, HISTORY), Assembler(data, fit), negatives, Sharing(BATCH, 0))


def from_disk(path: Path) -> StreamLoader:
    """Our loader that streams from disk."""
    data = load_streamed(path, "all", SplitSettings("leave-one-out", 0.1), VALIDATED, 0)
    assembler = Assembler(data, data.no_events, data.stream.stats)
    plan = LanePlan(data.stream, HISTORY, Sharing(BATCH, 0))
    return StreamLoader(plan, assembler, Negatives(data.stream.counts, DRAWN, POWER))


def contestants(path: Path) -> dict[str, Epoch]:
    """All loaders that are compared, by name."""
    data = load_prepared(path)
    memory, stream = from_memory(data), from_disk(path)

    def floor(_: int) -> Iterator[tuple[int, int]]:
        share = len(memory.windows) / len(data.item)
        for columns in stream.plan.stream.groups.scan(EVENT_COLUMNS):
            yield round(len(columns[0]) * share), len(columns[0])

    def ours(loader: TrainLoader | StreamLoader) -> Epoch:
        return lambda number: ((len(b.lengths), len(b.targets)) for b in loader.epoch(number))

    def plain(workers: int) -> Epoch:
        loader = DataLoader(
            OneByOne(data), BATCH, shuffle=True, collate_fn=padded, num_workers=workers, persistent_workers=workers > 0
        )
        return lambda _: ((len(lengths), int(lengths.sum())) for lengths, *_ in loader)

    return {
        "floor: pyarrow alone": floor,
        DISK: ours(stream),
        MEMORY: ours(memory),
        "plain Dataset, 0 workers": plain(0),
        "plain Dataset, 2 workers": plain(2),
    }


@dataclass
class Throughput:
    """Work and time of a contestant, summed over its epochs."""

    sequences: int = 0
    events: int = 0
    seconds: float = 0.0

    def add(self, epoch: Iterator[tuple[int, int]]) -> None:
        """Run an epoch and count its sequences, events and seconds."""
        began = time.perf_counter()
        for sequences, events in epoch:
            self.sequences += sequences
            self.events += events
        self.seconds += time.perf_counter() - began


def race(path: Path, rounds: int) -> None:
    """Run epochs of all contestants in turn, and print their speed."""
    entered = contestants(path)
    runs = {name: Throughput() for name in entered}
    for number in range(rounds + 1):
        if number == 1:  # the first epoch starts workers and fills caches
            runs = {name: Throughput() for name in entered}
        names = list(entered) if number % 2 else list(entered)[::-1]
        for name in names:
            runs[name].add(entered[name](number))
    base = runs[DISK]
    print(f"{'':26} sequences/s    events/s   ours from disk is")
    for name, run in runs.items():
        ratio = base.events / base.seconds / (run.events / run.seconds)
        rates = f"{run.sequences / run.seconds:11,.0f} {run.events / run.seconds:11,.0f}"
        print(f"{name:26} {rates}   {ratio:8.2f} times it")


def peak(path: Path, name: str) -> float:
    """Peak memory of an epoch in MiB, without that of the imports. Must run in a new process."""
    before = _peak_now()
    for _ in (from_disk(path) if name == DISK else from_memory(load_prepared(path))).epoch(0):
        pass
    return _peak_now() - before


def _peak_now() -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) / 1024


def show_memory(path: Path) -> None:
    """Print the peak memory of each of our loaders."""
    for name in (DISK, MEMORY):
        with ProcessPoolExecutor(1, get_context("spawn")) as own:
            print(f"{name}: {own.submit(peak, path, name).result():.0f} MiB at its peak")


def write_data(folder: Path, rows: int) -> Path:
    """Write prepared data of `rows` events without features, with items by a power law, in row groups of GROUP rows."""
    rng = np.random.default_rng(0)
    users = rows // EVENTS
    (folder / "interactions").mkdir(parents=True)
    types = {"user_id": "int64", "item_id": "int64", "timestamp": "int64", "event": "int32", "value": "float32"}
    schema = pa.schema([(name, pa.type_for_alias(kind)) for name, kind in types.items()])
    bounds = [*range(0, users, GROUP // EVENTS), users]
    with pq.ParquetWriter(folder / "interactions" / "part-00000.parquet", schema) as writer:
        for first, last in pairwise(bounds):
            number = (last - first) * EVENTS
            times = np.sort(rng.integers(1_600_000_000, 1_700_000_000, (last - first, EVENTS)), axis=1)
            columns = [
                np.repeat(np.arange(first, last), EVENTS),
                (ITEMS * rng.random(number) ** 3).astype(np.int64),
                times.ravel(),
                rng.integers(0, 2, number),
                rng.integers(1, 6, number),
            ]
            arrays = [pa.array(c).cast(f.type, safe=False) for c, f in zip(columns, schema, strict=True)]
            writer.write_table(pa.table(arrays, schema=schema), row_group_size=number)
    for entity, size in (("user", users), ("item", ITEMS)):
        keys = pa.array(np.arange(size)).cast(pa.string())
        table = pa.table({f"{entity}_id": np.arange(size), f"{entity}_key": keys})
        pq.write_table(table, folder / f"{entity}s.parquet")
    Schema("made-up", "bench", users, ITEMS, users * EVENTS, ("view", "buy")).save(folder / "schema.yaml")
    return folder


def wait_share(config: str, overrides: Sequence[str], stream: bool) -> float:
    """Share of the time of a training in which a rank waits for a batch."""
    with TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        run = Path(folder) / "run"
        fixed = [f"train.run={run}", "train.existing=refuse", "train.eval_every=1000000", "train.eval_users=100"]
        pretrain(load_config(config, [*overrides, *fixed, f"data.stream={stream}"]))
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        waits = [line["input_wait"] for line in lines if "input_wait" in line]
    return float(np.mean(waits[1:]))  # the first steps wait for the first batch


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, metavar="DIR", help="prepared data to read (default: made-up data)")
    parser.add_argument("--rows", type=int, default=2_000_000, help="of made-up data (default: 2000000)")
    parser.add_argument("--rounds", type=int, default=3, help="epochs of each contestant (default: 3)")
    parser.add_argument("--train", nargs="*", default=[], metavar="CONFIG", help="configs to train by, to see the wait")
    parser.add_argument("--steps", type=int, default=100, help="of each training (default: 100)")
    parser.add_argument("overrides", nargs="*", help="of these configs, such as data.path=DIR")
    args = parser.parse_args(argv)
    try:
        with TemporaryDirectory() as folder:
            path = args.data or write_data(Path(folder) / "data", args.rows)
            race(path, args.rounds)
            show_memory(path)
        for config in args.train:
            for stream in (False, True):
                share = wait_share(config, [*args.overrides, f"train.max_steps={args.steps}"], stream)
                print(f"{config}, {'from disk' if stream else 'from memory'}: {share:.2%} of the time without a batch")
    except FlmError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
