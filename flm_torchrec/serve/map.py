"""A map of the items' vectors: the two directions in which the vectors vary most (PCA)."""

from __future__ import annotations

import json
import threading
from dataclasses import dataclass
from typing import Any

import numpy as np

from flm_torchrec.serve.loaded_export import LoadedExport
from flm_torchrec.serve.service import Service

MOST_ITEMS = 20_000
"""Maximum of items on the map; of a larger catalogue it shows a sample with a fixed seed."""
MOST_VALUES = 10
"""Values of a feature that have their own colour: those of the most items."""


@dataclass(frozen=True)
class CachedMap:
    """The map of one loaded export."""

    model: tuple[int, str]
    """Number of the export, and version of its model."""
    answer: bytes
    """`draw` as JSON, since the conversion of 20,000 items for each request would delay others."""


class MapCache:
    """The map of the export that is served: made at the first request, and kept until another is loaded."""

    def __init__(self, service: Service) -> None:
        self.service = service
        self.making = threading.Lock()
        self.made: CachedMap | None = None

    def get(self) -> bytes:
        """`draw` as JSON. The first call takes a second; further calls wait for the same result."""
        with self.making:
            loaded = self.service.loaded
            model = loaded.number, loaded.manifest.model_version
            if self.made is None or self.made.model != model:
                self.made = CachedMap(model, json.dumps(draw(loaded)).encode())
            return self.made.answer


def draw(loaded: LoadedExport) -> dict[str, Any]:
    """Columns of the shown items.

    `items` has their keys, `titles` their titles, `x` and `y` their positions (-1 … 1, one scale for both). `features`
    is {name: {values, codes}}: the most common values, and for each item the index of one, or -1. `variance` is the
    share (0 … 1) of the vectors' variance along the two directions, `of` the number of items of the catalogue.
    """
    catalogue = loaded.catalogue
    rows = np.arange(len(catalogue))
    if len(rows) > MOST_ITEMS:
        rows = np.sort(np.random.default_rng(0).choice(len(rows), MOST_ITEMS, replace=False))
    positions, variance = flatten(catalogue.vectors(rows))
    return {
        "model_version": loaded.manifest.model_version,
        "of": len(catalogue),
        "variance": variance,
        "items": catalogue.keys.take(rows).to_pylist(),
        "titles": catalogue.titles.take(rows).to_pylist(),
        "x": positions[:, 0].round(4).tolist(),
        "y": positions[:, 1].round(4).tolist(),
        "features": {name: _codes(loaded, name, rows) for name in catalogue.attributes},
    }


def flatten(vectors: np.ndarray) -> tuple[np.ndarray, float]:
    """[N, D] → [N, 2] by PCA, scaled to -1 … 1, and the share of the variance that is kept."""
    centred = vectors.astype(np.float64) - vectors.mean(0, dtype=np.float64)
    variances, axes = np.linalg.eigh(centred.T @ centred)
    first = axes[:, ::-1][:, :2]
    first = first * np.where(first[np.abs(first).argmax(0), [0, 1]] < 0, -1, 1)  # the sign of an axis is arbitrary
    positions = centred @ first
    total = float(variances.sum())
    kept = float(variances[-2:].sum()) / total if total > 0 else 0.0
    return (positions / max(float(np.abs(positions).max()), 1e-12)).astype(np.float64), kept


def _codes(loaded: LoadedExport, name: str, rows: np.ndarray) -> dict[str, Any]:
    attribute = loaded.catalogue.attributes[name]
    values = attribute.top(MOST_VALUES)
    codes = np.full(len(loaded.catalogue), -1)
    for code in reversed(range(len(values))):  # an item of several values has the colour of the most common one
        codes[attribute.items_with(values[code])] = code
    return {"values": values, "codes": codes[rows].tolist()}
