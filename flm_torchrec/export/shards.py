"""An IVF-PQ index in shards: it is trained on a sample, each shard takes the vectors of some parts, and all are merged.

Each step reads and writes files alone, so shards may be built by other processes and machines that see the folders. The
merged index has the bytes of one that was filled in one piece. In memory are the sample, or one shard, or at the end
the codes of all vectors. The fp16 vectors, which take most of the space, are merged in a file that is mapped.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import faiss
import numpy as np
from pydantic import TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from flm_torchrec.errors import RunError
from flm_torchrec.export.manifest import STRICT, Count, Least1, Sha256
from flm_torchrec.export.parts import ExportRows
from flm_torchrec.export.vectors import decode
from flm_torchrec.files import replacing_file, telling, write_text

TRAINING_ROWS = 39
"""Training vectors for each centroid; faiss warns of fewer."""
BITS = 8
"""Bits of one number of a product quantisation code."""
LISTS = 32_768
"""Maximum of inverted lists."""
LEAST_ROWS = TRAINING_ROWS << BITS
"""Vectors without which an index cannot be trained."""
ROW_BYTES = 8
"""Of the number of a row, beside its code."""
SHARD_BYTES = 256 << 20
"""Of a shard, where an export builds the shards itself."""

PLAN, TRAINED, FIRST, VECTORS = "shards.json", "trained.faiss", "first.npy", "vectors.fp16"
METRICS = {faiss.METRIC_INNER_PRODUCT: "inner product", faiss.METRIC_L2: "distance"}


@dataclass(frozen=True, config=STRICT)
class ShardPlan:
    """`shards.json`, written last by training."""

    rows_digest: Sha256
    """Of the export."""
    shards: Least1
    parameters: dict[str, Count]
    """How the index was trained."""


class IndexShards:
    """The shards of an index over the distinct vectors of an export, in a folder of their own.

    Args:
        items: of the export.
        work: the folder, as `train` left it.

    Raises:
        RunError: nothing was trained there, or it was for other rows.
    """

    def __init__(self, items: ExportRows, work: Path) -> None:
        self.items, self.work = items, work
        file = work / PLAN
        if not file.is_file():
            raise RunError(f"{file}: not found; train the index first")
        try:
            self.plan = TypeAdapter(ShardPlan).validate_json(file.read_bytes())
            self.first = np.load(work / FIRST, mmap_mode="r", allow_pickle=False)
        except (ValidationError, OSError, ValueError) as error:
            raise RunError(f"{work}: is damaged; train the index again") from error
        if self.plan.rows_digest != items.manifest.rows_digest:
            raise RunError(f"{file}: is of other rows than this export; train the index again")

    @classmethod
    def train(cls, items: ExportRows, first: np.ndarray, work: Path, shards: int) -> IndexShards:
        """Train the index on every n-th of the distinct vectors; older shards in the folder are removed.

        Args:
            first: [rows] the first item of each distinct vector, ascending.

        Raises:
            RunError: there are too few vectors, more shards than parts, or the folder cannot be written.
        """
        if not 1 <= shards <= len(items.files):
            raise RunError(f"shards: {shards} of {len(items.files)} parts; give a number from 1 to that of the parts")
        if len(first) < LEAST_ROWS:
            raise RunError(
                f"shards: {len(first)} distinct vectors, and {LEAST_ROWS} are needed to train; export with hnsw"
            )
        with telling(work):
            work.mkdir(parents=True, exist_ok=True)
            for file in (work / PLAN, *work.glob("shard-*.faiss")):
                file.unlink(missing_ok=True)
            index, parameters = _trained(items, first)
            write_index(index, work / TRAINED)
            np.save(work / FIRST, first, allow_pickle=False)
            plan = ShardPlan(items.manifest.rows_digest, shards, parameters)
            write_text(work / PLAN, json.dumps(asdict(plan), indent=2))
        return cls(items, work)

    def build(self, shard: int) -> None:
        """Add the vectors of a shard's parts to a copy of the trained index, and write it.

        Raises:
            RunError: there is no such shard, or its file cannot be written.
        """
        if not 0 <= shard < self.plan.shards:
            raise RunError(f"shard {shard}: there are {self.plan.shards}, counted from 0; give one of them")
        index = _read(self.work / TRAINED, "train the index")
        for vectors in distinct_vectors(self.items, self.first, self._parts(shard)):
            index.add(vectors)
        with telling(self.work), replacing_file(self.file(shard)) as fresh:
            write_index(index, fresh)

    def merge(self) -> Any:
        """The index of all shards. Its fp16 vectors are mapped from a file of the folder, which must stay for as long.

        Raises:
            RunError: a shard is missing, cannot be read, or has other vectors or another training than was planned.
        """
        merged = _read(self.work / TRAINED, "train the index")
        lists: Any = faiss.downcast_index(merged.base_index)
        with telling(self.work), (self.work / VECTORS).open("wb") as stream:
            for shard in range(self.plan.shards):
                found = self._shard(shard, merged)
                lists.merge_from(faiss.downcast_index(found.base_index), lists.ntotal)
                codes = faiss.downcast_index(found.refine_index).codes  # type: ignore[attr-defined]
                if codes.size():
                    stream.write(faiss.rev_swig_ptr(codes.data(), codes.size()).data)
        vectors = faiss.downcast_index(merged.refine_index)
        merged.referenced_objects = [map_codes(vectors, self.work / VECTORS, lists.ntotal)]
        merged.ntotal = lists.ntotal
        return merged

    def file(self, shard: int) -> Path:
        """The file of a shard."""
        return self.work / f"shard-{shard:05d}.faiss"

    def _parts(self, shard: int) -> range:
        parts, shards = len(self.items.files), self.plan.shards
        return range(shard * parts // shards, (shard + 1) * parts // shards)

    def _shard(self, shard: int, trained: Any) -> Any:
        file, mend = self.file(shard), f"build shard {shard}"
        index = _read(file, mend)
        if (index.d, index.metric_type) != (trained.d, trained.metric_type):
            which = (f"{one.d} numbers by {METRICS.get(one.metric_type, 'another metric')}" for one in (index, trained))
            raise RunError(f"{file}: {', and the trained index '.join(which)}; {mend} again")
        try:
            trained.base_index.check_compatible_for_merge(index.base_index)
        except RuntimeError as error:
            raise RunError(f"{file}: is of another training; {mend} again") from error
        parts, size = self._parts(shard), self.items.manifest.part_rows
        low, high = np.searchsorted(self.first, [parts.start * size, parts.stop * size])
        if index.ntotal != high - low:
            raise RunError(f"{file}: has {index.ntotal} vectors, not {high - low}; {mend} again")
        return index


def _read(file: Path, mend: str) -> Any:
    """An index of the kind that is built here, in memory."""
    if not file.is_file():
        raise RunError(f"{file}: not found; {mend}")
    try:
        index = faiss.read_index(str(file))
    except (RuntimeError, MemoryError) as error:
        raise RunError(f"{file}: faiss cannot read it ({reason_of(error)}); {mend} again") from error
    if not isinstance(index, faiss.IndexRefine):
        raise RunError(f"{file}: holds {type(index).__name__}, and no shard; {mend} again")
    return index


def _trained(items: ExportRows, first: np.ndarray) -> tuple[faiss.Index, dict[str, int]]:
    """An index without vectors, trained, and its parameters."""
    dim, rows = items.dim, len(first)
    lists = _lists(rows)
    chosen = first[:: _step(rows)]
    sample, start = np.empty((len(chosen), dim), np.float32), 0
    for vectors in distinct_vectors(items, chosen, range(len(items.files))):
        sample[start : start + len(vectors)] = vectors
        start += len(vectors)
    m = _code_size(dim)
    index = faiss.index_factory(dim, f"OPQ{m},IVF{lists},PQ{m}x{BITS},Refine(SQfp16)", faiss.METRIC_INNER_PRODUCT)
    index.train(sample)
    return index, {"m": m, "nlist": lists}


def _lists(rows: int) -> int:
    """About 4 √N lists (faiss guidelines)."""
    return min(LISTS, 2 ** round(math.log2(4 * math.sqrt(rows))), rows // TRAINING_ROWS)


def _code_size(dim: int) -> int:
    """A byte of code for about four numbers; the fp16 vectors re-rank what the codes find."""
    return max(m for m in range(1, max(2, dim // 4 + 1)) if dim % m == 0)


def _step(rows: int) -> int:
    """Every so many rows one is trained on."""
    return max(1, rows // (TRAINING_ROWS * max(_lists(rows), 1 << BITS)))


def memory_of_shards(rows: int, width: int) -> int:
    """Bytes that an index of so many vectors takes at most: while it is trained, or while its shards are merged.

    Args:
        width: numbers of a vector.
    """
    sample = 4 * width * -(-rows // _step(rows))
    return max(2 * sample, rows * (_code_size(width) + ROW_BYTES) + SHARD_BYTES)


def shards_for(items: ExportRows, rows: int) -> int:
    """Into how many shards an export divides an index of so many vectors."""
    size = rows * (_code_size(items.dim) + ROW_BYTES + 2 * items.dim)
    return min(len(items.files), -(-size // SHARD_BYTES))


def distinct_vectors(items: ExportRows, first: np.ndarray, parts: range) -> Iterator[np.ndarray]:
    """The vectors of the rows `first` that lie in these parts, part by part: [n, D]."""
    size = items.manifest.part_rows
    for part in parts:
        low, high = np.searchsorted(first, [part * size, (part + 1) * size])
        vectors = decode(items.part(items.files[part], ["embedding"])["embedding"])
        yield np.ascontiguousarray(vectors[first[low:high] - part * size])


def map_codes(index: Any, file: Path, rows: int) -> np.memmap:
    """Let a flat index, or one of a scalar quantiser, take its rows from a file, which is mapped.

    faiss itself maps only files that it has written, and has no call that joins them.

    Returns:
        What must be held for as long as the index is.
    """
    mapped = np.memmap(file, np.uint8, mode="r", shape=(rows * index.code_size,))
    view: Any = faiss.MaybeOwnedVectorUInt8()  # type: ignore[attr-defined]
    view.is_owned = False
    view.view_data = view.c_ptr = faiss.swig_ptr(mapped)  # type: ignore[attr-defined]
    view.view_size = view.c_size = mapped.size
    index.codes, index.ntotal = view, rows
    return mapped


def reason_of(error: Exception) -> str:
    """Why faiss has refused a file, without where in faiss."""
    line = (str(error).splitlines() or ["too large"])[0]
    return line.rpartition("cpp:")[2].partition(": ")[2] or "not an index"


def write_index(index: faiss.Index, file: Path) -> None:
    """Write an index."""
    with file.open("wb") as stream:  # faiss's own writer does not report a disk that is full at the end
        faiss.write_index(index, faiss.PyCallbackIOWriter(stream.write))  # type: ignore[attr-defined]
