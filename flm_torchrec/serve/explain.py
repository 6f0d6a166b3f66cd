"""Why an item was recommended (a stub until the page's branch is merged)."""

from __future__ import annotations

from typing import Any

import numpy as np

from flm_torchrec.export.encoder import Represented
from flm_torchrec.serve.generation import Generation


def explain(generation: Generation, found: Represented, history: np.ndarray, items: np.ndarray) -> list[dict[str, Any]]:
    """One reason a row of `items`."""
    return [{} for _ in items]
