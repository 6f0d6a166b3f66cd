"""What a model takes over from another run: rows of tables by key, the dense part by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from flm_torchrec.config import Config
from flm_torchrec.data.schema import Entity
from flm_torchrec.data.vocabulary import ENTITIES, RowKeys, RowMatch, match_rows
from flm_torchrec.distributed.rows import held_by_rank
from flm_torchrec.errors import DataError, FlmError, RunError
from flm_torchrec.model.heads import OF_A_DOMAIN
from flm_torchrec.training.build import make_model
from flm_torchrec.training.checkpoint import storage
from flm_torchrec.training.checkpoint.by_key import MODEL, fill_by_key, table_weights, weight_of
from flm_torchrec.training.checkpoint.manager import BEST, refuse_damage
from flm_torchrec.training.identity import VOCABULARY, read_config
from flm_torchrec.training.job import Job

DENSE = "dense."
"""Beginning of the names of the dense part."""
TOWER = f"{DENSE}tower."


def vocabularies(run: Path, job: Job) -> tuple[RowKeys, RowKeys]:
    """The vocabularies of a run and of a job's data, each with the features that its model uses.

    Raises:
        FlmError: the run has no vocabulary, or not one of its config.
    """
    old = RowKeys.load(run / VOCABULARY, read_config(run).data.features)
    return old, RowKeys(job.data.path, job.data.schema)


def match_tables(old: RowKeys, new: RowKeys, job: Job) -> dict[str, RowMatch]:
    """By name of a table's weight, where its rows come from.

    Raises:
        FlmError: the rows of a table cannot be moved.
    """
    return {weight: match_rows(old, new, table, keys) for weight, table, keys in _tables(job)}


def _tables(job: Job) -> list[tuple[str, str, Any]]:
    with torch.random.fork_rng(devices=[]):
        return list(table_weights(make_model(job.data.schema, job.config, job.comm)))


def entity_tables(job: Job) -> dict[str, Entity]:
    """By name of a table's weight: whose rows they are, of the tables with one row for each user or item."""
    return {
        weight: ENTITIES[keys[0]]
        for weight, table, keys in _tables(job)
        if keys[0] in ENTITIES and job.data.schema.table(table).kind == "direct"
    }


def know_learned(job: Job) -> None:
    """Count users and items as known whose rows are not zero, though no event of the job's data has them. Collective.

    Only of a job that was warm-started, or took its tables over from one that was: there a row is zero until it has
    learned, in this run or in one before.
    """
    config = job.config
    if not _was_warm_started(config) or (config.finetune.source and not job.same_tables):
        return
    state = job.model.state_dict()
    for weight, entity in entity_tables(job).items():
        learned = torch.zeros(state[weight].size(0))
        for block, tensor in held_by_rank(state[weight]):
            learned[slice(*block.rows)] += (tensor != 0).any(1).float().cpu()
        mask = (job.comm.all_reduce_sum(learned) > 0).float().numpy()
        for stats in (job.train_stats, job.loader.assembler.stats):
            known = stats.items if entity == "item" else stats.users
            np.maximum(known, mask, out=known)


def _was_warm_started(config: Config) -> bool:
    """Whether the tables come from a warm start, through any number of fine-tunings."""
    tuning = config.finetune
    if not tuning.source:
        return bool(config.train.warm_start)
    return tuning.start == "pretrained" and _was_warm_started(read_config(Path(tuning.source)))


def load_source(job: Job) -> str | None:
    """Put what the fine-tuning's source has into the job's model, unless the job starts from scratch; collective.

    Rows of users and items move by key where both data are of one domain. Tables whose rows cannot be moved begin anew,
    as do parts of the tower whose shapes differ, and in another domain those that are a domain's own.

    Returns lines that say what was taken over; None if nothing was to be.

    Raises:
        RunError: the source's best model is damaged, or shares nothing with this model.
        DataError: the vectors of a feature are of another text encoder than the source's.
    """
    tuning = job.config.finetune
    if tuning.start != "pretrained":
        return None
    source = Path(tuning.source)
    old, new = vocabularies(source, job)
    _refuse_other_encoders(old, new)
    matches: dict[str, RowMatch] = {}
    reasons = []
    for weight, table, keys in _tables(job):
        if keys[0] in ENTITIES and not job.same_tables:
            continue
        try:
            match = match_rows(old, new, table, keys)
        except FlmError as error:
            reasons.append(f"begins anew: {error}")
            continue
        if match.origin is None or match.kept:
            matches[weight] = match
    lines = [_load_matching(source / BEST, job, matches), *reasons]
    if not job.same_tables:
        lines.append(
            f"the data are '{new.schema.name}' from {new.schema.source}, those of {source} '{old.schema.name}' from"
            f" {old.schema.source}: another domain, so users and items begin anew"
        )
    return "\n".join([*lines, *told(matches)])


def _refuse_other_encoders(old: RowKeys, new: RowKeys) -> None:
    """Vectors of two encoders have nothing in common, even where they are equally wide."""
    before = {(f.entity, f.name): f.encoder for f in old.schema.features}
    for feature in new.schema.features:
        known = before.get((feature.entity, feature.name), feature.encoder)
        if known != feature.encoder:
            raise DataError(
                f"{new.folder}: feature '{feature.name}' has vectors of {_encoder(feature.encoder)}, and those of the"
                f" source are of {_encoder(known)}; prepare both with one encoder, or leave the feature out with"
                " --data.features"
            )


def _encoder(digest: str) -> str:
    return f"the text encoder {digest}" if digest else "no text encoder"


def told(matches: dict[str, RowMatch]) -> list[str]:
    """One line for each table whose keys are counted."""
    return [
        f"{weight.split('.')[-2]}: {match.kept} keys kept, {match.new} new, {match.dropped} dropped"
        for weight, match in matches.items()
        if match.kept + match.new + match.dropped
    ]


def _load_matching(folder: Path, job: Job, matches: dict[str, RowMatch]) -> str:
    """Fill what the model shares with a checkpoint: tables that match, other tensors by name and shape.

    Returns a line that says what was filled.
    """
    refuse_damage(folder, job.comm)
    there = storage.stored(folder)
    state = job.model.state_dict()
    shared = {
        name: tensor
        for name, tensor in state.items()
        if (job.same_tables or name.removeprefix(TOWER) not in OF_A_DOMAIN)
        and (size := there.get(f"{MODEL}{name}")) is not None
        and _fits(name, size, tensor, matches)
    }
    if not shared:
        raise RunError(f"{folder}: nothing in it fits this model; fine-tune with the model settings of the source")
    fill_by_key(folder, {"model": shared}, matches, job.comm)
    job.model.load_state_dict({**state, **shared})
    fresh = sorted(state.keys() - shared.keys())
    return f"{len(shared)} of {len(state)} tensors from {folder}; new: {', '.join(fresh) or 'none'}"


def _fits(name: str, size: torch.Size, tensor: Any, matches: dict[str, RowMatch]) -> bool:
    """Whether a tensor of the model can be filled from a stored one of this size."""
    if name.startswith(DENSE):
        return size == tensor.size()
    weight = weight_of(f"{MODEL}{name}", matches)
    if weight is None:
        return False
    return size[1:] == tensor.size()[1:] if matches[weight].origin is not None else size == tensor.size()
