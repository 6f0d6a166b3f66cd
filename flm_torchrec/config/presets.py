"""Settings under one name, for `flm train --preset`. docs/results.md has what each reaches, and in which time."""

from __future__ import annotations

from typing import Any

PRESETS: dict[str, dict[str, dict[str, Any]]] = {
    # Minutes on two CPU cores for some hundred thousand events.
    "fast": {
        "model": {"dim": 128, "dropout": 0.3},
        "loss": {"attribute": 0.5},
        "train": {"epochs": 9},
    },
    # The best of validation on two domains. Every item is a negative of every event, so it asks for a GPU.
    "best": {
        "model": {"dim": 256, "dropout": 0.5},
        "loss": {"attribute": 0.5, "negatives": "all"},
        "train": {"epochs": 9},
    },
}
"""By name of a preset, by section, the settings that are not the defaults."""
