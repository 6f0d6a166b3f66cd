"""What each rank of a job has to hold and to do in a step: what a plan is made for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from flm_torchrec.planner.constraints import Lookup
from flm_torchrec.planner.step import StepWork


@dataclass(frozen=True)
class Workload:
    """Tables, batch and dense part of one rank."""

    model: nn.Module
    """Its tables may be on the meta device."""
    batch_size: int
    """Samples of a rank in a step."""
    lookups: Mapping[str, Lookup]
    """Of one sample, by feature."""
    optimizer: str
    """Of the tables, by its name in the config."""
    dense_bytes: int
    """Memory of a rank that the dense part takes in training."""
    sketch_bytes: int = 0
    """Host memory of a rank that the sketches of items take, on a GPU too."""
    collectives: str = "fp32"
    """What ranks send vectors and gradients as, `distributed.collectives`."""
    step: StepWork | None = None
    """What a step does beside the tables; None: not known, as of a spec."""
