"""A checkpoint of one vocabulary → a state of another: rows of tables by key, everything else as it is."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torchrec.modules.embedding_modules import EmbeddingBagCollection, EmbeddingCollection

from flm_torchrec.data.vocabulary import RowMatch
from flm_torchrec.distributed.comm import Comm
from flm_torchrec.distributed.rows import StoredBlock, held_by_rank, move_rows
from flm_torchrec.training.checkpoint import storage
from flm_torchrec.training.checkpoint.blocks import stored_blocks
from flm_torchrec.training.checkpoint.managed import PARTS, SHARING, Dealt, deal
from flm_torchrec.training.checkpoint.state import leaves, names

MODEL = "model."
OPTIMIZER = "optimizer."
TABLES = f"{OPTIMIZER}tables."
"""Beginnings of the names of a state's tensors."""
MANAGED = "_managed_collision_collection._managed_collision_modules"
"""Where TorchRec keeps the maps of ids of managed tables."""


def table_weights(model: nn.Module) -> Iterator[tuple[str, str, Sequence[str]]]:
    """Of each table of a model before sharding: name of the weight, of the table, and what a batch looks up in it."""
    for path, module in model.named_modules():
        if isinstance(module, EmbeddingBagCollection):
            configs, inner = module.embedding_bag_configs(), "embedding_bags"
        elif isinstance(module, EmbeddingCollection):
            configs, inner = module.embedding_configs(), "embeddings"
        else:
            continue
        for config in configs:
            yield f"{path}.{inner}.{config.name}.weight", config.name, config.feature_names


def fill_by_key(folder: Path, state: dict[str, Any], matches: Mapping[str, RowMatch], comm: Comm) -> None:
    """Fill a state from a checkpoint that any plan and any number of ranks has written; collective.

    Args:
        state: nested dicts of tensors, named as those of the checkpoint. All of it is filled.
        matches: by name of a table's weight, where its rows come from. Weights and their optimizer state move alike.

    Raises:
        RunError: the checkpoint lacks one of the tensors, or does not load; on every rank.
    """
    own = dict(zip(names(state), leaves(state), strict=True))
    wanted = set().union(*comm.gather(list(own)))  # a rank's optimizer has only the tables of which the rank holds rows
    stored = stored_blocks(folder)
    dealt = {weight: _deal(stored, weight, match, comm) for weight, match in matches.items() if match.held is not None}
    moved = set()
    for name, blocks in sorted(stored.items()):
        weight = weight_of(name, matches)
        if weight is None or name not in wanted or not blocks or not blocks[0].block.sizes:
            continue
        part = name.rpartition(".")[2]
        origin = dealt[weight].origin if weight in dealt else matches[weight].origin
        if weight in dealt and part in dealt[weight].parts:
            for block, tensor in held_by_rank(own[name]):
                tensor.copy_(torch.from_numpy(dealt[weight].parts[part][slice(*block.rows)]))
        elif f".{MANAGED}." not in name and origin is not None:
            move_rows(blocks, origin, held_by_rank(own.get(name)), comm)
        elif part != SHARING:
            continue
        moved.add(name)
    storage.read(folder, {name: tensor for name, tensor in own.items() if name not in moved}, comm.saving)


def _deal(stored: Mapping[str, Sequence[StoredBlock]], weight: str, match: RowMatch, comm: Comm) -> Dealt:
    assert match.held is not None
    module, table = weight.partition(".")[0], weight.split(".")[-2]
    begin = f"{MODEL}{module}.{MANAGED}.{table}."
    parts = {part: stored[f"{begin}{part}"] for part in PARTS if f"{begin}{part}" in stored}
    return deal(parts, match.held, comm.world_size)


def zero_unlearned(state: dict[str, Any], spared: Mapping[str, np.ndarray]) -> None:
    """Set this rank's rows to zero that no step has changed: they hold their first random values, which say nothing.

    Args:
        state: nested dicts of tensors of model and optimizer; changed in place.
        spared: by name of a table's weight, [rows] bool: rows that stay as they are.
    """
    own = dict(zip(names(state), leaves(state), strict=True))
    for weight, stays in spared.items():
        begin = f"{TABLES}{weight}."
        moments = [held_by_rank(t) for name, t in own.items() if name.startswith(begin) and len(t.size())]
        for place, (block, tensor) in enumerate(held_by_rank(own.get(f"{MODEL}{weight}"))):
            learned = _learned([held[place][1] for held in moments], stays[slice(*block.rows)])
            tensor[~learned.to(tensor.device)] = 0


def _learned(moments: Sequence[Tensor], stays: np.ndarray) -> Tensor:
    """[rows] bool of a block: rows that stay, and rows whose optimizer state, [rows] or [rows, D], is not zero."""
    learned = torch.from_numpy(stays.copy())
    for moment in moments:
        learned |= (moment != 0).reshape(len(moment), math.prod(moment.shape[1:])).any(1).cpu()
    return learned


def weight_of(name: str, weights: Iterable[str]) -> str | None:
    """The weight, of those given, to whose table a tensor of a checkpoint belongs; None where there is none.

    Args:
        name: of a weight, of its optimizer state, or of the map of ids of a managed table.
    """
    for weight in weights:
        module, table = weight.partition(".")[0], weight.split(".")[-2]
        begins = (f"{TABLES}{weight}.", f"{MODEL}{module}.{MANAGED}.{table}.")
        if name == f"{MODEL}{weight}" or name.startswith(begins):
            return weight
    return None
