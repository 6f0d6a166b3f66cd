"""Refuses a split that predicts events which the source of a fine-tuning or of a warm start has learned from."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from flm_torchrec.config import Config
from flm_torchrec.data.columns import EventBlock
from flm_torchrec.data.dataset import PreparedData, spans
from flm_torchrec.data.splits import Examples
from flm_torchrec.data.survey import StreamedData
from flm_torchrec.data.vocabulary import RowKeys
from flm_torchrec.errors import ConfigError, RunError
from flm_torchrec.training.identity import VOCABULARY, has_ids_of, of_one_domain, own_data, read_config
from flm_torchrec.training.job import JobInputs
from flm_torchrec.training.run_events import events_of, load_data, with_targets


def refuse_learned(source: Path, inputs: JobInputs) -> None:
    """Raise ConfigError where the inputs predict events that the source has learned from; collective.

    Data that were prepared anew are compared by the keys of user and item and by time. With the settings of the
    source's split they are taken to go on where its data ended, and are not compared.

    Raises:
        ConfigError: such events are predicted, or it cannot be told, as the source's data are gone.
    """
    inputs.comm.on_main(lambda: _check(source, inputs))


def _check(source: Path, inputs: JobInputs) -> None:
    config, data, splits = inputs.config, inputs.data, inputs.events.splits
    made = _unstreamed(read_config(source))
    if _split_of(made) == _split_of(config) and made.finetune.task != "label":
        return
    same_ids = has_ids_of(source, data.path, data.fingerprint)
    if not same_ids and not of_one_domain(source, data):
        return
    if isinstance(data, StreamedData):  # has the users of validation alone
        config = _unstreamed(config)
        data = load_data(config, on_disk=True)
        splits = events_of(config, data).splits
    valid, test = _held_out(splits.valid), _held_out(splits.test)
    rows = np.concatenate([valid, test])
    if same_ids:
        learned = events_of(made, with_targets(data, made)).seen[rows]
    else:
        learned = _learned_by_key(source, made, data, rows)
    for name, part in zip(("validation", "test"), np.split(learned, [len(valid)]), strict=True):
        if part.any():
            raise ConfigError(
                f"data.split: {source} has learned from {part.sum()} of the {len(part)} {name} events, so their"
                f" figures would be too good; take its split, {_told(made)}"
            )


def _split_of(config: Config) -> tuple[Any, ...]:
    return config.data.split, config.data.holdout, config.data.target_events


def _told(made: Config) -> str:
    kinds = made.data.target_events
    targets = kinds if isinstance(kinds, str) else f"[{','.join(kinds)}]"
    return f"--data.split {made.data.split} --data.holdout {made.data.holdout:g} --data.target_events {targets}"


def _unstreamed(config: Config) -> Config:
    return replace(config, data=replace(config.data, stream=False))


def _held_out(examples: Examples) -> np.ndarray:
    """Indices of the events that are predicted."""
    until = examples.end + 1 if examples.until is None else examples.until
    return spans(examples.end, until - examples.end)


def _learned_by_key(source: Path, made: Config, data: PreparedData, rows: np.ndarray) -> np.ndarray:
    """[n] bool: whether the source has learned from an event of the same user, item and time as each of n rows."""
    try:
        path = own_data(source, made)
    except RunError as error:
        raise ConfigError(
            f"data.split: is not that of {source}, whose data are gone, so nobody can tell whether it has learned from"
            f" the events to predict; take its split, {_told(made)}"
        ) from error
    before = load_data(replace(made, data=replace(made.data, path=str(path))), on_disk=True)
    seen = events_of(made, before).seen
    old, new = RowKeys.load(source / VOCABULARY, "none"), RowKeys(data.path, data.schema)
    user_of, item_of = (_new_ids(old, new, entity) for entity in ("user", "item"))
    columns = ["user", "item"] + ["time"] * (old.schema.timestamps and new.schema.timestamps)
    users = np.searchsorted(data.offsets, rows, "right") - 1
    wanted = pl.DataFrame({"user": users, "item": data.item[rows].astype(np.int64), "time": data.timestamp[rows]})

    def learned(block: EventBlock) -> pl.DataFrame:
        chosen = np.flatnonzero(seen[block.rows])
        user, item = user_of[block.users[chosen]], item_of[before.item[block.rows][chosen]]
        return pl.DataFrame({"user": user, "item": item, "time": before.timestamp[block.rows][chosen]})

    found = np.zeros(len(rows), bool)
    for block in before.blocks():
        there = learned(block).select(columns).unique().with_columns(found=True)
        found |= wanted.join(there, columns, "left", maintain_order="left")["found"].is_not_null().to_numpy()
    return found


def _new_ids(old: RowKeys, new: RowKeys, entity: str) -> np.ndarray:
    """[old users or items] int64: their numbers in the new data, -1 where they are not there."""
    table = f"{entity}_id"
    both = old.keys(table, [table]).join(new.keys(table, [table]), "key", suffix="_new")
    ids = np.full(old.rows(table, [table]), -1)
    ids[both["code"].to_numpy()] = both["code_new"].to_numpy()
    return ids
