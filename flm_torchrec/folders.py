"""What a folder holds, by its files: a command that is given another kind of folder than it wants can say so."""

from __future__ import annotations

from pathlib import Path

CONFIG, SCHEMA, MANIFEST, MAP = "config.yaml", "schema.yaml", "manifest.json", "map.parquet"
DELTA = "delta.json"
"""A delta of exports has this file in place of a manifest."""
PUSHED = "a folder of 'flm push'"
DATA = "prepared data"
EXPORT = "an export"
KINDS = {
    PUSHED: (CONFIG, MANIFEST),
    "a run": (CONFIG,),
    DATA: (SCHEMA, "interactions"),
    EXPORT: (MANIFEST, MAP),
    "a delta": (DELTA,),
}
"""By kind, what is in such a folder; the first kind that fits is it."""


def kind_of(folder: Path) -> str:
    """The kind of a folder, of KINDS; empty where it is none of them."""
    return next((kind for kind, names in KINDS.items() if all((folder / n).exists() for n in names)), "")
