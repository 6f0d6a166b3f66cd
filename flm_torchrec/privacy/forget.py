"""Forgetting users: they leave prepared data, the tables and the vocabulary of runs made with it, and other places."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Collection, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch

from flm_torchrec.claim import claim
from flm_torchrec.config import load_config
from flm_torchrec.data.dataset import PreparedData, fingerprint_of, fingerprints_before, load_prepared
from flm_torchrec.data.hashing import remap_ids
from flm_torchrec.data.schema import Schema
from flm_torchrec.data.vocabulary import first_row
from flm_torchrec.errors import DataError, RunError
from flm_torchrec.export.forget import AFTERWARDS, refuse_leftovers
from flm_torchrec.files import leftovers, mend, mend_inside, replacing, replacing_file, telling
from flm_torchrec.folders import CONFIG, SCHEMA
from flm_torchrec.privacy.forget_in_data import (
    forget_rows,
    forgotten_users,
    keys_and_ids,
    tombstone,
    unused_codes,
    which_id,
)
from flm_torchrec.privacy.places import ExportPlace, Place
from flm_torchrec.privacy.record import Log, Removal
from flm_torchrec.training.checkpoint import storage
from flm_torchrec.training.checkpoint.manager import ASIDE, CHECKPOINTS, user_tensors
from flm_torchrec.training.follow.events import LEARNED
from flm_torchrec.training.follow.growth import growth_files, publish_vocabulary
from flm_torchrec.training.identity import FINGERPRINT, made_with

VOCABULARY = "vocabulary"


def forget(
    folder: Path,
    keys: Sequence[str],
    runs: Sequence[Path],
    places: Sequence[Place] = (),
    log: Log | None = None,
    plain: Mapping[str, str] | None = None,
) -> list[str]:
    """Remove users from prepared data, from runs, and from other places.

    Each folder is replaced in one step, and nobody else may write it meanwhile. After an interruption the same call
    does the rest: a run holds the fingerprint of the data it was made with, and a key counts as known while any place
    still has it, or the log says that its forgetting has begun.

    Args:
        folder: prepared data.
        keys: of users, as users.parquet has them; none: runs are brought up to date with what the data has forgotten.
        plain: by key that was hashed for this, the id before, for messages.

    Returns what was done, one line for each place.

    Raises:
        DataError: a key that no place has, or data that are incomplete; nothing is changed.
        RunError: a run of other data, one whose table cannot be mended, or a place that cannot be reached: nothing is
            changed. Or, after all else is done, a place that still has one of the keys.
    """
    log = log or Log(None, keys)
    exports = [place.folder for place in places if isinstance(place, ExportPlace)]
    with ExitStack() as claims:
        for each in dict.fromkeys(path.resolve() for path in (folder, *runs, *exports)):
            if each.parent.is_dir():  # else the checks say what is not there
                claims.enter_context(claim(each, AFTERWARDS))
        with telling(folder, AFTERWARDS):
            for run in runs:
                mend(run / VOCABULARY)
                mend_inside(run / CHECKPOINTS)
                mend_inside(run / LEARNED)
        _check(folder, runs)
        found = {place: place.find(keys) for place in places}
        there = _known(folder, keys, runs, set(log.begun()).union(*found.values()), plain or {})
        in_runs = [(str(run), "run", len(set(keys) & _keys_of(run))) for run in runs]
        log.begin([(str(folder), "data", len(there)), *in_runs, *((str(p), p.kind, len(f)) for p, f in found.items())])
        return _forget(folder, there, keys, runs, places, log)


def _known(
    folder: Path, keys: Sequence[str], runs: Sequence[Path], elsewhere: Collection[str], plain: Mapping[str, str]
) -> set[str]:
    """Those of the keys that the data has.

    Raises:
        DataError: a key that neither the data, nor a run, nor another place has.
    """
    data_keys, ids = keys_and_ids(folder / "users.parquet")
    known = set(data_keys).union(elsewhere, *(_keys_of(run) for run in runs))
    for key in keys:
        if key not in known:
            there = [one for one, user in zip(data_keys, ids, strict=True) if one != tombstone(user)]
            where = f"user '{plain.get(key, key)}': not in {folder / 'users.parquet'}"
            raise DataError(f"{where}; {which_id(key, key in plain, there)}")
    return set(keys) & set(data_keys)


def _keys_of(run: Path) -> set[str]:
    return set(keys_and_ids(run / VOCABULARY / "users.parquet")[0])


def _forget(
    folder: Path, there: set[str], keys: Sequence[str], runs: Sequence[Path], places: Sequence[Place], log: Log
) -> list[str]:
    done: list[str] = []

    def note(removal: Removal) -> None:
        log.removed(removal)
        done.append(f"{removal.place}: {removal.line}")

    if there:
        counts = forget_rows(folder, there)
        refuse_leftovers(leftovers(folder.resolve().parent, folder.resolve().name))
        line = f"{counts['users']} users and their {counts['events']} events forgotten"
        note(Removal(str(folder), "data", counts, line))
    if runs:
        data = load_prepared(folder)
        gone = forgotten_users(folder / "users.parquet")
        with warnings.catch_warnings():
            warnings.filterwarnings(
                "ignore", "torch.distributed is disabled"
            )  # rightly: there is one process and no ranks
            for run in runs:
                note(_forget_in_run(run, data, gone, set(keys)))
    for place in places if keys else ():
        removal = place.forget(keys)
        if any(removal.counts.values()):
            note(removal)
    _refuse_remains({place: place.find(keys) for place in places}, done)
    log.end()
    return done


def _refuse_remains(remains: Mapping[Place, Collection[str]], done: Sequence[str]) -> None:
    """Raise RunError where a place still has users."""
    left = [f"{place} still has {len(found)} of the users: {place.mend()}" for place, found in remains.items() if found]
    if left:
        raise RunError(f"{'; '.join(left)} (done: {'; '.join(done) or 'nothing else was left'})")


def _check(folder: Path, runs: Sequence[Path]) -> None:
    """Raise where a folder is not what it should be, before anything is changed."""
    Schema.load(folder / SCHEMA)
    fingerprints = (fingerprint_of(folder), *fingerprints_before(folder))
    for run in runs:
        if not (run / CONFIG).is_file() or not (run / FINGERPRINT).is_file():
            raise RunError(f"{run}: no run folder (it lacks config.yaml or {FINGERPRINT}); give one of 'flm train'")
        if made_with(run) not in fingerprints:
            raise RunError(f"{run}: made with other data than {folder}; give the --data of its config.yaml")
        if Schema.load(run / VOCABULARY / SCHEMA).table("user_id").kind == "zch":
            raise RunError(
                f"{run}: its user_id table is managed (zch), where rows pass from user to user and no one's can be"
                " told for sure; forget in --data alone, delete this run and train anew"
            )
        for checkpoint in _checkpoints(run):
            if wrong := storage.damage(checkpoint):
                raise RunError(f"{checkpoint}: {'; '.join(wrong)}; delete it, or copy it anew, and start again")


def _checkpoints(run: Path) -> list[Path]:
    return [f for f in sorted((run / CHECKPOINTS).glob("*")) if f.is_dir() and not ASIDE.fullmatch(f.name)]


def _forget_in_run(run: Path, data: PreparedData, gone: np.ndarray, keys: set[str]) -> Removal:
    """Remove all users that the data has forgotten, and those with these keys whom a follower took in.

    The vocabulary comes last: it shows whether all is done.
    """
    with telling(run, AFTERWARDS):
        gone = np.concatenate([gone, forget_growth(run / LEARNED, keys)])
    rows = rows_to_reset(data, gone)
    checkpoints = _checkpoints(run)
    for folder in checkpoints:
        tensors = storage.read_all(folder)
        _reset(tensors, rows, data.schema, folder)
        storage.write(folder, tensors, {**storage.read_meta(folder), "data": data.fingerprint}, None)
    with telling(run, AFTERWARDS):
        for damaged in (run / CHECKPOINTS).glob("damaged-*"):
            if ASIDE.fullmatch(damaged.name):
                shutil.rmtree(damaged)  # nothing reads it, and it cannot be mended
        for file in (run / LEARNED).glob("part-*.parquet"):
            _forget_followed(file, gone)
        with replacing(run / VOCABULARY) as fresh:
            data.save_vocabulary(fresh)
            (fresh / Path(FINGERPRINT).name).write_text(data.fingerprint, encoding="ascii")
            if growths := len(growth_files(run / LEARNED)):
                publish_vocabulary(data.path, run / LEARNED, growths, fresh)
    refuse_leftovers([*leftovers(run), *leftovers(run / CHECKPOINTS), *leftovers(run / LEARNED)])
    line = f"rows of all users forgotten so far ({len(gone)}) set to zero in {len(checkpoints)} checkpoints"
    kind = data.schema.table("user_id").kind
    line += "; its user_id table is hashed, so users who share these rows lose them too" if kind == "hash" else ""
    if load_config(run / CONFIG).data.split != "leave-one-out":
        line += "; its split is drawn over all events, so it may change: compare no metrics with those from before"
    return Removal(str(run), "run", {"users": len(gone), "checkpoints": len(checkpoints)}, line)


def forget_growth(folder: Path, keys: set[str]) -> np.ndarray:
    """Put tombstones for keys of users whom a follower took in → [n] int64 ids of all with tombstones there."""
    gone: list[int] = []
    for file in growth_files(folder):
        users = pq.read_table(file)
        ids = users["user_id"].to_pylist()
        marked = [
            tombstone(i) if key in keys else key for i, key in zip(ids, users["user_key"].to_pylist(), strict=True)
        ]
        gone += [i for i, key in zip(ids, marked, strict=True) if key == tombstone(i)]
        position = users.column_names.index("user_key")
        with replacing_file(file) as fresh:
            pq.write_table(users.set_column(position, "user_key", pa.array(marked, users["user_key"].type)), fresh)
    return np.array(gone, np.int64)


def _forget_followed(file: Path, gone: np.ndarray) -> None:
    """Remove users from a chunk of 'flm follow'; an empty chunk stays, since chunks are numbered."""
    events = pq.read_table(file)
    with replacing_file(file) as fresh:
        pq.write_table(events.filter(pc.invert(pc.is_in(events["user"], pa.array(gone)))), fresh)


def rows_to_reset(data: PreparedData, gone: np.ndarray) -> dict[str, np.ndarray]:
    """By table, [n] int64 rows to reset: those of the users, and of features the codes that nobody has any more.

    A hashed table of a feature is left out: its rows are shared by codes.
    """
    schema = data.schema
    rows = {"user_id": np.unique(remap_ids(schema.table("user_id"), gone))}
    features = schema.of("user", sparse=True)
    for table in {f.table for f in features}:
        if schema.table(table).kind == "direct":
            rows[table] = unused_codes(data.path, [f for f in features if f.table == table])
    for number, feature in enumerate(schema.of("event", sparse=True)):
        codes = np.setdiff1d(np.arange(feature.cardinality), data.context[:, number])
        rows[feature.table] = codes + first_row(feature)
    return rows


def _reset(tensors: dict[str, torch.Tensor], rows: dict[str, np.ndarray], schema: Schema, folder: Path) -> None:
    """Set rows of tables, and of their optimizer state, to zero, as if they had never been learned."""
    by_table = user_tensors(schema, tensors)
    for table, ids in rows.items():
        weight, state = by_table[table]
        names = [*state, weight] if weight in tensors else state
        size = tensors[weight].shape[0] if weight in tensors else 0
        for name in names:
            tensor = tensors[name]
            if tensor.ndim and tensor.shape[0] != size:
                raise RunError(f"{folder}: {name} has {tensor.shape[0]} rows, its table {size}; train anew")
            if tensor.ndim:
                # An older state of a follower may not yet have its newest users.
                tensor[torch.from_numpy(ids[ids < size])] = 0
