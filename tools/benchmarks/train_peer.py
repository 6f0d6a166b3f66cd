"""How bench_train.py speaks to the trainers that it compares, each in a process of its own: JSON lines both ways.

Only the standard library is imported here, because one of them has an environment of its own.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from typing import Any, Protocol


class Trainer(Protocol):
    """One way to train a sequential recommender. Other methods may be asked for by name too."""

    def steps(self, count: int) -> tuple[int, int]:
        """Take steps of training, input included; the sequences and the targets that were learnt from."""

    def validate(self) -> float:
        """NDCG@10 on validation, the whole catalogue ranked."""


def serve(trainer: Trainer) -> None:
    """Answer requests on the standard input until it ends; whatever else is printed goes to the standard error."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        request = json.loads(line)
        before, cpu = time.perf_counter(), time.process_time()
        found = getattr(trainer, request.pop("do"))(**request)
        seconds, cpu = time.perf_counter() - before, time.process_time() - cpu
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        print(json.dumps({"found": found, "seconds": seconds, "cpu": cpu, "peak_mib": peak}), file=answers, flush=True)


def specification() -> dict[str, Any]:
    """What bench_train.py says the trainer shall be, as JSON in the first argument.

    Raises:
        SystemExit: called by hand; `--help` says who calls it.
    """
    if len(sys.argv) < 2 or not sys.argv[1].startswith("{"):
        print(f"{sys.argv[0]}: one of the trainers that tools/benchmarks/train.py starts and compares; call that one")
        raise SystemExit(0 if sys.argv[1:] in (["-h"], ["--help"]) else 2)
    return json.loads(sys.argv[1])
