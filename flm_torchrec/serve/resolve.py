"""Keys and names of requests → rows, codes and vectors of the loaded export. Unknown ones are refused."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from flm_torchrec.errors import DataError, FlmError
from flm_torchrec.names import nearest, nearest_key
from flm_torchrec.serve.loaded_export import LoadedExport


class Refused(FlmError):
    """A request that is refused, with the HTTP status of the answer."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


def item_row(loaded: LoadedExport, key: str, where: str) -> int:
    """The row of an item by its key.

    Args:
        where: field of the request that has the key.

    Raises:
        Refused: there is no such item.
    """
    row = loaded.row(key)
    if row is None:
        raise Refused(422, f"{where}: no item '{key}'; {nearest_key(key, loaded.catalogue.row_of)}")
    return row


def event_code(loaded: LoadedExport, name: str | None, where: str) -> int:
    """The code of a kind of event by its name; None is the data's first.

    Raises:
        Refused: there is no such kind.
    """
    events = loaded.tower.events
    if name is None:
        return 0
    if name not in events:
        raise Refused(422, f"{where}: no kind of event '{name}'; {nearest(name, events)}")
    return events.index(name)


def context_codes(loaded: LoadedExport, context: Mapping[str, Any], where: str, left_out: list[str]) -> list[int]:
    """The context of an event as codes, as of `PackagedTower.context`.

    Raises:
        Refused: there is no such feature, or a value does not fit its kind.
    """
    try:
        return loaded.tower.context(context, where, left_out)
    except DataError as error:
        raise Refused(422, str(error)) from error


def content_of(loaded: LoadedExport, entity: str, features: Mapping[str, Any]) -> tuple[np.ndarray, list[str]]:
    """The content vector [D] of an item or a user, and the values that were left out, as of `PackagedTower.content`.

    Raises:
        Refused: there is no such feature, or a value does not fit its kind.
    """
    try:
        return loaded.tower.content(entity, features)
    except DataError as error:
        raise Refused(422, str(error)) from error


def check_filter(loaded: LoadedExport, wanted: Mapping[str, Sequence[str]]) -> None:
    """Raise Refused where a filter names a feature or a value that no item of the catalogue has."""
    attributes = loaded.catalogue.attributes
    for name, values in wanted.items():
        if name not in attributes:
            known = nearest(name, attributes) if attributes else "items have none"
            raise Refused(422, f"filter: no feature '{name}'; {known}")
        for value in values:
            if value not in attributes[name].codes:
                raise Refused(422, f"filter.{name}: no value '{value}'; {nearest_key(value, attributes[name].codes)}")
