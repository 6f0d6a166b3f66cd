"""What an export holds in memory is compared with what is free before work starts."""

from __future__ import annotations

import psutil

from flm_torchrec.errors import RunError


def check_fits(needed: int, option: str, rows: str, instead: str) -> None:
    """Raise RunError where the free memory of this machine is smaller.

    Args:
        needed: bytes on rank 0.
        option: what asks for them.
        rows: of what they are, with numbers.
        instead: the way round, behind "export with".
    """
    free = psutil.virtual_memory().available
    if needed > free:
        raise RunError(
            f"{option}: takes {needed / 2**30:,.1f} GiB on rank 0 for {rows}, and {free / 2**30:,.1f} GiB are free;"
            f" export with {instead}"
        )
