"""The content of requests. Wrong types, unknown fields, NaN and infinity are refused, never converted."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, GetPydanticSchema, model_validator

from flm_torchrec.config.heads import FUSED, REPRESENTATIONS
from flm_torchrec.data.times import LATEST

MOST_HISTORY = 1000
MOST_K = 1000
MOST_BATCH = 64
MOST_PLAIN = 100
"""Items of an answer, and events of a history, of a plain request."""
MOST_VALUES = 100
MOST_FORGOTTEN = 400
"""Users of a request to forget: as long keys as may be fit into a request's body."""


def _or_else(message: str) -> GetPydanticSchema:
    """What is told of a wrong value: Pydantic's own words name no unit and, of several kinds, only the first."""
    told = {"custom_error_type": "wrong_value", "custom_error_message": message}
    return GetPydanticSchema(lambda kind, schema: {"type": "custom-error", "schema": schema(kind), **told})


Key = Annotated[str, Field(min_length=1, max_length=512)]
StoredKey = Annotated[str, Field(min_length=1, max_length=512, pattern=r"^[^\x00]*$")]
"""A key that is kept: PostgreSQL's text has no NUL."""
Finite = Annotated[float, Field(allow_inf_nan=False, ge=-1e9, le=1e9)]
Seconds = Annotated[
    int, Field(ge=0, le=LATEST), _or_else("give seconds since 1970 as a whole number, such as 1700000000")
]
Text = Annotated[str, Field(max_length=2000)]
FeatureValue = Annotated[
    Text
    | Annotated[int, Field(ge=-(2**53), le=2**53)]
    | Finite
    | (Annotated[list[Text], Field(max_length=MOST_VALUES)] | Annotated[list[Finite], Field(max_length=4096)]),
    _or_else("give a text of up to 2,000 characters, a number, or a list of up to 100 texts or 4,096 numbers"),
]
ContextValue = Annotated[
    Annotated[str, Field(max_length=512)] | Annotated[int, Field(ge=-(2**53), le=2**53)] | None,
    _or_else("give a text of up to 512 characters, a whole number, or null"),
]
Context = Annotated[dict[Key, ContextValue], Field(max_length=MOST_VALUES)]
Features = Annotated[dict[Key, FeatureValue], Field(max_length=MOST_VALUES)]
Values = Annotated[list[Key], Field(min_length=1, max_length=MOST_VALUES)]
Head = Literal[REPRESENTATIONS]  # type: ignore[valid-type]


class Message(BaseModel):
    """The body of a request."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, use_attribute_docstrings=True)


class Event(Message):
    """One event of a history."""

    item: Key
    event: Key | None = None
    """Kind of event, by name; without it the data's first."""
    value: Finite | None = None
    timestamp: Seconds | None = None
    """Seconds since 1970; without it the usual gap after the event before."""
    context: Context = Field(default_factory=dict)
    """By feature of events, such as the device, its value; one that is not given or null is unknown."""


class Whom(Message):
    """The user of a request: a known one, a history, features, all or none of them."""

    user: Key | None = None
    history: Annotated[list[Event], Field(max_length=MOST_HISTORY)] = Field(default_factory=list)
    """Oldest first. The history of a known user follows the events that are known."""
    features: Features | None = None
    """Features of the user, in place of the known user's own."""
    split_by: Key | None = None
    """Where several exports are served: what chooses one in place of `user`, such as the id of a session."""

    @property
    def unit(self) -> str | None:
        """What chooses one of several exports."""
        return self.split_by or self.user


class Recommend(Whom):
    """For whom to recommend, and what."""

    head: Head = FUSED
    k: Annotated[int, Field(ge=1, le=MOST_K)] = 10
    exclude_seen: bool = True
    filter: Annotated[dict[Key, Values], Field(max_length=20)] = Field(default_factory=dict)
    """By feature: values of which an item must have at least one."""
    explain: bool = False
    offset: Annotated[int, Field(ge=0, le=MOST_K)] = 0
    """Items to pass over: those of earlier pages."""
    diversity: Annotated[float, Field(ge=0, le=1)] = 0.0
    """0: by score alone; towards 1: items that are unlike each other."""
    boost: Annotated[dict[Key, dict[Key, Finite]], Field(max_length=20)] = Field(default_factory=dict)
    """By feature and value: what is added to the score of an item that has the value; negative buries it."""
    pinned: Annotated[list[Key], Field(max_length=MOST_VALUES)] = Field(default_factory=list)
    """Items that come first, in this order."""

    @property
    def plain(self) -> bool:
        """Whether it takes about as long as other plain requests: few items, by score alone."""
        rules = self.explain or self.diversity or self.boost or self.filter or self.pinned or self.features
        return not rules and self.offset + self.k <= MOST_PLAIN and len(self.history) <= MOST_PLAIN

    @model_validator(mode="after")
    def _check(self) -> Recommend:
        if self.offset + self.k > MOST_K:
            raise ValueError(f"offset + k is more than {MOST_K}; ask for fewer")
        if len(set(self.pinned)) < len(self.pinned):
            raise ValueError("pinned: names an item twice")
        return self


