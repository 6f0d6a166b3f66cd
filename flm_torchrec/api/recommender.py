"""Recommendations, similar items and embeddings as tables, from an export alone."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc

from flm_torchrec.config.heads import FUSED
from flm_torchrec.data.dataset import Ragged
from flm_torchrec.errors import DataError, RunError
from flm_torchrec.export.hops import Over, check_over, over_items, over_users
from flm_torchrec.export.index import cosine_index, index_of_some
from flm_torchrec.export.parts import VIEWS
from flm_torchrec.export.ranker import LeftOut, first_left
from flm_torchrec.export.recommend import COLUMNS, ExportRecommender, RecommendOptions
from flm_torchrec.export.recommend_file import WrittenRecommendations, write_recommendations
from flm_torchrec.export.vectors import decode
from flm_torchrec.files import path_of
from flm_torchrec.frames import Frame, FrameKind, arrow_of, check_kind, framed, is_frame
from flm_torchrec.names import nearest
from flm_torchrec.prepare.sources.user_list import distinct_users, read_users
from flm_torchrec.safe_text import first_line

if TYPE_CHECKING:
    from flm_torchrec.export.index import ItemIndex
    from flm_torchrec.export.tower.reader import PackagedTower

ONLY_WITH_ITEMS = ("timestamp", "event", "value", "item_id", "item_key")
"""Columns of a table that can only be meant as histories."""
Filter = Mapping[str, Sequence[str]]
"""By feature: values of which an item must have at least one."""


class Recommender:
    """Answers from an export, which `Run.export` and `flm export` write. Threads may share it.

    Args:
        export: folder of the export.
        frame: what its methods return: "polars", "pandas" or "arrow" tables.

    Raises:
        FlmError: the export is missing, incomplete or changed, or pandas is asked for and not installed.

    Example:
        >>> import flm_torchrec as flm
        >>> recommender = flm.Recommender("exports/shop")
        >>> recommender.users, recommender.items
        (40, 30)
    """

    def __init__(self, export: str | os.PathLike[str], frame: FrameKind = "polars") -> None:
        check_kind(frame)
        self.frame = frame
        self.export = ExportRecommender(path_of(export, "export"))

    @property
    def users(self) -> int:
        """Number of users."""
        return self.export.manifest.users

    @property
    def items(self) -> int:
        """Number of items."""
        return self.export.manifest.items

    def recommend(
        self,
        users: Any,
        k: int = 10,
        *,
        head: str = FUSED,
        filter: Filter | None = None,
        include_seen: bool = False,
    ) -> Frame:
        """The k best items for each user.

        Args:
            users: ids of known users, as a list, a series or a table with the column `user`; or the histories of users
                whom the model does not know: a table with columns `user` (a name of your choice), `item` and, if you
                have them, `timestamp`, `event`, `value` and features of events. The packaged user tower encodes
                histories.
            head: "fused", "content", "collaborative" or "sequential".
            filter: by feature, values of which an item must have at least one.
            include_seen: also items of the user's events.

        Returns:
            Columns `user`, `rank` (from 1), `item`, `title`, `score`; users in the order given, each once.

        Raises:
            FlmError: a user, an item, a head or a filter is unknown, or k is no number from 1 to the number of items.

        Example:
            >>> import flm_torchrec as flm
            >>> recommender = flm.Recommender("exports/shop")
            >>> table = recommender.recommend(["u7", "u3"], k=2, filter={"brand": ["b0", "b1"]})
            >>> table["user"].to_list(), table["rank"].to_list()
            (['u7', 'u7', 'u3', 'u3'], [1, 2, 1, 2])
        """
        options = RecommendOptions(k, head, include_seen, filter or {})
        self.export.check_many(options)
        table = arrow_of(users, "users") if is_frame(users) else None
        if table is not None and "item" in table.column_names:
            return framed(self._by_histories(table, options), self.frame)
        if lost := [name for name in (table.column_names if table is not None else ()) if name in ONLY_WITH_ITEMS]:
            raise DataError(
                f"users: has a column '{lost[0]}' and none 'item'; call the items of histories 'item', or give the"
                " column 'user' alone, of known users"
            )
        wanted = _keys(users if table is None else table, "users")
        tables = list(self.export.for_many(options, wanted))
        found = pa.concat_tables([COLUMNS.empty_table(), *tables])
        place = pc.index_in(found["user"], value_set=wanted)
        order = pc.sort_indices(
            pa.table({"place": place, "rank": found["rank"]}),
            sort_keys=[("place", "ascending"), ("rank", "ascending")],
        )
        return framed(found.take(order), self.frame)

    def recommend_to(
        self, output: str | os.PathLike[str], users: Any = None, *, overwrite: bool = False, **options: Any
    ) -> WrittenRecommendations:
        """Write the recommendations for many users into a Parquet file, block by block; it appears complete or not.

        Args:
            output: file to write; its name ends in .parquet.
            users: as of `recommend`, without histories; or a path of a file of ids. None: all users.
            overwrite: replace an older file of recommendations; anything else is never replaced.
            options: `k`, `head`, `filter` and `include_seen` of `recommend`; `head="all"`: lists by each head, and a
                column `head`.

        Raises:
            FlmError: as of `recommend`, or the output is wrong.

        Example:
            >>> import flm_torchrec as flm
            >>> flm.Recommender("exports/shop").recommend_to("recommendations.parquet", k=3)
            WrittenRecommendations(users=40, rows=120)
        """
        known = ("k", "head", "filter", "include_seen")
        for name in options:
            if name not in known:
                raise RunError(f"recommend_to: no option '{name}'; {nearest(name, known)}")
        wanted = None
        if users is not None:
            by_path = isinstance(users, str | os.PathLike)
            wanted = read_users(os.fspath(users)) if by_path else _keys(users, "users")
        return write_recommendations(
            self.export,
            path_of(output, "output"),
            RecommendOptions(**{**options, "filter": options.get("filter") or {}}),
            wanted,
            overwrite,
        )

    def similar_items(self, items: Any, k: int = 10, *, filter: Filter | None = None) -> Frame:
        """The k items nearest to each item, by the cosine of their vectors.

        Args:
            items: ids of items, as a list or a series.
            filter: as of `recommend`.

        Returns:
            Columns `item`, `rank` (from 1), `similar` (an item), `title` (of that), `score` (the cosine).

        Raises:
            FlmError: an item or a filter is unknown, or k is no number from 1 to the number of items.

        Example:
            >>> import flm_torchrec as flm
            >>> flm.Recommender("exports/shop").similar_items(["i3"], k=2)["rank"].to_list()
            [1, 2]
        """
        options = RecommendOptions(k, FUSED, filter=filter or {})
        self.export.check_many(options)
        keys = _keys(items, "items")
        rows = self.export.item_rows(keys, "items")
        index = self._cosines
        if (allowed := self.export.allowed(options)) is not None:
            index = index_of_some(self._cosines, allowed)
        queries = self._cosines.index.reconstruct_batch(self._cosines.groups.row[rows])
        if flat := np.flatnonzero(~queries.any(axis=1)).tolist():
            raise RunError(
                f"items: '{keys[flat[0]].as_py()}' has a vector of zeros, so no item is near it; leave it out"
            )
        itself = LeftOut.of(Ragged(np.arange(len(rows) + 1), rows), self.items)
        scores, found = first_left(index, queries, options.k, itself, np.arange(len(rows)))
        table = self.export.as_table(keys, scores, found)
        return framed(table.rename_columns(["item", "rank", "similar", "title", "score"]), self.frame)

    def hops(self, item: str, k: int = 10, *, over: Over = "users", filter: Filter | None = None) -> Frame:
        """The k items that are two hops from an item, with the path to each.

        Args:
            item: id of the item that the paths begin at.
            over: "users": those who had the item, and what else they had; "items": those that are nearest to it, and
                what is nearest to these.
            filter: as of `recommend`, of the items that paths end at.

        Returns:
            Columns `item`, `via` (the user or item in the middle of the strongest path), `reached` (an item), `title`
            (of that), `rank` (from 1), `score` and `paths` (how many were found). The score over users is the
            probability of a random walk, over items the product of two cosines. Fewer than k rows where no more are
            reached.

        Raises:
            FlmError: the item or a filter is unknown, no path leads on, or k is no number from 1 to the number of
                items.

        Example:
            >>> import flm_torchrec as flm
            >>> flm.Recommender("exports/shop").hops("i3", k=2)["rank"].to_list()
            [1, 2]
        """
        check_over(over)
        options = RecommendOptions(k, FUSED, filter=filter or {})
        self.export.check_many(options)
        row = int(self.export.item_rows(_keys([item], "items"), "items")[0])
        allowed = self.export.allowed(options)
        found = (
            over_users(self.export, row, options.k, allowed)
            if over == "users"
            else over_items(self.export, self._cosines, row, options.k, allowed)
        )
        rows, reached = len(found.items), pa.array(found.items)
        table = pa.table(
            {
                "item": pa.array([item] * rows, pa.string()),
                "via": pa.array(found.via, pa.string()),
                "reached": self.export.shown["item"].take(reached),
                "title": self.export.shown["title"].take(reached),
                "rank": pa.array(range(1, rows + 1), pa.int32()),
                "score": pa.array(found.scores, pa.float32()),
                "paths": pa.array(found.paths, pa.int64()),
            }
        )
        return framed(table, self.frame)

    def embeddings(self, of: Literal["items", "users"] = "items", vector: str = "") -> Frame:
        """The vectors of all items, or of all users.

        Args:
            vector: of items "embedding" (what all heads score against), "content" or "id"; of users a head.
                Empty: "embedding", or "fused".

        Returns:
            Columns `item` and `title`, or `user`, and `embedding`: D float32. A user's score of an item is their inner
            product; where the fusion is a mixture, "fused" is the nearest single vector.

        Raises:
            FlmError: there is no such vector.

        Example:
            >>> import flm_torchrec as flm
            >>> recommender = flm.Recommender("exports/shop", frame="arrow")
            >>> recommender.embeddings("users", "content").num_rows
            40
        """
        if of not in ("items", "users"):
            raise RunError(f"embeddings '{of}': choose items or users")
        known = VIEWS if of == "items" else self.export.manifest.heads
        name = vector or known[0 if of == "items" else -1]
        if name not in known:
            raise RunError(f"embeddings of {of}: no vector '{name}'; {nearest(name, known)}")
        rows = self.export.items if of == "items" else self.export.users
        table = pa.concat_tables(rows.known([f"{of[:-1]}_key", *(["title"] if of == "items" else []), name]))
        vectors = decode(table[name])
        columns = {of[:-1]: table[f"{of[:-1]}_key"]}
        if of == "items":
            columns["title"] = table["title"]
        columns["embedding"] = pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), vectors.shape[1])
        return framed(pa.table(columns), self.frame)

    @cached_property
    def tower(self) -> PackagedTower:
        """The packaged user tower.

        Raises:
            RunError: the export has none.
        """
        from flm_torchrec.export.tower.reader import PackagedTower

        return PackagedTower(self.export.folder)

    @cached_property
    def _cosines(self) -> ItemIndex:
        return cosine_index(self.export.ranker.exact)

    def _by_histories(self, table: pa.Table, options: RecommendOptions) -> pa.Table:
        from flm_torchrec.api.histories import HistoryTable

        if "user" not in table.column_names:
            raise DataError("histories: no column 'user'; give each history a name there")
        among = self.export.among(options)
        histories = HistoryTable(table, self.export, self.tower)
        heads, names = self.export.ranker.heads(options.head), self.export.manifest.heads
        tables = [COLUMNS.empty_table()]
        for some, vectors in histories.blocks():
            by_head = {head: np.ascontiguousarray(vectors[:, names.index(head)]) for head in heads}
            seen = histories.had(some)
            tables.append(self.export.ranked(histories.users[some], by_head, seen, options, among))
        return pa.concat_tables(tables)


def _keys(values: Any, where: str) -> pa.Array:
    """Distinct ids as text, in the order of their first places, from a list, a series or a table with their column."""
    name = where[:-1]
    if is_frame(values):
        table = arrow_of(values, where)
        if name not in table.column_names:
            raise DataError(f"{where}: no column '{name}'; it has {', '.join(table.column_names[:20])}")
        return distinct_users(pl.DataFrame(pl.from_arrow(table.select([name])))[name], where)
    if isinstance(values, str | bytes | Mapping) or not isinstance(values, Iterable):
        raise DataError(f"{where}: is a {type(values).__name__}; give a list of ids, such as ['u1', 'u2']")
    try:
        arrow = hasattr(values, "__arrow_c_stream__") or isinstance(values, pl.Series | pa.Array | np.ndarray)
        column = pl.Series(name, values if arrow else list(values), strict=True)
    except (TypeError, ValueError, OverflowError, pl.exceptions.PolarsError) as error:
        raise DataError(f"{where}: ids of several types ({first_line(error)}); give texts") from error
    return distinct_users(column, where)
