"""What a prepared data set holds: every feature with its kind, table and cardinality (`schema.yaml`)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path, PurePath
from typing import Literal, get_args

import yaml

from flm_torchrec.documents import read_yaml
from flm_torchrec.errors import DataError
from flm_torchrec.folders import kind_of
from flm_torchrec.names import nearest

Kind = Literal["categorical", "multi_categorical", "text", "numeric", "quantile", "dense"]
Entity = Literal["user", "item", "event"]
"""What a feature is of. Of an event: what was known of it when it happened, such as the device."""
TableKind = Literal["direct", "hash", "zch"]
Eviction = Literal["lfu", "lru"]

SPARSE_KINDS: tuple[Kind, ...] = ("categorical", "multi_categorical", "text", "quantile")
DENSE_KINDS: tuple[Kind, ...] = ("numeric", "dense")
ITEM_TABLES = ("item_id", "item_source", "item_target", "item_context")
"""Tables with a row for each item: what it is; for the collaborative head what it says of a user who has it, and what
is scored; for the sequential head what it says of the events after it. All have the rows chosen for `item_id`."""


@dataclass(frozen=True)
class Table:
    """How ids are mapped to the rows of an embedding table.

    direct: each id has its own row. hash: ids share `rows` rows by a fixed hash. zch: the ids seen most often (lfu) or
    last (lru) have one of `rows` rows each, all others share the last row (TorchRec's managed collision). That of the
    tables of items is always zero, so that an item without a row is represented by its content.
    """

    kind: TableKind = "direct"
    rows: int = 0
    """For hash and zch; a direct table has as many rows as there are ids."""
    eviction: Eviction = "lfu"
    """For zch."""

    @property
    def managed(self) -> bool:
        """Rows pass from id to id."""
        return self.kind == "zch"

    def __post_init__(self) -> None:
        for name, kinds in (("kind", get_args(TableKind)), ("eviction", get_args(Eviction))):
            if getattr(self, name) not in kinds:
                raise ValueError(f"{name} '{getattr(self, name)}' is not one of {', '.join(kinds)}")
        if self.kind != "direct" and not (isinstance(self.rows, int) and self.rows >= 2):
            raise ValueError(f"{self.kind} needs 'rows' of at least 2, not {self.rows!r}")


@dataclass(frozen=True)
class Feature:
    """One feature of a user, an item or an event. An event has codes of kind categorical in the interactions, -1 where
    unknown.

    `column` of `users.parquet` or `items.parquet` holds its values, by kind:
    categorical and quantile: int32 in [0, cardinality), null where unknown; multi_categorical and text: list<int32> of
    such codes (hashed words for text); numeric: float32, standardised; dense: fixed_size_list<float32>[width].
    """

    name: str
    entity: Entity
    kind: Kind
    column: str
    table: str = ""
    """Embedding table of a sparse feature. Features that name the same table share its rows."""
    cardinality: int = 0
    """Rows of the table (sparse kinds)."""
    width: int = 0
    """Numbers per entity (dense kinds; 1 for numeric)."""
    ngrams: int = 0
    """A text is hashed by runs of up to so many words; 0: data of an older version, which has single words."""
    encoder: str = ""
    """Of a dense feature: the digest of the text encoder that made its vectors; empty: vectors as they were given."""
    mean: float = 0.0
    """Mean of a numeric feature before it was standardised."""
    deviation: float = 0.0
    """Standard deviation of a numeric feature before it was standardised; 0: not known, data of an older version."""

    def __post_init__(self) -> None:
        if PurePath(self.name).name != self.name:  # its vocabulary becomes a file of that name
            raise DataError(f"feature '{self.name}': a name cannot hold a path; rename it")

    @property
    def sparse(self) -> bool:
        """True for kinds with codes, which an embedding table holds; False for kinds with numbers."""
        return self.kind in SPARSE_KINDS


@dataclass(frozen=True)
class Schema:
    """The contents of `schema.yaml`."""

    name: str
    source: str
    users: int
    items: int
    interactions: int
    events: tuple[str, ...] = ("interaction",)
    """Names of the event codes, in order of code."""
    timestamps: bool = True
    """False where the source has only an order; the timestamp is then the position in the user's sequence."""
    title: str = ""
    """Column of items.parquet to show to people (a string); empty: the item's key."""
    features: tuple[Feature, ...] = field(default=())
    tables: dict[str, Table] = field(default_factory=dict)
    """By name of the table: "user_id", "item_id" or a feature's table. Tables that are not named are direct."""
    domains: tuple[str, ...] = ()
    """Of a joint data set, the names of its domains; the column `domain` of items.parquet has one of them for each."""
    weights: bool = False
    """The interactions have a column `weight`: what each counts as a target."""

    def table(self, name: str) -> Table:
        """How the ids of the table of this name are mapped to its rows."""
        return self.tables.get("item_id" if name in ITEM_TABLES else name, Table())

    def of(self, entity: Entity, *, sparse: bool) -> tuple[Feature, ...]:
        """The sparse features, or the dense ones, of users or items, in the schema's order."""
        return tuple(f for f in self.features if f.entity == entity and f.sparse == sparse)

    def keeping(self, names: Sequence[str], path: Path) -> Schema:
        """This schema with only the features named.

        Raises:
            DataError: the schema, read from `path`, has no such feature.
        """
        present = [f.name for f in self.features]
        for name in names:
            if name not in present:
                raise DataError(f"{path}: no feature '{name}' in schema.yaml; {nearest(name, present)}")
        return replace(self, features=tuple(f for f in self.features if f.name in names))

    def save(self, path: Path) -> None:
        """Write `schema.yaml`; fields of a feature that are empty or 0 are left out."""
        record = asdict(self)
        record["events"] = list(self.events)
        record["features"] = [{k: v for k, v in asdict(f).items() if v not in ("", 0)} for f in self.features]
        record["domains"] = list(self.domains)
        for name in ("tables", "domains", "weights"):
            if not record[name]:
                del record[name]
        path.write_text(yaml.safe_dump(record, sort_keys=False), encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> Schema:
        """Read and check `schema.yaml`.

        Raises:
            DataError: the file is missing, is no YAML, or has an unknown key, kind, table, or an impossible size.
        """
        if not path.is_file():
            if kind := kind_of(path.parent):
                raise DataError(f"{path.parent}: is {kind}, not prepared data; give a folder of 'flm prepare --output'")
            raise DataError(
                f"{path}: not found; give the folder that 'flm prepare --output' wrote, or prepare your logs first"
                " ('flm prepare --help')"
            )
        try:
            record = read_yaml(path)
            features = tuple(Feature(**f) for f in record.pop("features", ()))
            tables = {name: Table(**t) for name, t in record.pop("tables", {}).items()}
            names = {name: tuple(record.get(name, ())) for name in ("events", "domains")}
            schema = cls(**{**record, **names}, features=features, tables=tables)
        except (TypeError, KeyError, AttributeError, ValueError) as error:
            reason = " ".join(str(error).split())
            raise DataError(f"{path}: not a schema ({reason}); prepare the data again") from error
        for feature in schema.features:
            _check(feature, path)
        present = ["user_id", "item_id", *(f.table for f in schema.features if f.sparse)]
        for name in tables:
            if name not in present:
                raise DataError(f"{path}: tables: no table '{name}' to choose rows for; {nearest(name, present)}")
        return schema


def sparsity(pairs: int, users: int, items: int) -> float:
    """Share of all pairs of a user and an item without an event; `pairs` is the number of pairs with events."""
    return 1 - pairs / (users * items)


def _check(feature: Feature, path: Path) -> None:
    where = f"{path}: feature '{feature.name}'"
    if feature.kind not in get_args(Kind):
        raise DataError(f"{where}: unknown kind '{feature.kind}'; use one of {', '.join(get_args(Kind))}")
    if feature.entity not in get_args(Entity):
        raise DataError(f"{where}: unknown entity '{feature.entity}'; use 'user', 'item' or 'event'")
    if feature.entity == "event" and feature.kind != "categorical":
        raise DataError(f"{where}: of kind {feature.kind}; features of events are categorical")
    if feature.sparse and (feature.cardinality < 1 or not feature.table):
        raise DataError(f"{where}: a {feature.kind} feature needs 'table' and a 'cardinality' of at least 1")
    if not feature.sparse and feature.width < 1:
        raise DataError(f"{where}: a {feature.kind} feature needs a 'width' of at least 1")
