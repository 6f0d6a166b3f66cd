"""A training in a process of its own, for what trains many runs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Protocol

from flm_torchrec.config import Config, to_yaml
from flm_torchrec.files import write_text

FLM = (sys.executable, "-m", "flm_torchrec")
"""The `flm` of this interpreter."""


class Process(Protocol):
    """A running process, such as `subprocess.Popen`."""

    def poll(self) -> int | None:
        """Exit code; None while it runs."""

    def send_signal(self, number: int) -> None:
        """Send a signal, unless it has ended."""

    def kill(self) -> None:
        """End it at once."""


def train_command(config: Config, file: Path, threads: int) -> list[str]:
    """The command that trains a config, which is written to a file."""
    write_text(file, to_yaml(config))
    return [*FLM, "train", "--config", str(file), "--distributed.threads", str(threads)]


def threads_of(jobs: int) -> int:
    """Threads for each of several processes that share the machine's cores."""
    return max(1, len(os.sched_getaffinity(0)) // jobs)


def launch(command: list[str], log: Path) -> Process:
    """Start a command; its output is added to a log."""
    with log.open("a", encoding="utf-8") as output:
        return subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL)
