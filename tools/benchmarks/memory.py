"""Seconds and peak memory of each command, at numbers of events, users and items that you choose.

    python -m tools.benchmarks.memory --events 1e6 1e7 --items 1e5
    python -m tools.benchmarks.memory --events 1e8 --users 1e7 --items 1e6 --commands prepare train export
    python -m tools.benchmarks.memory --events 3e6 --users 3e5 --items 1e6 --all-items --commands prepare train \\
        "evaluate --sample N"
    python -m tools.benchmarks.memory --folder /data/bench --events 1e6 1e7     # goes on where it was stopped
    python -m tools.benchmarks.memory --load data/logs         # held memory of loading all events, bytes an event

DuckDB writes made-up logs, items and users as Parquet, in a memory of its own that does not grow with them: an event's
user is uniform, its item follows Zipf's law. Equal numbers give equal files. Then the commands run one after the other,
each as a process of its own. Several numbers of events give a table with a part for each. The memory of the process and
its children is read every 50 ms. "held" is what only these processes have (RssAnon): it must be there. "resident" also
counts pages of files, which the system takes back when it needs them. "CPU s" is time on all cores: it says more than
seconds where other work runs beside; give --threads 1 there, or threads wait for each other. With --folder, data and
measurements stay there: the same call measures only what is not in measured.json yet.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from shutil import rmtree
from tempfile import TemporaryDirectory

import duckdb
import psutil

from flm_torchrec.data.dataset import load_prepared
from flm_torchrec.data.splits import split
from flm_torchrec.data.train_stats import TrainStats
from flm_torchrec.prepare import sql

PERIOD = 0.05
"""Seconds between two samples of the memory."""
CHILDREN = 1.0
"""Seconds between two looks for new processes, each of which reads all processes of the machine."""
ROWS = 10_000_000
"""Events of a log file."""
BRANDS, COUNTRIES = 1_000, 50
COMMANDS = (
    "prepare",
    "train",
    "evaluate --sample",
    "evaluate --sample N",
    "evaluate --user",
    "export",
    "finetune",
    "finetune --sample N",
    "follow",
)
"""What can be measured: `evaluate --sample N` and `--user` have baselines that learn from the events of all users."""
NEW_EVENTS = 10_000
"""Events that `follow` learns from."""


@dataclass(frozen=True)
class Sizes:
    """How much data is made up."""

    events: int
    users: int
    items: int


@dataclass
class Peak:
    """Time and memory of a process and its children."""

    seconds: float = 0.0
    cpu: float = 0.0
    held: int = 0
    """Peak of anonymous memory, bytes."""
    resident: int = 0
    """Peak of all resident memory, bytes."""


def make(folder: Path, size: Sizes) -> None:
    """Write `logs/`, `items.parquet` and `users.parquet`."""
    for name in ("logs", "new"):
        (folder / name).mkdir(parents=True)

    def chance(salt: int) -> str:
        return f"(hash(n * 4 + {salt})::DOUBLE / 18446744073709551616)"

    with duckdb.connect(config={"memory_limit": "1GiB", "threads": "1"}) as engine:
        for number, first in enumerate(range(0, size.events, ROWS)):
            span = f"range({first}, {min(size.events, first + ROWS)})"
            # pow(count, chance) - 1 has a density that falls as 1 / x.
            engine.execute(
                f"COPY (SELECT 'u' || floor({size.users} * {chance(1)})::BIGINT AS user_id,"
                f" 'i' || (pow({size.items}, {chance(2)}) - 1)::BIGINT AS item_id,"
                f" 1600000000 + floor({chance(3)} * 31536000)::BIGINT AS timestamp"
                f" FROM {span} AS t(n)) TO {sql.target(folder / 'logs' / f'part-{number:05d}.parquet')}"
            )
        engine.execute(
            f"COPY (SELECT 'u' || floor({size.users} * {chance(1)})::BIGINT AS user,"
            f" 'i' || (pow({size.items}, {chance(2)}) - 1)::BIGINT AS item, 1640000000 + n AS timestamp"
            f" FROM range({NEW_EVENTS}) AS t(n)) TO {sql.target(folder / 'new' / 'part-00000.parquet')}"
        )
        for name, rows, feature, values in (
            ("item", size.items, "brand", BRANDS),
            ("user", size.users, "country", COUNTRIES),
        ):
            engine.execute(
                f"COPY (SELECT '{name[0]}' || n AS {name}_id, 'v' || floor({values} * {chance(1)})::INT AS {feature}"
                f" FROM range({rows}) AS t(n)) TO {sql.target(folder / f'{name}s.parquet')}"
            )


def watch(command: Sequence[str]) -> Peak:
    """Run a command and sample its memory.

    Raises:
        SystemExit: the command failed.
    """
    cost, began, busy = Peak(), time.monotonic(), {}
    process = psutil.Popen(command, stdout=sys.stderr)
    tree, looked = [process], began
    while process.poll() is None:
        held = resident = 0
        if time.monotonic() - looked > CHILDREN:
            tree, looked = [process, *process.children(recursive=True)], time.monotonic()
        for one in tree:
            with suppress(psutil.NoSuchProcess, FileNotFoundError, ProcessLookupError):  # ended meanwhile
                resident += one.memory_info().rss
                held += held_by(one.pid)
                busy[one.pid] = sum(one.cpu_times()[:2])
        cost.held, cost.resident = max(cost.held, held), max(cost.resident, resident)
        time.sleep(PERIOD)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)}: ended with {process.returncode}")
    cost.seconds, cost.cpu = time.monotonic() - began, sum(busy.values())
    return cost


def held_by(pid: int) -> int:
    """Anonymous bytes of a process, resident."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024
    return 0  # a process that has ended and was not waited for


