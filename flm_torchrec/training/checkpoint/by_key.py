"""A checkpoint of one vocabulary → a state of another: rows of tables by key, everything else as it is."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn
from torchrec.modules.embedding_modules import EmbeddingBagCollection, EmbeddingCollection

from flm_torchrec.data.vocabulary import RowMatch
from flm_torchrec.distributed.comm import Comm
from flm_torchrec.distributed.rows import held_by_rank, move_rows
from flm_torchrec.training.checkpoint import storage
from flm_torchrec.training.checkpoint.blocks import stored_blocks
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
    moved = set()
    for name, blocks in sorted(stored_blocks(folder).items()):
        weight = weight_of(name, matches)
        origin = None if weight is None else matches[weight].origin
        if name in wanted and origin is not None and blocks and blocks[0].block.sizes:
            move_rows(blocks, origin, held_by_rank(own.get(name)), comm)
            moved.add(name)
    storage.read(folder, {name: tensor for name, tensor in own.items() if name not in moved}, comm.saving)


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
