"""Bins that fit numbers: one for each whole number where these are few, logarithmic ones for a span of decades."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from flm_torchrec.charts import wide

MOST = 30
"""Bins at most."""


@dataclass(frozen=True)
class Bins:
    """Bins of a histogram, each from its edge to below the next."""

    edges: np.ndarray  # [n + 1]
    log: bool
    """They are for a logarithmic axis."""


def fitting(least: float, most: float, whole: bool) -> Bins:
    """Bins for numbers from `least` to `most`.

    Whole numbers of a small range have a bin each, with the number in its middle. Bins of a larger range are equally
    wide, or equally wide on a logarithmic axis where `least` is above 0 and `most` more than two decades away.

    Args:
        whole: all numbers are whole; then no bin is without a whole number.
    """
    if wide([least, most]):
        edges = np.geomspace(least, most + 1 if whole else most, MOST + 1)
        edges = np.unique(np.ceil(edges - 1e-9)) if whole else edges
        edges[-1] = most + 1 if whole else np.nextafter(most, np.inf)
        return Bins(edges, True)
    if whole:
        width = max(1, -(-(most - least + 1) // MOST))
        count = int(-(-(most - least + 1) // width))
        return Bins(least - 0.5 + width * np.arange(count + 1), False)
    edges = np.linspace(least, most, MOST + 1)
    edges[-1] = np.nextafter(most, np.inf)
    return Bins(edges, False)
