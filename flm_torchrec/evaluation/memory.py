"""What an evaluation holds in memory is compared with what is free, before any of it is computed."""

from __future__ import annotations

import psutil
import torch

from flm_torchrec.config.schema import EvalConfig
from flm_torchrec.errors import ConfigError, RunError
from flm_torchrec.evaluation.protocol import Encoder

EVENT_BYTES = 24
"""Bytes of a training event in item-kNN and in Markov, while they are made."""
GIB = 2**30


def check_vectors(count: int, encoder: Encoder, device: torch.device) -> None:
    """Raise RunError where a device has no memory left for so many vectors of items, float32, and what makes them."""
    on_gpu = device.type == "cuda"
    free = torch.cuda.mem_get_info(device)[0] if on_gpu else _free()
    needed = 4 * count * encoder.dim + (0 if on_gpu else encoder.growth)
    if needed > free:
        raise RunError(
            f"ranking by {count:,} vectors of items of {encoder.dim} numbers needs {needed / GIB:.1f} GiB on each"
            f" {'GPU' if on_gpu else 'rank'}, and {free / GIB:.1f} GiB are free: rank on more machines, whose ranks"
            " share the items, or train a narrower model.dim"
        )


def check_events(config: EvalConfig, events: int) -> None:
    """Check that the baselines that keep something of each training event fit into the free memory.

    Raises:
        ConfigError: they do not.
    """
    needed, free = EVENT_BYTES * events, _free()
    for name in ("item-kNN", "Markov"):
        if name in config.baselines and needed > free:
            raise ConfigError(
                f"eval.baselines: {name} needs {needed / GIB:,.1f} GiB for {events:,} training events"
                f" ({EVENT_BYTES} bytes each), and {free / GIB:,.1f} GiB are free; leave it out of eval.baselines"
            )


def left_out(config: EvalConfig, items: int) -> list[str]:
    """Why a baseline that is asked for will not be in the table, a line each.

    Raises:
        ConfigError: EASE-R is allowed so many items, and this machine has not so much memory free.
    """
    needed, free = 8 * items**2, _free()
    size = f"{items:,} items would need {needed / GIB:,.1f} GiB (8 items^2 bytes)"
    if "EASE-R" not in config.baselines or config.ease_items == 0:
        return []
    if items > config.ease_items:
        return [f"EASE-R is left out: {size}, and eval.ease_items is {config.ease_items:,}; raise that to rank by it"]
    if needed > free:
        raise ConfigError(
            f"eval.ease_items: {size}, and {free / GIB:,.1f} GiB are free; leave EASE-R out of eval.baselines, or set"
            f" eval.ease_items below {items}"
        )
    return []


def _free() -> int:
    return psutil.virtual_memory().available
