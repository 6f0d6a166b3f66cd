"""Printing an error as one line: once for all ranks of a job that have it, and with the ranks if some do not."""

from __future__ import annotations

import hashlib
import os
import sys
import time
from collections.abc import Sequence
from datetime import timedelta

from flm_torchrec.safe_text import redact, visible

GRACE = 3.0
"""Seconds to wait for other ranks to fail too. A launcher ends them soon after the first rank ends."""
POLL = 0.05


def tell(text: str) -> None:
    """Print an error without its secrets, unless a lower rank has the same error."""
    text = visible(redact(text))
    rank, ranks = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    having = _ranks_with(text, rank, ranks) if ranks > 1 else [rank]
    if rank == min(having):
        print(f"error: {'' if len(having) == ranks else _named(having)}{text}", file=sys.stderr, flush=True)


def _named(ranks: Sequence[int]) -> str:
    shown = ", ".join(str(rank) for rank in ranks[:4])
    return f"rank {shown}{f' and {len(ranks) - 4} more' if len(ranks) > 4 else ''}: "


def _ranks_with(text: str, rank: int, ranks: int) -> Sequence[int]:
    """Ranks with the same error, this one included. Waits until all ranks have an error, at most `GRACE` seconds."""
    # Imported here: PyTorch takes seconds, and a job of one process does not need it.
    import torch.distributed as dist

    attempt = f"errors/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
    same = f"{attempt}/{hashlib.sha256(text.encode()).hexdigest()}"
    # torchrun serves the store; other launchers leave this to rank 0.
    serves = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    try:
        store = dist.TCPStore(
            os.environ["MASTER_ADDR"],
            int(os.environ["MASTER_PORT"]),
            is_master=serves,
            wait_for_workers=False,
            multi_tenant=True,
            timeout=timedelta(seconds=GRACE),
        )
        store.set(f"{same}/{store.add(same, 1)}", str(rank))
        until = time.monotonic() + GRACE
        failed = store.add(attempt, 1)
        while failed < ranks and time.monotonic() < until:
            time.sleep(POLL)
            failed = store.add(attempt, 0)
        alike = store.add(same, 0)
        having = range(ranks) if alike == ranks else sorted(int(store.get(f"{same}/{n + 1}")) for n in range(alike))
        if serves:
            time.sleep(10 * POLL)  # let the others read before the store ends
        return having
    except (KeyError, ValueError, RuntimeError):
        return [rank]  # without a store each rank prints its error
