"""Weights that a config gives by name, and what kinds of events are predicted and count."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal

import numpy as np

from flm_torchrec.data.schema import Schema
from flm_torchrec.errors import ConfigError
from flm_torchrec.names import nearest

MOST = 1e6
"""Maximum weight of an event, and of a kind of events."""


def parse_weights(weights: Sequence[str], setting: str) -> dict[str, float]:
    """`NAME=WEIGHT` several times → weight by name.

    Args:
        setting: for errors.

    Raises:
        ConfigError: a part is not written so, or is named twice.
    """
    found: dict[str, float] = {}
    for part in weights:
        name, equals, text = part.rpartition("=")
        try:
            value = float(text)
        except ValueError:
            value = -1.0
        if not equals or not name or name in found or not 0 <= value < float("inf"):
            raise ConfigError(f"{setting}: '{part}' is not NAME=WEIGHT, once for each name, at least 0")
        found[name] = value
    return found


def target_kinds(schema: Schema, names: Literal["all"] | tuple[str, ...]) -> np.ndarray | None:
    """[kinds of events] bool: those to predict, by `data.target_events`; None: all.

    Raises:
        ConfigError: none is named, one twice, or one that the data do not have.
    """
    if names == "all":
        return None
    if not names:
        raise ConfigError(f"data.target_events: names nothing to predict; give some of {', '.join(schema.events)}")
    for name in names:
        _check_kind(schema, name, "data.target_events")
    if len(set(names)) < len(names):
        raise ConfigError(f"data.target_events: {', '.join(names)}: name each kind once")
    chosen = np.isin(schema.events, names)
    return None if chosen.all() else chosen


def kind_weights(
    schema: Schema, weights: Literal["equal"] | tuple[str, ...], targets: np.ndarray | None
) -> np.ndarray | None:
    """[kinds of events] float32: what a target of each counts, by `loss.event_weights`; None: all count 1.

    Args:
        targets: [kinds] bool, see `target_kinds`; kinds that are no targets count 0.

    Raises:
        ConfigError: a kind is not in the data, or is no target; or no target counts.
    """
    named = {} if weights == "equal" else parse_weights(weights, "loss.event_weights")
    counts = np.ones(len(schema.events), np.float32) if targets is None else targets.astype(np.float32)
    for name, weight in named.items():
        _check_kind(schema, name, "loss.event_weights")
        code = schema.events.index(name)
        if counts[code] == 0:
            raise ConfigError(f"loss.event_weights: '{name}' is not predicted; add it to data.target_events")
        if weight > MOST:
            raise ConfigError(f"loss.event_weights: '{name}' counts {weight:g}; give at most {MOST:g}")
        counts[code] = weight
    if not counts.any():
        raise ConfigError("loss.event_weights: every target counts 0; give one kind more")
    return None if (counts == 1).all() else counts


VALUE = "value"
"""The label of `finetune.labels` that is told by the value of an event; each other one is a kind of events."""


def label_weights(labels: Sequence[str]) -> dict[str, float]:
    """`finetune.labels` → by name, the weight of its loss.

    Raises:
        ConfigError: a part is neither NAME nor NAME=WEIGHT, a name comes twice, or a weight is not above 0.
    """
    found = parse_weights([part if "=" in part else f"{part}=1" for part in labels], "finetune.labels")
    for name, weight in found.items():
        if not 0 < weight <= MOST:
            raise ConfigError(f"finetune.labels: '{name}' has the weight {weight:g}; give one above 0, or leave it out")
    return found


def check_labels(schema: Schema, names: Iterable[str]) -> None:
    """Raise ConfigError where a label is neither the value nor a kind of events of the data."""
    for name in names:
        if name != VALUE and name not in schema.events:
            hint = nearest(name, [VALUE, *schema.events])
            raise ConfigError(f"finetune.labels: the data have no event '{name}'; {hint}")


def _check_kind(schema: Schema, name: str, setting: str) -> None:
    if name not in schema.events:
        raise ConfigError(f"{setting}: the data have no event '{name}'; {nearest(name, schema.events)}")
