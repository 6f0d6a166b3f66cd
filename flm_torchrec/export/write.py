"""A trained model → user and item embeddings in Parquet and a faiss index."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import faiss
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from flm_torchrec.data.prepared import PreparedData
from flm_torchrec.data.splits import everyone
from flm_torchrec.errors import RunError
from flm_torchrec.evaluation.protocol import HEADS, Comm, Encoder
from flm_torchrec.evaluation.ranking import item_vectors, user_blocks
from flm_torchrec.export.manifest import FILE, FORMAT, Manifest
from flm_torchrec.files import sha256

USERS, ITEMS, INDEX = "users.parquet", "items.parquet", "items.faiss"
HNSW_LINKS = 32
RECALL_AT = 100
RECALL_SAMPLE = 256


def check_output(output: Path, overwrite: bool) -> None:
    """Refuse to replace anything but an older export, and that only when asked.

    Raises:
        RunError: the folder is in use.
    """
    if not output.exists() or not any(output.iterdir()):
        return
    if not (output / FILE).is_file():
        raise RunError(f"{output}: exists and is no export, so it is not replaced; give another --output")
    if not overwrite:
        raise RunError(f"{output}: exists; give another --output, or --overwrite to replace it")


def export(
    data: PreparedData, encoder: Encoder, comm: Comm, output: Path, version: str, index: str, block: int
) -> Manifest | None:
    """Write the export; collective, rank 0 writes and returns the manifest.

    Rows are encoded and written block by block; rank 0 alone holds the index, items x D x 4 bytes, and beside an
    approximate one an exact one to measure it by.

    Args:
        encoder: of `everyone(data)`, each user after all known events.
        index: 'flat' (exact) or 'hnsw' (Malkov & Yashunin, IEEE TPAMI 2020).
        block: users or items at once.
    """
    main = comm.rank == 0
    fresh = output.with_name(output.name + ".tmp")
    if main:
        shutil.rmtree(fresh, ignore_errors=True)
        fresh.mkdir(parents=True)
    search = _new_index(index, encoder.dim)
    exact = search if index == "flat" else faiss.IndexFlatIP(encoder.dim)
    with _Writer(fresh / ITEMS if main else None) as writer:
        for table, vectors in _item_tables(data, encoder, comm, block):
            writer.write(table)
            for held in {search, exact} if main else ():
                held.add(vectors)
    sample = np.zeros((0, encoder.dim), np.float32)
    with _Writer(fresh / USERS if main else None) as writer:
        for table, fused in _user_tables(data, encoder, comm, block):
            writer.write(table)
            sample = np.concatenate([sample, fused])[:RECALL_SAMPLE]
    if not main:
        return None
    faiss.write_index(search, str(fresh / INDEX))
    manifest = Manifest(
        format=FORMAT,
        model_version=version,
        data=data.schema.name,
        dim=encoder.dim,
        users=data.schema.users,
        items=data.schema.items,
        heads=HEADS,
        index=index,
        index_recall=_recall(search, exact, sample),
        sha256={name: sha256(fresh / name) for name in (USERS, ITEMS, INDEX)},
    )
    manifest.save(fresh)
    shutil.rmtree(output, ignore_errors=True)
    fresh.rename(output)
    return manifest


def _item_tables(data: PreparedData, encoder: Encoder, comm: Comm, block: int) -> Iterator[tuple[pa.Table, np.ndarray]]:
    both = zip(
        item_vectors(encoder, data.schema.items, block, comm),
        item_vectors(encoder, data.schema.items, block, comm, of="content"),
        strict=True,
    )
    for (ids, vectors), (_, content) in both:
        table = pa.table(
            {
                "item_id": ids,
                "item_key": [data.item_keys[i] for i in ids],
                "title": [data.titles[i] for i in ids],
                "embedding": _vectors(vectors.numpy()),
                "content": _vectors(content.numpy()),
            }
        )
        yield table, vectors.numpy()


def _user_tables(data: PreparedData, encoder: Encoder, comm: Comm, block: int) -> Iterator[tuple[pa.Table, np.ndarray]]:
    examples = everyone(data)
    for mine in user_blocks(len(examples), block, comm):
        by_head = encoder.users(mine)
        encoded = torch.stack([by_head[head] for head in HEADS])  # [heads, b, D]
        count = comm.all_gather(torch.tensor(len(mine)))
        padded = torch.cat([encoded, encoded.new_zeros(len(HEADS), block - len(mine), encoder.dim)], 1)
        first = int(mine[0]) - comm.rank * block if len(mine) else 0
        for rank, (size, vectors) in enumerate(zip(count, comm.all_gather(padded), strict=True)):
            if comm.rank != 0 or int(size) == 0:
                continue
            ids = np.arange(first + rank * block, first + rank * block + int(size))
            yield _user_table(data, ids, vectors[:, : int(size)].numpy()), vectors[-1, : int(size)].numpy()


def _user_table(data: PreparedData, ids: np.ndarray, vectors: np.ndarray) -> pa.Table:
    offsets = data.offsets[ids[0] : ids[-1] + 2]
    seen = pa.array(data.item[offsets[0] : offsets[-1]].astype(np.int32))
    return pa.table(
        {
            "user_id": ids,
            "user_key": [data.user_keys[i] for i in ids],
            "seen": pa.ListArray.from_arrays(pa.array((offsets - offsets[0]).astype(np.int32)), seen),
            **{head: _vectors(rows) for head, rows in zip(HEADS, vectors, strict=True)},
        }
    )


def _vectors(rows: np.ndarray) -> pa.FixedSizeListArray:
    return pa.FixedSizeListArray.from_arrays(pa.array(rows.ravel()), rows.shape[1])


def _new_index(kind: str, dim: int) -> faiss.Index:
    if kind == "hnsw":
        return faiss.IndexHNSWFlat(dim, HNSW_LINKS, faiss.METRIC_INNER_PRODUCT)
    return faiss.IndexFlatIP(dim)


def _recall(search: faiss.Index, exact: faiss.Index, queries: np.ndarray) -> float:
    k = min(RECALL_AT, exact.ntotal)
    _, found = search.search(queries, k)
    _, true = exact.search(queries, k)
    hits = [len(np.intersect1d(a, b)) for a, b in zip(found, true, strict=True)]
    return float(np.mean(hits) / k)


class _Writer:
    """Parquet written block by block; without a path it takes blocks and writes nothing."""

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.writer: pq.ParquetWriter | None = None

    def __enter__(self) -> _Writer:
        return self

    def write(self, table: pa.Table) -> None:
        if self.path is None:
            return
        if self.writer is None:
            self.writer = pq.ParquetWriter(self.path, table.schema)
        self.writer.write_table(table)

    def __exit__(self, *_: object) -> None:
        if self.writer is not None:
            self.writer.close()
