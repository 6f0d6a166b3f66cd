"""`map.parquet` of an export: where the web page draws each item. Near items have similar vectors."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from flm_torchrec.errors import RunError
from flm_torchrec.export.manifest import Manifest, MapMethod
from flm_torchrec.export.parts import ExportRows, read_part, write_part
from flm_torchrec.export.vectors import decode, unit
from flm_torchrec.folders import MAP

MOST_ITEMS = 20_000
"""Maximum of items on the map; of a larger catalogue it shows a sample with a fixed seed."""
NEIGHBOURS = 15
"""UMAP's n_neighbors, its default (McInnes et al., JOSS 2018). With fewer items PCA places them."""


@dataclass(frozen=True)
class ItemMap:
    """Items in two directions."""

    method: MapMethod
    rows: np.ndarray  # [N] int64, ascending: the items shown
    positions: np.ndarray  # [N, 2] float32, -1 … 1, one scale for both directions
    variance: float | None
    """Share (0 … 1) of the vectors' variance along the two directions of PCA; None of UMAP."""


def method_of(asked: MapMethod | None) -> MapMethod:
    """The method asked for, else UMAP where umap-learn is installed, and PCA elsewhere.

    Raises:
        RunError: UMAP is asked for and not installed.
    """
    installed = importlib.util.find_spec("umap") is not None
    if asked == "umap" and not installed:
        raise RunError("--map umap: needs umap-learn; pip install 'flm_torchrec[umap]', or give --map pca")
    return asked or ("umap" if installed else "pca")


def method_used(folder: Path) -> MapMethod:
    """How the map of an export or a delta that was just written is drawn."""
    return pq.read_schema(folder / MAP).metadata[b"method"].decode()  # type: ignore[return-value]


def shown_rows(items: int) -> np.ndarray:
    """Rows [N] int64 of the items that the map of a catalogue shows, ascending."""
    if items <= MOST_ITEMS:
        return np.arange(items)
    return np.sort(np.random.default_rng(0).choice(items, MOST_ITEMS, replace=False))


def place(rows: np.ndarray, vectors: np.ndarray, method: MapMethod) -> ItemMap:
    """The map of items [N] with these vectors [N, D].

    Raises:
        RunError: UMAP found no position for some item.
    """
    if method == "umap" and len(rows) > NEIGHBOURS:
        return ItemMap("umap", rows, _by_umap(vectors), None)
    return ItemMap("pca", rows, *flatten(vectors))


def flatten(vectors: np.ndarray) -> tuple[np.ndarray, float]:
    """[N, D] → [N, 2] by PCA, scaled to -1 … 1, and the share of the variance that is kept."""
    if vectors.shape[1] < 2:
        vectors = np.pad(vectors, ((0, 0), (0, 1)))
    centred = vectors.astype(np.float64) - vectors.mean(0, dtype=np.float64)
    variances, axes = np.linalg.eigh(centred.T @ centred)
    first = axes[:, ::-1][:, :2]
    first = first * np.where(first[np.abs(first).argmax(0), [0, 1]] < 0, -1, 1)  # the sign of an axis is arbitrary
    total = float(variances.sum())
    kept = float(variances[-2:].sum()) / total if total > 0 else 0.0
    return _scaled(centred @ first), kept


def _by_umap(vectors: np.ndarray) -> np.ndarray:
    """[N, D] → [N, 2] by UMAP on the directions of the vectors, the same at each call."""
    from umap import UMAP  # an extra, which compiles at its first use

    reducer = UMAP(n_neighbors=NEIGHBOURS, init="pca", random_state=0, n_jobs=1)
    positions = np.asarray(reducer.fit_transform(unit(vectors)), np.float64)
    if not np.isfinite(positions).all():
        raise RunError("UMAP found no position for some items; export with --map pca")
    return _scaled(positions - (positions.max(0) + positions.min(0)) / 2)


def _scaled(positions: np.ndarray) -> np.ndarray:
    return (positions / max(float(np.abs(positions).max()), 1e-12)).astype(np.float32)


def write_map(folder: Path, manifest: Manifest, method: MapMethod) -> None:
    """Draw the map of an export whose rows are written, and write it beside these."""
    rows, found = shown_rows(manifest.items), []
    for part, file in enumerate(ExportRows(folder, manifest, "items").files):
        begin = part * manifest.part_rows
        low, high = np.searchsorted(rows, [begin, begin + manifest.part_rows])
        vectors = read_part(file, ["embedding"])["embedding"]
        found.append(decode(vectors.take(pa.array(rows[low:high] - begin))))
    drawn = place(rows, np.concatenate(found), method)
    told = {"method": drawn.method} | ({} if drawn.variance is None else {"variance": repr(drawn.variance)})
    x, y = drawn.positions.T
    write_part(folder / MAP, pa.table({"item_id": drawn.rows, "x": x, "y": y}).replace_schema_metadata(told))


def read_map(folder: Path, manifest: Manifest) -> ItemMap | None:
    """The map of an export; None of one that an older version wrote.

    Raises:
        RunError: the file is damaged, or it is the map of another export.
    """
    if MAP not in manifest.sha256:
        return None
    table = read_part(folder / MAP, ["item_id", "x", "y"])
    told = {name.decode(): value.decode() for name, value in (table.schema.metadata or {}).items()}
    try:
        rows = table["item_id"].to_numpy()
        positions = np.stack([table[name].to_numpy() for name in ("x", "y")], 1).astype(np.float32)
        variance = float(told["variance"]) if told["method"] == "pca" else None
    except (KeyError, ValueError, TypeError, pa.ArrowException) as error:
        raise RunError(f"{folder / MAP}: not a map of items ({error}); export again") from error
    sound = 0 < len(rows) <= MOST_ITEMS and rows[0] >= 0 and rows[-1] < manifest.items and (np.diff(rows) > 0).all()
    if not sound or told["method"] not in ("umap", "pca") or not (np.abs(positions) <= 1).all():
        raise RunError(f"{folder / MAP}: not the map of these {manifest.items} items; export again")
    return ItemMap(told["method"], rows, positions, variance)  # type: ignore[arg-type]
