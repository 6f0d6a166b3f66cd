"""A trained model → user and item embeddings in part files, written by all ranks, and a faiss index."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from flm_torchrec.claim import claim
from flm_torchrec.config.heads import REPRESENTATIONS
from flm_torchrec.data.dataset import PreparedData, Ragged
from flm_torchrec.errors import RunError
from flm_torchrec.evaluation.protocol import Collectives, Encoder, Of
from flm_torchrec.export.attributes import Keys
from flm_torchrec.export.index import build_index, check_index, check_memory
from flm_torchrec.export.item_map import write_map
from flm_torchrec.export.manifest import FILE, FORMAT, RECALL, IndexKind, Manifest, MapMethod, Quantise, Storage
from flm_torchrec.export.parts import PART_ROWS, Entity, part_name, write_part
from flm_torchrec.export.quality import Quality, ValidationSet
from flm_torchrec.export.vectors import encode
from flm_torchrec.files import new_folder, put_in_place, remove, resolved, telling, temporary
from flm_torchrec.folders import DATA, DELTA, EXPORT, kind_of

MOST_ITEMS = 2**31 - 1
"""Items of an export: seen items, histories and rows of the index are stored as int32."""
VIEWS: dict[str, Of] = {"embedding": "all", "content": "content", "id": "id"}
"""By column of the items, the kind of vector that the encoder makes."""


@dataclass(frozen=True)
class ExportSource:
    """What is exported: the data, the model, and what is measured or written besides."""

    data: PreparedData
    encoder: Encoder
    """For the examples of `everyone(data)`: each user after all known events."""
    item_known: np.ndarray  # [items] bool: the id was trained, and has a row; the encoder hides other ids
    version: str
    """Of the model; in the metadata of every file."""
    validation: ValidationSet | None = None
    """Examples by which the cost of quantised vectors is measured. None: it is not measured."""
    beside: Callable[[Path], None] = lambda folder: None
    """Writes further files into the export, such as the user tower; collective."""


@dataclass(frozen=True)
class ExportOptions:
    """How an export is written."""

    storage: Storage = "parquet"
    quantise: Quantise = "none"
    index: IndexKind = "flat"
    recall: float = RECALL
    """Recall@100 that the index promises. A flat index replaces one that does not reach it."""
    user_block: int = 512
    """Users that are encoded at once."""
    item_block: int = 16_384
    """Items that are encoded at once."""
    part_rows: int = PART_ROWS
    item_map: MapMethod = "pca"
    """How the map of the web page is drawn."""
    tolerance: float = 0.0
    """Of a delta: a row stays the older one if each of its vectors has moved by at most this part of its length."""


def check_output(output: Path, overwrite: bool) -> None:
    """Check that nothing is replaced but an older export, and that only with `overwrite`, and nothing is written into
    prepared data or another export, which are replaced whole.

    Raises:
        RunError: the output is a file, another folder, an export without `overwrite`, or in one of these.
    """
    for folder in resolved(output).parents:
        if (kind := kind_of(folder)) in (DATA, EXPORT):
            raise RunError(f"{output}: lies in {folder}, {kind}, which is replaced whole; give another --output")
    if output.is_file():
        raise RunError(f"{output}: is a file; give another --output")
    if not output.exists() or not any(output.iterdir()):
        return
    if not any((output / name).is_file() for name in (FILE, DELTA)):
        raise RunError(f"{output}: exists and is no export, so it is not replaced; give another --output")
    if not overwrite:
        raise RunError(f"{output}: exists; give another --output, or --overwrite to replace it")


def check_items(index: IndexKind, items: int, width: int, growth: int) -> None:
    """Check the number of items before an export begins.

    Args:
        width: numbers of an item's vector.
        growth: bytes that encoding all items keeps.

    Raises:
        RunError: there are too few for the index, or more than an export can number or the index has memory for.
    """
    check_index(index, items)
    check_memory(index, items, width, growth)
    if items > MOST_ITEMS:
        raise RunError(
            f"export: {items:,} items; an export numbers {MOST_ITEMS:,} at most (int32): prepare with a larger"
            " --min-count, or export the domains apart"
        )


@contextmanager
def claimed(output: Path, overwrite: bool, comm: Collectives) -> Iterator[None]:
    """Keep other jobs from writing the output. Rank 0 locks it for all ranks; collective.

    Raises:
        InUse: another job writes the output.
        RunError: as of `check_output`.
    """
    with ExitStack() as claims:

        def begin() -> None:
            if comm.rank == 0:
                claims.enter_context(claim(output))
                check_output(output, overwrite)  # another job may have written it until now

        together(comm, output, begin)
        yield


@contextmanager
def fresh_folder(output: Path, comm: Collectives) -> Iterator[Path]:
    """A folder beside the output, the same on all ranks; removed at the end unless it was put in place. Collective."""
    drawn = torch.tensor(secrets.randbits(60) if comm.rank == 0 else 0)
    token = f"{int(comm.all_reduce_sum(drawn)):016x}"
    fresh = temporary(output, "new", token)
    together(comm, output, lambda: None if comm.rank else _make_folder(output, token))
    try:
        yield fresh
    finally:
        if comm.rank == 0:
            remove(fresh)


def _make_folder(output: Path, token: str) -> None:
    new_folder(output, token)


def export(
    source: ExportSource, comm: Collectives, output: Path, options: ExportOptions, overwrite: bool = True
) -> Manifest | None:
    """Write the export; collective. Rank 0 builds the index and returns the manifest, the others return None.

    Each rank encodes and writes its own range of parts and has one part in memory. The folder must be on a disk that
    all ranks share, as the run's folder is.

    Args:
        overwrite: replace an older export; without it that is refused. Anything else is never replaced.

    Raises:
        RunError: there are too few items for the index, another job writes the output, or the disk cannot be written.
            No file is left then.
    """
    check_items(options.index, source.data.schema.items, source.encoder.dim, source.encoder.growth)
    manifest = blank_manifest(source, options)
    with claimed(output, overwrite, comm), fresh_folder(output, comm) as fresh:
        quality = None
        if source.validation is not None and len(source.validation.examples) and options.quantise != "none":
            quality = Quality(source.data, source.validation, options.quantise, comm, options.user_block)
        writer = _PartWriter(source, comm, fresh, options)
        _write_items(writer, quality)
        _write_users(writer)
        together(comm, output, lambda: source.beside(fresh))
        manifest = replace(manifest, quality={} if quality is None else quality.result())
        if comm.rank:
            return None  # other ranks do not wait for the index: it may take longer than the time limit of a collective
        with telling(output):
            return _finish(manifest, fresh, output, options)


def blank_manifest(source: ExportSource, options: ExportOptions) -> Manifest:
    """The manifest of an export before it is made: without files, index and quality."""
    schema = source.data.schema
    return Manifest(
        format=FORMAT,
        model_version=source.version,
        data=schema.name,
        dim=source.encoder.dim,
        users=schema.users,
        items=schema.items,
        heads=REPRESENTATIONS,
        storage=options.storage,
        part_rows=options.part_rows,
        quantise=options.quantise,
        mixture=source.encoder.mixture,
    )


def _finish(manifest: Manifest, fresh: Path, output: Path, options: ExportOptions) -> Manifest:
    manifest = manifest.listing(fresh)
    for entity, rows in (("items", manifest.items), ("users", manifest.users)):
        for part in range(-(-rows // options.part_rows)):
            name = part_name(entity, options.storage, part)  # type: ignore[arg-type]
            if name not in manifest.sha256:
                raise RunError(f"{fresh / name}: is not there; all ranks must write to one disk that they share")
    write_map(fresh, manifest, options.item_map)
    manifest = replace(manifest, index=build_index(fresh, manifest, options.index, options.recall)).listing(fresh)
    manifest.save(fresh)
    put_in_place(fresh, output)
    return manifest


@dataclass(frozen=True)
class _PartWriter:
    """Where parts are written to, and how."""

    source: ExportSource
    comm: Collectives
    folder: Path
    options: ExportOptions

    def write(self, entity: Entity, part: int, tables: Iterator[pa.Table]) -> None:
        """Write one part of this rank, or nothing where `tables` is empty; collective.

        All ranks continue together or stop together. The tables are made here, so that an error of making these stops
        all ranks too.
        """
        together(self.comm, self.folder, lambda: self._write(entity, part, list(tables)))

    def _write(self, entity: Entity, part: int, tables: list[pa.Table]) -> None:
        if not tables:
            return
        metadata = {"model_version": self.source.version, "format": str(FORMAT)}
        table = pa.concat_tables(tables).replace_schema_metadata(metadata)
        write_part(self.folder / part_name(entity, self.options.storage, part), table)


def _write_items(writer: _PartWriter, quality: Quality | None) -> None:
    source, options, comm = writer.source, writer.options, writer.comm
    keys = Keys(source.data, "item")
    for part, blocks in rounds(source.data.schema.items, options.part_rows, options.item_block, comm):
        views = [source.encoder.views(ids) for ids in blocks]  # collective, also without ids

        def table_of(ids: np.ndarray, view: dict[Of, Tensor]) -> pa.Table:
            if quality is not None:
                quality.add(ids, view["all"])
            vectors = {column: encode(view[of].numpy(), options.quantise) for column, of in VIEWS.items()}
            known = source.item_known[ids]
            return pa.table({"item_id": ids, **keys.rows(int(ids[0]), int(ids[-1]) + 1), "known": known, **vectors})

        tables = (table_of(ids, view) for ids, view in zip(blocks, views, strict=True) if len(ids))
        writer.write("items", part, tables)


def _write_users(writer: _PartWriter) -> None:
    source, options, comm = writer.source, writer.options, writer.comm
    data, keys = source.data, Keys(source.data, "user")
    for part, blocks in rounds(data.schema.users, options.part_rows, options.user_block, comm):
        encoded = [source.encoder.users(ids) for ids in blocks]  # collective, also without ids

        def table_of(ids: np.ndarray, by_head: dict[str, Tensor]) -> pa.Table:
            offsets = data.offsets[ids[0] : ids[-1] + 2]
            seen = seen_items(data, offsets)
            vectors = {head: encode(by_head[head].numpy(), options.quantise) for head in REPRESENTATIONS}
            return pa.table({"user_id": ids, **keys.rows(int(ids[0]), int(ids[-1]) + 1), "seen": seen, **vectors})

        tables = (table_of(ids, by_head) for ids, by_head in zip(blocks, encoded, strict=True) if len(ids))
        writer.write("users", part, tables)


def seen_items(data: PreparedData, offsets: np.ndarray) -> pa.ListArray:
    """[n] the items of the events `offsets[u]:offsets[u + 1]` that are of a kind to predict; offsets [n + 1]."""
    rows = slice(int(offsets[0]), int(offsets[-1]))
    seen = Ragged(offsets - offsets[0], data.item[rows])
    if data.targets is not None:
        seen = seen.only(data.targets[data.event[rows]])
    return pa.ListArray.from_arrays(pa.array(seen.offsets.astype(np.int32)), pa.array(seen.values.astype(np.int32)))


def rounds(rows: int, part_rows: int, block: int, comm: Collectives) -> Iterator[tuple[int, list[np.ndarray]]]:
    """Numbers of this rank's parts, each with its ids in blocks.

    All ranks have the same number of parts and of blocks; the last may be empty.
    """
    parts = -(-rows // part_rows)
    share = -(-parts // comm.world_size)

    def span(part: int) -> tuple[int, int]:
        return min(part * part_rows, rows), min((part + 1) * part_rows, rows)

    for turn in range(share):
        spans = [span(rank * share + turn) for rank in range(comm.world_size)]
        longest = max(stop - start for start, stop in spans)
        start, stop = spans[comm.rank]
        blocks = [np.arange(min(start + b, stop), min(start + b + block, stop)) for b in range(0, longest, block)]
        yield comm.rank * share + turn, blocks


def together(comm: Collectives, folder: Path, action: Callable[[], None]) -> None:
    """Run each rank's action; collective. If one fails, all ranks stop, and none waits in a later collective.

    Raises:
        RunError: the action of this rank or of another one failed.
    """
    problem: RunError | None = None
    try:
        with telling(folder):
            action()
    except RunError as error:
        problem = error
    failed = int(comm.all_reduce_sum(torch.tensor(int(problem is not None))))
    if problem is not None:
        raise problem
    if failed:
        raise RunError(f"{folder}: another rank could not write its part; see its message")
