"""`torchrun ARGUMENTS`, but its agent forks the ranks, as it has imported what they import. To be run by `Forked`."""

from __future__ import annotations

import multiprocessing
import multiprocessing.popen_fork
import os
import signal
import sys

from torch.distributed import run
from torch.distributed.elastic.multiprocessing.subprocess_handler import subprocess_handler

from tests.processes import begin

HANDLED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)
"""The agent has handlers for them, which a forked process would keep."""


class Rank(multiprocessing.popen_fork.Popen):
    """In the place of the `subprocess.Popen` of a rank, whose output is that of the agent."""

    def __init__(self, args: tuple[str, ...], env: dict[str, str], start_new_session: bool, **streams: None) -> None:
        assert args[:2] == (sys.executable, "-u") and start_new_session and not any(streams.values())
        super().__init__(multiprocessing.Process(target=_begin, args=(list(args[2:]), env)))


def _begin(arguments: list[str], environment: dict[str, str]) -> None:
    os.setsid()
    for number in HANDLED:
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    begin(arguments, environment)


if __name__ == "__main__":
    subprocess_handler.Popen = Rank  # type: ignore[misc,assignment]
    run.main(sys.argv[1:])
