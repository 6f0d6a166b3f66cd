"""A run as a folder to share, and back: `flm push` and `flm pull` call this file.

The folder has no pickle: safetensors, YAML, JSON, Parquet, and a model card. docs/sharing.md describes it.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import stat
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from flm_torchrec.claim import claim
from flm_torchrec.config import first_problem, load_config
from flm_torchrec.data.schema import Schema
from flm_torchrec.documents import Unreadable, read_json
from flm_torchrec.errors import RunError
from flm_torchrec.files import make_parent, replacing, sha256, telling, write_text
from flm_torchrec.folders import CONFIG, MANIFEST, PUSHED, SCHEMA, kind_of
from flm_torchrec.training.identity import FINGERPRINT, VOCABULARY, check_has_model

FORMAT = 1
META, CARD = "meta.json", "README.md"
INSIDE = re.compile(r"(?:vocabulary/(?:vocab/)?)?[A-Za-z0-9_][\w.-]{0,200}")
"""Paths that a hub folder may hold."""
MODEL = "model."
ANOTHER = "give another folder"


class _File(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    bytes: Annotated[int, Field(ge=0)]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)
    file: str
    dtype: str
    shape: list[Annotated[int, Field(ge=0)]]


class _Manifest(BaseModel):
    """The content of manifest.json."""

    model_config = ConfigDict(extra="forbid", strict=True)
    format: int
    files: dict[str, _File]
    tensors: dict[str, Annotated[list[_Part], Field(min_length=1)]]


@contextmanager
def _one_process() -> Iterator[None]:
    """Without PyTorch's warning that there are no ranks."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        yield


@_one_process()
def push(run: str | os.PathLike[str], folder: str | os.PathLike[str], seeds: Sequence[Path] = ()) -> None:
    """Write the best model of a run as a new hub folder. It has the keys of users and items, and no events.

    Args:
        seeds: runs of the same settings with other seeds, for deviations in the model card.

    Raises:
        RunError: no run, a damaged model, a run of 'flm follow', a folder that is there already, or a run of `seeds`
            that differs in more than its seed.
    """
    from flm_torchrec.api.model_card import model_card
    from flm_torchrec.training.checkpoint import storage
    from flm_torchrec.training.checkpoint.manager import BEST
    from flm_torchrec.training.checkpoint.tensor_files import write_tensors

    run, folder = Path(run), Path(folder)
    check_has_model(run)
    _refuse_existing(folder)
    meta = storage.read_meta(run / BEST)
    if meta.get("taken"):
        raise RunError(
            f"{run}: is a run of 'flm follow', whose events are no part of a hub folder; push the run it follows"
        )
    if wrong := storage.damage(run / BEST):
        raise RunError(f"{run / BEST}: {wrong[0]}; copy the run anew")
    tensors = {n: t for n, t in storage.read_all(run / BEST).items() if n.startswith(MODEL)}
    card = model_card(run, meta, tensors, seeds)
    with telling(folder, ANOTHER), _new(folder) as fresh:
        index = write_tensors(fresh, tensors, [n for n in tensors if n.startswith(f"{MODEL}dense.")])
        shutil.copy2(run / CONFIG, fresh / CONFIG)
        shutil.copytree(run / VOCABULARY, fresh / VOCABULARY)
        write_text(fresh / META, json.dumps(meta, indent=2))
        write_text(fresh / CARD, card)
        files = {f.relative_to(fresh).as_posix(): f for f in sorted(fresh.rglob("*")) if f.is_file()}
        listed = {name: {"sha256": sha256(f), "bytes": f.stat().st_size} for name, f in files.items() if name != CARD}
        write_text(fresh / MANIFEST, json.dumps({"format": FORMAT, "files": listed, "tensors": index}, indent=1))


