"""A YAML file and command-line overrides → one checked `Config`."""

from __future__ import annotations

import argparse
import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import MISSING, asdict, fields
from numbers import Integral, Real
from pathlib import Path
from typing import Any, get_type_hints

import yaml
from pydantic import TypeAdapter, ValidationError
from pydantic.fields import FieldInfo

from flm_torchrec.config.accepts import accepts, setting_help
from flm_torchrec.config.presets import PRESETS
from flm_torchrec.config.schema import Config
from flm_torchrec.documents import Unreadable, parse_yaml, read_yaml, shortened
from flm_torchrec.errors import ConfigError
from flm_torchrec.names import nearest

COMMAND_LINE = "command line"


def load_config(path: str | Path | None = None, overrides: Sequence[str] = (), preset: str | None = None) -> Config:
    """Read a config file and apply overrides such as `train.batch_size=512`.

    Args:
        preset: a name of PRESETS, whose settings take the place of the defaults.

    Raises:
        ConfigError: an unreadable file, an unknown key (with the nearest known one), or a value out of range.
    """
    values = _read(Path(path)) if path else {}
    if preset is not None:
        values = _under(values, preset, path)
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals:
            raise ConfigError(f"override '{override}': write it as section.field=value")
        section, _, name = key.partition(".")
        values.setdefault(section, {})
        if not isinstance(values[section], dict):
            raise ConfigError(f"{path}: '{section}' is not a section; write its fields below it")
        values[section][name] = text if _is_text(section, name) else _value(key, text)
    given = {override.partition("=")[0] for override in overrides}
    return from_dict(values, str(path or COMMAND_LINE), given)


def _under(values: dict[str, Any], preset: str, path: str | Path | None) -> dict[str, Any]:
    """The values of a file, with those of a preset where the file has none."""
    if preset not in PRESETS:
        raise ConfigError(f"preset: no preset '{preset}'; {nearest(preset, PRESETS)}")
    _refuse_unknown(values, str(path))
    return values | {section: content | values.get(section, {}) for section, content in PRESETS[preset].items()}


