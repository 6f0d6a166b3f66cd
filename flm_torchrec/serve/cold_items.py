"""Cold items of a server: their contents by the packaged tower, and what of them fits a newly loaded export."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from flm_torchrec.data.dataset import DOMAIN
from flm_torchrec.errors import DataError
from flm_torchrec.serve.event_store import StoredItem
from flm_torchrec.serve.loaded_export import AddedItem, AddedItems, LoadedExport
from flm_torchrec.serve.resolve import Refused, content_of


def cold_item(loaded: LoadedExport, key: str, title: str, features: Mapping[str, Any]) -> AddedItem:
    """A cold item with its attributes, for filters and for people, of the features in the catalogue.

    Args:
        title: empty: people see the key. It is the text of the feature that titles come from too, if that is not given.

    Raises:
        Refused: a value does not fit its kind.
    """
    if title and loaded.tower.title:
        features = {loaded.tower.title: title, **features}
    kinds = {f.name: f for f in loaded.tower.features if f.entity == "item"}
    known = loaded.catalogue.attributes
    attributes: dict[str, list[str]] = {name: [] for name in known}
    try:
        attributes |= {n: kinds[n].shown(features.get(n), known[n].codes) for n in known if n in kinds}
    except DataError as error:
        raise Refused(422, str(error)) from error
    if DOMAIN in attributes and DOMAIN not in kinds:
        attributes[DOMAIN] = _domain(loaded, key)
    return AddedItem(key, title or key, features, attributes)


def _domain(loaded: LoadedExport, key: str) -> list[str]:
    """[the domain of an item of joint data], whose keys are DOMAIN/KEY; empty where the key names none."""
    domain, slash, _ = key.partition("/")
    return [domain] if slash and domain in loaded.catalogue.attributes[DOMAIN].codes else []


def with_items(loaded: LoadedExport, items: Iterable[AddedItem]) -> tuple[AddedItems, list[str]]:
    """The added items with these, each in place of one with its key; and the values of features that were left out.

    Raises:
        Refused: there is no such feature, or a value does not fit its kind.
    """
    added = loaded.added
    by_key = {item.key: (item, content) for item, content in zip(added.items, added.contents, strict=True)}
    left_out: list[str] = []
    for item in items:
        content, unknown = content_of(loaded, "item", item.features)
        by_key[item.key] = item, content
        left_out += unknown
    contents = np.array([content for _, content in by_key.values()], np.float32).reshape(-1, loaded.tower.dim)
    rows = {key: len(loaded.catalogue) + position for position, key in enumerate(by_key)}
    return AddedItems(tuple(i for i, _ in by_key.values()), contents, loaded.tower.scored(contents), rows), left_out


def with_fitting(loaded: LoadedExport, items: Iterable[StoredItem]) -> LoadedExport:
    """The export with those items of the store that it does not have and whose features fit it."""
    fitting = [fitted for item in items for fitted in _fitted(loaded, item)]
    return replace(loaded, added=with_items(loaded, fitting)[0]) if fitting else loaded


def _fitted(loaded: LoadedExport, item: StoredItem) -> list[AddedItem]:
    """[the item with its attributes in this export]; empty where that has the item, or a feature does not fit."""
    if item.key in loaded.catalogue.row_of:
        return []
    try:
        fitted = cold_item(loaded, item.key, item.title, item.features)
        content_of(loaded, "item", fitted.features)
        return [fitted]
    except Refused:
        return []  # other features are no reason to keep serving the older model
