"""Recommendations from an export alone, without model and training data."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain, islice
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from flm_torchrec.config.heads import FUSED
from flm_torchrec.data.dataset import Ragged
from flm_torchrec.errors import RunError
from flm_torchrec.export.attributes import allowed_items
from flm_torchrec.export.index import ItemIndex, open_index
from flm_torchrec.export.manifest import Manifest, load_manifest, read_manifest
from flm_torchrec.export.parts import ExportRows, single_array
from flm_torchrec.export.ranker import MOST_RESULTS, LeftOut, Ranker
from flm_torchrec.export.vectors import decode
from flm_torchrec.mixture import shortlist
from flm_torchrec.names import COMPARED, nearest_key

USERS = 8192
"""Maximum of users whose recommendations are in memory at once."""
COLUMNS = pa.schema(
    {"user": pa.string(), "rank": pa.int32(), "item": pa.string(), "title": pa.string(), "score": pa.float32()}
)
"""Columns of a table of recommendations; `rank` counts from 1."""


@dataclass(frozen=True)
class Recommendation:
    """One item for a user."""

    item_key: str
    title: str
    score: float


@dataclass(frozen=True)
class RecommendOptions:
    """What to recommend."""

    k: int = 10
    """Items for each user; fewer where no more are left."""
    head: str = FUSED
    include_seen: bool = False
    """Also items of the user's events."""
    filter: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """By feature: values of which an item must have at least one."""

    def __post_init__(self) -> None:
        if isinstance(self.k, np.integer):
            object.__setattr__(self, "k", int(self.k))  # faiss takes no number of numpy


