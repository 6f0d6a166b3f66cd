"""One loaded export. Nothing in it changes, so a request sees the same state from start to end."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pyarrow as pa

from flm_torchrec.config.heads import FUSED
from flm_torchrec.data.history import NO_EVENTS
from flm_torchrec.data.keys import are_tombstones
from flm_torchrec.errors import RunError
from flm_torchrec.export.index import inner, top
from flm_torchrec.export.item_map import ItemMap, read_map
from flm_torchrec.export.manifest import FILE, Manifest, check_files, read_manifest
from flm_torchrec.export.mapped import IN_MEMORY, MappedFiles
from flm_torchrec.export.parts import ExportRows, single_array
from flm_torchrec.export.tower.reader import PackagedTower, Represented, TowerQuery
from flm_torchrec.mixture import Mixture, shortlist
from flm_torchrec.safe_text import first_line, visible
from flm_torchrec.serve.catalogue import Catalogue, best_of, load_catalogue
from flm_torchrec.serve.key_rows import KeyRows
from flm_torchrec.serve.server_folder import NOT_SHARED, SharedExports

UNSOUND = (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RuntimeError, OSError, MemoryError)
"""What a damaged export may raise when it is read, besides RunError."""


@dataclass(frozen=True)
class AddedItem:
    """A cold item, as it was posted."""

    key: str
    title: str
    """What people see: the title that was posted, or else the key."""
    features: Mapping[str, Any]
    attributes: Mapping[str, list[str]]


@dataclass(frozen=True)
class AddedItems:
    """Cold items that were posted to the server. Their rows follow those of the catalogue."""

    items: tuple[AddedItem, ...]
    contents: np.ndarray  # [M, D], input of the tower
    vectors: np.ndarray  # [M, D], what representations are scored against
    row_of: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Query:
    """What items are scored by: one vector, or a mixture of several."""

    vectors: np.ndarray  # [1, S], or [heads, S] of a mixture
    mixture: Mixture | None = None

    def score(self, items: np.ndarray) -> np.ndarray:
        """[n, S] item vectors → [n] float32."""
        if self.mixture is None:
            return inner(items, self.vectors[0])
        return self.mixture.score([inner(items, h) for h in self.vectors])


@dataclass(frozen=True)
class LoadedExport:
    """One export and the items added since: all that answers need."""

    number: int
    """1 for the first export served, 2 after the first swap …"""
    rows: str
    """`Manifest.rows_digest`: what the export says of users and items, whatever process loads it."""
    folder: Path
    manifest: Manifest
    tower: PackagedTower
    catalogue: Catalogue
    user_of: Mapping[str, int]
    seen: pa.ListArray  # [users] rows of items
    added: AddedItems
    mapped: MappedFiles = IN_MEMORY
    """The files that the arrays are in."""
    users: pa.Array = field(default_factory=lambda: pa.array([], pa.string()))  # [users] their keys
    forgotten: frozenset[int] = frozenset()
    """Rows of users who were forgotten: nobody is answered from them."""
    item_map: ItemMap | None = None
    """The map that the export holds; None: it is older than these."""
    user_vectors: faiss.Index | None = None
    """See `load_user_vectors`; None: users alike are off."""

    @property
    def size(self) -> int:
        """Number of items, with the added ones."""
        return len(self.catalogue) + len(self.added.items)

    def row(self, key: str) -> int | None:
        """Row of an item by its key; None of an unknown one."""
        row = self.catalogue.row_of.get(key)
        return self.added.row_of.get(key) if row is None else row

    def key(self, row: int) -> str:
        """Key of an item by its row."""
        return self.catalogue.keys[row].as_py() if row < len(self.catalogue) else self._added(row).key

    def title(self, row: int) -> str:
        """Title of an item by its row."""
        return self.catalogue.titles[row].as_py() if row < len(self.catalogue) else self._added(row).title

    def attributes(self, row: int) -> dict[str, list[str]]:
        """By feature, the values of an item by its row."""
        if row < len(self.catalogue):
            return self.catalogue.attributes_of(row)
        return dict(self._added(row).attributes)

    def vectors(self, rows: np.ndarray) -> np.ndarray:
        """[n] rows → [n, D] float32, what representations are scored against."""
        rows = np.asarray(rows, np.int64)
        result = np.empty((len(rows), self.manifest.dim), np.float32)
        inside = rows < len(self.catalogue)
        result[inside] = self.catalogue.vectors(rows[inside])
        result[~inside] = self.added.vectors[rows[~inside] - len(self.catalogue)]
        return result

    def represent(self, queries: list[TowerQuery]) -> list[Represented]:
        """The tower's output for each query; histories may have added items."""
        return self.tower.represent(queries, self.added.contents)

    def query(self, represented: Represented, head: str) -> Query:
        """What a head of the manifest scores by."""
        if head == FUSED and self.manifest.mixture is not None:
            return Query(represented.heads[:-1], self.manifest.mixture)
        return Query(represented.heads[self.manifest.heads.index(head)][None])

    def best(
        self, query: Query, k: int, excluded: np.ndarray, wanted: Mapping[str, list[str]]
    ) -> list[tuple[int, float]]:
        """The k best rows with their scores, of catalogue and added items.

        A mixture scores the best items of each of its vectors: it needs one head that is sure of an item.

        Args:
            excluded: [n] rows to leave out.
            wanted: by feature, values of which an item must have at least one.
        """
        if query.mixture is None:
            return self._nearest(query.vectors[0], k, excluded, wanted)
        found = [self._nearest(h, shortlist(k), excluded, wanted) for h in query.vectors]
        rows = np.unique([row for best in found for row, _ in best]).astype(np.int64)
        scores, rows = top(query.score(self.vectors(rows)), rows, k)
        return list(zip(rows.tolist(), scores.tolist(), strict=True))

    def _nearest(
        self, h: np.ndarray, k: int, excluded: np.ndarray, wanted: Mapping[str, list[str]]
    ) -> list[tuple[int, float]]:
        """As `best`, by the dot product with h [S]."""
        catalogue = self.catalogue
        inside = excluded[excluded < len(catalogue)]
        scores, rows = catalogue.best(h, k, inside, catalogue.allowed(wanted))
        more = [
            len(catalogue) + position
            for position, item in enumerate(self.added.items)
            if all(set(values) & set(item.attributes.get(name, ())) for name, values in wanted.items())
        ]
        if more:
            extra = np.setdiff1d(np.array(more, np.int64), excluded)
            added_scores, added_rows = best_of(h, self.vectors(extra), extra, k)
            scores, rows = np.concatenate([scores, added_scores]), np.concatenate([rows, added_rows])
            order = np.argsort(-scores, kind="stable")[:k]
            scores, rows = scores[order], rows[order]
        return list(zip(rows.tolist(), scores.tolist(), strict=True))

    def _added(self, row: int) -> AddedItem:
        return self.added.items[row - len(self.catalogue)]


