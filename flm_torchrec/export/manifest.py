"""`manifest.json`: what an export holds, from which model, and digests that show whether the export is complete."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, field, replace
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal, TypeVar

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from flm_torchrec.config.heads import HEADS, REPRESENTATIONS
from flm_torchrec.documents import MOST_JSON_BYTES, Unreadable, parse_json, read_text
from flm_torchrec.errors import RunError
from flm_torchrec.files import sha256, write_text
from flm_torchrec.folders import DELTA, EXPORT, MANIFEST, kind_of
from flm_torchrec.mixture import Mixture
from flm_torchrec.safe_text import visible

FILE = MANIFEST
FORMAT = 4
READABLE = (2, 3, 4)
"""Format 2 has no `rows` in the report of its index, format 3 no mixture."""

RECALL = 0.99
"""Default recall@100, for each head and against brute force, that an index promises."""

Storage = Literal["parquet", "arrow"]
Quantise = Literal["none", "fp16", "int8"]
IndexKind = Literal["flat", "hnsw", "ivfpq", "none"]
MapMethod = Literal["umap", "pca"]
Vectors = Literal["embedding", "content", "id"]
"""Columns of an item: the vector of id and features, which all heads score against, or of one of the two alone."""

Count = Annotated[int, Field(ge=0, le=1 << 40)]
Least1 = Annotated[int, Field(ge=1, le=1 << 40)]
Number = Annotated[float, Field(allow_inf_nan=False)]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Recall = dict[str, Annotated[float, Field(ge=0, le=1)]]
STRICT = ConfigDict(strict=True, extra="forbid")
"""A wrong type or an unknown field is refused, not converted."""

T = TypeVar("T")


@dataclass(frozen=True, config=STRICT)
class IndexReport:
    """A faiss index over the items' embeddings by inner product, and its recall against brute force."""

    kind: Literal["flat", "hnsw", "ivfpq"]
    parameters: dict[str, Count]
    """How the index was built, and the tuned search effort, which `open_index` sets."""
    recall: dict[str, Recall]
    """By head: recall "@10" and "@100" against brute force, for a sample of users."""
    bytes_per_item: Number
    rows: Least1 | None = None
    """Distinct vectors, each indexed once. None: an older version indexed each item by itself."""
    promised: Number = RECALL
    """Recall@100 that `--recall` has set."""
    asked: IndexKind = "flat"
    """The kind that `--index` has set. It differs from `kind` where it did not reach the promised recall."""

    @property
    def least(self) -> float:
        """The minimum over the heads of recall@100."""
        return min(recall["@100"] for recall in self.recall.values())


