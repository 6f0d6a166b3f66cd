"""Text files in blocks of complete lines: bounded memory, every line accounted for, no Python loop over good lines."""

from __future__ import annotations

import codecs
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from typing import IO

import numpy as np

from flm_torchrec.prepare.sources.records import LONGEST, NEWLINE, QUOTE, RETURN, inside_quotes, split

BLOCK = 2**24
"""Bytes read at once."""
SAMPLE = 2**16
"""Bytes at the start of a file from which the kind of its line ends is taken."""


@dataclass(frozen=True)
class Block:
    """Complete lines of a file, or records of several lines."""

    data: bytes
    """Ends with a line feed."""
    numbers: np.ndarray  # [lines] int64: where each begins in the file, from 1
    ends: np.ndarray  # [lines] int64: the line feeds in `data` that end each
    multiline: bool = False
    """A line feed inside quotes ends no line."""

    @cached_property
    def spans(self) -> tuple[np.ndarray, np.ndarray]:
        """[lines] begin and [lines] end (before the line feed) of each line in `data`."""
        return np.concatenate([[0], self.ends + 1])[:-1], self.ends

    def _bytes(self) -> np.ndarray:
        return np.frombuffer(self.data, np.uint8)

    def counts(self, byte: int) -> np.ndarray:
        """[lines] int64: how often the byte stands in each line; of several lines, outside quotes."""
        matches = self._bytes() == byte
        begin, end = self.spans
        if self.multiline and byte != QUOTE:
            inside = inside_quotes(self._bytes())
            odd_before = np.concatenate([[False], inside[self.ends]])[:-1]
            matches &= inside == np.repeat(odd_before, end - begin + 1)
        total = np.concatenate([[0], np.cumsum(matches)])
        return total[end] - total[begin]

    def keep(self, kept: np.ndarray) -> Block:
        """The lines where `kept` [lines] is true."""
        if kept.all():
            return self
        begin, end = self.spans
        widths = end - begin + 1
        data = self._bytes()[np.repeat(kept, widths)].tobytes()
        return Block(data, self.numbers[kept], np.cumsum(widths[kept]) - 1, self.multiline)

    def line(self, index: int) -> bytes:
        """One line, without its line feed."""
        begin, end = self.spans
        return self.data[begin[index] : end[index]]


def pieces(stream: IO[bytes], encoding: str) -> Iterator[bytes]:
    """A file as UTF-8, with line feeds also in place of carriage returns, if the file has only those.

    What cannot be decoded becomes bytes that are no UTF-8, so that `readable` finds the line.
    """
    read = _decoded(stream, encoding)
    head = next(read, b"")
    returns = RETURN in head[:-1] and NEWLINE not in head
    for piece in chain((head,), read):
        text = piece.replace(b"\r", b"\n") if returns else piece
        yield from (text[start : start + BLOCK] for start in range(0, len(text), BLOCK))


def blocks(text: Iterator[bytes], drop: Callable[[np.ndarray, str], None], separator: str = "") -> Iterator[Block]:
    """All lines of `pieces`, in order, without those that are too long or whose quote is stray.

    Args:
        drop: takes the numbers of lines that are left out, and the reason.
        separator: of columns whose quoted fields may go over several lines; empty: every line feed ends a line.
    """
    rest, first, skipping = b"", 1, False
    for piece in text:
        data = rest + piece
        if skipping and b"\n" in data:
            data, first, skipping = data[data.find(b"\n") + 1 :], first + 1, False
        whole = 0 if skipping else data.rfind(b"\n") + 1
        block, stray = _block(data[:whole], first, separator, final=False)
        yield from _without(block, stray, drop)
        first, rest = first + block.data.count(b"\n"), data[len(block.data) :]
        if len(data) - whole > LONGEST or (skipping and rest):
            if not skipping:
                drop(first + np.arange(rest.count(b"\n") + 1), "malformed: a line of over 64 MiB")
            first += rest.count(b"\n")
            rest, skipping = b"", True
    if rest and not skipping:
        rest = rest.removesuffix(b"\n") + b"\n"
        yield from _without(*_block(rest, first, separator, final=True), drop)


def _block(data: bytes, first: int, separator: str, final: bool) -> tuple[Block, np.ndarray]:
    """The complete records of lines from number `first` on, and [records] bool: a line whose quote is stray."""
    newlines = np.flatnonzero(np.frombuffer(data, np.uint8) == NEWLINE)
    ends, stray = split(data, separator, final) if separator else (newlines, np.zeros(len(newlines), bool))
    before = np.concatenate([[0], np.searchsorted(newlines, ends) + 1])[:-1]
    used = int(ends[-1]) + 1 if len(ends) else 0
    return Block(data[:used], first + before, ends, bool(separator)), stray


def _without(block: Block, stray: np.ndarray, drop: Callable[[np.ndarray, str], None]) -> Iterator[Block]:
    if stray.any():
        drop(block.numbers[stray], UNCLOSED)
        block = block.keep(~stray)
    if block.data:
        yield block


def from_first_filled(found: Iterator[Block]) -> Iterator[Block]:
    """The blocks without the blank lines before the first other line."""
    for block in found:
        filled = next((n for n in range(len(block.numbers)) if block.line(n).strip()), None)
        if filled is not None:
            yield block.keep(np.arange(len(block.numbers)) >= filled)
            yield from found


UNCLOSED = "malformed: a quote is not closed on its line"


def readable(block: Block, drop: Callable[[np.ndarray, str], None], quoted: bool, encoding: str = "utf-8") -> Block:
    """The block without empty lines, and without lines that parsers read in different ways.

    Args:
        drop: takes the numbers of lines that are left out, and the reason.
        quoted: a quote must be closed on its line.
    """
    begin, end = block.spans
    width = end - begin
    closing = np.frombuffer(block.data, np.uint8)[np.maximum(end - 1, 0)] == RETURN
    empty = (width == 0) | ((width == 1) & closing)
    rules = {
        "malformed: a zero byte": block.counts(0) > 0,
        "malformed: a carriage return inside the line": block.counts(RETURN) > (closing & (width > 0)),
        f"malformed: not {shown(encoding)}": _not_utf8(block),
    }
    if quoted:
        rules[UNCLOSED] = block.counts(QUOTE) % 2 == 1
    bad = empty.copy()
    for reason, matches in rules.items():
        new = matches & ~bad
        if new.any():
            drop(block.numbers[new], reason)
        bad |= new
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


def shown(encoding: str) -> str:
    """The name of an encoding, for people."""
    return "UTF-8" if _is_plain(encoding) else encoding


def _is_plain(encoding: str) -> bool:
    return codecs.lookup(encoding).name in ("utf-8", "utf-8-sig")


def _decoded(stream: IO[bytes], encoding: str) -> Iterator[bytes]:
    """The file as UTF-8 without a byte order mark, in pieces; the first piece is a sample."""
    decoder = None if _is_plain(encoding) else codecs.getincrementaldecoder(encoding)("replace")
    size, begun = SAMPLE, False
    while True:
        data = stream.read(size)
        text = data if decoder is None else _marked(decoder.decode(data, final=not data))
        if text and not begun:
            text, begun = text.removeprefix(codecs.BOM_UTF8), True
        if text:
            yield text
        if not data:
            return
        size = BLOCK


def _marked(text: str) -> bytes:
    """UTF-8, except for characters that could not be decoded: they become surrogates, which are no UTF-8."""
    return text.replace("\ufffd", "\udcff").encode("utf-8", "surrogatepass")
