"""`--columns`, `--item-features` and `--user-features`: which columns of the logs mean what."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import get_args

from flm_torchrec.data.schema import Kind
from flm_torchrec.errors import DataError
from flm_torchrec.names import nearest
from flm_torchrec.prepare.text_encoder import ENDING, encoder_kind

ROLES = ("user", "item", "timestamp", "event", "value", "weight")
RESERVED = ("key", "id", "item_id", "user_id", "item_key", "user_key")
"""Names of columns and tables that the layout and the model use themselves."""


def parse_columns(text: str) -> dict[str, str]:
    """`user=uid,item=sku` → column by role.

    Raises:
        DataError: not of that form, a role that is unknown or given twice, or user or item missing.
    """
    columns: dict[str, str] = {}
    for part in filter(None, map(str.strip, text.split(","))):
        role, _, column = map(str.strip, part.partition("="))
        if role not in ROLES or not column:
            raise DataError(f"--columns: '{part}' is not ROLE=COLUMN; {nearest(role, ROLES)}")
        if role in columns:
            raise DataError(f"--columns: '{role}' is given twice; keep one of them")
        columns[role] = column
    check_columns(columns)
    return columns


def check_columns(columns: Mapping[str, str]) -> None:
    """Raise DataError where a role is unknown, none is the user's or the item's, or one column is both."""
    for role in columns:
        if role not in ROLES:
            raise DataError(f"--columns: no role '{role}'; {nearest(role, ROLES)}")
    for role in ("user", "item"):
        if role not in columns:
            raise DataError(f"--columns: name the column of the {role}, e.g. {role}={role}_id")
    if columns["user"] == columns["item"]:
        raise DataError(f"--columns: user and item are both '{columns['user']}'; name a column for each")


def parse_kinds(text: str, option: str) -> dict[str, str]:
    """`brand:categorical,price:numeric,title:text@FOLDER` → kind by column, as it is written.

    Raises:
        DataError: not of that form, an unknown kind, a name that cannot be a feature's or is given twice, or a folder
            without an encoder.
    """
    kinds: dict[str, str] = {}
    for part in filter(None, map(str.strip, text.split(","))):
        name, _, kind = map(str.strip, part.partition(":") if "@" in part else part.rpartition(":"))
        if not name:
            raise DataError(f"{option}: '{part}' is not COLUMN:KIND; {nearest(kind, get_args(Kind))}")
        if name in kinds:
            raise DataError(f"{option}: '{name}' is given twice; keep one of them")
        kinds[name] = kind
    check_kinds(kinds, option)
    return kinds


def check_event_kinds(kinds: Mapping[str, str], others: Mapping[str, str]) -> None:
    """Raise DataError where a feature of events is not categorical, or has the name of another one.

    Args:
        others: features of items and users.
    """
    check_kinds(kinds, "--event-features")
    for name, kind in kinds.items():
        if kind != "categorical":
            raise DataError(f"--event-features: '{name}' is {kind}; of events only categorical features are learnt")
        if name in others or name in (*ROLES, "gap"):
            raise DataError(f"--event-features: '{name}' is taken; rename the column")
        if sum(name.lower() == other.lower() for other in kinds) > 1:  # columns of SQL, where capitals do not count
            raise DataError(f"--event-features: '{name}' differs from another in capitals alone; rename the column")


def check_kinds(kinds: Mapping[str, str], option: str) -> None:
    """Raise DataError where a name or a kind cannot be a feature's."""
    for name, given in kinds.items():
        kind, folder = kind_and_encoder(given)
        if kind not in get_args(Kind):
            raise DataError(f"{option}: '{name}:{given}' is not COLUMN:KIND; {nearest(kind, get_args(Kind))}")
        # The name becomes that of a file and of a module of the model.
        if not re.fullmatch(r"\w+", name) or name in RESERVED:
            raise DataError(f"{option}: '{name}' cannot name a feature; rename the column, in letters, digits and _")
        made = [(f"{name}_tokens", "words")] if kind == "text" else []
        made += [(f"{name}{ENDING}", "vectors")] if folder is not None else []
        for other, what in made:
            if other in kinds:
                raise DataError(f"{option}: '{other}' is where the {what} of '{name}' go; rename the column")
        if folder is not None:
            if kind != "text":
                raise DataError(f"{option}: '{name}:{given}': only a text has an encoder; write {name}:text@FOLDER")
            encoder_kind(folder, f"{option}: '{name}:{given}'")


def kind_and_encoder(given: str) -> tuple[str, Path | None]:
    """`text@FOLDER` → the kind and the folder of its encoder, None where no encoder is named."""
    kind, at, folder = given.partition("@")
    return kind, Path(folder) if at else None
