"""What `flm tune` chooses from: settings with choices or ranges, each checked against the typed config."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from itertools import islice, product
from pathlib import Path
from typing import Any

from flm_torchrec.config import Config, from_dict, load_config
from flm_torchrec.documents import Unreadable, read_yaml, shortened
from flm_torchrec.errors import ConfigError
from flm_torchrec.names import nearest

KEYS = ("config", "settings", "space")
"""Of a file of a space."""
RANGE_KEYS = ("low", "high", "step", "log")
OWN = ("train.run", "train.existing")
"""Settings that each trial is given by the search."""
COMPARED = (
    *("data.path", "data.split", "data.holdout", "data.target_events", "data.stream"),
    *("train.select", "train.eval_users", "train.eval_every", "train.seed", "train.warm_start"),
)
COMPARED_SECTIONS = ("eval", "finetune", "distributed")
"""Settings that all trials share: with other values their validations are not comparable, or no model is another."""
MOST_CHECKED = 500
"""Combinations of values that are checked before the first trial."""


@dataclass(frozen=True)
class Choices:
    """One of several values."""

    values: tuple[Any, ...]

    def samples(self) -> list[Any]:
        """All values."""
        return list(self.values)


@dataclass(frozen=True)
class Range:
    """A number from low to high, both included; with a step, high is a whole number of steps above low."""

    low: float
    high: float
    step: float | None = None
    log: bool = False
    """Drawn evenly by its logarithm."""

    @property
    def whole(self) -> bool:
        """Whether only whole numbers are drawn."""
        return isinstance(self.low, int)

    def samples(self) -> list[Any]:
        """Both ends; of whole numbers the second too, and with few values all."""
        if not self.whole:
            return [self.low, self.high]
        values = range(int(self.low), int(self.high) + 1, int(self.step or 1))
        return list(values if len(values) <= 2 * math.isqrt(MOST_CHECKED) else [*values[:2], self.high])


@dataclass(frozen=True)
class Space:
    """A config to start from, and what is chosen in it."""

    base: Config
    parts: Mapping[str, Choices | Range]
    """By setting."""

    def config(self, values: Mapping[str, Any], source: str) -> Config:
        """The config with these values by setting.

        Raises:
            ConfigError: a value is out of its bounds, or two contradict each other; names the source.
        """
        content = asdict(self.base)
        for name, value in values.items():
            section, _, field = name.partition(".")
            content.setdefault(section, {})[field] = value
        return from_dict(content, source)


def read_space(file: Path) -> Space:
    """Read and check a file of a space: `config`, `settings` for all trials, and `space`.

    Raises:
        ConfigError: the file cannot be read, names an unknown setting, or has a value that a setting does not accept.
    """
    content = _content(file)
    start, settings = content.get("config"), content.get("settings") or {}
    if not isinstance(settings, dict):
        raise ConfigError(f"{file}: settings must hold 'section.field: value', not {shortened(settings)}")
    base = Space(load_config(start), {})
    for name in settings:
        _refuse(file, name, OWN, (), "each trial has its own; leave it out")
    base = Space(base.config(settings, f"{file}: settings"), {})
    parts = {str(name): _part(file, base, str(name), given) for name, given in content["space"].items()}
    space = Space(base.base, parts)
    for values in islice(_combinations(parts), MOST_CHECKED):
        space.config(values, f"{file}: space: {', '.join(f'{name} {value}' for name, value in values.items())}")
    return space


def _content(file: Path) -> dict[str, Any]:
    try:
        content = read_yaml(file)
    except Unreadable as error:
        raise ConfigError(f"{file}: {error}; give the path of a YAML file with 'space', see docs/tuning.md") from error
    if not isinstance(content, dict) or not isinstance(content.get("space"), dict) or not content["space"]:
        raise ConfigError(f"{file}: has no 'space' of settings with choices or ranges, see docs/tuning.md")
    for key in content:
        if key not in KEYS:
            raise ConfigError(f"{file}: unknown key '{key}'; {nearest(str(key), KEYS)}")
    start = content.get("config")
    if start is not None and not isinstance(start, str):
        raise ConfigError(f"{file}: config must be the path of a config file, not {shortened(start)}")
    return content


def _refuse(file: Path, name: Any, names: tuple[str, ...], sections: tuple[str, ...], reason: str) -> None:
    if "." not in str(name):
        raise ConfigError(f"{file}: '{name}' is no setting; write it as section.field, such as train.sparse_lr")
    if name in names or str(name).partition(".")[0] in sections:
        raise ConfigError(f"{file}: {name} is not to be chosen: {reason}")


def _part(file: Path, base: Space, name: str, given: Any) -> Choices | Range:
    """A setting's choices, from a list; or its range, from a mapping."""
    _refuse(file, name, OWN, (), "each trial has its own; leave it out")
    _refuse(file, name, COMPARED, COMPARED_SECTIONS, "all trials share it; give it under 'settings'")
    place = f"{file}: space"
    if isinstance(given, list):
        if not given or any(isinstance(value, list | dict) for value in given):
            raise ConfigError(f"{place}: {name}: give a list of single values, not {shortened(given)}")
        values = tuple(_checked(base, name, value, place) for value in given)
        if len(set(map(repr, values))) < len(values):
            raise ConfigError(f"{place}: {name}: a choice is there twice in {shortened(given)}")
        return Choices(values)
    if not isinstance(given, dict) or not {"low", "high"} <= set(given):
        raise ConfigError(f"{place}: {name}: give a list of choices, or {{low: …, high: …}}, not {shortened(given)}")
    for key in given:
        if key not in RANGE_KEYS:
            raise ConfigError(f"{place}: {name}: unknown key '{key}'; {nearest(str(key), RANGE_KEYS)}")
    return _range(base, name, given, place)


