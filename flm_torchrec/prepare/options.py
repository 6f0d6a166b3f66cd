"""Every option of `flm prepare` that says how to prepare, with its default, range and meaning.

A field's `description` is its help on the command line, its `title` the placeholder there. Nothing heavy is imported
here: every command reads this file to build its help.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Callable
from dataclasses import field
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field, model_validator
from pydantic.dataclasses import dataclass

from flm_torchrec.data.schema import Entity, Kind, Table
from flm_torchrec.prepare.column_options import (
    check_columns,
    check_event_kinds,
    check_kinds,
    kind_and_encoder,
    parse_columns,
    parse_kinds,
)
from flm_torchrec.prepare.memory import GIB, memory_bytes
from flm_torchrec.prepare.table_options import parse_tables

STRICT = ConfigDict(extra="forbid")
LEAST_MEMORY = GIB
"""Bytes that Python and the engine themselves need."""


def _parsed(parse: Callable[[str], Any]) -> BeforeValidator:
    """Reads text from the command line; a value that is parsed already stays as it is."""
    return BeforeValidator(lambda value: parse(value) if isinstance(value, str) else value)


def _share(value: float) -> float:
    if not 0 <= value <= 1:
        raise ValueError("must be a share, from 0 to 1")
    return value


def _tab(value: str) -> str:
    """A tab is hard to type in a shell, so that `\\t` stands for it."""
    return value.replace("\\t", "\t")


Number = Annotated[int, Field(ge=0, title="N")]
Seconds = Annotated[int, Field(ge=0, title="SECONDS")]
Strength = Annotated[float, Field(title="X")]


@dataclass(frozen=True, config=STRICT)
class PrepareOptions:
    """Cleaning and coding."""

    k_core: Annotated[
        Number, Field(description="keep users and items with at least so many events each, repeated until all have")
    ] = 0
    min_user_events: Annotated[Number, Field(description="as --k-core, of users alone")] = 0
    min_item_events: Annotated[Number, Field(description="as --k-core, of items alone")] = 0
    min_value: Annotated[
        float | None, Field(title="X", allow_inf_nan=False, description="drop events of a lower value")
    ] = None
    dedup: Annotated[
        Literal["none", "exact", "consecutive", "first", "last", "window"],
        Field(
            description="exact: same user, item, time, event; consecutive: the same item again at once; first, last:"
            " keep that event of a user with an item; window: the same user, item and event at most --dedup-window"
            " seconds after the one before"
        ),
    ] = "none"
    dedup_window: Annotated[Seconds, Field(description="of --dedup window")] = 0
    session_gap: Annotated[
        Seconds,
        Field(description="number a user's sessions, a pause of more seconds between two; 0: no sessions"),
    ] = 0
    min_count: Annotated[
        int, Field(ge=1, title="N", description="values of a categorical feature that occur fewer times become unknown")
    ] = 1
    min_users: Annotated[
        int,
        Field(
            ge=1,
            title="K",
            description="drop items that fewer than K users have, and make values of user features unknown that fewer"
            " than K users have; numbers of the kinds numeric and dense stay",
        ),
    ] = 1
    text_buckets: Annotated[
        int, Field(ge=1, title="N", description="rows of a text feature's table, into which words are hashed")
    ] = 10_000
    text_ngrams: Annotated[
        int, Field(ge=1, title="N", description="hash runs of up to so many words of a text; 1: words alone")
    ] = 1
    quantiles: Annotated[
        int, Field(ge=2, title="N", description="buckets of a feature of kind quantile, equally many rows each")
    ] = 100
    exclude_users: Annotated[
        str,
        Field(
            title="FILE",
            description="leave out all events of these users: text with an id a line, or a table with a column user;"
            " ids as in --input or, with --hash-users, hashed with the same key",
        ),
    ] = ""
    keep_unseen_items: Annotated[
        bool,
        Field(
            description="also keep described items without events; with --min-users not those whose events were dropped"
        ),
    ] = False
    max_dropped: Annotated[
        float,
        AfterValidator(_share),
        Field(
            title="X",
            description="stop where more than this share (0 to 1) of the rows is unreadable or lacks what an event"
            " needs; above a share of 0.2 a warning is given",
        ),
    ] = 0.9
    tables: Annotated[
        dict[str, Table],
        _parsed(parse_tables),
        Field(
            title="NAME=KIND:ROWS,…",
            description="for user_id, item_id or a sparse feature with more ids than rows: hash:ROWS, or"
            " zch:ROWS[:lfu|lru], where the ids seen most or last keep a row each; none: every id has a row",
        ),
    ] = field(default_factory=dict)

    @model_validator(mode="after")
    def _check(self) -> PrepareOptions:
        if (self.dedup == "window") != (self.dedup_window > 0):
            raise ValueError("--dedup-window: give it with --dedup window, and only then")
        return self

    def minimum_events(self, entity: Entity) -> int:
        """Events that every user, or every item, must have."""
        return max(self.k_core, self.min_user_events if entity == "user" else self.min_item_events)


@dataclass(frozen=True, config=STRICT)
class MachineOptions:
    """With what to prepare: changes no byte of the result."""

    memory: Annotated[
        int | None,
        _parsed(lambda text: memory_bytes(text, LEAST_MEMORY)),
        Field(
            title="SIZE",
            description="for the whole preparation, such as 2GiB or 1500MB, at least 1GiB; what does not fit goes to"
            " disk beside the output; none: half of the machine's",
        ),
    ] = None
    threads: Annotated[Number, Field(description="threads of the engine; 0: all cores")] = 0
    engine: Annotated[
        Literal["duckdb", "spark"],
        Field(description="duckdb: this machine; spark: a cluster, with the settings of spark-submit"),
    ] = "duckdb"


@dataclass(frozen=True, config=STRICT)
class NumberForm:
    """How numbers are written in text."""

    decimal: Annotated[str, Field(title="SIGN", description="decimal sign of numbers in text")] = "."
    thousands: Annotated[str, Field(title="SIGN", description="between groups of digits of numbers in text")] = ""
    currency: Annotated[
        str,
        Field(
            title="SIGN",
            description="sign or code beside numbers in text, such as € or EUR; another one makes no number",
        ),
    ] = ""

    @model_validator(mode="after")
    def _check(self) -> NumberForm:
        for option, sign in (("--decimal", self.decimal), ("--thousands", self.thousands)):
            if sign and (len(sign) > 1 or sign.isalnum() or sign in '+-"'):
                raise ValueError(f"{option} '{sign}': give one sign, such as , or .")
        if not self.decimal or self.decimal == self.thousands:
            raise ValueError(f"--thousands '{self.thousands}': must differ from --decimal '{self.decimal}'")
        if re.search(r"[\d+\-.,\s]", self.currency):
            raise ValueError(f"--currency '{self.currency}': give one sign or code, such as € or EUR")
        return self


@dataclass(frozen=True, config=STRICT)
class TextForm:
    """How text is written: of --input, --items and --users alike."""

    separator: Annotated[
        str, AfterValidator(_tab), Field(title="SIGN", description="of CSV columns, one character")
    ] = ","
    list_separator: Annotated[
        str,
        AfterValidator(_tab),
        Field(title="SIGN", description="inside a column of lists; lists of JSON are read as they are"),
    ] = "|"
    encoding: Annotated[str, Field(title="NAME", description="of text, such as latin-1, cp1252, utf-16")] = "utf-8"
    multiline: Annotated[
        bool,
        Field(
            description="a quoted field of CSV events may hold line breaks, as those of --items and --users may; else a"
            " row is a line, so that a stray quote spoils one row alone"
        ),
    ] = False
    numbers: NumberForm = field(default_factory=NumberForm)

    @model_validator(mode="after")
    def _check(self) -> TextForm:
        try:
            of_text = codecs.lookup(self.encoding)._is_text_encoding  # type: ignore[attr-defined]
        except (LookupError, ValueError):
            of_text = False
        if not of_text:
            raise ValueError(
                f"--encoding '{self.encoding}': not known; give one such as utf-8, latin-1, cp1252, utf-16"
            )
        if not self.list_separator:
            raise ValueError("--list-separator '': give a sign that separates the values of a list")
        if self.list_separator in (self.numbers.decimal, self.numbers.thousands) and self.list_separator != ".":
            raise ValueError(f"--list-separator '{self.list_separator}': must differ from --decimal and --thousands")
        return self


@dataclass(frozen=True)
class EntityTable:
    """A table that describes items or users."""

    entity: Entity
    file: str
    """A file, a folder, a pattern or an address."""
    key: str
    """Column of the ids."""
    given: dict[str, str]
    """Kind by column, of its features, as it was given: with the encoder of a text."""

    @property
    def kinds(self) -> dict[str, Kind]:
        """Kind by column."""
        return {name: kind_and_encoder(given)[0] for name, given in self.given.items()}  # type: ignore[misc]

    @property
    def encoders(self) -> dict[str, Path]:
        """Folder of the text encoder by column, of the columns that have one."""
        folders = {name: kind_and_encoder(given)[1] for name, given in self.given.items()}
        return {name: folder for name, folder in folders.items() if folder is not None}

    @property
    def option(self) -> str:
        """The option that named the file, for errors."""
        return f"--{self.entity}s"


@dataclass(frozen=True, config=STRICT)
class LogOptions:
    """Your own logs (parquet, csv, jsonl, delta, iceberg)."""

    columns: Annotated[
        dict[str, str],
        _parsed(parse_columns),
        Field(
            title="ROLE=COLUMN,…",
            description="roles: user, item, timestamp, event, value, weight; without a timestamp the order of the rows"
            " counts; weight: what an event counts as a target, at least 0."
            " COLUMN may be a path into objects (user.id), or several names of which a file has one (uid|user_id)",
        ),
    ] = field(default_factory=lambda: {"user": "user_id", "item": "item_id", "timestamp": "timestamp"})
    time_unit: Annotated[
        Literal["s", "ms", "us", "ns"],
        Field(description="unit of numeric timestamps; ISO dates are read as they are"),
    ] = "s"
    table_version: Annotated[
        Number | None,
        Field(
            title="N",
            description="version of a Delta table, or id of an Iceberg snapshot, of --input; none: the newest",
        ),
    ] = None
    items: Annotated[
        str, Field(title="PATH", description="features of items: Parquet, CSV or JSON lines, a path as of --input")
    ] = ""
    item_key: Annotated[str, Field(title="COLUMN", description="id column of --items")] = "item_id"
    item_features: Annotated[
        dict[str, str],
        _parsed(lambda text: parse_kinds(text, "--item-features")),
        Field(
            title="COLUMN:KIND,…",
            description="columns of --items; kinds: categorical, multi_categorical, text, numeric, quantile, dense;"
            " text@FOLDER: by its words, and by vectors of the text encoder in the folder",
        ),
    ] = field(default_factory=dict)
    users: Annotated[
        str, Field(title="PATH", description="features of users: Parquet, CSV or JSON lines, a path as of --input")
    ] = ""
    user_key: Annotated[str, Field(title="COLUMN", description="id column of --users")] = "user_id"
    user_features: Annotated[
        dict[str, str],
        _parsed(lambda text: parse_kinds(text, "--user-features")),
        Field(title="COLUMN:KIND,…", description="columns of --users; kinds as of --item-features"),
    ] = field(default_factory=dict)
    event_features: Annotated[
        dict[str, str],
        _parsed(lambda text: parse_kinds(text, "--event-features")),
        Field(
            title="COLUMN:KIND,…",
            description="columns of --input that say in what context an event happened, such as device:categorical;"
            " kinds: categorical",
        ),
    ] = field(default_factory=dict)
    duplicates: Annotated[
        Literal["refuse", "first", "last"],
        Field(description="of rows with one key in --items or --users, the one that is kept"),
    ] = "refuse"
    title: Annotated[
        str, Field(title="COLUMN", description="text feature of --items to show to people; none: the id")
    ] = ""
    text_cache: Annotated[
        str,
        Field(title="FOLDER", description="keeps vectors of text@FOLDER for the next preparation; none: encode again"),
    ] = ""
    form: TextForm = field(default_factory=TextForm)

    @model_validator(mode="after")
    def _check(self) -> LogOptions:
        check_columns(self.columns)
        for entity, file, kinds in (("item", self.items, self.item_features), ("user", self.users, self.user_features)):
            check_kinds(kinds, f"--{entity}-features")
            if kinds and not file:
                raise ValueError(f"--{entity}-features: name the file that has them with --{entity}s")
        check_event_kinds(self.event_features, self.item_features | self.user_features)
        if self.title and kind_and_encoder(self.item_features.get(self.title, ""))[0] != "text":
            raise ValueError(f"--title '{self.title}': declare it in --item-features as {self.title}:text")
        return self

    @property
    def entity_tables(self) -> tuple[EntityTable, ...]:
        """The tables that describe items and users, where there are such."""
        both = (
            EntityTable("item", self.items, self.item_key, self.item_features),
            EntityTable("user", self.users, self.user_key, self.user_features),
        )
        return tuple(table for table in both if table.file)


@dataclass(frozen=True, config=STRICT)
class Recipe:
    """Synthetic: made-up logs with planted structure, for trying things out."""

    users: Annotated[int, Field(title="N", description="users")] = 4000
    items: Annotated[int, Field(title="N", description="items")] = 1000
    events: Annotated[int, Field(title="N", description="mean events a user")] = 40
    content: Annotated[Strength, Field(description="strength of the content signal relative to the others")] = 1.0
    collaborative: Annotated[
        Strength, Field(description="strength of the collaborative signal relative to the others")
    ] = 1.0
    sequential: Annotated[Strength, Field(description="strength of the sequential signal relative to the others")] = 1.0
    seed: Annotated[int, Field(title="N", description="the same seed gives the same data")] = 0
