"""Keys of users and items that a follower knows, and which new ones it takes in."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow.parquet as pq

from flm_torchrec.data.admission import Admission
from flm_torchrec.data.event_files import as_data_error
from flm_torchrec.errors import DataError
from flm_torchrec.training.follow.item_rows import ItemRows

MISFIT = "features that do not fit"
"""Reason to refuse a row that brings a new item."""


class KnownIds:
    """Ids of users and items by key. Ids are given out in order, so a key never changes its id.

    Args:
        vocabulary: folder with users.parquet and items.parquet.
    """

    def __init__(self, vocabulary: Path) -> None:
        self.user, self.item = (_ids_by_key(vocabulary / f"{e}s.parquet", f"{e}_key") for e in ("user", "item"))
        self.new_users: list[str] = []
        """Keys taken in since `settle`, in order of their ids."""
        self.new_items: list[tuple[str, dict[str, Any]]] = []
        """Keys and rows of items.parquet, likewise."""
        self.described: list[tuple[str, dict[str, Any]]] = []
        """Keys and rows of items that came in without features, and have got them since `settle`."""
        self.left_out: list[str] = []
        """A line for each value of a new item that has no code; whoever counts them clears the list."""

    def add_user(self, key: str) -> None:
        """Take in a user, if the key is new."""
        if key not in self.user:
            self.user[key] = len(self.user)
            self.new_users.append(key)

    def add_item(self, key: str, row: Mapping[str, Any]) -> None:
        """Take in an item with its features, if the key is new."""
        if key not in self.item:
            self.item[key] = len(self.item)
            self.new_items.append((key, dict(row)))

    def settle(self) -> None:
        """All that was taken in is part of the model."""
        self.new_users, self.new_items, self.described = [], [], []


@dataclass(frozen=True)
class IdIntake:
    """What lets unknown keys in.

    A user comes in at the sighting that `admission` says, an item too, and at once if its event has features of it.
    """

    admission: Admission
    rows: ItemRows
    reserved: Collection[str] = ()
    """Names under which the source writes user, item, time, kind and value: no features, even if the data have such."""

    def take_in(self, frame: pl.DataFrame, objects: list[dict[str, Any]], ids: KnownIds) -> pl.Series:
        """Give ids to keys that may come in; [rows] the reason to refuse a row, null where there is none.

        Args:
            frame: rows that can be learned from otherwise, with `user`, `item`, `user_id`, `item_id`, and in `position`
                the index of the row's object.
        """
        names = [name for name in self.rows.given_names if name not in self.reserved]
        given = [
            {n: objects[p][n] for n in names if objects[p].get(n) is not None} if new else {}
            for p, new in zip(frame["position"], frame["item_id"].is_null(), strict=True)
        ]
        may = {what: self._admitted(frame, what, ids) for what in ("user", "item")}
        reasons: list[str | None] = []
        keys = zip(frame["user"], frame["item"], given, may["user"], may["item"], strict=True)
        for user, item, features, user_may, item_may in keys:
            reasons.append(self._take_one(ids, (user, user_may), (item, item_may), features))
        return pl.Series("reason", reasons, dtype=pl.String)

    def _take_one(
        self, ids: KnownIds, user: tuple[str, bool], item: tuple[str, bool], features: dict[str, Any]
    ) -> str | None:
        if user[0] not in ids.user and not user[1]:
            return "user not seen often enough (--admit-after)"
        if item[0] not in ids.item and not item[1] and not features:
            return "item not seen often enough (--admit-after)"
        left_out: list[str] = []
        try:
            row = {} if item[0] in ids.item else self.rows.row(features, left_out)
        except DataError:
            return MISFIT
        ids.left_out += left_out
        ids.add_item(item[0], row)
        ids.add_user(user[0])
        return None

    def _admitted(self, frame: pl.DataFrame, what: str, ids: KnownIds) -> np.ndarray:
        """[rows] bool: the key of the row has been seen often enough, this sighting included."""
        if self.admission.after == 1:
            return np.ones(len(frame), bool)
        unknown = frame[f"{what}_id"].is_null().to_numpy()
        admitted = ~unknown
        hashes = [_hash(f"{what} {key}") for key in frame[what].filter(pl.Series(unknown))]
        admitted[unknown] = self.admission.count(np.array(hashes, np.uint64))
        return admitted


def _hash(key: str) -> int:
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "little")


def _ids_by_key(file: Path, column: str) -> dict[str, int]:
    with as_data_error(file):
        return {key: i for i, key in enumerate(pq.read_table(file, columns=[column])[column].to_pylist())}
