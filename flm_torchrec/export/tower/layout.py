"""The files of the packaged tower: their names, and the content of `tower.json`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated

import pyarrow as pa
from pydantic import BaseModel, ConfigDict, Field, model_validator

FOLDER = "tower"
USER, ITEM, PROFILE = "user.pt2", "item.pt2", "profile.pt2"
ONNX = "user.onnx"
"""The user program once more, if it was asked for."""
DESCRIPTION, HISTORIES = "tower.json", "histories.parquet"

Number = Annotated[float, Field(allow_inf_nan=False)]
Count = Annotated[int, Field(ge=0, le=1 << 40)]


class FeatureDescription(BaseModel):
    """A feature in `tower.json`, see `data.feature_values.FeatureValues`."""

    model_config = ConfigDict(strict=True, extra="forbid")

    name: str
    entity: str
    kind: str
    width: Annotated[int, Field(ge=0, le=1 << 16)] = 0
    mean: Number = 0.0
    deviation: Number = 0.0
    buckets: Count = 0
    ngrams: Annotated[int, Field(ge=1, le=100)] = 1
    values: tuple[str, ...] = ()


class Description(BaseModel):
    """The part of `tower.json` that a reader needs. A wrong type is refused, not converted."""

    model_config = ConfigDict(strict=True)

    dim: Annotated[int, Field(ge=1, le=1 << 16)]
    """Of content vectors, the inputs."""
    space: Annotated[int, Field(ge=1, le=1 << 16)] | None = None
    """Of representations and of the item vectors that they are scored against. None: an older version; as `dim`."""
    items: Count
    max_history: Annotated[int, Field(ge=1, le=1 << 20)]
    cosine: bool
    fusion: str
    events: Annotated[list[str], Field(min_length=1)]
    targets: list[str] | None = None
    """Kinds of events that the model predicts, whose items are left out of recommendations; None: all."""
    timestamps: bool
    usual_gap: Annotated[int, Field(ge=0, le=1 << 40)]
    value_mean: Number
    value_scale: Number
    gaps: Annotated[int, Field(ge=1, le=1 << 20)]
    features: list[FeatureDescription]
    title: str = ""
    """The text feature of items that people see as the title; empty: there is none, or the export is older."""

    @model_validator(mode="after")
    def _check(self) -> Description:
        if self.title and self.title not in (f.name for f in self.features if f.entity == "item" and f.kind == "text"):
            raise ValueError(f"title: '{self.title}' is no text feature of items")
        return self


def history_types(contexts: Iterable[str]) -> dict[str, pa.DataType]:
    """Columns of `histories.parquet`, each a list of this type for each user: those of `contexts` are codes."""
    types = {"item": pa.int32(), "event": pa.int32(), "value": pa.float32(), "timestamp": pa.int64()}
    return types | dict.fromkeys(contexts, pa.int32())
