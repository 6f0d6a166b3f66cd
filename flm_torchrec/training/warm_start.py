"""Warm start: a run goes on with new data. Rows move by key, with weights and optimizer state."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np

from flm_torchrec.config import Config, load_config
from flm_torchrec.data.keys import HASHED
from flm_torchrec.data.schema import Feature
from flm_torchrec.data.vocabulary import RowKeys, RowMatch
from flm_torchrec.distributed.comm import Comm
from flm_torchrec.errors import ConfigError, DataError, RunError
from flm_torchrec.folders import CONFIG
from flm_torchrec.training.by_key import entity_tables, match_tables, told, vocabularies
from flm_torchrec.training.checkpoint import storage
from flm_torchrec.training.checkpoint.by_key import MODEL, weight_of
from flm_torchrec.training.checkpoint.manager import Checkpoints, find_damage, states_of
from flm_torchrec.training.identity import check_has_model, has_ids_of, own_data, read_config, refuse_forgotten
from flm_torchrec.training.job import Job
from flm_torchrec.training.logger import RunLogger
from flm_torchrec.training.run_events import ANY_RANKS
from flm_torchrec.training.run_folder import ANOTHER_RUN

REPORT = "warm_start.json"
FREE = ("dropout", "embedding_dropout", "id_dropout", "user_id_dropout")
"""Settings of the model that change no weight."""


def warm_config(source: Path, overrides: Sequence[str]) -> Config:
    """The config of a warm start: that of the run that it goes on from, with overrides.

    Two settings have other defaults: `train.existing` is "refuse", and `data.path` is where the run's own data are. If
    the source is gone and the run to write has a state, the config is that of this run, which resumes.

    Raises:
        FlmError: the source is no finished run, or a setting is wrong.
    """
    given = {key: value for key, _, value in (override.partition("=") for override in overrides)}
    if "train.run" not in given:
        raise ConfigError("--train.run: name the folder to write, beside that of the run to go on from")
    run = Path(given["train.run"])
    if not source.exists() and states_of(run):
        return load_config(run / CONFIG, overrides)
    check_has_model(source)
    config = load_config(source / CONFIG, ["train.existing=refuse", *ANY_RANKS, *overrides])
    if "data.path" in given:
        return config
    return replace(config, data=replace(config.data, path=str(own_data(source, config))))


def check_source(config: Config) -> None:
    """Refuse a source that no warm start of this config can go on from, before data are read.

    Raises:
        RunError: it is no finished run, the run to write itself, a fine-tuning, or has another model.
    """
    source = Path(config.train.warm_start)
    if Path(config.train.run).resolve() == source.resolve():
        raise RunError(f"{source}: train.warm_start is the run to write itself; {ANOTHER_RUN}")
    if not source.exists() and states_of(Path(config.train.run)):
        return  # the run resumes without it
    check_has_model(source)
    made = read_config(source)
    if made.finetune.source:
        raise RunError(f"{source}: is a fine-tuning, not a pretraining; go on from {made.finetune.source}")
    if not states_of(source):
        raise RunError(f"{source}: has no state to go on from (checkpoints/step-...); train it again")
    for section, names in (
        ("model", [name for name in asdict(made.model) if name not in FREE]),
        ("data", ["max_history", "target_events"]),
        ("train", ["sparse_optimizer"]),
    ):
        for name in names:
            before, now = (getattr(getattr(each, section), name) for each in (made, config))
            if before != now:
                raise RunError(f"{source}: was made with {section}.{name} {before}, not {now}; go on with the same")


@dataclass(frozen=True)
class WarmStart:
    """What a job takes over, checked before the run folder is made."""

    source: Path
    state: Path
    matches: dict[str, RowMatch]
    spared: dict[str, np.ndarray]
    """By name of a table's weight, [rows] bool: rows that stay random though they never learned."""

    @classmethod
    def of(cls, job: Job) -> WarmStart:
        """Match the tables of the job's model with those of `train.warm_start`. Collective.

        Raises:
            FlmError: the source was made with other features, with keys under another secret or with other data
                altogether, its state is damaged, or a table cannot be moved.
        """
        source = Path(job.config.train.warm_start)
        refuse_forgotten(source, job.data.path)
        old, new = vocabularies(source, job)
        _check_features(old, new)
        matches = match_tables(old, new, job)
        _check_keys(old, new)
        state = _newest_state(source, job.comm)
        _check_whole(state, old, job)
        _check_fits(state, job, matches)
        return cls(source, state, matches, _spared(source, matches, job))

    def load(self, job: Job, checkpoints: Checkpoints, logger: RunLogger) -> int:
        """Set the job to the state, and report what was kept; collective.

        Returns the number of steps that the optimizer has taken.
        """
        steps = checkpoints.load_by_key(self.state, self.matches, self.spared)
        logger.say(f"warm start from {self.source} after step {steps}")
        for line in told(self.matches):
            logger.say(line)
        tables = {
            weight.split(".")[-2]: {"kept": match.kept, "new": match.new, "dropped": match.dropped}
            for weight, match in self.matches.items()
        }
        logger.write_json(REPORT, {"source": str(self.source), "steps": steps, "keys": tables})
        return steps


