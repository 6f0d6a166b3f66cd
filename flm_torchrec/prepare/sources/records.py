"""Where the records of a CSV file end whose quoted fields may go over several lines."""

from __future__ import annotations

import re
from functools import cache

import numpy as np

NEWLINE, RETURN, QUOTE = 10, 13, 34
LONGEST = 2**26
"""Bytes of a line, or of a record; a longer one is none of a log."""


def split(data: bytes, separator: str, final: bool) -> tuple[np.ndarray, np.ndarray]:
    """[records] the line feeds that end them, and [records] bool: a line whose quote is stray. The rest is incomplete.

    A quote begins a quoted field at the start of a field alone. A field over several lines must end with its quote:
    else one stray quote would swallow all rows up to the next one. Where it does not, the line that it begins in is
    stray, and the next line begins a record.

    Args:
        data: complete lines.
        final: nothing comes after them, so that a quote that is still open is stray.
    """
    codes = np.frombuffer(data, np.uint8)
    ends = np.flatnonzero(codes == NEWLINE)
    quotes = np.flatnonzero(codes == QUOTE)
    if not len(quotes):
        return ends, np.zeros(len(ends), bool)
    complete = ends[~inside_quotes(codes)[ends]]
    used = int(complete[-1]) + 1 if len(complete) else 0
    waiting = used == len(data) or (not final and len(data) - used <= LONGEST)
    if waiting and _plain(codes, quotes, ord(separator)):
        return complete, np.zeros(len(complete), bool)
    return _one_by_one(data, separator, final)


def inside_quotes(codes: np.ndarray) -> np.ndarray:
    """[bytes] bool: an odd number of quotes stands before the byte or is there."""
    return np.logical_xor.accumulate(codes == QUOTE)


def _plain(codes: np.ndarray, quotes: np.ndarray, separator: int) -> bool:
    """Whether every quote begins a field, ends one, or is one of two that stand for a sign."""
    opening, closing = quotes[::2], quotes[1::2]
    before, after = codes[opening - 1], codes[closing + 1]  # of the first byte, the line feed at the end is before
    return bool(
        np.isin(before, (separator, NEWLINE, QUOTE)).all() and np.isin(after, (separator, NEWLINE, RETURN, QUOTE)).all()
    )


def _one_by_one(data: bytes, separator: str, final: bool) -> tuple[np.ndarray, np.ndarray]:
    """As `split`, record by record."""
    record, opened = _patterns(separator)
    ends, stray, at = list[int](), list[bool](), 0
    while at < len(data):
        found = record.match(data, at)
        if not found and not final and len(data) - at <= LONGEST and opened.match(data, at):
            break
        ends.append(found.end() - 1 if found else data.find(b"\n", at))
        stray.append(not found)
        at = ends[-1] + 1
    return np.array(ends, np.int64), np.array(stray, bool)


@cache
def _patterns(separator: str) -> tuple[re.Pattern[bytes], re.Pattern[bytes]]:
    """A record with its line feed, as Arrow reads it, and one whose last field is still open at the end of the data."""
    sign = re.escape(separator)
    one_line = rf'"(?:[^"\n]++|"")*+"[^{sign}\n]*+'  # what stands behind the quote is part of the field
    several = rf'"(?:[^"]++|"")*+"(?:\r(?=\n)|(?={sign}|\n))'
    field = rf'(?>{one_line}|{several}|(?!")[^{sign}\n]*+)'
    fields = rf"(?>(?:{field}{sign})*+)"
    return re.compile(rf"{fields}{field}\n".encode()), re.compile(rf'{fields}"(?:[^"]++|"")*+\Z'.encode())