def load(path: Path, on_disk: bool) -> str:
    """Load prepared data in this process, split them and take their statistics; the peaks of held memory, in a line.

    Args:
        on_disk: leave the events on disk, as `flm evaluate` and `flm export` do.
    """
    peaks, stop = [0], threading.Event()

    def sample() -> None:
        while not stop.wait(PERIOD / 5):
            peaks[0] = max(peaks[0], held_by(os.getpid()))

    before = held_by(os.getpid())
    sampler = threading.Thread(target=sample)
    sampler.start()
    data = load_prepared(path, on_disk=on_disk)
    events, loading = len(data.item), max(peaks[0], held_by(os.getpid()))
    mask = split(data, "leave-one-out", 0.1).train_mask(data)
    TrainStats.of(data, mask, values=True)
    data.item_counts(mask)
    stop.set()
    sampler.join()
    parts = [(peak - before) / events for peak in (loading, peaks[0])]
    return (
        f"{events:,} events: {parts[0]:.1f} bytes each at the peak of loading, {parts[1]:.1f} with split and statistics"
    )


def commands(folder: Path, args: argparse.Namespace) -> dict[str, list[str]]:
    """Options of `flm` by the name of what they measure."""
    run = ["--run", str(folder / "run")]
    finetune = [
        *("finetune", "--finetune.source", str(folder / "run"), "--train.run", str(folder / "tuned")),
        *("--no-control", "--train.max_steps", str(args.steps), "--train.eval_every", str(args.steps)),
        *("--train.eval_users", str(args.sample), "--train.existing", "replace"),
    ]
    return {
        "prepare": [
            *("prepare", "--source", "parquet", "--input", str(folder / "logs"), "--output", str(folder / "data")),
            *("--columns", "user=user_id,item=item_id,timestamp=timestamp", "--memory", args.memory),
            *("--items", str(folder / "items.parquet"), "--item-features", "brand:categorical", "--overwrite"),
            *("--users", str(folder / "users.parquet"), "--user-features", "country:categorical"),
            *(["--keep-unseen-items"] if args.all_items else []),
        ],
        "train": [
            *("train", "--data.path", str(folder / "data"), "--train.run", str(folder / "run")),
            *("--data.stream", "true", "--train.max_steps", str(args.steps), "--train.eval_every", str(args.steps)),
            *("--model.dim", str(args.dim), "--train.batch_size", "256", "--train.eval_users", str(args.sample)),
            *("--train.existing", "replace", "--distributed.threads", str(args.threads)),
        ],
        "evaluate --sample": ["evaluate", *run, "--sample", "--eval.baselines", "[popularity,item-kNN]"],
        "evaluate --sample N": [
            *("evaluate", *run, "--sample", str(args.rank), "--eval.baselines", "[popularity,item-kNN]"),
        ],
        "evaluate --user": ["evaluate", *run, "--user", "u1", "--eval.baselines", "[popularity,item-kNN]"],
        "export": ["export", *run, "--output", str(folder / "export"), "--overwrite"],
        "finetune": finetune,
        "finetune --sample N": [*finetune, "--sample", str(args.rank)],
        "follow": [
            *("follow", *run, "--source", str(folder / "new"), "--output", str(folder / "followed"), "--once"),
            *("--admit-after", "0"),
        ],
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Make the data, measure and print; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--events", type=number, nargs="+", default=[10**6], help="numbers of events (default: 1e6)")
    parser.add_argument("--users", type=number, help="number of users (default: a tenth of the events)")
    parser.add_argument("--items", type=number, default=10**5, help="number of items (default: 1e5)")
    parser.add_argument("--all-items", action="store_true", help="keep items without events (default: those with some)")
    parser.add_argument("--steps", type=int, default=50, help="of training (default: 50)")
    parser.add_argument("--dim", type=int, default=32, help="width of the model (default: 32)")
    parser.add_argument("--threads", type=int, default=0, help="of training and what uses its run (default: 0, cores)")
    parser.add_argument("--sample", type=int, default=1000, help="users that are validated on (default: 1000)")
    parser.add_argument("--rank", type=int, default=10_000, help="N of --sample N (default: 10000)")
    parser.add_argument("--memory", default="2GiB", help="of flm prepare (default: 2GiB)")
    parser.add_argument("--folder", type=Path, help="keep data, run and export here (default: a temporary folder)")
    parser.add_argument("--commands", nargs="+", choices=COMMANDS, default=COMMANDS, help="measure only these")
    parser.add_argument("--load", type=Path, metavar="DIR", help="only load these prepared data, in this process")
    parser.add_argument("--on-disk", action="store_true", help="with --load: leave the events on disk")
    args = parser.parse_args(argv)
    if args.load:
        print(load(args.load, args.on_disk))
        return 0
    print("| events | users | items | command | seconds | CPU s | held, MiB | resident, MiB |")
    print("|---:|---:|---:|---|---:|---:|---:|---:|", flush=True)
    for events in args.events:
        size = Sizes(events, args.users or max(1, events // 10), args.items)
        with TemporaryDirectory() as temporary:
            measure((args.folder or Path(temporary)) / f"{events}", size, args)
    return 0


def measure(folder: Path, size: Sizes, args: argparse.Namespace) -> None:
    """Make the data, unless they are there, run the commands, and print a row for each."""
    if not folder.exists():
        unfinished = folder.with_name(f"{folder.name}.unfinished")
        rmtree(unfinished, ignore_errors=True)
        make(unfinished, size)
        unfinished.rename(folder)
    for name in args.commands:
        cost = _measured(folder / "measured.json", commands(folder, args)[name])
        made = f"{size.events:,} | {size.users:,} | {size.items:,}"
        mib = f"{cost.held / 2**20:,.0f} | {cost.resident / 2**20:,.0f}"
        print(f"| {made} | {name} | {cost.seconds:,.0f} | {cost.cpu:,.0f} | {mib} |", flush=True)


def _measured(file: Path, options: Sequence[str]) -> Peak:
    """What a command of these options cost: as the file says, else measured now and written there."""
    done = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    command = " ".join(options)
    if command not in done:
        done[command] = asdict(watch([sys.executable, "-m", "flm_torchrec", *options]))
        unfinished = file.with_suffix(".tmp")
        unfinished.write_text(json.dumps(done, indent=2), encoding="utf-8")
        unfinished.replace(file)
    return Peak(**done[command])


def number(text: str) -> int:
    """A whole number, which may be written as 1e6."""
    return int(float(text))


if __name__ == "__main__":
    sys.exit(main())
