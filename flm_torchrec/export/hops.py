"""Items that are two hops from an item: over the users who had it, or over the items that are nearest to it.

Each answer has its path, which says why it was found.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import pyarrow as pa

from flm_torchrec.data.dataset import Ragged
from flm_torchrec.errors import RunError
from flm_torchrec.export.index import ItemIndex, index_of_some
from flm_torchrec.export.parts import single_array
from flm_torchrec.export.ranker import LeftOut, first_left
from flm_torchrec.export.recommend import ExportRecommender

Over = Literal["users", "items"]
MIDDLE = 100
"""Nearest items that paths may lead over."""


@dataclass(frozen=True)
class Hops:
    """Items [n] that were reached, best first."""

    items: np.ndarray  # [n] int64
    scores: np.ndarray  # [n] float64
    via: list[str]
    """[n] the key of the user or of the item in the middle of each item's strongest path."""
    paths: np.ndarray
    """[n] int64: the number of paths that lead to each item."""


def check_over(over: str) -> None:
    """Raise RunError where paths cannot lead over this."""
    if over not in get_args(Over):
        raise RunError(f"--over '{over}': choose users or items")


def over_users(export: ExportRecommender, item: int, k: int, allowed: np.ndarray | None) -> Hops:
    """The k items that a random walk from the item to one of its users, and to one of her items, ends at most often.

    The probability is summed over the users: 1 / users of the item * 1 / different items of the user (P3: Cooper et
    al., WWW 2014). The strongest path leads over the user with the fewest items.

    Args:
        item: row of the item, which is left out.
        allowed: [n] rows of items to choose among; None: all.

    Raises:
        RunError: no user has had the item.
    """
    scores, paths = np.zeros(export.manifest.items), np.zeros(export.manifest.items, np.int64)
    strongest, user = np.zeros(export.manifest.items), np.full(export.manifest.items, -1)
    keys: list[str] = []
    for part in export.users.parts(["user_key", "seen"]):
        lists = single_array(part["seen"])
        flat = lists.flatten().to_numpy()
        rows = np.repeat(np.arange(len(lists)), lists.value_lengths().to_numpy())
        for row in np.unique(rows[flat == item]).tolist():
            had = np.unique(flat[rows == row])
            share = 1 / len(had)
            scores[had] += share
            paths[had] += 1
            better = had[share > strongest[had]]
            strongest[better], user[better] = share, len(keys)
            keys.append(part["user_key"][row].as_py())
    if not keys:
        key = export.shown["item"][item].as_py()
        raise RunError(f"--item '{key}': no user has had it; ask for paths over items (--over items)")
    found = _best(scores / len(keys), item, k, allowed)
    return Hops(found, scores[found] / len(keys), [keys[number] for number in user[found]], paths[found])


def over_items(export: ExportRecommender, cosines: ItemIndex, item: int, k: int, allowed: np.ndarray | None) -> Hops:
    """The k items that are near to items which are near to the item: the largest product of the two cosines.

    Args:
        cosines: index of all items by cosine.
        item, allowed: as of `over_users`.
    """
    items = export.manifest.items
    itself = LeftOut.of(Ragged(np.array([0, 1]), np.array([item])), items)
    first = cosines.index.reconstruct_batch(cosines.groups.row[np.array([item])])
    near, middle = first_left(cosines, first, min(MIDDLE, items), itself, np.zeros(1, np.int64))
    near, middle = near[0][middle[0] >= 0], middle[0][middle[0] >= 0]
    near, middle = near[near > 0], middle[near > 0]
    if not len(middle):
        raise RunError(f"--item '{export.shown['item'][item].as_py()}': no item is near it; ask for --over users")
    last = cosines if allowed is None else index_of_some(cosines, allowed)
    both = Ragged(2 * np.arange(len(middle) + 1), np.stack([middle, np.full(len(middle), item)], 1).ravel())
    queries = cosines.index.reconstruct_batch(cosines.groups.row[middle])
    far, reached = first_left(last, queries, min(k, items), LeftOut.of(both, items), np.arange(len(middle)))
    products = near[:, None].astype(np.float64) * np.maximum(far, 0)
    products = np.where(reached >= 0, products, 0)
    scores, paths = np.zeros(items), np.zeros(items, np.int64)
    there = products > 0
    np.maximum.at(scores, reached[there], products[there])
    np.add.at(paths, reached[there], 1)
    found = _best(scores, item, k, allowed)
    # The first of the middle items whose product is the best one.
    via = [int(np.argmax((np.where(reached == one, products, -1)).max(1))) for one in found]
    keys = export.shown["item"].take(pa.array(middle[via], pa.int64())).to_pylist()
    return Hops(found, scores[found], keys, paths[found])


def _best(scores: np.ndarray, item: int, k: int, allowed: np.ndarray | None) -> np.ndarray:
    """[n] the items with the k highest scores above 0; of equal scores the lower item first."""
    kept = np.zeros(len(scores), bool)
    kept[slice(None) if allowed is None else allowed] = True
    kept[item] = False
    rows = np.flatnonzero(kept & (scores > 0))
    return rows[np.argsort(-scores[rows], kind="stable")][:k]