@dataclass(frozen=True, config=STRICT)
class Manifest:
    """Written last: an export without a manifest is incomplete."""

    format: int
    model_version: str
    data: str
    dim: Annotated[int, Field(ge=1, le=1 << 16)]
    users: Count
    items: Least1
    heads: tuple[str, ...]
    storage: Storage
    part_rows: Least1
    """Rows of each part but the last: the first id of part p is p * part_rows."""
    quantise: Quantise
    """How vectors are stored, see `vectors.encode`."""
    mixture: Mixture | None = None
    """How the heads' scores become the fused one, where that is no dot product with the fused vector."""
    index: IndexReport | None = None
    tolerance: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Rows may be those of an older model, whose vectors are within this part of their length: by `--tolerance`."""
    quality: dict[str, dict[str, Number]] = field(default_factory=dict)
    """By head, where vectors are quantised: validation NDCG@10 "before" and "after", and the relative "change"."""
    sha256: dict[str, Sha256] = field(default_factory=dict)
    """By file, with its path relative to the export."""
    cleaned_of: tuple[Sha256, ...] = ()
    """`rows_digest` of the exports of which this is a copy without forgotten users: all other rows are the same."""

    def save(self, folder: Path) -> None:
        """Write `manifest.json` into the folder of the export; a reader finds a whole one."""
        write_text(folder / FILE, json.dumps(asdict(self), indent=2))

    def listing(self, folder: Path) -> Manifest:
        """The manifest with the sha256 of every file of the folder. Files that it lists already are not read again."""
        files = {f.relative_to(folder).as_posix(): f for f in sorted(folder.rglob("*")) if f.is_file()}
        fresh = {name: sha256(file) for name, file in files.items() if name not in self.sha256 and name != FILE}
        return replace(self, sha256=self.sha256 | fresh)

    @property
    def rows_digest(self) -> str:
        """A digest of all rows of items and users. The index does not change it."""
        rows = {name: digest for name, digest in self.sha256.items() if is_part(name)}
        return hashlib.sha256(json.dumps(rows, sort_keys=True).encode()).hexdigest()


def is_part(name: str) -> bool:
    """Whether a file, by its path relative to the export, is a part of items or users."""
    return name.startswith(("items.", "users.")) and "/" in name


def load_manifest(folder: Path) -> Manifest:
    """Read the manifest and check that every file exists and is unchanged.

    Raises:
        RunError: there is no export, it has another format, or a file is missing or changed.
    """
    manifest = read_manifest(folder)
    check_files(folder, manifest.sha256, folder / FILE)
    return manifest


def read_manifest(folder: Path) -> Manifest:
    """The manifest alone. The files that it lists are not checked.

    Raises:
        RunError: there is no export, it has another format, or its fields contradict each other.
    """
    file = folder / FILE
    if (kind := kind_of(folder)) not in ("", EXPORT):
        raise RunError(f"{folder}: is {kind}, not an export; give a folder of 'flm export --output'")
    if not file.is_file():
        raise RunError(f"{file}: not found; make the export with 'flm export --output {folder}'")
    manifest = read_strictly(file, Manifest)
    check_manifest(manifest, file)
    return manifest


def read_strictly(file: Path, kind: type[T]) -> T:
    """A JSON file as the dataclass that describes it.

    Raises:
        RunError: the file is unreadable, has another format, or does not fit the dataclass.
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
    """Raise RunError for another format, before any other field is checked."""
    manifest = record.get("whole", record) if isinstance(record, dict) else None  # a delta has it inside
    number = manifest.get("format") if isinstance(manifest, dict) else None
    if type(number) is not int:
        raise Unreadable("has no number of its format")
    if number not in READABLE:
        wanted = " and ".join(map(str, READABLE))
        raise RunError(f"{file}: format {number}, this version reads {wanted}; export again")


def check_manifest(manifest: Manifest, file: Path) -> None:
    """Raise RunError where the fields of a manifest contradict each other."""
    heads = set(manifest.heads)
    if not heads or len(heads) < len(manifest.heads) or not heads <= set(REPRESENTATIONS):
        raise RunError(f"{file}: heads: wants some of {', '.join(REPRESENTATIONS)}; export again")
    if manifest.mixture is not None and not heads >= set(HEADS):
        raise RunError(f"{file}: mixture: wants the heads {', '.join(HEADS)}; export again")
    index = manifest.index
    if index is None:
        return
    if set(index.recall) != set(manifest.heads) or any(set(r) != {"@10", "@100"} for r in index.recall.values()):
        raise RunError(f"{file}: index.recall: wants @10 and @100 of each head; export again")
    if index.rows is not None and index.rows > manifest.items:
        raise RunError(f"{file}: index.rows: {index.rows} of {manifest.items} items; export again")


def check_files(folder: Path, sha256s: dict[str, str], listed: Path) -> None:
    """Raise RunError where a file that `listed` names is missing, changed or outside the folder."""
    for name, digest in sha256s.items():
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts or "\0" in name:
            raise RunError(f"{listed}: '{name}' lies outside the folder; export again")
        try:
            actual = sha256(folder / name) if (folder / name).is_file() else None
        except OSError as error:
            raise RunError(f"{folder / name}: cannot be read ({error.strerror}); mend that, or export again") from error
        if actual is None:
            raise RunError(f"{folder / name}: not found; export again")
        if actual != digest:
            raise RunError(f"{folder / name}: changed since the export was written; export again")
