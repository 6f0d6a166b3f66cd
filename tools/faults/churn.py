"""Send millions of ids, most of them never seen before, through a table of fixed size, training it all the while.

    python tools/faults/churn.py --ids 10000000 --rows 100000

Each step looks up a batch, half of it ids that come once, half regular ids (the logarithm of their rank is even: a long
tail), through the model's own user table, and takes an optimizer step. Prints Markdown: memory before and after,
the share of look-ups of regular ids whose row no other regular id has, and evictions.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass

import numpy as np
import psutil
import torch
from torch import Tensor, nn
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from flm_torchrec.config.schema import DistributedConfig, TrainConfig
from flm_torchrec.data.hashing import remap_ids
from flm_torchrec.data.schema import Schema, Table
from flm_torchrec.distributed.comm import Comm, process_group
from flm_torchrec.distributed.shard import make_optimizer, shard
from flm_torchrec.model.tables import EVICTION_INTERVAL, ManagedIds, user_tables
from flm_torchrec.planner.plan import make_plan
from flm_torchrec.planner.workload import Workload

WARM_UP = 50
"""Steps before memory is first read: by then buffers and allocator have reached their size."""


@dataclass
class TableResult:
    """What the churn did to one table."""

    before_mib: float
    after_mib: float
    own_row: float
    evictions: int
    seconds: float


class IdStream:
    """Batches of ids: half of the `regulars`, which are 0, 1, …, then half new."""

    def __init__(self, batch: int, regulars: int, seed: int) -> None:
        self.new = batch // 2
        self.regulars = regulars
        self.rng = np.random.default_rng(seed)
        self.next = regulars

    def batch(self) -> np.ndarray:
        """[batch] int64."""
        regular = np.exp(self.rng.random(self.new) * np.log(self.regulars)).astype(np.int64)
        ids = np.concatenate([regular, np.arange(self.next, self.next + self.new)])
        self.next += self.new
        return ids


class Users(nn.Module):
    """The model's table of user ids, alone."""

    def __init__(self, schema: Schema, dim: int) -> None:
        super().__init__()
        self.fixed, self.managed = user_tables(schema, dim)

    def forward(self, features: KeyedJaggedTensor) -> Tensor:
        """[B] ids of "user_id" → [B, D]."""
        if self.fixed is not None:
            return self.fixed(features).to_dict()["user_id"]
        assert self.managed is not None
        return self.managed(features)[0].to_dict()["user_id"]


def churn(table: Table, ids: int, dim: int, batch: int, regulars: int, comm: Comm) -> TableResult:
    """Train until `ids` different ids have passed."""
    users = table.rows if table.kind == "direct" else ids
    schema = Schema("churn", "churn", users=users, items=1, interactions=1, tables={"user_id": table})
    config = TrainConfig(sparse_lr=0.1)
    users_alone = Users(schema, dim)
    work = Workload(users_alone, batch, {}, config.sparse_optimizer, dense_bytes=0)
    plan = make_plan(users_alone, comm, DistributedConfig(), lambda: work)
    model = shard(users_alone, plan, comm, config)
    optimizer = make_optimizer(model, config)
    managed = [m for m in model.modules() if isinstance(m, ManagedIds)]
    kept = np.zeros(0, np.int64)
    rows, ids_of_row = np.unique(remap_ids(table, np.arange(regulars)), return_counts=True)
    alone = rows[ids_of_row == 1]
    stream, process = IdStream(batch, regulars, seed=0), psutil.Process()
    began, before, own, looked, evictions, step = time.monotonic(), 0.0, 0, 0, 0, 0
    while stream.next < ids:
        drawn = stream.batch()
        asked = remap_ids(table, drawn)
        values, lengths = torch.from_numpy(asked), torch.ones(len(asked), dtype=torch.int64)
        out = model(KeyedJaggedTensor(keys=["user_id"], values=values, lengths=lengths))
        optimizer.zero_grad()
        (out - 1).square().mean().backward()
        optimizer.step()
        step += 1
        if step == WARM_UP:
            before = process.memory_info().rss / 2**20
        if managed and step % EVICTION_INTERVAL == 0:  # the map changed before this step's look-ups
            held = _held(managed)
            evictions += int((~np.isin(kept, held)).sum())
            kept = held
        if step > WARM_UP:
            own += _own_rows(asked[: stream.new], kept if managed else alone)
            looked += stream.new
    after = process.memory_info().rss / 2**20
    return TableResult(before, after, own / max(1, looked), evictions, time.monotonic() - began)


def _own_rows(asked: np.ndarray, ordered: np.ndarray) -> int:
    """How many of the look-ups are among those in `ordered`."""
    position = np.minimum(np.searchsorted(ordered, asked), len(ordered) - 1)
    return int((ordered[position] == asked).sum())


def _held(managed: list[ManagedIds]) -> np.ndarray:
    """Ids that have a row now, in order."""
    held = np.sort(np.concatenate([m._mch_sorted_raw_ids.numpy() for m in managed]))
    return held[held < np.iinfo(np.int64).max]


def main() -> None:
    """Print a table of results, one row for each kind of table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    numbers = {
        "ids": (10_000_000, "different ids that pass"),
        "rows": (100_000, "of the table"),
        "dim": (16, "of a row"),
        "batch": (4096, "look-ups a step"),
        "regulars": (50_000, "regular ids"),
    }
    for name, (default, text) in numbers.items():
        parser.add_argument(f"--{name}", type=int, default=default, metavar="N", help=f"{text} (default: {default})")
    args = parser.parse_args()
    print("| table | memory before | after | look-ups of regular ids with a row of their own | evictions | seconds |")
    print("|---|---|---|---|---|---|")
    tables = {
        "hash": Table("hash", args.rows),
        "zch lfu": Table("zch", args.rows, "lfu"),
        "zch lru": Table("zch", args.rows, "lru"),
    }
    with process_group(DistributedConfig(device="cpu", threads=1)) as comm:
        for name, table in tables.items():
            result = churn(table, args.ids, args.dim, args.batch, args.regulars, comm)
            print(
                f"| {name} | {result.before_mib:.0f} MiB | {result.after_mib:.0f} MiB | {result.own_row:.1%} |"
                f" {result.evictions} | {result.seconds:.0f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
