"""Which data a run was made with, known by fingerprint and never by path, and where these data are now."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from flm_torchrec.config import Config, load_config
from flm_torchrec.data.dataset import PreparedData, fingerprint_of, fingerprints_before
from flm_torchrec.data.schema import Schema
from flm_torchrec.errors import RunError
from flm_torchrec.folders import CONFIG, PUSHED, SCHEMA, kind_of

VOCABULARY = "vocabulary"
"""Folder of a run: what the rows of its tables stand for."""
FINGERPRINT = f"{VOCABULARY}/fingerprint"
STARTED_IN = "started_in"
"""File of a run: the folder that relative paths of its config start from."""


def open_run(run: Path, overrides: Sequence[str] = ()) -> Config:
    """The config of a run that has a best model, with the paths at which its data and its source are now.

    Args:
        overrides: of the config. If `data.path` is among them, the data must be there.

    Raises:
        RunError: no run folder, no best model yet, data that are not there or are not those of the run.
    """
    check_has_model(run)
    config = read_config(run, overrides)
    path = own_data(run, config, given=any(override.startswith("data.path=") for override in overrides))
    return replace(config, data=replace(config.data, path=str(path)))


def read_config(run: Path, overrides: Sequence[str] = ()) -> Config:
    """The config of a run, with the path at which the run that it was fine-tuned from is now.

    Raises:
        FlmError: the config is no config, or there is no such run.
    """
    config = load_config(run / CONFIG, overrides)
    if not config.finetune.source or any(override.startswith("finetune.source=") for override in overrides):
        return config
    source = _source(_candidates(run, config.finetune.source), run)
    return replace(config, finetune=replace(config.finetune, source=str(source)))


def check_has_model(run: Path) -> None:
    """Raise RunError unless it is a run folder with a best model; the message says how to get one."""
    # Imported here: PyTorch takes seconds to load, and 'flm report' asks only for the data.
    from flm_torchrec.training.checkpoint.manager import BEST
    from flm_torchrec.training.checkpoint.storage import read_meta

    check_is_run(run)
    if not (run / BEST).exists():
        command = f"'flm train --config {run / 'config.yaml'} --train.run {run} --train.existing resume'"
        if load_config(run / CONFIG).finetune.source:
            command = "the 'flm finetune' that began it and --train.existing resume"
        raise RunError(f"{run}: stopped before its first validation, so it has no best model yet; go on with {command}")
    read_meta(run / BEST)


def check_is_run(run: Path) -> None:
    """Raise RunError unless it is a run folder; the message says what it is, or how to get one."""
    kind = kind_of(run)
    if kind == PUSHED:
        raise RunError(f"{run}: is {kind}, not a run; make a run of it with 'flm pull {run} RUN'")
    if (run / CONFIG).is_file():
        return
    if kind:
        raise RunError(
            f"{run}: no config.yaml, so no run folder: it is {kind}; give a folder of 'flm train --train.run'"
        )
    inner = [str(file.parent) for file in sorted(run.glob(f"*/{CONFIG}"))]
    mend = f"give one of {', '.join(inner)}" if inner else f"make one with 'flm train --train.run {run}'"
    raise RunError(f"{run}: no config.yaml, so no run folder; {mend}")


def made_with(run: Path) -> str:
    """Fingerprint of the data that a run was made with.

    Raises:
        RunError: the run has none.
    """
    try:
        return (run / FINGERPRINT).read_text(encoding="ascii")
    except (OSError, UnicodeDecodeError) as error:
        raise RunError(f"{run / FINGERPRINT}: not readable ({error}); train anew, or copy the run anew") from error


def refuse_forgotten(run: Path, data: Path) -> None:
    """Raise RunError where the data are those of the run, but users were forgotten in the data and not in the run."""
    if made_with(run) in fingerprints_before(data):
        raise RunError(
            f"{run}: users were forgotten from {data} and not from this run; bring it up to date with"
            f" 'flm forget --data {data} --run {run}'"
        )


def has_ids_of(run: Path, data: Path, fingerprint: str) -> bool:
    """Whether ids mean the same in the data of a run and in prepared data with this fingerprint.

    Forgetting users moves no ids, so the fingerprints before it count as well.
    """
    return made_with(run) in (fingerprint, *fingerprints_before(data))


def of_one_domain(run: Path, data: PreparedData) -> bool:
    """Whether a key names the same user or item in prepared data and in the data of a run.

    Keys of two domains may be equal by chance. So the data must be those of the run, or have their name and source.
    """
    schema = Schema.load(run / VOCABULARY / SCHEMA)
    same_name = (schema.name, schema.source) == (data.schema.name, data.schema.source)
    return same_name or has_ids_of(run, data.path, data.fingerprint)


def own_data(run: Path, config: Config, given: bool = False) -> Path:
    """Where the data that a run was made with are now.

    Args:
        given: the user gave `data.path` of the config, so the data must be there.

    Raises:
        RunError: no data are there, or other data.
    """
    wanted = made_with(run)
    paths = [Path(config.data.path)] if given else _candidates(run, config.data.path)
    there = [path for path in paths if (path / SCHEMA).is_file()]
    for path in there:
        if fingerprint_of(path) == wanted:
            return path
    if not there:
        raise RunError(f"{run}: its data are not at {paths[0]}; say where they are now with --data.path")
    for path in there:
        refuse_forgotten(run, path)
    raise RunError(
        f"{run}: made with other data than {there[0]} holds now, so its rows would stand for other users and items;"
        " name a folder with its own data with --data.path, or go on with the new data:"
        f" 'flm train --train.warm_start {run} --data.path {there[0]} --train.run NEW'"
    )


def _source(paths: Sequence[Path], run: Path) -> Path:
    for path in paths:
        if (path / CONFIG).is_file():
            return path
    raise RunError(
        f"{run}: the run that it was fine-tuned from is not at {paths[0]}; put it back there, or set"
        f" finetune.source in {run / 'config.yaml'}"
    )


def _candidates(run: Path, path: str) -> list[Path]:
    """Where a path of a run's config may lead: from here, from where the run was started, or from the run's folder.

    The last finds data that were moved together with the run.
    """
    paths = [Path(path)]
    file = run / STARTED_IN
    if file.is_file():
        start = Path(file.read_text(encoding="utf-8"))
        began = load_config(run / CONFIG).train.run
        paths += [start / path, run / os.path.relpath(start / path, start / began)]
    return list(dict.fromkeys(paths))
