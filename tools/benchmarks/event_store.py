"""Events a second that are on the disk before they are acknowledged: SQLite beside a plain log file that only grows.

    python tools/benchmarks/event_store.py --folder /tmp --seconds 3

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
from pathlib import Path

import numpy as np

from flm_torchrec.serve.event_store import EventStore, LiveEvent

USERS, TOGETHER, ROUNDS = 1000, 16, 5


def by_store(store: EventStore, count: int, number: int) -> None:
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


def read(store: EventStore, number: int) -> None:
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
    parser.add_argument("--seconds", type=float, default=3.0, help="for each way")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        store = EventStore(Path(folder) / "events.sqlite")
        log = os.open(Path(folder) / "events.jsonl", os.O_CREAT | os.O_APPEND | os.O_WRONLY)
        ways: dict[str, tuple[int, Callable[[int], None]]] = {
            "log, one event a flush": (1, lambda n: by_log(log, 1, n)),
            "SQLite, one event a commit": (1, lambda n: by_store(store, 1, n)),
            f"log, {TOGETHER} events a flush": (TOGETHER, lambda n: by_log(log, TOGETHER, n)),
            f"SQLite, {TOGETHER} events a commit": (TOGETHER, lambda n: by_store(store, TOGETHER, n)),
            "SQLite, reading 50 events of a user": (1, lambda n: read(store, n)),
        }
        found: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(ROUNDS):
            for name, (_, act) in ways.items():
                found[name].append(rate(act, args.seconds / ROUNDS))
        for name, (count, _) in ways.items():
            print(f"{name:36} {count * float(np.median(found[name])):9.0f} a second")
        store.close()
        os.close(log)


if __name__ == "__main__":
    main()
