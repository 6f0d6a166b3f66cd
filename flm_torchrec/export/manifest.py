"""`manifest.json` of an export: what it holds, of which model, and the digests that tell whether it is whole."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, field, replace
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal, TypeVar

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from flm_torchrec.config.heads import REPRESENTATIONS
from flm_torchrec.documents import MOST_JSON_BYTES, Unreadable, parse_json, read_text
from flm_torchrec.errors import RunError
from flm_torchrec.files import sha256
from flm_torchrec.safe_text import visible

FILE = "manifest.json"
DELTA = "delta.json"
"""Of a delta, in its place."""
FORMAT = 3
READABLE = (2, 3)
"""2 has no `rows` in the report of its index."""

RECALL = 0.99
"""Recall@100 against brute force, of each head, that an index promises by default."""

Storage = Literal["parquet", "arrow"]
Quantise = Literal["none", "fp16", "int8"]
IndexKind = Literal["flat", "hnsw", "ivfpq", "none"]
Vectors = Literal["embedding", "content", "id"]
"""Columns of an item: of its id and features, which all heads score against, or of one of the two alone."""

Count = Annotated[int, Field(ge=0, le=1 << 40)]
Least1 = Annotated[int, Field(ge=1, le=1 << 40)]
Number = Annotated[float, Field(allow_inf_nan=False)]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Recall = dict[str, Annotated[float, Field(ge=0, le=1)]]
STRICT = ConfigDict(strict=True, extra="forbid")
"""A wrong type or an unknown field is refused, not bent."""

T = TypeVar("T")


@dataclass(frozen=True, config=STRICT)
class IndexReport:
    """A faiss index over the items' embeddings by inner product, and what it costs beside brute force."""

    kind: Literal["flat", "hnsw", "ivfpq"]
    parameters: dict[str, Count]
    """How it was built, and efSearch or nprobe and k_factor_rf as tuned: `open_index` sets them."""
    recall: dict[str, Recall]
    """By head: recall "@10" and "@100" against brute force, on a sample of users."""
    bytes_per_item: Number
    rows: Least1 | None = None
    """Distinct vectors, each indexed once. None: by an older version, each item by itself."""
    promised: Number = RECALL
    """Recall@100 that `--recall` asked for."""
    asked: IndexKind = "flat"
    """What `--index` asked for: another kind than `kind` where that did not keep the promise."""

    @property
    def least(self) -> float:
        """Recall@100 of the head that fares worst."""
        return min(recall["@100"] for recall in self.recall.values())


@dataclass(frozen=True, config=STRICT)
class Manifest:
    """Written last: an export without it is not whole."""

    format: int
    model_version: str
    data: str
    dim: Annotated[int, Field(ge=1, le=1 << 16)]
    users: Count
    items: Least1
    heads: tuple[str, ...]
    storage: Storage
    part_rows: Least1
    """Of each part but the last: part p has the ids from p * part_rows on."""
    quantise: Quantise
    """How vectors are stored: see `vectors.encode`."""
    index: IndexReport | None = None
    quality: dict[str, dict[str, Number]] = field(default_factory=dict)
    """By head, where vectors are quantised: NDCG@10 in validation "before" and "after", and the relative "change"."""
    sha256: dict[str, Sha256] = field(default_factory=dict)
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
        RunError: no export, another format, or it does not hold together.
    """
    file = folder / FILE
    if not file.is_file():
        raise RunError(f"{file}: not found; make the export with 'flm export --output {folder}'")
    manifest = read_strictly(file, Manifest)
    check_manifest(manifest, file)
    return manifest


def read_strictly(file: Path, kind: type[T]) -> T:
    """A JSON file as the dataclass that describes it.

    Raises:
        RunError: it is not readable, of a format that this version does not read, or not as described.
    """
    what = "a delta" if file.name == DELTA else "a manifest"
    try:
        text = read_text(file, MOST_JSON_BYTES)
        _check_format(parse_json(text), file)
        return TypeAdapter(kind).validate_json(text)
    except ValidationError as error:
        problem = error.errors(include_url=False, include_context=False, include_input=False)[0]
        where = ".".join(str(part) for part in problem["loc"])
        raise RunError(f"{file}: not {what} ({visible(where)[:200]}: {problem['msg']}); export again") from error
    except Unreadable as error:
        raise RunError(f"{file}: not {what} ({visible(str(error))[:200]}); export again") from error


def _check_format(record: Any, file: Path) -> None:
    """Raise RunError for another format, before its other fields are looked at."""
    whole = record.get("whole", record) if isinstance(record, dict) else None
    found = whole.get("format") if isinstance(whole, dict) else None
    if type(found) is not int:
        raise Unreadable("has no number of its format")
    if found not in READABLE:
        wanted = " and ".join(map(str, READABLE))
        raise RunError(f"{file}: format {found}, this version reads {wanted}; export again")


def check_manifest(manifest: Manifest, file: Path) -> None:
    """Raise RunError where the fields of a manifest do not go together."""
    heads = set(manifest.heads)
    if not heads or len(heads) < len(manifest.heads) or not heads <= set(REPRESENTATIONS):
        raise RunError(f"{file}: heads: wants some of {', '.join(REPRESENTATIONS)}; export again")
    index = manifest.index
    if index is None:
        return
    if set(index.recall) != set(manifest.heads) or any(set(r) != {"@10", "@100"} for r in index.recall.values()):
        raise RunError(f"{file}: index.recall: wants @10 and @100 of each head; export again")
    if index.rows is not None and index.rows > manifest.items:
        raise RunError(f"{file}: index.rows: {index.rows} of {manifest.items} items; export again")


def check_files(folder: Path, sha256s: dict[str, str], listed: Path) -> None:
    """Raise RunError where a file that `listed` lists is missing, changed, or lies outside the folder."""
    for name, digest in sha256s.items():
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts or "\0" in name:
            raise RunError(f"{listed}: '{name}' lies outside the folder; export again")
        try:
            found = sha256(folder / name) if (folder / name).is_file() else None
        except OSError as error:
            raise RunError(f"{folder / name}: cannot be read ({error.strerror}); mend that, or export again") from error
        if found is None:
            raise RunError(f"{folder / name}: not found; export again")
        if found != digest:
            raise RunError(f"{folder / name}: changed since the export was written; export again")
