"""The protocol between tools/benchmarks/train.py and the trainers that it compares: JSON lines in both directions.

Each trainer is a process. This module imports only the standard library and NumPy, because other libraries' trainers
have environments of their own.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from collections.abc import Iterable, Iterator
from typing import Any, Protocol, TypeVar

import numpy as np

Batch = TypeVar("Batch")


class Trainer(Protocol):
    """One way to train a recommender. A trainer may have further methods, which are called by name."""

    def steps(self, count: int) -> tuple[int, int]:
        """Run training steps, input included; the number of sequences (0: it has none) and of targets."""

    def validate(self) -> float:
        """NDCG@10 on validation, ranking all items."""


class Validation:
    """What is known of each user and the item that comes next, from the file that `train.write_for_others` writes."""

    def __init__(self, file: str) -> None:
        data = np.load(file)
        self.items = int(data["items"])
        """Items are numbered from 1 to this."""
        lengths = np.diff(data["valid_offsets"])
        known = np.ones(lengths.sum(), bool)
        known[data["valid_offsets"][1:] - 1] = False
        self.user = np.repeat(np.arange(len(lengths)), lengths)[known]  # [known events]
        self.item = data["valid"][known]  # [known events]
        self.last = data["valid"][~known]  # [users]

    def ndcg(self, ranks: np.ndarray) -> float:
        """NDCG@10, given the ranks [hits] of the last items among the ten best, from 1 on."""
        return float((1 / np.log2(1 + ranks)).sum() / len(self.last))


def endless(loader: Iterable[Batch]) -> Iterator[Batch]:
    """The batches of one epoch after the other."""
    while True:
        yield from loader


def serve(trainer: Trainer) -> None:
    """Answer requests on standard input until it ends. Other output goes to standard error."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        request = json.loads(line)
        before, cpu = time.perf_counter(), time.process_time()
        result = getattr(trainer, request.pop("do"))(**request)
        seconds, cpu = time.perf_counter() - before, time.process_time() - cpu
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        print(
            json.dumps({"result": result, "seconds": seconds, "cpu": cpu, "peak_mib": peak}), file=answers, flush=True
        )


def specification() -> dict[str, Any]:
    """The settings of the trainer, from JSON in the first argument.

    Raises:
        SystemExit: the argument is no JSON, because a user called the module.
    """
    if len(sys.argv) < 2 or not sys.argv[1].startswith("{"):
        print(f"{sys.argv[0]}: one of the trainers that tools/benchmarks/train.py starts and compares; call that one")
        raise SystemExit(0 if sys.argv[1:] in (["-h"], ["--help"]) else 2)
    return json.loads(sys.argv[1])
