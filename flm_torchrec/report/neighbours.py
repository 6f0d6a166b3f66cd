"""Which items lie nearest to some items, by the vectors of an export: a look at what was learnt."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as pds

from flm_torchrec.export.vectors import decode
from flm_torchrec.pages import PageTable, Section
from flm_torchrec.report.pieces import Missing

SAMPLES = 10
NEIGHBOURS = 5
STORED = {"items.parquet": "parquet", "items.arrow": "feather"}


def neighbours(export: Path | None, data: Path | str) -> Section:
    """Items spread over popularity, from the most to the least, each with its nearest by cosine.

    Reads the export in batches; of the prepared data only counts of items are asked, and ids are spread where it is
    not there (then `data` says why) or names other items than the export.
    """
    if export is None:
        raise Missing("give an export of the run with --export")
    names = [name for name in STORED if (export / name).exists()]
    if not names:
        raise Missing(f"{export} holds no items.parquet; 'flm export --output {export}' makes an export")
    try:
        rows = pds.dataset(export / names[0], format=STORED[names[0]])
        counts = _counts(data, rows)
        order = np.argsort(-counts, kind="stable")
        picked = order[np.unique(np.linspace(0, len(order) - 1, SAMPLES).astype(int))]
        columns = ["item_id", "item_key", "title", "embedding"]
        table = rows.to_table(columns=columns, filter=pc.field("item_id").isin(picked))
        table = table.take(pc.index_in(pa.array(picked), table["item_id"]))
        ids, scores = _nearest(rows, _unit(table["embedding"].combine_chunks()), picked)
        told = rows.to_table(columns=["item_id", "title"], filter=pc.field("item_id").isin(np.unique(ids)))
    except (pa.ArrowException, OSError) as error:
        raise Missing(f"{export} is not readable ({str(error).splitlines()[0]})") from error
    titles = dict(zip(told["item_id"].to_pylist(), told["title"].to_pylist(), strict=True))
    lines = [
        (
            f"{title} ({key})",
            f"{counts[picked[n]]:,}" if counts.any() else "",
            *(f"{titles[i]} {score:.2f}" for i, score in zip(ids[n].tolist(), scores[n].tolist(), strict=True)),
        )
        for n, (key, title) in enumerate(zip(table["item_key"].to_pylist(), table["title"].to_pylist(), strict=True))
    ]
    header = ("item", "events", *(f"nearest {n + 1}" for n in range(ids.shape[1])))
    return Section("Nearest items", ["By cosine of item vectors, from the most popular item to the least."],
                   [PageTable(str(export), header, lines)])  # fmt: skip


def _counts(data: Path | str, export: pds.Dataset) -> np.ndarray:
    """[items] events of each item of the export; all 0 where the data are not there or name other items."""
    keys = _keys(export)
    counts = np.zeros(len(keys), np.int64)
    if isinstance(data, str) or not keys.equals(_keys(pds.dataset(data / "items.parquet", format="parquet"))):
        return counts
    for batch in pds.dataset(data / "interactions", format="parquet").to_batches(columns=["item_id"]):
        counts += np.bincount(batch.column(0).to_numpy(), minlength=len(keys))
    return counts


def _keys(rows: pds.Dataset) -> pa.ChunkedArray:
    """Keys of items, in order of id."""
    return pc.cast(rows.to_table(columns=["item_key"])["item_key"], pa.string())


def _nearest(rows: pds.Dataset, wanted: np.ndarray, own: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Ids and cosines [samples, k] of the nearest items but the samples themselves."""
    ids = np.zeros((len(wanted), 0), np.int64)
    scores = np.zeros((len(wanted), 0))
    for batch in rows.to_batches(columns=["item_id", "embedding"]):
        if len(batch) == 0:
            continue
        here = batch.column(0).to_numpy()
        found = np.where(own[:, None] == here[None], -np.inf, wanted @ _unit(batch.column(1)).T)
        scores = np.concatenate([scores, found], 1)
        ids = np.concatenate([ids, np.broadcast_to(here, found.shape)], 1)
        best = np.argsort(-scores, 1, kind="stable")[:, :NEIGHBOURS]
        ids, scores = np.take_along_axis(ids, best, 1), np.take_along_axis(scores, best, 1)
    return ids, scores


def _unit(column: pa.FixedSizeListArray) -> np.ndarray:
    """[n, D] of length 1."""
    vectors = decode(column)
    if not np.isfinite(vectors).all():
        raise Missing("the export's vectors have NaN or infinity; export again")
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