def _range(base: Space, name: str, given: dict[str, Any], place: str) -> Range:
    low, high = (_checked(base, name, given[end], place) for end in ("low", "high"))
    for end in (low, high):
        if isinstance(end, bool) or not isinstance(end, int | float):
            raise ConfigError(f"{place}: {name}: has no range, it takes no number; give a list of choices")
    step, log = given.get("step"), given.get("log", False)
    if not isinstance(log, bool):
        raise ConfigError(f"{place}: {name}: log must be true or false, not {shortened(log)}")
    kinds: Any = int if isinstance(low, int) else int | float
    if step is not None and (isinstance(step, bool) or not isinstance(step, kinds) or step <= 0):
        raise ConfigError(
            f"{place}: {name}: step must be a number above 0, whole as the setting, not {shortened(step)}"
        )
    if log and (step is not None or low <= 0):
        raise ConfigError(f"{place}: {name}: log needs a low end above 0, and no step")
    if low > high:
        raise ConfigError(f"{place}: {name}: low {low} is above high {high}")
    steps = (high - low) / (step or 1)
    if step and abs(steps - round(steps)) > 1e-6:
        last = low + math.floor(steps) * step
        raise ConfigError(
            f"{place}: {name}: steps of {step:g} from {low:g} miss high {high:g}, so it would never be tried; give high"
            f" {last:.6g}"
        )
    return Range(low, high, step, log)


def _checked(base: Space, name: str, value: Any, place: str) -> Any:
    """The value as the config holds it: a number where it was written as text, such as 1e-3 in YAML."""
    section, _, field = name.partition(".")
    held = getattr(getattr(base.config({name: value}, place), section), field)
    return held if isinstance(held, bool | int | float | str) else value


def _combinations(parts: Mapping[str, Choices | Range]) -> Iterator[dict[str, Any]]:
    for values in product(*(part.samples() for part in parts.values())):
        yield dict(zip(parts, values, strict=True))
