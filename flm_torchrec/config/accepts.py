"""What a setting accepts, derived from its type: the same words in the help and in errors."""

from __future__ import annotations

from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic.fields import FieldInfo

TEXT = "a text"
LIMITS = {"ge": "from", "gt": "above", "le": "to", "lt": "below"}
"""Words for the limits of a number, by pydantic's names."""


def accepts(hint: Any) -> str:
    """Choices of a Literal, range of a number, or form of a list. The alternatives of a union are joined by "or"."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return _ranged(inner[0], [m for info in inner[1:] if isinstance(info, FieldInfo) for m in info.metadata])
    if origin is Literal:
        return f"one of {', '.join(map(str, inner))}" if len(inner) > 1 else f"'{inner[0]}'"
    if origin in (Union, UnionType):
        return ", or ".join(accepts(kind) for kind in inner if kind is not NoneType)
    if origin is tuple:
        return f"one or several, separated by commas, each {accepts(inner[0])}"
    return {bool: "true or false", int: "a whole number", float: "a number", str: TEXT}[hint]


def setting_help(description: str, taken: str, default: Any) -> str:
    """Help of a setting, as argparse wants it: what it is, what it takes as `accepts` says it, and its default."""
    text = f"{description}; {taken}" if taken != TEXT else description
    return f"{text} (default: {default})".replace("%", "%%")


def _ranged(kind: Any, limits: list[Any]) -> str:
    """The type of a number with its limits, the narrowest if there are several."""
    if kind not in (int, float):
        return accepts(kind)
    found = [(name, getattr(limit, name)) for limit in limits for name in LIMITS if hasattr(limit, name)]
    low = [(value, LIMITS[name]) for name, value in found if name in ("ge", "gt")]
    high = [(value, LIMITS[name]) for name, value in found if name in ("le", "lt")]
    ends: list[tuple[Any, str]] = [max(low, default=(None, "")), min(high, default=(None, ""))]
    multiples = [limit.multiple_of for limit in limits if hasattr(limit, "multiple_of")]
    named = f"a multiple of {multiples[0]}" if multiples else accepts(kind)
    return " ".join([named, *(f"{word} {_number(limit)}" for limit, word in ends if word)])


def _number(limit: float) -> str:
    return f"{limit:,}" if isinstance(limit, int) else f"{limit:g}"
