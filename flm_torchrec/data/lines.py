"""Text files in blocks of whole lines: bounded memory, every line accounted for, no Python loop over good ones."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import IO

import numpy as np

BLOCK = 2**24
"""Bytes read at once."""
LONGEST = 2**26
"""Bytes of a line; a longer one is no line of a log."""

NEWLINE, RETURN, QUOTE = 10, 13, 34


@dataclass(frozen=True)
class Block:
    """Whole lines of a file."""

    data: bytes
    """Ends with a line feed."""
    numbers: np.ndarray  # [lines] int64: where each stands in the file, from 1

    @cached_property
    def spans(self) -> tuple[np.ndarray, np.ndarray]:
        """[lines] begin and [lines] end (before the line feed) of each line in `data`."""
        ends = np.flatnonzero(self._bytes() == NEWLINE)
        return np.concatenate([[0], ends[:-1] + 1]), ends

    def _bytes(self) -> np.ndarray:
        return np.frombuffer(self.data, np.uint8)

    def counts(self, byte: int) -> np.ndarray:
        """[lines] int64: how often the byte stands in each line."""
        total = np.concatenate([[0], np.cumsum(self._bytes() == byte)])
        begin, end = self.spans
        return total[end] - total[begin]

    def keep(self, kept: np.ndarray) -> Block:
        """The lines where `kept` [lines] is true."""
        if kept.all():
            return self
        begin, end = self.spans
        where = np.repeat(kept, end - begin + 1)
        return Block(self._bytes()[where].tobytes(), self.numbers[kept])

    def line(self, index: int) -> bytes:
        begin, end = self.spans
        return self.data[begin[index] : end[index]]


def blocks(stream: IO[bytes], too_long: Callable[[int], None]) -> Iterator[Block]:
    """All lines, in order; the number of a line that is too long to be one is told and the line skipped."""
    rest, first, skipping = b"", 1, False
    while piece := stream.read(BLOCK):
        data = rest + piece
        cut = data.rfind(b"\n") + 1
        if skipping and cut:
            begin = data.find(b"\n") + 1
            data, cut, first, skipping = data[begin:], cut - begin, first + 1, False
        data, rest = data[:cut], data[cut:]
        if data:
            count = data.count(b"\n")
            yield Block(data, np.arange(first, first + count))
            first += count
        if len(rest) > LONGEST or (skipping and rest):
            if not skipping:
                too_long(first)
            rest, skipping = b"", True
    if rest and not skipping:
        yield Block(rest + b"\n", np.array([first]))


def readable(block: Block, drop: Callable[[np.ndarray, str], None], quoted: bool) -> Block:
    """Without empty lines, and without those that no parser could be trusted with.

    Args:
        drop: told the numbers of lines left out for a reason.
        quoted: a quote must be closed on its line.
    """
    begin, end = block.spans
    width = end - begin
    closing = np.frombuffer(block.data, np.uint8)[np.maximum(end - 1, 0)] == RETURN
    empty = (width == 0) | ((width == 1) & closing)
    rules = {
        "malformed: a zero byte": block.counts(0) > 0,
        "malformed: a carriage return inside the line": block.counts(RETURN) > (closing & (width > 0)),
        "malformed: not UTF-8": _not_utf8(block),
    }
    if quoted:
        rules["malformed: a quote is not closed on its line"] = block.counts(QUOTE) % 2 == 1
    bad = empty.copy()
    for reason, found in rules.items():
        found = found & ~bad
        if found.any():
            drop(block.numbers[found], reason)
        bad |= found
    return block.keep(~bad)


def _not_utf8(block: Block) -> np.ndarray:
    bad = np.zeros(len(block.numbers), bool)
    try:
        block.data.decode()
    except UnicodeDecodeError:
        begin, end = block.spans
        for index in range(len(bad)):
            bad[index] = not _is_utf8(block.data[begin[index] : end[index]])
    return bad


def _is_utf8(line: bytes) -> bool:
    try:
        line.decode()
    except UnicodeDecodeError:
        return False
    return True
