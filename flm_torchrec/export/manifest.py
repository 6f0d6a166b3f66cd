"""`manifest.json` of an export: what it holds, of which model, and the digests that tell whether it is whole."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from flm_torchrec.documents import read_json
from flm_torchrec.errors import RunError
from flm_torchrec.files import sha256

FILE = "manifest.json"
DELTA = "delta.json"
"""Of a delta, in its place."""
FORMAT = 2

RECALL_WANTED = 0.99
"""Recall@100 against brute force, of each head, that an index is tuned to."""

Storage = Literal["parquet", "arrow"]
Quantise = Literal["none", "fp16", "int8"]
Kind = Literal["flat", "hnsw", "ivfpq", "none"]
Vectors = Literal["embedding", "content", "id"]
"""Columns of an item: of its id and features, which all heads score against, or of one of the two alone."""


@dataclass(frozen=True)
class IndexReport:
    """A faiss index over the items' embeddings by inner product, and what it costs beside brute force."""

    kind: Kind
    parameters: dict[str, int]
    """How it was built, and efSearch or nprobe and k_factor_rf as tuned: `open_index` sets them."""
    recall: dict[str, dict[str, float]]
    """By head: recall "@10" and "@100" against brute force, on a sample of users."""
    bytes_per_item: float


@dataclass(frozen=True)
class Manifest:
    """Written last: an export without it is not whole."""

    format: int
    model_version: str
    data: str
    dim: int
    users: int
    items: int
    heads: tuple[str, ...]
    storage: Storage
    part_rows: int
    """Of each part but the last: part p has the ids from p * part_rows on."""
    quantise: Quantise
    """How vectors are stored: see `vectors.encode`."""
    index: IndexReport | None = None
    quality: dict[str, dict[str, float]] = field(default_factory=dict)
    """By head, where vectors are quantised: NDCG@10 in validation "before" and "after", and the relative "change"."""
    sha256: dict[str, str] = field(default_factory=dict)
    """By file, relative to the export."""

    def save(self, folder: Path) -> None:
        (folder / FILE).write_text(json.dumps(asdict(self), indent=2), encoding="utf-8")

    def listing(self, folder: Path) -> Manifest:
        """With the sha256 of every file of the folder that it does not list yet."""
        files = {f.relative_to(folder).as_posix(): f for f in sorted(folder.rglob("*")) if f.is_file()}
        fresh = {name: sha256(file) for name, file in files.items() if name not in self.sha256 and name != FILE}
        return replace(self, sha256=self.sha256 | fresh)

    @property
    def rows_digest(self) -> str:
        """Of all rows of items and users: the same for the same rows, whatever index lies beside them."""
        rows = {name: digest for name, digest in self.sha256.items() if is_part(name)}
        return hashlib.sha256(json.dumps(rows, sort_keys=True).encode()).hexdigest()


def is_part(name: str) -> bool:
    """Whether the file is one of the parts of items or users."""
    return name.startswith(("items.", "users.")) and "/" in name


def load_manifest(folder: Path) -> Manifest:
    """Read the manifest and check that every file is there and unchanged.

    Raises:
        RunError: no export, another format, a file missing or changed.
    """
    manifest = read_manifest(folder)
    check_files(folder, manifest.sha256, folder / FILE)
    return manifest


def read_manifest(folder: Path) -> Manifest:
    """The manifest alone, its files unchecked.

    Raises:
        RunError: no export, or another format.
    """
    file = folder / FILE
    if not file.is_file():
        raise RunError(f"{file}: not found; make the export with 'flm export --output {folder}'")
    try:
        return manifest_of(read_json(file), file)
    except (ValueError, TypeError, KeyError, OSError) as error:
        raise RunError(f"{file}: not a manifest ({error}); export again") from error


def manifest_of(record: dict[str, Any], file: Path) -> Manifest:
    """The manifest as its dataclass.

    Raises:
        RunError: another format. TypeError, KeyError: not a manifest.
    """
    if record["format"] != FORMAT:
        raise RunError(f"{file}: format {record['format']}, this version reads {FORMAT}; export again")
    index = IndexReport(**record["index"]) if record["index"] else None
    return Manifest(**{**record, "heads": tuple(record["heads"]), "index": index})


def check_files(folder: Path, sha256s: dict[str, str], listed: Path) -> None:
    """Raise RunError where a file that `listed` lists is missing, changed, or lies outside the folder."""
    for name, digest in sha256s.items():
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts:
            raise RunError(f"{listed}: '{name}' lies outside the folder; export again")
        if not (folder / name).is_file():
            raise RunError(f"{folder / name}: not found; export again")
        if sha256(folder / name) != digest:
            raise RunError(f"{folder / name}: changed since the export was written; export again")