def _spared(source: Path, matches: dict[str, RowMatch], job: Job) -> dict[str, np.ndarray]:
    """Rows that never learned become zero: a key without events yesterday is as new as one that was not there.

    With the same data the run goes on as it would have without a warm start, so what it learns from stays as it is.
    """
    rows = {weight: job.model.state_dict()[weight].size(0) for weight in matches}
    if not has_ids_of(source, job.data.path, job.data.fingerprint):
        return {weight: np.zeros(size, bool) for weight, size in rows.items()}
    seen = {"item": job.train_stats.items > 0, "user": job.train_stats.users > 0}
    return {weight: seen[entity] for weight, entity in entity_tables(job).items()}


def _newest_state(source: Path, comm: Comm) -> Path:
    reasons = []
    for folder in comm.gather(states_of(source))[0]:
        wrong = find_damage(folder, comm)
        if not wrong:
            return folder
        reasons.append(f"{folder}: {'; '.join(wrong)}")
    raise RunError(f"{reasons[0]}; and no older state is whole: copy the run anew, or train again")


def _check_features(old: RowKeys, new: RowKeys) -> None:
    """Raise DataError unless both have the same features, of the same kinds and widths, in the same order."""
    before, after = ({f.name: f for f in each.schema.features} for each in (old, new))
    for name in before:
        if name not in after:
            raise DataError(f"{new.folder}: lacks the feature '{name}' of the run; prepare the data with that feature")
    for name, feature in after.items():
        if name not in before:
            raise DataError(
                f"{new.folder}: has the feature '{name}', which the run lacks; leave it out with --data.features"
                f" [{','.join(before)}], or train anew"
            )
        if _form(before[name]) != _form(feature):
            raise DataError(
                f"{new.folder}: feature '{name}' is {_form(feature)}, and {_form(before[name])} in the run; prepare the"
                " data as those of the run, or train anew"
            )
    if list(before) != list(after):
        raise DataError(
            f"{new.folder}: has the features {', '.join(after)}, and the run has them in the order {', '.join(before)};"
            " declare the features in that order"
        )
    if old.schema.timestamps != new.schema.timestamps:
        raise DataError(f"{new.folder}: of the data and those of the run, only one has timestamps; train anew")


def _form(feature: Feature) -> str:
    """Entity, kind, width and text encoder of a feature, and the table of its values."""
    parts: list[str] = [feature.entity, feature.kind]
    parts += [f"of width {feature.width}"] if feature.width else []
    parts += [f"of text encoder {feature.encoder}"] if feature.encoder else []
    parts += [f"of runs of up to {feature.ngrams} words"] if feature.ngrams > 1 else []
    parts += [f"with table {feature.table}"] if feature.table not in ("", f"{feature.entity}_{feature.name}") else []
    return " ".join(parts)


def _check_keys(old: RowKeys, new: RowKeys) -> None:
    """Raise DataError where the two cannot be of the same users and items."""
    before, after = (v.keys("user_id", ["user_id"])["key"] for v in (old, new))
    hashed = [bool(HASHED.fullmatch(keys.first() or "")) for keys in (before, after)]  # type: ignore[arg-type]
    if hashed[0] != hashed[1] or (hashed[0] and not after.is_in(before.implode()).any()):
        raise DataError(
            f"{new.folder}: its keys of users are not hashed under the secret of the run's; prepare the data with the"
            " --hash-users of the run's data"
        )
    before, after = (v.keys("item_id", ["item_id"])["key"] for v in (old, new))
    if not after.is_in(before.implode()).any():
        raise DataError(
            f"{new.folder}: has none of the run's items (the run has '{before[0]}', the data '{after[0]}'); give data"
            " with the same keys, or train anew"
        )


def _check_whole(state: Path, old: RowKeys, job: Job) -> None:
    """Raise RunError where a state has more users or items than the vocabulary: a follower died between the two."""
    there = storage.stored(state)
    for weight, entity in entity_tables(job).items():
        known = old.schema.items if entity == "item" else old.schema.users
        size = there.get(f"{MODEL}{weight}")
        if size is not None and size[0] > known:
            raise RunError(
                f"{old.folder.parent}: 'flm follow' was stopped while it saved: its model has {size[0]} {entity}s, its"
                f" vocabulary {known}; start the same 'flm follow --once' again, then go on from it"
            )


def _check_fits(state: Path, job: Job, matches: dict[str, RowMatch]) -> None:
    """Raise RunError unless the state has the tensors of the model, in their sizes but for rows that move."""
    there = {n: size for n, size in storage.stored(state).items() if n.startswith(MODEL)}
    here = {f"{MODEL}{name}": tensor.size() for name, tensor in job.model.state_dict().items()}
    differ = sorted(there.keys() ^ here.keys())
    if differ:
        where = "the run lacks" if differ[0] in here else "this model lacks"
        differs = f"{where} {differ[0].removeprefix(MODEL)}"
        raise RunError(f"{state}: {differs}; go on with the settings of the run; {storage.OLDER}")
    for name, size in here.items():
        weight = weight_of(name, matches)
        first = 1 if weight is not None and matches[weight].origin is not None else 0
        if there[name][first:] != size[first:]:
            raise RunError(
                f"{state}: {name.removeprefix(MODEL)} is {list(there[name])} there and {list(size)} here; go on with"
                " the settings of the run"
            )
