"""`manifest.json` of an export: what it holds, of which model, and the digests that tell whether it is whole."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path, PurePath

from flm_torchrec.errors import RunError
from flm_torchrec.files import sha256

FILE = "manifest.json"
FORMAT = 1


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
    index: str
    """Kind of faiss index over the item vectors; its scores are inner products."""
    index_recall: float
    """Recall@100 of the index against brute force, on a sample of users."""
    sha256: dict[str, str]
    """By file name."""

    def save(self, folder: Path) -> None:
        (folder / FILE).write_text(json.dumps(asdict(self), indent=2), encoding="utf-8")


def load_manifest(folder: Path) -> Manifest:
    """Read the manifest and check that every file is there and unchanged.

    Raises:
        RunError: no export, another format, a file missing or changed.
    """
    file = folder / FILE
    if not file.is_file():
        raise RunError(f"{file}: not found; make the export with 'flm export --output {folder}'")
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
        manifest = Manifest(**{**record, "heads": tuple(record["heads"])})
    except (ValueError, TypeError, KeyError) as error:
        raise RunError(f"{file}: not a manifest ({error}); export again") from error
    if manifest.format != FORMAT:
        raise RunError(f"{file}: format {manifest.format}, this version reads {FORMAT}; export again")
    for name, digest in manifest.sha256.items():
        if PurePath(name).name != name:
            raise RunError(f"{file}: '{name}' lies outside the folder; export again")
        if not (folder / name).is_file():
            raise RunError(f"{folder / name}: not found; export again")
        if sha256(folder / name) != digest:
            raise RunError(f"{folder / name}: changed since the export was written; export again")
    return manifest
