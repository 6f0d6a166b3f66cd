"""One trial: a training in a process of its own, and its validations as they are written."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Event

from flm_torchrec.claim import InUse, claim
from flm_torchrec.config import Config
from flm_torchrec.documents import Unreadable, parse_json
from flm_torchrec.errors import Interrupted
from flm_torchrec.tuning.process import Process, train_command

POLL = 0.5
"""Seconds between two looks at a training."""
PATIENCE = 600.0
"""Seconds that a training has to save its state and end after it was asked to."""
Launch = Callable[[list[str], Path], Process]


@dataclass(frozen=True)
class TrialRun:
    """The training of a trial."""

    config: Config
    threads: int
    launch: Launch

    @property
    def folder(self) -> Path:
        """The run folder. Config and output of the process lie beside it."""
        return Path(self.config.train.run)

    @property
    def log(self) -> Path:
        """What the process prints."""
        return self.folder.with_suffix(".log")

    def validations(self) -> list[float]:
        """The value of `train.select` at each validation up to now."""
        with suppress(OSError):
            lines = (self.folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
            return list(self._values(lines))
        return []

    def _values(self, lines: list[str]) -> Iterator[float]:
        name = f"valid/{self.config.train.select}"
        for line in lines:
            if line.endswith("\n") and f'"{name}"' in line:
                with suppress(Unreadable):
                    yield parse_json(line)[name]

    def run(self, watch: Callable[[list[float]], bool], stop: Event) -> int:
        """Train, or go on from the newest checkpoint, and give the exit code.

        Args:
            watch: given the validations whenever there are more; False: the training is of no use and is to end.
            stop: set when all is to end.

        Raises:
            Interrupted: `stop` was set; the training has saved its state.
        """
        self._wait_until_free(stop)
        command = train_command(self.config, self.folder.with_suffix(".yaml"), self.threads)
        process = self.launch(command, self.log)
        seen, wanted = 0, True
        while process.poll() is None:
            values = self.validations()
            if len(values) > seen:
                seen, wanted = len(values), watch(values)
            if not wanted or stop.is_set():
                _end(process)
            else:
                time.sleep(POLL)
        code = process.poll()
        assert code is not None
        if stop.is_set() and code:
            raise Interrupted("stopped as asked")
        return code

    def _wait_until_free(self, stop: Event) -> None:
        """Wait for a training that has outlived a search that was killed."""
        while not stop.is_set():
            with suppress(InUse), claim(self.folder):
                return
            time.sleep(POLL)
        raise Interrupted("stopped as asked")

    def problem(self) -> str:
        """The error that the process has printed last."""
        with suppress(OSError):
            lines = self.log.read_text(encoding="utf-8", errors="replace").splitlines()
            errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
            return errors[-1] if errors else f"see {self.log}"
        return f"see {self.log}"


def _end(process: Process) -> None:
    """Ask a training to save its state and to end; end it at once if it does not."""
    process.send_signal(signal.SIGTERM)
    until = time.monotonic() + PATIENCE
    while process.poll() is None:
        if time.monotonic() > until:
            process.kill()
        time.sleep(POLL)
