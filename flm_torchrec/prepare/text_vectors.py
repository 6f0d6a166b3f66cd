"""A column of texts → a column of vectors by a frozen encoder, each distinct text once."""

from __future__ import annotations

import hashlib
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import numpy as np
import polars as pl

from flm_torchrec.errors import DataError
from flm_torchrec.prepare.text_encoder import ENDING, TextEncoder

PART = 4096
"""Texts between two commits to the cache."""


def text_vectors(column: pl.Series, folder: Path, digest: str, cache: str) -> pl.Series:
    """[rows] List(Float32): the vectors of texts; null for a text without a word.

    Args:
        column: texts.
        folder: of the encoder.
        digest: of the encoder.
        cache: folder of vectors that were made before; empty: none is kept.

    Raises:
        DataError: the encoder fails, or the cache cannot be used.
    """
    texts = column.str.strip_chars()
    distinct = texts.filter(texts.is_not_null() & (texts != "")).unique(maintain_order=True).to_list()
    keys = [hashlib.sha256(text.encode()).digest() for text in distinct]
    with _opened(cache, digest) as store:
        known = _known(store, keys)
        wanted = [n for n, key in enumerate(keys) if key not in known]
        encoder = TextEncoder(folder, f"feature '{column.name}'") if wanted else None
        for start in range(0, len(wanted), PART):
            part = wanted[start : start + PART]
            assert encoder is not None
            found = encoder.encode([distinct[n] for n in part])
            new = {keys[n]: vector.tobytes() for n, vector in zip(part, found, strict=True)}
            with store:
                store.executemany("INSERT OR IGNORE INTO vectors VALUES (?, ?)", new.items())
            known |= new
    vectors = pl.Series([np.frombuffer(known[key], "<f4").tolist() for key in keys], dtype=pl.List(pl.Float32))
    rows = pl.DataFrame({"text": pl.Series(distinct, dtype=pl.String), "vector": vectors})
    joined = pl.DataFrame({"text": texts}).join(rows, "text", "left", maintain_order="left")
    return joined["vector"].rename(f"{column.name}{ENDING}")


@contextmanager
def _opened(cache: str, digest: str) -> Iterator[sqlite3.Connection]:
    """The store of an encoder's vectors: a file of SQLite, which several preparations may use at once."""
    place = ":memory:"
    try:
        if cache:
            Path(cache).mkdir(parents=True, exist_ok=True)
            place = str(Path(cache) / f"{digest}.sqlite")
        with closing(sqlite3.connect(place, timeout=60)) as store:
            store.execute("CREATE TABLE IF NOT EXISTS vectors (text BLOB PRIMARY KEY, vector BLOB NOT NULL) STRICT")
            yield store
    except (OSError, sqlite3.Error) as error:
        raise DataError(f"--text-cache {cache}: {error}; give another folder, or remove the damaged file") from error


def _known(store: sqlite3.Connection, keys: list[bytes]) -> dict[bytes, bytes]:
    found: dict[bytes, bytes] = {}
    for start in range(0, len(keys), 500):  # SQLite's limit of parameters
        part = keys[start : start + 500]
        marks = ",".join("?" * len(part))
        found |= dict(store.execute(f"SELECT text, vector FROM vectors WHERE text IN ({marks})", part))
    return found
