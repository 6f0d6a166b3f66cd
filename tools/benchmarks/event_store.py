"""Events a second that are on the disk before they are acknowledged: SQLite beside a plain log file that only grows.

    python tools/benchmarks/event_store.py --folder /tmp --seconds 3
    python tools/benchmarks/event_store.py --also redis://127.0.0.1/9     # beside it an empty database of a server too

Both take one event, or 16 that came together, in one write and one flush. Reading: the last 50 events of one of 1,000
users, which a plain log has only in a memory beside it. Rounds of all are interleaved in one run.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np

from flm_torchrec.serve.event_store import LiveEvent
from flm_torchrec.serve.live_store import LiveStore, open_store

USERS, TOGETHER, ROUNDS = 1000, 16, 5


def by_store(store: LiveStore, count: int, number: int) -> None:
    """One transaction of `count` events."""
    with store.writing() as transaction:
        for n in range(count):
            user = f"user{(number * count + n) % USERS}"
            transaction.add_event(user, LiveEvent(f"item{n}", "view", 1.0, number, "export"))


def by_log(log: int, count: int, number: int) -> None:
    """One write of `count` lines."""
    lines = [
        json.dumps({"user": f"user{(number * count + n) % USERS}", "item": f"item{n}", "timestamp": number})
        for n in range(count)
    ]
    os.write(log, "".join(line + "\n" for line in lines).encode())
    os.fsync(log)


def read(store: LiveStore, number: int) -> None:
    """The last events of one user."""
    store.events_of(f"user{number % USERS}", 50)


def rate(act: Callable[[int], None], seconds: float) -> float:
    """Acts a second."""
    began, done = time.perf_counter(), 0
    while time.perf_counter() - began < seconds:
        act(done)
        done += 1
    return done / (time.perf_counter() - began)


def main() -> None:
    """Measure, and print a line for each way."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="on the disk to measure (default: that of temporary files)")
    parser.add_argument(
        "--also", metavar="ADDRESS", help="of a database, as of 'flm serve --events'; it keeps the events"
    )
    parser.add_argument("--seconds", type=float, default=3.0, help="for each way")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        stores = {"SQLite": open_store(str(Path(folder) / "events.sqlite"))}
        if args.also:
            stores[args.also.partition(":")[0]] = open_store(args.also)
        log = os.open(Path(folder) / "events.jsonl", os.O_CREAT | os.O_APPEND | os.O_WRONLY)
        ways: dict[str, tuple[int, Callable[[int], None]]] = {
            "log, one event a flush": (1, lambda n: by_log(log, 1, n)),
            f"log, {TOGETHER} events a flush": (TOGETHER, lambda n: by_log(log, TOGETHER, n)),
        }
        for name, store in stores.items():
            ways[f"{name}, one event a commit"] = 1, partial(by_store, store, 1)
            ways[f"{name}, {TOGETHER} events a commit"] = TOGETHER, partial(by_store, store, TOGETHER)
            ways[f"{name}, reading 50 events of a user"] = 1, partial(read, store)
        found: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(ROUNDS):
            for name, (_, act) in ways.items():
                found[name].append(rate(act, args.seconds / ROUNDS))
        for name, (count, _) in ways.items():
            print(f"{name:36} {count * float(np.median(found[name])):9.0f} a second")
        for store in stores.values():
            store.close()
        os.close(log)


if __name__ == "__main__":
    main()
