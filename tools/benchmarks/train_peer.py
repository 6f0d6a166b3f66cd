"""The protocol between tools/benchmarks/train.py and the trainers that it compares: JSON lines in both directions.

Each trainer is a process. This module imports only the standard library, because RecBole has its own environment.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from typing import Any, Protocol


class Trainer(Protocol):
    """One way to train a sequential recommender. A trainer may have further methods, which are called by name."""

    def steps(self, count: int) -> tuple[int, int]:
        """Run training steps, input included; the number of sequences and of targets."""

    def validate(self) -> float:
        """NDCG@10 on validation, ranking all items."""


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
