"""Options of a command from the fields of a dataclass: `--k-core` from `k_core`, with the field's type and help."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, Field, fields, is_dataclass
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from pydantic import BeforeValidator, ValidationError
from pydantic.fields import FieldInfo

from flm_torchrec.config.accepts import TEXT, accepts, setting_help
from flm_torchrec.errors import ConfigError

Options = TypeVar("Options")


def add_options(parser: argparse.ArgumentParser, kind: type, prefix: str = "") -> None:
    """Add one option for every field of a pydantic dataclass, in a group titled by the first line of its docstring.

    A field that is a dataclass itself adds its own fields, in a group of its own. The `title` of a field is the
    placeholder of its value in the help.

    Args:
        prefix: put before each name, such as `synthetic-`.
    """
    group = parser.add_argument_group((kind.__doc__ or "").split("\n")[0].rstrip("."))
    for field, hint in _hints(kind):
        if is_dataclass(_bare(hint)):
            add_options(parser, _bare(hint), prefix)
        else:
            group.add_argument(_flag(prefix, field.name), **_argument(field, hint))


def options_from(kind: type[Options], args: argparse.Namespace, prefix: str = "") -> Options:
    """The dataclass filled with what was given of `add_options`; see `options_of`."""
    return options_of(kind, vars(args), prefix)


def options_of(kind: type[Options], given: Mapping[str, Any], prefix: str = "") -> Options:
    """The dataclass filled with values by name; a field without one, or with None, keeps its default.

    Raises:
        ConfigError: a value is out of its range, or two contradict each other.
    """
    values = {}
    for field, hint in _hints(kind):
        if is_dataclass(_bare(hint)):
            values[field.name] = options_of(_bare(hint), given, prefix)
        elif (value := given.get(f"{prefix}{field.name}".replace("-", "_"))) is not None:
            values[field.name] = value
    try:
        return kind(**values)
    except ValidationError as error:
        raise ConfigError(_problem(error, kind, prefix)) from error


def option_names(kind: Any, prefix: str = "") -> list[str]:
    """The names that `options_of` reads."""
    names: list[str] = []
    for field, hint in _hints(kind):
        inner = _bare(hint)
        names += option_names(inner, prefix) if is_dataclass(inner) else [f"{prefix}{field.name}".replace("-", "_")]
    return names


def _argument(field: Field[Any], hint: Any) -> dict[str, Any]:
    """Keyword arguments of `add_argument`. An option that is not given is None: only the field has the default."""
    description = next(info.description for info in _infos(hint) if info.description)
    bare = _bare(hint)
    if bare is bool:
        return {"action": "store_true", "default": None, "help": setting_help(description, TEXT, "no")}
    if get_origin(bare) is Literal:
        return {"choices": get_args(bare), "help": setting_help(description, TEXT, _default(field))}
    parsed = any(isinstance(part, BeforeValidator) for part in hint.__metadata__)
    number = bare in (int, float) and not parsed
    return {
        "type": bare if number else str,
        "metavar": next((info.title for info in _infos(hint) if info.title), "VALUE"),
        "help": setting_help(description, accepts(hint) if number else TEXT, _default(field)),
    }


def _default(field: Field[Any]) -> str:
    """The default as the command line takes it; `none` where it is empty."""
    default = field.default if field.default_factory is MISSING else field.default_factory()
    if isinstance(default, dict):
        default = ",".join(f"{name}={value}" for name, value in default.items())
    if default in ("", None):
        return "none"
    return f"'{default}'" if isinstance(default, str) and not default[0].isalnum() else str(default)


def _problem(error: ValidationError, kind: type, prefix: str) -> str:
    """The first wrong value: its option, the value, and what the option takes."""
    first = error.errors()[0]
    reason = first["msg"].removeprefix("Value error, ")
    if not first["loc"]:  # a check of several fields names the options itself
        return reason
    name, *inside = map(str, first["loc"])
    if first["type"] == "greater_than_equal":
        reason = f"must be at least {first['ctx']['ge']}"
    elif first["type"] != "value_error":
        reason = f"must be {_taken(next(hint for field, hint in _hints(kind) if field.name == name))}"
    value = f"{'.'.join(inside)}={first['input']}" if inside and inside[-1] != "[key]" else first["input"]
    return f"{_flag(prefix, name)} {value}: {reason}"


def _taken(hint: Any) -> str:
    """What an option takes; several values by name are a text of the command line, or a mapping in Python."""
    form = next((info.title for info in _infos(hint) if info.title), None)
    bare = _bare(hint)
    if get_origin(bare) is not dict:
        return accepts(hint)
    return f"a text {form}" + (", or a mapping of texts" if get_args(bare) == (str, str) else "")


def _flag(prefix: str, name: str) -> str:
    return f"--{prefix}{name}".replace("_", "-")


def _hints(kind: type) -> Iterator[tuple[Field[Any], Any]]:
    """The fields of a dataclass with their annotated types."""
    hints = get_type_hints(kind, include_extras=True)
    return ((field, hints[field.name]) for field in fields(kind))


def _infos(hint: Any) -> list[FieldInfo]:
    return [part for part in hint.__metadata__ if isinstance(part, FieldInfo)]


def _bare(hint: Any) -> Any:
    """The type without annotations, and without None."""
    if get_origin(hint) is Annotated:
        hint = get_args(hint)[0]
    if get_origin(hint) in (Union, UnionType):
        (hint,) = (part for part in get_args(hint) if part is not NoneType)
    return hint
