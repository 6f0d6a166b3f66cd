"""YAML file plus command-line overrides → one checked `Config`."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, asdict, fields
from pathlib import Path
from typing import Any, get_type_hints

import yaml
from pydantic import TypeAdapter, ValidationError
from pydantic.fields import FieldInfo

from flm_torchrec.config.accepts import TEXT, accepts
from flm_torchrec.config.schema import Config
from flm_torchrec.documents import Unreadable, parse_yaml, read_yaml, shortened
from flm_torchrec.errors import ConfigError
from flm_torchrec.names import nearest


def load_config(path: str | Path | None = None, overrides: Sequence[str] = ()) -> Config:
    """Read a config file and lay overrides such as `train.batch_size=512` over it.

    Raises:
        ConfigError: unreadable file, unknown key (with the nearest known one), or a value out of its range.
    """
    values = _read(Path(path)) if path else {}
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals:
            raise ConfigError(f"override '{override}': write it as section.field=value")
        section, _, name = key.partition(".")
        values.setdefault(section, {})
        if not isinstance(values[section], dict):
            raise ConfigError(f"{path}: '{section}' is not a section; write its fields below it")
        values[section][name] = text if _is_text(section, name) else _value(key, text)
    return from_dict(values, source=str(path or "command line"))


def from_dict(values: dict[str, Any], source: str) -> Config:
    """Check nested values and build the config; `source` names where they came from in errors."""
    _refuse_unknown(values, source)
    try:
        return TypeAdapter(Config).validate_python(values)
    except ValidationError as error:
        raise ConfigError(f"{source}: {_problem(error)}") from error


def first_problem(error: ValidationError, depth: int | None = None) -> str:
    """What is wrong with the first value that is: its place, at most `depth` names of it, the reason and the value."""
    first = error.errors()[0]
    place = ".".join(str(part) for part in first["loc"][:depth])
    given = "" if first["type"] in ("value_error", "missing") else f", not {shortened(first['input'])}"
    # A check of several sections has no place, and names the fields itself.
    before = f"{place}: " if place else ""
    return f"{before}{first['msg'].removeprefix('Value error, ')}{given}"


def _problem(error: ValidationError) -> str:
    """As `first_problem`; of a setting what it takes, so that the choices and the range are told at once."""
    first = error.errors()[0]
    if len(first["loc"]) < 2 or first["type"] == "value_error":
        return first_problem(error, 2)
    section, name = map(str, first["loc"][:2])
    given = error.errors()[-1]["input"] if len(first["loc"]) == 2 else first["input"]
    return f"{section}.{name}: must be {accepted(section, name)}, not {shortened(given)}"


def accepted(section: str, name: str) -> str:
    """What a setting takes, for people: its choices, or its range."""
    return accepts(get_type_hints(sections()[section], include_extras=True)[name])


def to_yaml(config: Config) -> str:
    """The resolved config, every field written out; `load_config` reads it back equal."""
    record = {
        section: {name: list(value) if isinstance(value, tuple) else value for name, value in content.items()}
        for section, content in asdict(config).items()
    }
    return yaml.safe_dump(record, sort_keys=False)


def sections() -> dict[str, type]:
    """The sections of `Config` by name."""
    return get_type_hints(Config)


def add_config_arguments(parser: argparse.ArgumentParser) -> None:
    """Add `--config FILE` and one `--section.field VALUE` for every setting of a pretraining."""
    parser.add_argument("--config", metavar="FILE", help="YAML file of settings; options below override it")
    add_overrides(parser, [name for name in sections() if name != "finetune"], {})


def add_overrides(parser: argparse.ArgumentParser, names: Iterable[str], defaults: Mapping[str, str]) -> None:
    """Add one `--section.field VALUE` for every setting of the sections named.

    Args:
        defaults: what the help says of a setting, or of all of a section, whose default is not the schema's.
    """
    for section in names:
        kind = sections()[section]
        group = parser.add_argument_group(section, (kind.__doc__ or "").split("\n")[0])
        hints = get_type_hints(kind, include_extras=True)
        for field in fields(kind):
            infos = [m for m in hints[field.name].__metadata__ if isinstance(m, FieldInfo)]
            text = next(info.description for info in infos if info.description).replace("%", "%%")
            own = field.default if field.default is not MISSING else ""
            default = defaults.get(f"{section}.{field.name}", defaults.get(section, own))
            default = ",".join(map(str, default)) if isinstance(default, tuple) else default
            taken = accepts(hints[field.name]).replace("%", "%%")
            group.add_argument(
                f"--{section}.{field.name}",
                dest=f"override:{section}.{field.name}",
                metavar="VALUE",
                help=f"{text}; {taken} (default: {default})" if taken != TEXT else f"{text} (default: {default})",
            )


def add_data_path(parser: argparse.ArgumentParser) -> None:
    """Add `--data.path DIR` to a command that takes a run with its own data."""
    parser.add_argument(
        "--data.path", dest="override:data.path", metavar="DIR",
        help="where the run's own data are now, should they have been moved (default: where they were)",
    )  # fmt: skip


def config_from_arguments(args: argparse.Namespace) -> Config:
    """The config of a parser made with `add_config_arguments`."""
    return load_config(args.config, given_overrides(args))


def given_overrides(args: argparse.Namespace) -> list[str]:
    """What was given of `add_overrides`, as `load_config` takes it."""
    given = {k.removeprefix("override:"): v for k, v in vars(args).items() if k.startswith("override:")}
    return [f"{key}={value}" for key, value in given.items() if value is not None]


def given_options(args: argparse.Namespace) -> dict[str, str]:
    """Options of a command beside settings and folders, which may lie elsewhere on each host."""
    left_out = ("run_folder", "config")
    given = {name: value for name, value in vars(args).items() if ":" not in name and name not in left_out}
    return {f"--{name}": str(value) for name, value in given.items() if isinstance(value, str | int | float | list)}


def _read(path: Path) -> dict[str, Any]:
    try:
        values = read_yaml(path)
    except Unreadable as error:
        raise ConfigError(f"{path}: {error}; give the path of a YAML config file") from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: must hold sections such as 'train:', not a {type(values).__name__}")
    return values


def _is_text(section: str, name: str) -> bool:
    """Whether the setting is a text, such as a path: `2024` and `no` are then names and no numbers or truths."""
    return section in sections() and get_type_hints(sections()[section]).get(name) is str


def _value(key: str, text: str) -> Any:
    try:
        value = parse_yaml(text)
    except Unreadable as error:
        raise ConfigError(f"--{key}: {shortened(text)} is not a value ({error}); put it in quotes") from error
    # YAML 1.1 reads 1e-3 as a string, Python and people read it as a number.
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value


def _refuse_unknown(values: dict[str, Any], source: str) -> None:
    known = sections()
    for section, content in values.items():
        if section not in known:
            raise ConfigError(f"{source}: unknown section '{section}'; {nearest(str(section), known)}")
        if not isinstance(content, dict):
            raise ConfigError(f"{source}: '{section}' must hold fields, not {shortened(content)}")
        names = [f.name for f in fields(known[section])]
        for name in content:
            if name not in names:
                raise ConfigError(f"{source}: unknown key '{section}.{name}'; {nearest(str(name), names)}")
