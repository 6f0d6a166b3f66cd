"""A flat picture of the items' vectors: the two directions in which they differ most (PCA)."""

from __future__ import annotations

import json
import threading
from dataclasses import dataclass
from typing import Any

import numpy as np

from flm_torchrec.serve.loaded_export import LoadedExport
from flm_torchrec.serve.service import Service

MOST_ITEMS = 20_000
"""That are shown; of a larger catalogue a sample drawn from a fixed seed."""
MOST_VALUES = 10
"""Of a feature, that have a colour of their own: those of the most items."""


@dataclass(frozen=True)
class CachedMap:
    model: tuple[int, str]
    answer: bytes
    """`draw` as JSON: turning 20,000 items into text anew for every reader would keep others waiting."""


class MapCache:
    """The map of the generation served: made when it is first asked for, once, and kept until the next one."""

    def __init__(self, service: Service) -> None:
        self.service = service
        self.making = threading.Lock()
        self.made: CachedMap | None = None

    def get(self) -> bytes:
        """`draw` as JSON. Takes a second when it is made; whoever asks meanwhile waits for the same one."""
        with self.making:
            loaded = self.service.loaded
            model = loaded.number, loaded.manifest.model_version
            if self.made is None or self.made.model != model:
                self.made = CachedMap(model, json.dumps(draw(loaded)).encode())
            return self.made.answer


def draw(loaded: LoadedExport) -> dict[str, Any]:
    """Columns of the shown items.

    `items` keys, `titles`, `x` and `y` (-1 … 1, one scale for both), `features`: {name: {values, codes}} with the
    commonest values and each item's place in them, -1 where it has none of them; `variance`: the part (0 … 1) of the
    vectors' variance that the two directions hold; `of`: how many items the catalogue has.
    """
    catalogue = loaded.catalogue
    rows = np.arange(len(catalogue))
    if len(rows) > MOST_ITEMS:
        rows = np.sort(np.random.default_rng(0).choice(len(rows), MOST_ITEMS, replace=False))
    places, variance = flatten(catalogue.vectors(rows))
    return {
        "model_version": loaded.manifest.model_version,
        "of": len(catalogue),
        "variance": variance,
        "items": catalogue.keys.take(rows).to_pylist(),
        "titles": catalogue.titles.take(rows).to_pylist(),
        "x": places[:, 0].round(4).tolist(),
        "y": places[:, 1].round(4).tolist(),
        "features": {name: _codes(loaded, name, rows) for name in catalogue.attributes},
    }


def flatten(vectors: np.ndarray) -> tuple[np.ndarray, float]:
    """[N, D] → [N, 2] by PCA, scaled into -1 … 1, and the part of the variance kept."""
    centred = vectors.astype(np.float64) - vectors.mean(0, dtype=np.float64)
    variances, axes = np.linalg.eigh(centred.T @ centred)
    first = axes[:, ::-1][:, :2]
    first = first * np.where(first[np.abs(first).argmax(0), [0, 1]] < 0, -1, 1)  # an axis has no sign of its own
    places = centred @ first
    total = float(variances.sum())
    kept = float(variances[-2:].sum()) / total if total > 0 else 0.0
    return (places / max(float(np.abs(places).max()), 1e-12)).astype(np.float64), kept


def _codes(loaded: LoadedExport, name: str, rows: np.ndarray) -> dict[str, Any]:
    attribute = loaded.catalogue.attributes[name]
    values = attribute.top(MOST_VALUES)
    codes = np.full(len(loaded.catalogue), -1)
    for place in reversed(range(len(values))):  # of several values, the commonest colours
        codes[attribute.items_with(values[place])] = place
    return {"values": values, "codes": codes[rows].tolist()}
