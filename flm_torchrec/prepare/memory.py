"""Sizes of memory as people write them, in the same form in every command."""

from __future__ import annotations

import re

import psutil

from flm_torchrec.errors import DataError

GIB = 2**30
MIB = 2**20
SHARE = 0.5
"""Of a command's memory, for DuckDB's buffers; the rest is for Python, Polars, Arrow and what DuckDB does not count."""
LEAST = 100 * MIB
"""Bytes below which DuckDB cannot work."""


def duckdb_bytes(memory: int) -> int:
    """Bytes that DuckDB may fill before it goes to disk, of the memory of a whole command."""
    return max(LEAST, int(memory * SHARE))


def memory_bytes(text: str, least: int = 0) -> int:
    """`2GiB`, `500MB` → bytes; empty: half of the machine's.

    Args:
        least: bytes below which the command cannot work.

    Raises:
        DataError: no unit, no number, or less than `least`.
    """
    if not text:
        return psutil.virtual_memory().total // 2
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT])(i?)B?", text.strip(), re.IGNORECASE)
    if not match:
        raise DataError(f"--memory '{text}': write it as 2GiB or 1500MB, with the unit; the least is {shown(least)}")
    number, letter, binary = match.groups()
    size = int(float(number) * (1024 if binary else 1000) ** ("KMGT".index(letter.upper()) + 1))
    if size < least:
        raise DataError(f"--memory {text}: the least is {shown(least)}")
    return size


def shown(size: int) -> str:
    """Bytes as `memory_bytes` reads them: `1GiB`, `100MiB`."""
    return f"{size // GIB}GiB" if size % GIB == 0 else f"{size // MIB}MiB"
