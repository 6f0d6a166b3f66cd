"""Run by test_rows as two ranks: fixed and managed tables of one batch, sharded by rows, against pooling by hand.

Argument: prepared data. No id has a row yet in a new managed table, so each reads the last row of the rank that its
hash falls to. Fails on the first difference; rank 0 prints a line a mixture of tables.
"""

from __future__ import annotations

import sys
from dataclasses import replace

import torch
from torch import Tensor, nn
from torchrec.distributed.model_parallel import get_unwrapped_module
from torchrec.sparse.jagged_tensor import JaggedTensor, KeyedJaggedTensor

from flm_torchrec.config import load_config
from flm_torchrec.data.dataset import load_prepared
from flm_torchrec.data.hashing import MANAGED_IDS
from flm_torchrec.data.schema import Table
from flm_torchrec.distributed.comm import process_group
from flm_torchrec.training.job import Job, JobInputs
from tests.distributed.equality_job import whole

ROWS = 64
MIXTURES = [
    ["item_brand"],
    ["item_title"],
    ["item_title", "item_genre"],
    ["user_interests", "user_id"],
]


def embedded(fixed: nn.Module | None, managed: nn.Module | None, features: KeyedJaggedTensor) -> dict[str, Tensor]:
    pooled = fixed(features).to_dict() if fixed is not None else {}
    return pooled | (managed(features)[0].to_dict() if managed is not None else {})


def by_hand(weight: Tensor, ids: JaggedTensor, managed: bool, mean: bool, ranks: int) -> Tensor:
    rows, lengths = ids.values(), ids.lengths()
    if managed:
        each = ROWS // ranks
        rows = rows // (MANAGED_IDS // ranks + 1) * each + each - 1
    bag = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
    pooled = torch.zeros(len(lengths), weight.shape[1]).index_add(0, bag, weight[rows])
    return pooled / lengths.clamp(min=1)[:, None] if mean else pooled


def main(path: str) -> None:
    overrides = ["model.dim=16", "train.batch_size=32", "distributed.threads=1", "distributed.sharding=row_wise"]
    config, prepared = load_config(None, overrides), load_prepared(path)
    with process_group(config.distributed) as comm:
        for tables in MIXTURES:
            schema = replace(prepared.schema, tables={name: Table("zch", ROWS) for name in tables})
            data = replace(prepared, schema=schema)
            job = Job(JobInputs.of(config, data, comm))
            model = get_unwrapped_module(job.model.eval())
            weights = {name.split(".")[-2]: t for name, t in job.model.state_dict().items() if "embedding_bags" in name}
            batch = next(iter(job.loader.epoch(0)))
            items = embedded(model.item_features, model.managed_item_features, batch.item_features)
            users = embedded(model.users, model.managed_users, batch.users)
            outputs = {f"item_{name}": (out, batch.item_features[name]) for name, out in items.items()}
            outputs |= {f"user_{name.removeprefix('user_')}": (out, batch.users[name]) for name, out in users.items()}
            means = {f.table for f in schema.features if f.kind in ("text", "multi_categorical")}
            for table, (out, ids) in outputs.items():
                weight = whole(weights[table], weights[table].size())
                expected = by_hand(weight, ids, table in tables, table in means, comm.world_size)
                torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
            assert outputs.keys() == weights.keys()
            if comm.main:
                print("equal", tables)


if __name__ == "__main__":
    main(sys.argv[1])