class Similar(Message):
    """For which item, or which vector, to give similar items."""

    item: Key | None = None
    vector: Annotated[list[Finite], Field(min_length=1, max_length=65_536)] | None = None
    """As wide as item vectors."""
    k: Annotated[int, Field(ge=1, le=MOST_K)] = 10
    exclude: Annotated[list[Key], Field(max_length=MOST_HISTORY)] = Field(default_factory=list)
    """Items to leave out."""
    filter: Annotated[dict[Key, Values], Field(max_length=20)] = Field(default_factory=dict)
    """As of `Recommend`."""
    explain: bool = False
    split_by: Key | None = None
    """As of `Whom`."""

    @property
    def unit(self) -> str | None:
        """As of `Whom`."""
        return self.split_by

    @model_validator(mode="after")
    def _check(self) -> Similar:
        if (self.item is None) == (self.vector is None):
            raise ValueError("give either item or vector")
        return self


class SimilarUsers(Whom):
    """For which user to give users alike."""

    k: Annotated[int, Field(ge=1, le=MOST_K)] = 10
    exclude: Annotated[list[Key], Field(max_length=MOST_HISTORY)] = Field(default_factory=list)
    """Users to leave out."""
    explain: bool = False

    @model_validator(mode="after")
    def _check(self) -> SimilarUsers:
        if self.user is None and not self.history and self.features is None:
            raise ValueError("give user, history or features")
        return self


class RecommendBatch(Message):
    """Several requests that are answered together."""

    requests: Annotated[list[Recommend], Field(min_length=1, max_length=MOST_BATCH)]


class NewItem(Message):
    """A cold item, which has features but no trained id."""

    item: StoredKey
    title: Annotated[str, Field(max_length=2000, pattern=r"^[^\x00]*$")] = ""
    features: Features = Field(default_factory=dict)


class NewEvent(Event):
    """An event of a user since the export."""

    user: StoredKey

    @property
    def unit(self) -> str:
        """What chooses one of several exports."""
        return self.user


class Swap(Message):
    """The export to serve from now on."""

    export: Annotated[str, Field(min_length=1, max_length=4096)]
    replaces: Key | None = None
    """Name of the served export whose place it takes; needed where there are several."""
    canary: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Share of the users that get it first; without it all get it at once."""
    minutes: Annotated[float, Field(gt=0, le=10_080)] = 10.0
    """After which it takes over, with `canary`."""


class Forget(Message):
    """Users whose live events to remove."""

    users: Annotated[list[Key], Field(max_length=MOST_FORGOTTEN)]
    check: bool = False
    """Only say what there is of them."""


class Answered(BaseModel):
    """The body of an answer. It describes answers in the OpenAPI document; the service makes them as plain dicts."""

    model_config = ConfigDict(use_attribute_docstrings=True)


class FoundItem(Answered):
    """An item."""

    item: str
    title: str
    attributes: dict[str, list[str]]


class KnownEvent(FoundItem):
    """An event of a user."""

    event: str
    timestamp: int | None
    """Seconds since 1970; null in data without timestamps."""
    context: dict[str, str] | None = None
    """By feature of events, the value that the model knows."""


class ServedNames(Answered):
    """The names that requests may use."""

    heads: list[str]
    features: dict[str, list[str]]
    """By feature, its values: those of most items first."""
    events: list[str]
    """Kinds of events."""
    contexts: dict[str, list[str]] = {}
    """By feature of events, the first of its values."""
    max_history: int
    """Events of a history that count, the newest ones."""
    model_version: str


class ScoredItem(FoundItem):
    """An item of an answer."""

    score: float
    why: dict[str, Any] | None = None


class Recommended(Answered):
    """Answer of /v1/recommend and /v1/similar."""

    model_version: str
    export: str
    items: list[ScoredItem]
    head: str | None = None
    left_out: list[str] | None = None


class RecommendedBatch(Answered):
    """Answer of /v1/recommend/batch."""

    answers: list[Recommended]


class SimilarUser(Answered):
    """A user of an answer."""

    user: str
    score: float
    why: dict[str, Any] | None = None


class FoundUsers(Answered):
    """Answer of /v1/users/similar."""

    model_version: str
    export: str
    users: list[SimilarUser]
    left_out: list[str] | None = None


class ItemAdded(Answered):
    """Answer of POST /v1/items."""

    item: str
    items: int
    left_out: list[str]
    model_version: str


class EventAdded(Answered):
    """Answer of POST /v1/events."""

    user: str
    known: bool
    live_events: int
    model_version: str
    export: str
    left_out: list[str] | None = None
    """Values of the context that were not in training."""


class ServedCanary(Answered):
    """A fresh export that a share of the users gets."""

    model_version: str
    share: float
    until: float


class ServedExport(Answered):
    """One of the exports that are served."""

    export: str
    share: float
    model_version: str
    generation: int
    recall: float | None
    canary: ServedCanary | None


class Forgotten(Answered):
    """Answer of /v1/forget."""

    export: str
    """Folder of the export that is served; of several, of one that has users."""
    exports: dict[str, str]
    """By name, the folders of the served exports that have users."""
    canaries: dict[str, str] = {}
    """By name, the folders of the canaries that have users. They are rolled back, unless the request only checks."""
    in_export: list[str]
    """Those of the users whom these exports have: they are known until a cleaned export is swapped in."""
    in_canary: list[str] = []
    """Those of the users whom these canaries have."""
    live_events: dict[str, int]
    """By user, the live events that were removed, or that there are; without users who had none."""


class Health(Answered):
    """Answer of /health and /v1/swap."""

    status: str
    model_version: str
    users: int
    items: int
    generation: int
    exports: list[ServedExport]
