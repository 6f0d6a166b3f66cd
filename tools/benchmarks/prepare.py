"""Speed and memory of `flm prepare` beside a plain scan and write of the same files.

    python tools/benchmarks/prepare.py --folder /tmp/bench --rows 100000000 --memory 2GiB --format parquet

Makes logs once and keeps them in the folder: items and users follow Zipf's law, and equal numbers give equal logs.
Then runs two processes in turn and samples their resident memory, with that of their children. The floor is DuckDB,
which reads the mapped columns and writes them as Parquet under the same limit. The other is `flm prepare`. Prints rows
per second of both, their ratio, and the largest resident memory.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import duckdb
import psutil

from flm_torchrec.prepare import sql
from flm_torchrec.prepare.engine import DuckEngine
from flm_torchrec.prepare.memory import memory_bytes

SAMPLE = 0.05
"""Seconds between two samples of the memory."""


@dataclass(frozen=True)
class Cost:
    """Time and memory of a process."""

    seconds: float
    peak: int  # bytes, resident


def make(folder: Path, rows: int, files: int, form: str) -> None:
    """Write logs of user, item, timestamp and event, with a user per 50 rows and an item per 500, by Zipf's law."""
    ready = folder / f"{form}-{rows}-{files}.made"
    if ready.exists():
        return
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    users, items, each = max(10, rows // 50), max(10, rows // 500), -(-rows // files)

    def chance(salt: int) -> str:
        return f"(hash(n * 4 + {salt})::DOUBLE / 18446744073709551616)"

    with duckdb.connect(config={"memory_limit": "2GiB"}) as engine:
        engine.execute("SET preserve_insertion_order = false")
        for number in range(files):
            span = f"range({number * each}, {min(rows, (number + 1) * each)})"
            file = sql.target(folder / f"part-{number:03d}.{form}")
            # pow(count, chance) - 1 has a density that falls as 1 / x.
            engine.execute(
                f"COPY (SELECT 'u' || pow({users}, {chance(1)})::BIGINT AS user_id,"
                f" 'i' || pow({items}, {chance(2)})::BIGINT AS item_id,"
                f" 1600000000 + floor({chance(3)} * 31536000)::BIGINT AS timestamp,"
                f" CASE WHEN {chance(4)} < 0.9 THEN 'view' ELSE 'buy' END AS event"
                f" FROM {span} AS t(n)) TO {file}"
            )
    ready.touch()


def floor(folder: Path, form: str, memory: int, threads: int, output: Path) -> None:
    """Only read and write."""
    with DuckEngine(memory, threads, output) as engine:
        engine.connection.execute(
            f"COPY (SELECT user_id, item_id, timestamp, event FROM {sql.text(f'{folder}/*.{form}')})"
            f" TO {sql.target(output / 'floor.parquet')}"
        )


def watch(command: list[str]) -> Cost:
    """Run a command; its time, and the largest memory of it and its children together."""
    began, peak = time.monotonic(), 0
    process = psutil.Popen(command)
    while process.poll() is None:
        try:
            tree = [process, *process.children(recursive=True)]
            peak = max(peak, sum(p.memory_info().rss for p in tree))
        except psutil.NoSuchProcess:
            pass  # ended between two samples
        time.sleep(SAMPLE)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)
    return Cost(time.monotonic() - began, peak)


def main() -> None:
    """Make the logs, measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="where logs and outputs go")
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--files", type=int, default=10)
    parser.add_argument("--format", choices=("parquet", "csv"), default="parquet")
    parser.add_argument("--memory", default="2GiB")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", choices=("make", "floor"), help="do this and no more")
    parser.add_argument("--options", default="--dedup exact --k-core 2", help="of flm prepare")
    args = parser.parse_args()
    logs, output = args.folder / "logs", args.folder / "out"
    if args.only == "floor":
        return floor(logs, args.format, memory_bytes(args.memory, 1), args.threads, output)
    make(logs, args.rows, args.files, args.format)
    if args.only == "make":
        return None
    shutil.rmtree(output, ignore_errors=True)
    output.mkdir()
    again = [sys.executable, __file__, *sys.argv[1:], "--only", "floor"]
    lower = watch(again)
    shutil.rmtree(output)
    limits = ["--memory", args.memory, "--threads", str(args.threads)]
    columns = "user=user_id,item=item_id,timestamp=timestamp,event=event"
    source = ["--source", args.format, "--input", str(logs), "--output", str(output), "--columns", columns]
    flm = [sys.executable, "-m", "flm_torchrec", "prepare"]
    prepared = watch([*flm, *source, *limits, *args.options.split()])
    shutil.rmtree(output)
    for title, cost in (("scan and write", lower), ("flm prepare", prepared)):
        speed = f"{args.rows / cost.seconds:12,.0f} rows/s {cost.seconds:8.1f} s"
        print(f"{title:15} {speed}  peak {cost.peak / 2**30:.2f} GiB")
    print(f"ratio {lower.seconds / prepared.seconds:.3f} of the floor; --memory {args.memory}, {args.threads} threads")
    return None


if __name__ == "__main__":
    main()
