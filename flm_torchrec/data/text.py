"""Words of a text, and the codes that they are hashed to."""

from __future__ import annotations

import zlib

import polars as pl


def split_words(text: pl.Series, longest: int = 1) -> pl.Series:
    """[n] texts → [n] lists of the words in lower case, and of runs of up to `longest` words, joined by spaces."""
    words = text.str.to_lowercase().str.extract_all(r"[\p{L}\p{N}]+")
    if longest == 1:
        return words
    rows = words.to_frame("words").with_row_index("row")
    flat = rows.explode("words").drop_nulls()
    by_size = [
        flat.select("row", pl.concat_str([pl.col("words").shift(-n).over("row") for n in range(size)], separator=" "))
        for size in range(1, longest + 1)
    ]
    runs = pl.concat(by_size).drop_nulls().group_by("row", maintain_order=True).agg("words")
    joined = rows.select("row").join(runs, "row", "left", maintain_order="left")["words"]
    return joined.fill_null([]).rename(text.name)


def word_bucket(word: str, buckets: int) -> int:
    """Code of a word, below `buckets`. CRC-32 is the same on every machine and in every version, unlike `hash`."""
    return zlib.crc32(word.encode()) % buckets
