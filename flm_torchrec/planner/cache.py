"""How often a look-up misses the HBM cache of a table. The planner estimates from it what prefetching costs."""

from __future__ import annotations

import math

from torch import nn
from torchrec.distributed.planner import ParameterConstraints
from torchrec.distributed.planner.constants import UVM_CACHING_RATIO
from torchrec.distributed.types import CacheParams, CacheStatistics

from flm_torchrec.planner.constraints import TableConstraints, table_configs


class EvenCache(CacheStatistics):
    """All rows are equally likely. This is the worst case: a cache of one fifth of the rows misses four fifths.

    Args:
        rows: of the table.
        ids: number of ids that all ranks look up in a step.
    """

    def __init__(self, rows: int, ids: float) -> None:
        self.rows = rows
        self.ids = ids

    @property
    def expected_lookups(self) -> float:
        """Expected number of distinct ids in a step, for ids drawn uniformly: rows (1 - (1 - 1 / rows)^ids)."""
        return -self.rows * math.expm1(self.ids * math.log1p(-1 / self.rows)) if self.rows > 1 else 1.0

    def expected_miss_rate(self, clf: float) -> float:
        """Share of look-ups that miss a cache of the share `clf` of the rows."""
        return 1 - clf

    @property
    def cacheability(self) -> float:
        """How hard the table is to cache, from 0 to 1; 1 is the hardest."""
        return 1.0


def set_cache_params(model: nn.Module, allowed: dict[str, ParameterConstraints], samples: int) -> None:
    """Set, for each table that may be cached, that its rows are prefetched, and how often the cache misses.

    Args:
        allowed: constraints by table; those of tables that may be cached are changed in place.
        samples: of all ranks in a step.
    """
    for table in table_configs(model):
        rule = allowed[table.name]
        assert isinstance(rule, TableConstraints)
        if "fused_uvm_caching" in (rule.compute_kernels or []):
            ids = samples * sum(n * use.bags for n, use in zip(rule.pooling_factors, rule.lookups, strict=True))
            stats = EvenCache(table.num_embeddings, ids)
            rule.cache_params = CacheParams(load_factor=UVM_CACHING_RATIO, prefetch_pipeline=True, stats=stats)
