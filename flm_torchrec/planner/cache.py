"""How often a table cached in HBM is missed: what the planner needs to tell what prefetching costs."""

from __future__ import annotations

import math

from torch import nn
from torchrec.distributed.planner import ParameterConstraints
from torchrec.distributed.planner.constants import UVM_CACHING_RATIO
from torchrec.distributed.types import CacheParams, CacheStatistics

from flm_torchrec.planner.constraints import TableConstraints, table_configs


class EvenCache(CacheStatistics):
    """Every row as likely as another, which is the hardest to cache: a cache of a fifth of the rows misses four fifths.

    Args:
        rows: of the table.
        ids: looked up in a step by all ranks.
    """

    def __init__(self, rows: int, ids: float) -> None:
        self.rows = rows
        self.ids = ids

    @property
    def expected_lookups(self) -> float:
        """Different ids among so many drawn: rows (1 - (1 - 1 / rows)^ids)."""
        return -self.rows * math.expm1(self.ids * math.log1p(-1 / self.rows)) if self.rows > 1 else 1.0

    def expected_miss_rate(self, clf: float) -> float:
        return 1 - clf

    @property
    def cacheability(self) -> float:
        return 1.0


def prefetching(model: nn.Module, allowed: dict[str, ParameterConstraints], samples: int) -> None:
    """Tell the planner that cached tables are fetched ahead, and how much of them.

    Args:
        allowed: by table; those that may be cached are changed.
        samples: of all ranks in a step.
    """
    for table in table_configs(model):
        rule = allowed[table.name]
        assert isinstance(rule, TableConstraints)
        if "fused_uvm_caching" in (rule.compute_kernels or []):
            ids = samples * sum(n * use.bags for n, use in zip(rule.pooling_factors, rule.lookups, strict=True))
            stats = EvenCache(table.num_embeddings, ids)
            rule.cache_params = CacheParams(load_factor=UVM_CACHING_RATIO, prefetch_pipeline=True, stats=stats)
