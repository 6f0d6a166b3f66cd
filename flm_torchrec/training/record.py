"""What a run leaves for people: resolved config, plan, log, metrics.jsonl, TensorBoard curves, progress."""

from __future__ import annotations

import json
import logging
import shutil
import time
from contextlib import AbstractContextManager
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch.utils.tensorboard import SummaryWriter

from flm_torchrec.config import Config, to_yaml
from flm_torchrec.errors import RunError


def check_run_folder(config: Config) -> None:
    """Refuse to replace anything but an older run, and that only when asked; every rank calls it.

    Raises:
        RunError: the folder is in use.
    """
    folder = Path(config.train.run)
    if not folder.exists() or not any(folder.iterdir()):
        return
    if not (folder / "config.yaml").is_file():
        raise RunError(f"{folder}: exists and is no run folder, so it is not replaced; give another --train.run")
    if not config.train.overwrite:
        raise RunError(f"{folder}: exists; give another --train.run, or --train.overwrite true to replace it")


def new_run_folder(config: Config) -> Path:
    """Make the run folder anew, config in it; rank 0 calls it.

    Raises:
        RunError: it cannot be written.
    """
    folder = Path(config.train.run)
    try:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.yaml").write_text(to_yaml(config), encoding="utf-8")
    except OSError as error:
        raise RunError(f"{folder}: cannot be written ({error.strerror}); give another --train.run") from error
    return folder


class Record(AbstractContextManager["Record"]):
    """Writes on rank 0; on the other ranks `folder` is None and every call does nothing."""

    def __init__(self, folder: Path | None, steps: int) -> None:
        self.folder = folder
        if folder is None:
            return
        self.started = time.monotonic()
        self.metrics = (folder / "metrics.jsonl").open("a", encoding="utf-8")
        self.curves = SummaryWriter(str(folder / "tensorboard"))
        self.console = Console()
        self.log = logging.Logger("flm_torchrec")
        handler = logging.FileHandler(folder / "train.log")
        handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
        self.log.addHandler(handler)
        self.progress = Progress(
            TextColumn("step"), MofNCompleteColumn(), BarColumn(), TimeRemainingColumn(),
            TextColumn("{task.fields[status]}"), console=self.console, disable=not self.console.is_terminal,
        )  # fmt: skip
        self.task = self.progress.add_task("train", total=steps, status="")
        self.progress.start()

    def step(self, step: int, status: str) -> None:
        if self.folder is not None:
            self.progress.update(self.task, completed=step, status=status)

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """A line of metrics.jsonl and a point on each curve."""
        if self.folder is None:
            return
        line = {"step": step, "seconds": round(time.monotonic() - self.started, 3), **values}
        self.metrics.write(json.dumps(line) + "\n")
        self.metrics.flush()
        for name, value in values.items():
            self.curves.add_scalar(name, value, step)

    def say(self, text: str) -> None:
        """To the log and to the person watching."""
        if self.folder is not None:
            self.log.info(text)
            self.console.print(text, highlight=False, soft_wrap=True)

    def write_json(self, name: str, content: dict[str, Any]) -> None:
        if self.folder is not None:
            (self.folder / name).write_text(json.dumps(content, indent=2), encoding="utf-8")

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.folder is None:
            return
        if error is not None:
            self.log.error("stopped by %s: %s", type(error).__name__, error)
        self.progress.stop()
        self.metrics.close()
        self.curves.close()
