"""A log whose events have contexts and weights."""

from __future__ import annotations

import numpy as np
import polars as pl

from tests.training.test_event_kinds import ROLES, USERS, log

WITH_WEIGHTS = {**ROLES, "weight": "weight"}
FEATURES = {"device": "categorical", "place": "categorical"}


def with_contexts() -> pl.DataFrame:
    """The log with devices, of which one is too rare, and places, many of which are unknown."""
    rng = np.random.default_rng(5)
    n = USERS * 12
    device = rng.choice(["phone", "tv", "laptop"], n).tolist()
    device[7] = "fridge"
    place = [
        None if unknown else name
        for name, unknown in zip(rng.choice(["home", "away"], n), rng.random(n) < 0.4, strict=True)
    ]
    return log([0.5, 2.0, 0.0, 1.0, 3.0]).with_columns(
        device=pl.Series(device), place=pl.Series(place, dtype=pl.String)
    )
