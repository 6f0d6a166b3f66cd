"""A job's model for the export of the user tower: the dense weights of all ranks, rows of sharded tables by name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from flm_torchrec.data.hashing import item_lookups, managed_items, remap_ids
from flm_torchrec.data.history import GAP_ROWS, HISTORY_KEYS
from flm_torchrec.model.pretrain import pooled
from flm_torchrec.model.space import width
from flm_torchrec.model.tables import ITEM_TABLES, item_outputs, item_vectors
from flm_torchrec.model.tower import Tower
from flm_torchrec.training.build import make_model
from flm_torchrec.training.checkpoint.by_key import MANAGED
from flm_torchrec.training.job import Job


def items_with_rows(job: Job) -> np.ndarray:
    """[items] bool: known items whose ids the model has rows for; all others are represented by their content alone.

    Collective.
    """
    known = job.train_stats.items > 0
    if not job.data.schema.table("item_id").managed:
        return known
    held = job.model.state_dict()[f"item_id.{MANAGED}.item_id._mch_sorted_raw_ids"].local_shards()[0].tensor
    ids = managed_items(np.arange(len(known)), np.zeros(len(known), bool)) // 2
    here = torch.from_numpy(np.isin(ids, held.cpu().numpy()).astype(np.int32))
    return known & (job.comm.all_reduce_sum(here).numpy() > 0)


class GatheredModel:
    """What `export.tower.write_tower` asks of a model. Collective: all ranks make it, and call it alike."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.model = job.model.eval().module
        stats = job.train_stats
        self.item_known, self.user_known = stats.items, stats.users
        config = job.config
        self.settings: dict[str, Any] = {
            "dim": config.model.dim,
            "space": width(config.model.dim),
            "max_history": config.data.max_history,
            "gaps": GAP_ROWS,
            "cosine": config.model.similarity == "cosine",
            "fusion": config.model.fusion,
            "value_mean": stats.value_mean,
            "value_scale": stats.value_scale,
        }
        self.dense = self._gather_tower()

    def _gather_tower(self) -> Tower:
        """The tower on the CPU; slices that ranks hold of its weights (FSDP) are put together."""
        state: Mapping[str, Any] = self.model.tower.state_dict()
        weights = {n: (w.full_tensor() if isinstance(w, DTensor) else w).cpu() for n, w in state.items()}
        with torch.random.fork_rng(devices=[]):
            tower = make_model(self.job.data.schema, self.job.config, self.job.comm).tower
        tower.load_state_dict(weights)
        return tower.eval()

    def rows(self, name: str, ids: np.ndarray, entity: str = "") -> Tensor:
        """[n] ids or codes → [n, D] float32 on the CPU; see `export.tower.writer.TowerSource`."""
        schema, model = self.job.data.schema, self.model
        with torch.no_grad():
            if name in ITEM_TABLES:
                return self._item_rows(name, ids)
            if name in HISTORY_KEYS or entity == "event":
                keys = [*HISTORY_KEYS, *(f.name for f in schema.of("event", sparse=True))]
                return self._unpooled(model.history, keys, name, ids)
            of_item = entity == "item"
            tables = {f.name: f.table for f in schema.of("item" if of_item else "user", sparse=True)}
            table = schema.table("user_id" if not entity else tables[name])
            fixed = model.item_features if of_item else model.users
            managed = model.managed_item_features if of_item else model.managed_users
            keys = [*([] if of_item else ["user_id"]), *tables]
            ids_of_key = self._jagged(keys, name, remap_ids(table, ids))
            vectors = {key: v for outputs in pooled(fixed, managed, ids_of_key) for key, v in outputs.to_dict().items()}
            return vectors[name].float().cpu()

    def _item_rows(self, name: str, ids: np.ndarray) -> Tensor:
        schema = self.job.data.schema
        asked = item_lookups(schema.table("item_id"), ids, np.zeros(len(ids), bool))
        lengths = torch.ones(len(asked) * len(ids), dtype=torch.int64)
        jagged = KeyedJaggedTensor(list(asked), torch.from_numpy(np.concatenate(list(asked.values()))), lengths=lengths)
        rows = item_vectors(self.model.item_id, jagged.to(self.job.comm.device), self.model.managed_items)
        return rows[item_outputs(schema)[name]].values().float().cpu()

    def _unpooled(self, tables: Any, keys: Sequence[str], name: str, ids: np.ndarray) -> Tensor:
        return tables(self._jagged(keys, name, ids))[name].values().float().cpu()

    def _jagged(self, keys: Sequence[str], name: str, ids: np.ndarray) -> KeyedJaggedTensor:
        """One id in each sequence for `name`, none for the other keys."""
        lengths = [torch.full((len(ids),), int(key == name)) for key in keys]
        values = torch.from_numpy(ids.astype(np.int64))
        jagged = KeyedJaggedTensor(keys=list(keys), values=values, lengths=torch.cat(lengths))
        return jagged.to(self.job.comm.device)
