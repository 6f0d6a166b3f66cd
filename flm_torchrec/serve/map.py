"""The map of items as the web page gets it. An export holds the positions; those of an older one are computed here."""

from __future__ import annotations

import json
import threading
from dataclasses import dataclass
from typing import Any

import numpy as np

from flm_torchrec.export.item_map import place, shown_rows
from flm_torchrec.serve.loaded_export import LoadedExport
from flm_torchrec.serve.service import Service

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
    is {name: {values, codes}}: the most common values, and for each item the index of one, or -1. `method` is "umap" or
    "pca", `variance` the share (0 … 1) of the vectors' variance along the two directions of PCA, and None of UMAP. `of`
    is the number of items of the catalogue.
    """
    catalogue, shown = loaded.catalogue, loaded.item_map
    if shown is None:
        rows = shown_rows(len(catalogue))
        shown = place(rows, catalogue.vectors(rows), "pca")
    rows = shown.rows
    return {
        "model_version": loaded.manifest.model_version,
        "of": len(catalogue),
        "method": shown.method,
        "variance": shown.variance,
        "items": catalogue.keys.take(rows).to_pylist(),
        "titles": catalogue.titles.take(rows).to_pylist(),
        "x": _rounded(shown.positions[:, 0]),
        "y": _rounded(shown.positions[:, 1]),
        "features": {name: _codes(loaded, name, rows) for name in catalogue.attributes},
    }


def _rounded(positions: np.ndarray) -> list[float]:
    return positions.astype(np.float64).round(4).tolist()


def _codes(loaded: LoadedExport, name: str, rows: np.ndarray) -> dict[str, Any]:
    attribute = loaded.catalogue.attributes[name]
    values = attribute.top(MOST_VALUES)
    codes = np.full(len(loaded.catalogue), -1)
    for code in reversed(range(len(values))):  # an item of several values has the colour of the most common one
        codes[attribute.items_with(values[code])] = code
    return {"values": values, "codes": codes[rows].tolist()}