def load_export(folder: Path, number: int, shared: SharedExports = NOT_SHARED) -> LoadedExport:
    """Load an export and check every file.

    Args:
        shared: where other processes of this server have its arrays too.

    Raises:
        RunError: the export is missing, incomplete, changed or damaged, or has no tower.
    """
    folder = folder.resolve()
    try:
        manifest = read_manifest(folder)
        with shared.files(manifest) as mapped:
            mapped.once("checked", lambda: check_files(folder, manifest.sha256, folder / FILE))
            return _loaded(folder, number, manifest, mapped)
    except UNSOUND as error:
        # The programs of the tower are compiled code inside the export, which may raise anything.
        reason = f"{type(error).__name__}: {visible(first_line(error))}"
        raise RunError(f"{folder}: is not an export that can be served ({reason}); export again") from error


def _loaded(folder: Path, number: int, manifest: Manifest, mapped: MappedFiles) -> LoadedExport:
    tower = PackagedTower(folder, mapped)
    if tower.space != manifest.dim:
        raise RunError(f"{folder}: the tower's vectors are {tower.space} wide, the rows {manifest.dim}; export again")
    if tower.items != manifest.items:
        raise RunError(f"{folder}: the tower is of {tower.items} items, the rows of {manifest.items}; export again")
    if len(tower.histories) != manifest.users:
        raise RunError(f"{folder}: the tower is of {len(tower.histories)} users, not {manifest.users}; export again")
    contents, vectors = np.zeros((0, tower.dim), np.float32), np.zeros((0, tower.space), np.float32)
    (represented,) = tower.represent([TowerQuery()], contents)
    if represented.heads.shape != (len(manifest.heads), manifest.dim) or not np.isfinite(represented.heads).all():
        raise RunError(f"{folder}: the tower makes other vectors than the manifest says; export again")
    users = mapped.table("users", lambda: ExportRows(folder, manifest, "users").table(["user_key", "seen"]))
    keys = single_array(users["user_key"])
    rows = pa.array(np.arange(len(keys)))  # a whole export has all ids in order, so a row is the user's id
    forgotten = np.flatnonzero(are_tombstones(keys, rows).to_numpy(zero_copy_only=False)).tolist()
    user_of = KeyRows(keys, "user-keys", mapped, forgotten)
    loaded = LoadedExport(
        number=number,
        rows=manifest.rows_digest,
        folder=folder,
        manifest=manifest,
        tower=tower,
        catalogue=load_catalogue(folder, manifest, mapped),
        user_of=user_of,
        users=keys,
        forgotten=user_of.left_out,
        seen=single_array(users["seen"]),
        added=AddedItems((), contents, vectors),
        mapped=mapped,
        item_map=read_map(folder, manifest),
    )
    loaded.best(
        loaded.query(represented, FUSED), 10, NO_EVENTS.item, {}
    )  # warm: the first request must not wait for the index
    return loaded
