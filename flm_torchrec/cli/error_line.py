"""An error in one line on standard error: once for all ranks of a job that have it, with its rank where few do."""

from __future__ import annotations

import hashlib
import os
import sys
import time
from collections.abc import Sequence
from datetime import timedelta

from flm_torchrec.safe_text import redact, visible

GRACE = 3.0
"""Seconds that ranks have to fail too. A launcher ends the others soon after the first has left."""
POLL = 0.05


def tell(text: str) -> None:
    """Print the error, its secrets taken out, unless a lower rank has the same one."""
    text = visible(redact(text))
    rank, ranks = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    having = _ranks_with(text, rank, ranks) if ranks > 1 else [rank]
    if rank == min(having):
        print(f"error: {'' if len(having) == ranks else _named(having)}{text}", file=sys.stderr, flush=True)


def _named(ranks: Sequence[int]) -> str:
    shown = ", ".join(str(rank) for rank in ranks[:4])
    return f"rank {shown}{f' and {len(ranks) - 4} more' if len(ranks) > 4 else ''}: "


def _ranks_with(text: str, rank: int, ranks: int) -> Sequence[int]:
    """Ranks that have told the launcher's store the same error, this one among them, once all have or time is up."""
    # Imported here: an error of one process must not wait seconds for PyTorch.
    import torch.distributed as dist

    attempt = f"told/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
    same = f"{attempt}/{hashlib.sha256(text.encode()).hexdigest()}"
    # torchrun keeps the store; where there is none, rank 0 does.
    keeps = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    try:
        store = dist.TCPStore(
            os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=keeps, wait_for_workers=False,
            multi_tenant=True, timeout=timedelta(seconds=GRACE),
        )  # fmt: skip
        store.set(f"{same}/{store.add(same, 1)}", str(rank))
        until = time.monotonic() + GRACE
        failed = store.add(attempt, 1)
        while failed < ranks and time.monotonic() < until:
            time.sleep(POLL)
            failed = store.add(attempt, 0)
        alike = store.add(same, 0)
        having = range(ranks) if alike == ranks else sorted(int(store.get(f"{same}/{n + 1}")) for n in range(alike))
        if keeps:
            time.sleep(10 * POLL)  # the others read, too, before the store goes
        return having
    except (KeyError, ValueError, RuntimeError):
        return [rank]  # no store to ask: better told twice than not at all
