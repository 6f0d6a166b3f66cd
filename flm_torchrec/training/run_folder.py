"""What a run leaves for people: resolved config, plan, log, metrics.jsonl, TensorBoard curves, progress."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch.utils.tensorboard import SummaryWriter

from flm_torchrec.claim import claim
from flm_torchrec.config import Config, load_config, to_yaml
from flm_torchrec.data.dataset import PreparedData
from flm_torchrec.distributed.comm import Comm
from flm_torchrec.errors import RunError
from flm_torchrec.files import replacing, telling, write_text
from flm_torchrec.safe_text import redact, visible
from flm_torchrec.terminal import PlainConsole
from flm_torchrec.training.checkpoint.storage import refuse_other_data
from flm_torchrec.training.identity import FINGERPRINT, STARTED_IN, made_with, refuse_forgotten

ANOTHER_RUN = "give another --train.run"
GO_ON = "go on with --train.existing resume"
FREE = (
    "distributed", "eval", "data.path", "train.run", "train.existing", "train.log_every", "train.checkpoint_every",
    "train.non_finite",
)  # fmt: skip
"""Sections and settings that a resumed run may have otherwise than it began; data are compared by fingerprint."""


@contextmanager
def claimed(run: str | Path, comm: Comm, instead: str = ANOTHER_RUN) -> Iterator[None]:
    """Keep other jobs from training in a run folder; rank 0 claims it for all ranks. Collective.

    Raises:
        InUse: another job has it; on every rank.
    """
    with ExitStack() as held:
        comm.on_main(lambda: held.enter_context(claim(Path(run), instead)))
        yield


def check_run_folder(config: Config, comm: Comm) -> bool:
    """Whether to go on in the run folder, rather than to make it anew; collective.

    Raises:
        RunError: the folder is in use, or holds a run with other settings than those to resume with.
    """
    again = comm.remembers(_opened(config))
    return comm.on_main(lambda: _goes_on(config, again))


def _opened(config: Config) -> str:
    """What an attempt leaves to those that the launcher starts after it: that the run folder is this job's own."""
    return f"opened {Path(config.train.run).resolve()}"


def _goes_on(config: Config, again: bool) -> bool:
    folder = Path(config.train.run)
    if folder.exists() and not folder.is_dir():
        raise RunError(f"{folder}: is a file; give another --train.run")
    if not folder.exists() or not any(folder.iterdir()):
        return False
    if not (folder / "config.yaml").is_file():
        raise RunError(f"{folder}: exists and is no run folder, so it is not replaced; give another --train.run")
    if again:
        return True
    if config.train.existing == "refuse":
        raise RunError(
            f"{folder}: exists; give another --train.run, or --train.existing replace to start anew, resume to go on"
        )
    if config.train.existing == "replace":
        return False
    if changed := _changed(load_config(folder / "config.yaml"), config):
        raise RunError(
            f"{folder}: was made with {changed}; resume with the same settings, or start anew with --train.existing"
            " replace"
        )
    return True


def _changed(made: Config, config: Config) -> str:
    """The first setting that makes it another run, with both values; empty if there is none."""
    for section, content in asdict(made).items():
        for name, value in content.items():
            given = getattr(getattr(config, section), name)
            if f"{section}.{name}" not in FREE and section not in FREE and given != value:
                return f"{section}.{name} {value}, not {given}"
    return ""


