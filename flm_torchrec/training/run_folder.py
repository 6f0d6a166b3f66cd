"""The folder of a run: who may write it, whether a run resumes in it, and the files that it begins with."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from flm_torchrec.claim import claim
from flm_torchrec.config import Config, load_config, to_yaml
from flm_torchrec.data.dataset import PreparedData
from flm_torchrec.distributed.comm import Comm
from flm_torchrec.errors import RunError
from flm_torchrec.files import replacing, telling, write_text
from flm_torchrec.folders import CONFIG
from flm_torchrec.training.checkpoint.storage import refuse_other_data
from flm_torchrec.training.identity import FINGERPRINT, STARTED_IN, made_with, refuse_forgotten
from flm_torchrec.training.logger import RunLogger
from flm_torchrec.training.trackers import About, Trackers

ANOTHER_RUN = "give another --train.run"
FREE = (
    "distributed",
    "eval",
    "data.path",
    "train.run",
    "train.existing",
    "train.log_every",
    "train.trackers",
    "train.checkpoint_every",
    "train.non_finite",
)
"""Sections and settings that may change when a run resumes; data are compared by fingerprint."""


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
    """Whether to resume in the run folder, rather than make a new one; collective.

    Raises:
        RunError: the folder is in use, or holds a run with other settings than those to resume with.
    """
    restarted = comm.has_flag(_opened(config))
    return comm.on_main(lambda: resumes(config, restarted))


def _opened(config: Config) -> str:
    """Name of the flag that tells later attempts of the launcher that the run folder is this job's own."""
    return f"opened {Path(config.train.run).resolve()}"


def resumes(config: Config, restarted: bool) -> bool:
    """Whether to resume in the run folder, on one process; see `check_run_folder`.

    Args:
        restarted: the folder is this job's own.
    """
    folder = Path(config.train.run)
    if folder.exists() and not folder.is_dir():
        raise RunError(f"{folder}: is a file; give another --train.run")
    if not folder.exists() or not any(folder.iterdir()):
        return False
    if not (folder / CONFIG).is_file():
        raise RunError(f"{folder}: exists and is no run folder, so it is not replaced; give another --train.run")
    if restarted:
        return True
    if config.train.existing == "refuse":
        raise RunError(
            f"{folder}: exists; give another --train.run, or --train.existing replace to start anew, resume to go on"
        )
    if config.train.existing == "replace":
        return False
    if changed := _changed(load_config(folder / CONFIG), config):
        raise RunError(
            f"{folder}: was made with {changed}; resume with the same settings, or start anew with --train.existing"
            " replace"
        )
    return True


def _changed(made: Config, config: Config) -> str:
    """The first setting that differs and is not FREE, with both values; empty if there is none."""
    now = config.by_name()
    for name, value in made.by_name().items():
        if name not in FREE and name.partition(".")[0] not in FREE and now[name] != value:
            return f"{name} {value}, not {now[name]}"
    return ""


def open_run_folder(config: Config, data: PreparedData, comm: Comm, steps: int) -> RunLogger:
    """The logger of a run in its folder, which is a new one or the old one as `check_run_folder` says; collective.

    A new folder holds the config, and the vocabulary: what the rows of the tables stand for. The job must have
    `claimed` the folder before.

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
            write_text(folder / CONFIG, to_yaml(config))
            return
        with replacing(folder) as fresh:
            data.save_vocabulary(fresh / "vocabulary")
            (fresh / FINGERPRINT).write_text(data.fingerprint, encoding="ascii")
            (fresh / STARTED_IN).write_text(str(Path.cwd()), encoding="utf-8")
            (fresh / CONFIG).write_text(to_yaml(config), encoding="utf-8")

    loggers: list[RunLogger] = []

    def begin() -> None:
        with telling(folder, ANOTHER_RUN):
            make()
            about = About(folder.resolve(), config.by_name(), resumed)
            loggers.append(RunLogger(folder, steps, resumed, Trackers(config.train.trackers, about)))

    comm.on_main(begin)
    comm.set_flag(_opened(config))
    blind = [rank for rank, sees in enumerate(comm.gather((folder / CONFIG).is_file())) if not sees]
    if blind:
        raise RunError(f"{folder}: not seen by rank {blind[0]}; --train.run must be on storage that all nodes share")
    return loggers[0] if comm.main else RunLogger(None, steps, resumed)
