"""The nearest items of some items, by the vectors of an export: a view of what the model has learnt."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as pds

from flm_torchrec.export.vectors import decode, unit
from flm_torchrec.pages import PageTable, Section
from flm_torchrec.report.pieces import Missing

SAMPLES = 10
NEIGHBOURS = 5
STORED = {"items.parquet": "parquet", "items.arrow": "feather"}


def neighbours(export: Path | None, data: Path | str) -> Section:
    """A section with items from the most to the least popular, each with its nearest items by cosine.

    Reads the export in batches. The prepared data give only the popularity; where they are missing or have other items
    than the export, the items are spread over ids instead.

    Args:
        data: folder of the prepared data, or why they are missing.

    Raises:
        Missing: there is no export, or it cannot be read.
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
        named = rows.to_table(columns=["item_id", "title"], filter=pc.field("item_id").isin(np.unique(ids)))
    except (pa.ArrowException, OSError) as error:
        raise Missing(f"{export} is not readable ({str(error).splitlines()[0]})") from error
    titles = dict(zip(named["item_id"].to_pylist(), named["title"].to_pylist(), strict=True))
    lines = [
        (
            f"{title} ({key})",
            f"{counts[picked[n]]:,}" if counts.any() else "",
            *(f"{titles[i]} {score:.2f}" for i, score in zip(ids[n].tolist(), scores[n].tolist(), strict=True)),
        )
        for n, (key, title) in enumerate(zip(table["item_key"].to_pylist(), table["title"].to_pylist(), strict=True))
    ]
    header = ("item", "events", *(f"nearest {n + 1}" for n in range(ids.shape[1])))
    note = "By cosine of item vectors, from the most popular item to the least."
    return Section("Nearest items", [note], [PageTable(str(export), header, lines)])


def _counts(data: Path | str, export: pds.Dataset) -> np.ndarray:
    """[items] events of each item of the export; all 0 where the data are missing or have other items."""
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
    """Ids and cosines [samples, k] of the nearest items to vectors [samples, D], without the items `own` [samples]."""
    ids = np.zeros((len(wanted), 0), np.int64)
    scores = np.zeros((len(wanted), 0))
    for batch in rows.to_batches(columns=["item_id", "embedding"]):
        if len(batch) == 0:
            continue
        here = batch.column(0).to_numpy()
        cosines = np.where(own[:, None] == here[None], -np.inf, wanted @ _unit(batch.column(1)).T)
        scores = np.concatenate([scores, cosines], 1)
        ids = np.concatenate([ids, np.broadcast_to(here, cosines.shape)], 1)
        best = np.argsort(-scores, 1, kind="stable")[:, :NEIGHBOURS]
        ids, scores = np.take_along_axis(ids, best, 1), np.take_along_axis(scores, best, 1)
    return ids, scores


def _unit(column: pa.FixedSizeListArray) -> np.ndarray:
    """A column of vectors → [n, D] with rows of length 1."""
    vectors = decode(column)
    if not np.isfinite(vectors).all():
        raise Missing("the export's vectors have NaN or infinity; export again")
    return unit(vectors)
