"""`--columns`, `--item-features` and `--user-features`: which columns of the logs mean what."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import get_args

from flm_torchrec.data.schema import Kind
from flm_torchrec.errors import DataError
from flm_torchrec.names import nearest

ROLES = ("user", "item", "timestamp", "event", "value")
RESERVED = ("key", "id", "item_id", "user_id", "item_key", "user_key")
"""Names of columns and tables that the layout and the model use themselves."""


def parse_columns(text: str) -> dict[str, str]:
    """`user=uid,item=sku` → column by role.

    Raises:
        DataError: not of that form, unknown role, or user or item missing.
    """
    columns: dict[str, str] = {}
    for part in filter(None, map(str.strip, text.split(","))):
        role, _, column = map(str.strip, part.partition("="))
        if role not in ROLES or not column:
            raise DataError(f"--columns: '{part}' is not ROLE=COLUMN; {nearest(role, ROLES)}")
        columns[role] = column
    check_columns(columns)
    return columns


def check_columns(columns: Mapping[str, str]) -> None:
    """Raise DataError where a role is unknown, or none is the user's or the item's."""
    for role in columns:
        if role not in ROLES:
            raise DataError(f"--columns: no role '{role}'; {nearest(role, ROLES)}")
    for role in ("user", "item"):
        if role not in columns:
            raise DataError(f"--columns: name the column of the {role}, e.g. {role}={role}_id")


def parse_kinds(text: str, option: str) -> dict[str, Kind]:
    """`brand:categorical,price:numeric` → kind by column.

    Raises:
        DataError: not of that form, an unknown kind, or a name that cannot be a feature's.
    """
    kinds: dict[str, Kind] = {}
    for part in filter(None, map(str.strip, text.split(","))):
        name, _, kind = map(str.strip, part.rpartition(":"))
        if not name or kind not in get_args(Kind):
            raise DataError(f"{option}: '{part}' is not COLUMN:KIND; {nearest(kind, get_args(Kind))}")
        kinds[name] = kind  # type: ignore[assignment]
    check_kinds(kinds, option)
    return kinds


def check_kinds(kinds: Mapping[str, Kind], option: str) -> None:
    """Raise DataError where a name cannot be a feature's."""
    for name, kind in kinds.items():
        # The name becomes that of a file and of a module of the model.
        if not re.fullmatch(r"\w+", name) or name in RESERVED:
            raise DataError(f"{option}: '{name}' cannot name a feature; rename the column, in letters, digits and _")
        if kind == "text" and f"{name}_tokens" in kinds:
            raise DataError(f"{option}: '{name}_tokens' is where the words of '{name}' go; rename the column")