def open_run_folder(config: Config, data: PreparedData, comm: Comm, steps: int) -> Record:
    """The record of a run in its folder, made anew or gone on with as `check_run_folder` says; collective.

    A new folder has the config in it and the vocabulary, what the rows of the tables stand for. The job has `claimed`
    the folder before.

    Raises:
        RunError: it cannot be written, or some rank does not see it.
    """
    folder = Path(config.train.run)
    resumed = check_run_folder(config, comm)

    def make() -> None:
        if resumed:
            refuse_forgotten(folder, data.path)
            refuse_other_data(folder, made_with(folder), data.fingerprint)
            write_text(folder / STARTED_IN, str(Path.cwd()))
            write_text(folder / "config.yaml", to_yaml(config))
            return
        with replacing(folder) as fresh:
            data.save_vocabulary(fresh / "vocabulary")
            (fresh / FINGERPRINT).write_text(data.fingerprint, encoding="ascii")
            (fresh / STARTED_IN).write_text(str(Path.cwd()), encoding="utf-8")
            (fresh / "config.yaml").write_text(to_yaml(config), encoding="utf-8")

    records: list[Record] = []

    def begin() -> None:
        with telling(folder, ANOTHER_RUN):
            make()
            records.append(Record(folder, steps, resumed))

    comm.on_main(begin)
    comm.remember(_opened(config))
    blind = [rank for rank, sees in enumerate(comm.gather((folder / "config.yaml").is_file())) if not sees]
    if blind:
        raise RunError(f"{folder}: not seen by rank {blind[0]}; --train.run must be on storage that all nodes share")
    return records[0] if comm.main else Record(None, steps, resumed)


class Record(AbstractContextManager["Record"]):
    """Writes on rank 0; on the other ranks `folder` is None and every call does nothing."""

    def __init__(self, folder: Path | None, steps: int, resumed: bool = False) -> None:
        self.folder = folder
        self.resumed = resumed
        if folder is None:
            return
        self.started = time.monotonic()
        self.metrics = (folder / "metrics.jsonl").open("a", encoding="utf-8")
        self.curves = SummaryWriter(str(folder / "tensorboard"))
        self.console = PlainConsole()
        self.log = logging.Logger("flm_torchrec")
        handler = _LogFile(folder / "train.log")
        handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
        self.log.addHandler(handler)
        self.progress = Progress(
            TextColumn("step"), MofNCompleteColumn(), BarColumn(), TimeRemainingColumn(),
            TextColumn("{task.fields[status]}", markup=False),
            console=self.console, disable=not self.console.is_terminal,
        )  # fmt: skip
        self.task = self.progress.add_task("train", total=steps, status="")
        self.progress.start()

    def step(self, step: int, status: str) -> None:
        if self.folder is not None:
            self.progress.update(self.task, completed=step, status=status)

    def rewind(self, step: int) -> None:
        """Forget what was recorded after the step that a resumed run goes on from, and tests; they come again."""
        if self.folder is None:
            return
        with telling(self.folder, GO_ON):
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
        self.curves.close()
        self.curves = SummaryWriter(str(file.parent / "tensorboard"), purge_step=step + 1)

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """A line of metrics.jsonl and a point on each curve."""
        if self.folder is None:
            return
        line = {"step": step, "seconds": round(time.monotonic() - self.started, 3), **values}
        with telling(self.folder, GO_ON):
            self.metrics.write(json.dumps(line) + "\n")
            self.metrics.flush()
            for name, value in values.items():
                self.curves.add_scalar(name, value, step)

    def say(self, text: str) -> None:
        """To the log and to the person watching."""
        if self.folder is not None:
            text = visible(redact(text))
            with telling(self.folder, GO_ON):
                self.log.info(text)
            self.console.print(text, soft_wrap=True)

    def write_json(self, name: str, content: dict[str, Any]) -> None:
        if self.folder is not None:
            with telling(self.folder, GO_ON):
                write_text(self.folder / name, json.dumps(content, indent=2))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.folder is None:
            return
        if error is not None:
            with suppress(OSError):  # a full disk, of which `error` tells
                self.log.error("stopped by %s: %s", type(error).__name__, visible(redact(str(error))))
        self.progress.stop()
        try:
            self.metrics.close()
            self.curves.close()
        except OSError:
            if error is None:
                raise
            # A full disk, of which `error` tells.


class _LogFile(logging.FileHandler):
    """Raises what the disk says, in place of a traceback on standard error for each line."""

    def handleError(self, record: logging.LogRecord) -> None:
        raise
