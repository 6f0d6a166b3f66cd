"""What rank 0 writes while a run trains: log, metrics.jsonl, trackers, progress bar."""

from __future__ import annotations

import json
import logging
import time
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from flm_torchrec.errors import Interrupted, RunError
from flm_torchrec.files import telling, write_text
from flm_torchrec.safe_text import redact, visible
from flm_torchrec.terminal import PlainConsole
from flm_torchrec.training.trackers import Trackers


class RunLogger(AbstractContextManager["RunLogger"]):
    """Writes on rank 0; on the other ranks `folder` is None and every call does nothing."""

    def __init__(
        self, folder: Path | None, steps: int, resumed: bool = False, trackers: Trackers | None = None
    ) -> None:
        self.folder = folder
        self.resumed = resumed
        if folder is None:
            return
        self.started = time.monotonic()
        self.metrics = (folder / "metrics.jsonl").open("a", encoding="utf-8")
        self.trackers = trackers
        self.summary: dict[str, float] = {}
        self.console = PlainConsole()
        self.log = logging.Logger("flm_torchrec")
        handler = LogFile(folder / "train.log")
        handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
        self.log.addHandler(handler)
        self.progress = Progress(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[status]}", markup=False),
            console=self.console,
            disable=not self.console.is_terminal,
        )
        self.task = self.progress.add_task("train", total=steps, status="")
        self.progress.start()

    def step(self, step: int, status: str) -> None:
        """Move the progress bar to a step, with a line of text beside it."""
        if self.folder is not None:
            self.progress.update(self.task, completed=step, status=status)

    def rewind(self, step: int) -> None:
        """Drop the lines after the step from which a run resumes, and the tests: they will be written again."""
        if self.folder is None:
            return
        with telling(self.folder, RESUME):
            self._rewind(self.folder / "metrics.jsonl", step)

    def _rewind(self, file: Path, step: int) -> None:
        lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
        kept = [
            line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step and "test/" not in line
        ]
        self.metrics.close()
        write_text(file, "".join(kept))
        self.metrics = file.open("a", encoding="utf-8")
        self.started -= json.loads(kept[-1])["seconds"] if kept else 0.0
        if self.trackers is not None:
            self.trackers.rewind(step)

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """Write a line of metrics.jsonl, and tell the trackers."""
        if self.folder is None:
            return
        line = {"step": step, "seconds": round(time.monotonic() - self.started, 3), **values}
        with telling(self.folder, RESUME):
            self.metrics.write(json.dumps(line) + "\n")
            self.metrics.flush()
        if self.trackers is not None:
            self.trackers.metrics(step, values)
            self._tell_problems(self.trackers)

    def best(self, step: int, values: dict[str, float]) -> None:
        """The values that trackers are to know the run by: those of its best model."""
        self.summary = {"best/step": step, **{f"best/{name}": value for name, value in values.items()}}

    def _tell_problems(self, trackers: Trackers) -> None:
        for problem in trackers.problems():
            self.say(problem)

    def say(self, text: str) -> None:
        """Write a line to the log and to the terminal."""
        if self.folder is not None:
            text = visible(redact(text))
            with telling(self.folder, RESUME):
                self.log.info(text)
            self.console.print(text, soft_wrap=True)

    def write_json(self, name: str, content: dict[str, Any]) -> None:
        """Write a file of the run folder."""
        if self.folder is not None:
            with telling(self.folder, RESUME):
                write_text(self.folder / name, json.dumps(content, indent=2))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.folder is None:
            return
        if error is not None:
            with suppress(OSError):  # a full disk; `error` already says so
                self.log.error("stopped by %s: %s", type(error).__name__, visible(redact(str(error))))
        self.progress.stop()
        try:
            self.metrics.close()
            self._finish_trackers(error)
        except (OSError, RunError):
            if error is None:
                raise

    def _finish_trackers(self, error: BaseException | None) -> None:
        if self.trackers is not None:
            stopped = isinstance(error, Interrupted | KeyboardInterrupt)
            self.trackers.finish("stopped" if stopped else "finished" if error is None else "failed", self.summary)
            self._tell_problems(self.trackers)


RESUME = "go on with --train.existing resume"


class LogFile(logging.FileHandler):
    """Raises the error of the disk, where `logging` would print a traceback for each line."""

    def handleError(self, record: logging.LogRecord) -> None:
        """Raise the error that is being handled."""
        raise