@_one_process()
def pull(folder: str | os.PathLike[str], run: str | os.PathLike[str]) -> None:
    """Make a new run folder of a hub folder. `flm evaluate` and `flm export` then need the prepared data of the run.

    Every file is checked before anything is written.

    Raises:
        RunError: a file is missing, changed or leaves the folder, a tensor is not as described, or the run is there.
    """
    from flm_torchrec.training.checkpoint import storage
    from flm_torchrec.training.checkpoint.manager import BEST
    from flm_torchrec.training.checkpoint.tensor_files import read_tensors

    folder, run = Path(folder), Path(run)
    _refuse_existing(run)
    manifest = _checked(folder)
    load_config(folder / CONFIG)
    Schema.load(folder / VOCABULARY / SCHEMA)
    meta = storage.read_meta(folder)
    if not isinstance(meta, dict) or meta.get("data") != _fingerprint(folder):
        raise RunError(f"{folder / META}: is of other data than {folder / FINGERPRINT}; copy the folder anew")
    tensors = read_tensors(folder, {n: [p.model_dump() for p in parts] for n, parts in manifest.tensors.items()})
    with telling(run, ANOTHER), _new(run) as fresh:
        for name in manifest.files:
            if name == CONFIG or name.startswith(f"{VOCABULARY}/"):
                (fresh / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(folder / name, fresh / name)
        storage.write(fresh / BEST, _nested(tensors), meta, None)


@contextmanager
def _new(folder: Path) -> Iterator[Path]:
    """A claimed new folder, which gets its name at the end."""
    make_parent(folder)
    with claim(folder, ANOTHER), replacing(folder) as fresh:
        yield fresh


def _refuse_existing(folder: Path) -> None:
    if os.path.lexists(folder):
        raise RunError(f"{folder}: is there already; {ANOTHER}, or move it away")


def _nested(tensors: Mapping[str, Any]) -> dict[str, Any]:
    """As `storage.write` wants a model."""
    return {"model": {name.removeprefix(MODEL): tensor for name, tensor in tensors.items()}}


def _fingerprint(folder: Path) -> str:
    return (folder / FINGERPRINT).read_text(encoding="ascii", errors="replace")


def _checked(folder: Path) -> _Manifest:
    """The manifest of a folder whose files are as it says."""
    if (kind := kind_of(folder)) not in ("", PUSHED):
        raise RunError(f"{folder}: is {kind}, not {PUSHED}; make one with 'flm push RUN FOLDER'")
    file = folder / MANIFEST
    try:
        manifest = _Manifest.model_validate(read_json(file))
    except (Unreadable, OSError) as error:
        raise RunError(f"{file}: not readable ({error}); is this {PUSHED}?") from error
    except ValidationError as error:
        raise RunError(f"{file}: {first_problem(error)}; copy the folder anew") from error
    if manifest.format != FORMAT:
        raise RunError(f"{file}: format {manifest.format}, this version reads {FORMAT}; update flm_torchrec")
    parts = {part.file for parts in manifest.tensors.values() for part in parts}
    needed = {CONFIG, META, FINGERPRINT, f"{VOCABULARY}/{SCHEMA}", *parts}
    if missing := sorted(needed - manifest.files.keys()):
        raise RunError(f"{file}: does not list '{missing[0]}'; copy the folder anew")
    if foreign := sorted(name for name in manifest.tensors if not name.startswith(MODEL)):
        raise RunError(f"{file}: '{foreign[0]}' is no tensor of a model; copy the folder anew")
    for name, listed in manifest.files.items():
        _check_file(folder, name, listed)
    return manifest


def _check_file(folder: Path, name: str, listed: _File) -> None:
    """Raise RunError unless it is a plain file inside the folder with the listed content."""
    if not INSIDE.fullmatch(name) or ".." in name:
        raise RunError(f"{folder / MANIFEST}: '{name[:100]}' is no file of a hub folder; do not use this folder")
    file = folder / name
    try:
        status = file.lstat()
        if not stat.S_ISREG(status.st_mode) or not file.resolve().is_relative_to(folder.resolve()):
            raise RunError(f"{file}: is a link or no plain file; copy the files themselves")
        if status.st_size != listed.bytes:
            raise RunError(f"{file}: has {status.st_size:,} bytes, {MANIFEST} says {listed.bytes:,}; copy it anew")
        same = sha256(file) == listed.sha256
    except OSError as error:
        raise RunError(f"{file}: {error.strerror}; copy the folder anew") from error
    if not same:
        raise RunError(f"{file}: has changed since it was written; copy it anew")