def overrides_of(given: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Settings by section and field → overrides in the form of `load_config`.

    Raises:
        ConfigError: a section is no mapping, or a value is none of YAML's.
    """
    overrides = []
    for section, content in given.items():
        if not isinstance(content, Mapping):
            raise ConfigError(f"{section}: give a mapping such as {section}={{'field': value}}, not {content!r:.60}")
        for name, value in content.items():
            try:
                text = str(value) if _is_text(section, name) else json.dumps(value, default=_number)
            except TypeError as error:
                raise ConfigError(f"{section}.{name}: {value!r:.60} is no setting; give a number or a text") from error
            overrides.append(f"{section}.{name}={text}")
    return overrides


def _number(value: object) -> int | float:
    """A number of numpy as one of Python."""
    if isinstance(value, Integral):
        return int(value)
    if isinstance(value, Real):
        return float(value)
    raise TypeError


def from_dict(values: dict[str, Any], source: str, given: Collection[str] = ()) -> Config:
    """Build the config from nested values.

    Args:
        source: names the origin of the values in errors.
        given: settings such as `train.seed` that the command line gave in place of the source.

    Raises:
        ConfigError: an unknown key or a value out of range.
    """
    _refuse_unknown(values, source)
    try:
        return TypeAdapter(Config).validate_python(values)
    except ValidationError as error:
        where = COMMAND_LINE if ".".join(map(str, error.errors()[0]["loc"][:2])) in given else source
        raise ConfigError(f"{where}: {_problem(error)}") from error


def first_problem(error: ValidationError, depth: int | None = None) -> str:
    """The first problem of a validation: the path of the field (at most `depth` names), the reason and the value."""
    first = error.errors()[0]
    place = ".".join(str(part) for part in first["loc"][:depth])
    given = "" if first["type"] in ("value_error", "missing") else f", not {shortened(first['input'])}"
    # A check of several sections has no place, and names the fields itself.
    before = f"{place}: " if place else ""
    return f"{before}{first['msg'].removeprefix('Value error, ')}{given}"


def _problem(error: ValidationError) -> str:
    """As `first_problem`, but for a setting the message says what it accepts: choices or range."""
    first = error.errors()[0]
    if len(first["loc"]) < 2 or first["type"] == "value_error":
        return first_problem(error, 2)
    section, name = map(str, first["loc"][:2])
    given = error.errors()[-1]["input"] if len(first["loc"]) == 2 else first["input"]
    return f"{section}.{name}: must be {accepted(section, name)}, not {shortened(given)}"


def accepted(section: str, name: str) -> str:
    """What a setting accepts, as text: its choices or its range."""
    return accepts(get_type_hints(sections()[section], include_extras=True)[name])


def to_yaml(config: Config) -> str:
    """The complete config as YAML, with every field. `load_config` reads an equal config from it."""
    record = {
        section: {name: list(value) if isinstance(value, tuple) else value for name, value in content.items()}
        for section, content in asdict(config).items()
    }
    return yaml.safe_dump(record, sort_keys=False)


def sections() -> dict[str, type]:
    """The sections of `Config` by name."""
    return get_type_hints(Config)


def add_config_arguments(parser: argparse.ArgumentParser, several_data: bool = False) -> None:
    """Add `--config FILE` and one `--section.field VALUE` for every setting of a pretraining.

    Args:
        several_data: `--data.path` takes several folders; `given_folders` reads them.
    """
    parser.add_argument("--config", metavar="FILE", help="YAML file of settings; options below override it")
    parser.add_argument(
        "--preset",
        choices=tuple(PRESETS),
        help="other defaults, which --config and options override; fast: for minutes on a CPU; best: wider, against all"
        " items, for a GPU",
    )
    several = {"data.path": {"nargs": "+", "action": _Once}} if several_data else {}
    add_overrides(parser, [name for name in sections() if name != "finetune"], {}, several)


def given_folders(args: argparse.Namespace) -> list[str]:
    """What was given as `--data.path`: no folder, one, or several."""
    found = vars(args).get("override:data.path") or []
    return [found] if isinstance(found, str) else list(found)


class _Once(argparse.Action):
    """Several values after one option, which is given once: a second one would replace the first unseen."""

    def __call__(self, parser, namespace, values, option_string=None):  # type: ignore[no-untyped-def]
        """Keep the values."""
        if getattr(namespace, self.dest) is not None:
            raise argparse.ArgumentError(self, "given twice; write all folders behind one")
        setattr(namespace, self.dest, values)


def add_overrides(
    parser: argparse.ArgumentParser,
    names: Iterable[str],
    defaults: Mapping[str, str],
    more: Mapping[str, Mapping[str, Any]] | None = None,
) -> None:
    """Add one `--section.field VALUE` for every setting of the sections named.

    Args:
        defaults: defaults for the help, by setting or by section, where they differ from the schema.
        more: by setting, more keyword arguments of `add_argument`.
    """
    for section in names:
        kind = sections()[section]
        group = parser.add_argument_group(section, (kind.__doc__ or "").split("\n")[0])
        hints = get_type_hints(kind, include_extras=True)
        for field in fields(kind):
            infos = [m for m in hints[field.name].__metadata__ if isinstance(m, FieldInfo)]
            description = next(info.description for info in infos if info.description)
            own = field.default if field.default is not MISSING else ""
            default = defaults.get(f"{section}.{field.name}", defaults.get(section, own))
            default = ",".join(map(str, default)) if isinstance(default, tuple) else default
            group.add_argument(
                f"--{section}.{field.name}",
                dest=f"override:{section}.{field.name}",
                metavar="VALUE",
                help=setting_help(description, accepts(hints[field.name]), default),
                **(more or {}).get(f"{section}.{field.name}", {}),
            )


def add_data_path(parser: argparse.ArgumentParser) -> None:
    """Add `--data.path DIR` to a command that takes a run, and with it the data of the run."""
    parser.add_argument(
        "--data.path",
        dest="override:data.path",
        metavar="DIR",
        help="where the run's own data are now, should they have been moved (default: where they were)",
    )


def config_from_arguments(args: argparse.Namespace) -> Config:
    """The config of a parser made with `add_config_arguments`."""
    return load_config(args.config, given_overrides(args), args.preset)


def given_overrides(args: argparse.Namespace) -> list[str]:
    """The given options of `add_overrides`, in the form of `load_config`."""
    given = {k.removeprefix("override:"): v for k, v in vars(args).items() if k.startswith("override:")}
    if isinstance(given.get("data.path"), list):
        given["data.path"] = given["data.path"][0] if len(given["data.path"]) == 1 else None
    return [f"{key}={value}" for key, value in given.items() if value is not None]


def given_options(args: argparse.Namespace) -> dict[str, str]:
    """Options of a command without settings, and without folders, whose paths may differ between hosts."""
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
    """Whether the setting is text, such as a path: then `2024` and `no` are names, not a number and a boolean."""
    return section in sections() and get_type_hints(sections()[section]).get(name) is str


def _value(key: str, text: str) -> Any:
    try:
        value = parse_yaml(text)
    except Unreadable as error:
        raise ConfigError(f"--{key}: {shortened(text)} is not a value ({error}); put it in quotes") from error
    # YAML 1.1 reads 1e-3 as a string; users mean a number.
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