class ExportRecommender:
    """Recommends items to the users of an export.

    Args:
        checked: the manifest, where the files were checked already, as by another process; None: all files are read.

    Raises:
        RunError: the export is missing, incomplete or changed.
    """

    def __init__(self, folder: str | Path, checked: Manifest | None = None) -> None:
        self.folder = Path(folder)
        self.manifest = load_manifest(self.folder) if checked is None else read_manifest(self.folder)
        if checked not in (None, self.manifest):
            raise RunError(f"{self.folder}: has changed since it was checked; begin again")
        self.index = open_index(self.folder, self.manifest)
        self.items = ExportRows(self.folder, self.manifest, "items")
        self.users = ExportRows(self.folder, self.manifest, "users")
        self.ranker = Ranker(self.items, self.index, self.manifest.mixture)

    def recommend(
        self,
        user_key: str,
        k: int = 10,
        head: str = FUSED,
        include_seen: bool = False,
        filter: Mapping[str, Sequence[str]] | None = None,
    ) -> list[Recommendation]:
        """The user's k best items, best first; see `RecommendOptions`.

        Raises:
            RunError: the user, the head or a name in the filter is unknown, or k is below 1.
        """
        options = RecommendOptions(k, head, include_seen, filter or {})
        self.check(options)
        found = self._ranked(self._row(user_key, options), options, self.among(options))
        rows = zip(*(found[name].to_pylist() for name in ("item", "title", "score")), strict=True)
        return [Recommendation(*row) for row in rows]

    def for_many(self, options: RecommendOptions, wanted: pa.Array | None = None) -> Iterator[pa.Table]:
        """The same for all users, or for those with the wanted keys: tables of `COLUMNS`, in order of user.

        Memory is bounded: the items, and one part of the users.

        Raises:
            RunError: as of `recommend`, or k is more than there are items.
        """
        self.check_many(options)
        if wanted is not None:
            self.check_users(wanted)
        return self._for_many(options, self.among(options), wanted)

    def check(self, options: RecommendOptions) -> None:
        """Raise RunError where the head is unknown, k is no number of items, or the filter is no mapping."""
        if isinstance(options.k, bool) or not isinstance(options.k, int | np.integer) or options.k < 1:
            raise RunError(f"-k {options.k}: ask for at least 1 item, as a whole number")
        if options.head not in self.manifest.heads:
            raise RunError(f"--head '{options.head}': choose one of {', '.join(self.manifest.heads)}")
        if not isinstance(options.filter, Mapping):
            raise RunError(f"filter: give lists of values by feature, not {options.filter!r:.60}")

    def check_many(self, options: RecommendOptions) -> None:
        """As `check`, and raise RunError where k is more than there are items."""
        self.check(options)
        if options.k > self.manifest.items:
            raise RunError(f"-k {options.k}: the export has {self.manifest.items} items; ask for at most as many")

    def check_users(self, wanted: pa.Array) -> None:
        """Raise RunError where a key is not that of a user of the export."""
        unknown = wanted
        for part in self.users.known(["user_key"]):
            unknown = unknown.filter(pc.invert(pc.is_in(unknown, value_set=single_array(part["user_key"]))))
            if not len(unknown):
                return
        more = f" and {len(unknown) - 1} more" if len(unknown) > 1 else ""
        raise self._unknown(f"user '{unknown[0].as_py()}'{more}", unknown[0].as_py())

    def among(self, options: RecommendOptions) -> ItemIndex | None:
        """An index of the items that the filter allows; None without a filter.

        Raises:
            RunError: as of `allowed`.
        """
        items = self.allowed(options)
        return None if items is None else self.ranker.some(items)

    def allowed(self, options: RecommendOptions) -> np.ndarray | None:
        """The rows of items that the filter allows, ascending; None without a filter.

        Raises:
            RunError: a name in the filter is unknown, or no item has a value of each feature.
        """
        if not options.filter:
            return None
        items = np.flatnonzero(allowed_items(self.items, options.filter))
        if not len(items):
            raise RunError(
                f"filter: no item has a value of each of {', '.join(options.filter)}; ask for fewer features"
            )
        return items

    @cached_property
    def shown(self) -> dict[str, pa.Array]:
        """Key and title [items] of each item."""
        table = self.items.table(["item_key", "title"])
        return {"item": single_array(table["item_key"]), "title": single_array(table["title"])}

    def _for_many(
        self, options: RecommendOptions, among: ItemIndex | None, wanted: pa.Array | None
    ) -> Iterator[pa.Table]:
        step = max(1, min(USERS, MOST_RESULTS // shortlist(options.k)))
        for part in self.users.known(self._columns(options)):
            if wanted is not None:
                part = part.filter(pc.is_in(part["user_key"], value_set=wanted))
            for start in range(0, len(part), step):
                yield self._ranked(part.slice(start, step), options, among)

    def _columns(self, options: RecommendOptions) -> list[str]:
        return ["user_key", "seen", *self.ranker.heads(options.head)]

    def _row(self, key: str, options: RecommendOptions) -> pa.Table:
        """The user's row."""
        for part in self.users.known(self._columns(options)):
            row = part.filter(pc.field("user_key") == key)
            if len(row):
                return row
        raise self._unknown(f"user '{key}'", key)

    def _ranked(self, users: pa.Table, options: RecommendOptions, among: ItemIndex | None) -> pa.Table:
        """Rows of the users' file → their recommendations, with `COLUMNS`."""
        lists = single_array(users["seen"])
        lengths = lists.value_lengths().to_numpy()
        seen = Ragged(np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]), lists.flatten().to_numpy())
        vectors = {head: decode(users[head]) for head in self.ranker.heads(options.head)}
        return self.ranked(single_array(users["user_key"]), vectors, seen, options, among)

    def ranked(
        self,
        users: pa.Array,
        vectors: Mapping[str, np.ndarray],
        seen: Ragged,
        options: RecommendOptions,
        among: ItemIndex | None,
    ) -> pa.Table:
        """Recommendations by vectors of users, with `COLUMNS`.

        Args:
            users: [q] names of the users.
            vectors: by each of `Ranker.heads`, [q, D].
            seen: items of the users' events.
            among: as of `among`.
        """
        if options.include_seen:
            seen = Ragged(np.zeros(len(users) + 1, np.int64), np.zeros(0, np.int64))
        left_out = LeftOut.of(seen, self.manifest.items)
        scores, items = self.ranker.best(vectors, min(options.k, self.manifest.items), left_out, among)
        return self.as_table(users, scores, items)

    def item_rows(self, keys: pa.Array, where: str) -> np.ndarray:
        """[n] rows of items by their keys.

        Raises:
            RunError: a key is not that of an item of the export.
        """
        rows = pc.index_in(keys, value_set=self.shown["item"])
        if rows.null_count:
            key = keys.filter(pc.is_null(rows))[0].as_py()
            known = self.shown["item"].slice(0, COMPARED).to_pylist()
            raise RunError(f"{where}: no item '{key}' in {self.folder}; {nearest_key(str(key), known, COMPARED)}")
        return rows.to_numpy().astype(np.int64)

    def as_table(self, users: pa.Array, scores: np.ndarray, items: np.ndarray) -> pa.Table:
        """Keys of users [q], scores and items [q, k] as of `Ranker.best` → rows with `COLUMNS`."""
        user, place = np.nonzero(items >= 0)
        rows = pa.array(items[user, place])
        columns = {
            "user": users.take(pa.array(user)),
            "rank": pa.array((place + 1).astype(np.int32)),
            "item": self.shown["item"].take(rows),
            "title": self.shown["title"].take(rows),
            "score": pa.array(scores[user, place]),
        }
        return pa.table(columns, schema=COLUMNS)

    def _unknown(self, what: str, key: str) -> RunError:
        parts = (part["user_key"].to_pylist() for part in self.users.known(["user_key"]))
        compared = list(islice(chain.from_iterable(parts), COMPARED))
        return RunError(f"{what}: not in {self.folder}; {nearest_key(key, compared, COMPARED)}")
