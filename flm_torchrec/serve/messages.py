"""The content of requests. Wrong types, unknown fields, NaN and infinity are refused, never converted."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from flm_torchrec.config.heads import FUSED, REPRESENTATIONS
from flm_torchrec.data.times import LATEST

MOST_HISTORY = 1000
MOST_K = 1000
MOST_BATCH = 64
MOST_VALUES = 100
Key = Annotated[str, Field(min_length=1, max_length=512)]
Finite = Annotated[float, Field(allow_inf_nan=False, ge=-1e9, le=1e9)]
Seconds = Annotated[int, Field(ge=0, le=LATEST)]
Text = Annotated[str, Field(max_length=2000)]
FeatureValue = (
    Text
    | Annotated[int, Field(ge=-(2**53), le=2**53)]
    | Finite
    | (Annotated[list[Text], Field(max_length=MOST_VALUES)] | Annotated[list[Finite], Field(max_length=4096)])
)
Features = Annotated[dict[Key, FeatureValue], Field(max_length=MOST_VALUES)]
Values = Annotated[list[Key], Field(min_length=1, max_length=MOST_VALUES)]
Head = Literal[REPRESENTATIONS]  # type: ignore[valid-type]


class Message(BaseModel):
    """The body of a request."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)


class Event(Message):
    """One event of a history."""

    item: Key
    event: Key | None = None
    """Kind of event, by name; without it the data's first."""
    value: Finite | None = None
    timestamp: Seconds | None = None
    """Seconds since 1970; without it the usual gap after the event before."""


class Recommend(Message):
    """For whom to recommend, and what."""

    user: Key | None = None
    history: Annotated[list[Event], Field(max_length=MOST_HISTORY)] = []
    """Oldest first. The history of a known user follows the events that are known."""
    features: Features | None = None
    """Features of the user, in place of the known user's own."""
    head: Head = FUSED
    k: Annotated[int, Field(ge=1, le=MOST_K)] = 10
    exclude_seen: bool = True
    filter: Annotated[dict[Key, Values], Field(max_length=20)] = {}
    """By feature: values of which an item must have at least one."""
    explain: bool = False


class RecommendBatch(Message):
    """Several requests that are answered together."""

    requests: Annotated[list[Recommend], Field(min_length=1, max_length=MOST_BATCH)]


class NewItem(Message):
    """A cold item, which has features but no trained id."""

    item: Key
    title: Text = ""
    features: Features = {}


class NewEvent(Event):
    """An event of a user since the export."""

    user: Key


class Swap(Message):
    """The export to serve from now on."""

    export: Annotated[str, Field(min_length=1, max_length=4096)]
