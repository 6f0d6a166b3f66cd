"""Feature columns of a source → codes, tokens and numbers, and what the schema says of them."""

from __future__ import annotations

import zlib
from dataclasses import dataclass, replace

import polars as pl

from flm_torchrec.data.raw import Declared
from flm_torchrec.data.schema import Feature
from flm_torchrec.errors import DataError


@dataclass(frozen=True)
class Encoded:
    """One feature, ready to be written."""

    feature: Feature
    columns: list[pl.Series]
    """The column of codes or numbers; for a text, the text before it."""
    vocabulary: pl.DataFrame | None
    """Columns code and value, of categorical kinds."""


def encode(declared: Declared, column: pl.Series, min_count: int, text_buckets: int) -> Encoded:
    """Encode one column, a row an entity.

    Args:
        min_count: rarer values of a categorical feature become unknown.
        text_buckets: rows of a text feature's table, into which its words are hashed.

    Raises:
        DataError: the column's type does not fit its kind.
    """
    try:
        return _ENCODERS[declared.kind](declared, column, min_count, text_buckets)
    except (pl.exceptions.PolarsError, TypeError) as error:
        reason = str(error).splitlines()[0]
        raise DataError(
            f"{declared.entity} feature '{declared.name}': its column is {column.dtype}, which does not fit kind"
            f" {declared.kind} ({reason}); declare another kind or mend the column"
        ) from error


def _vocabulary(values: pl.Series, min_count: int) -> pl.DataFrame:
    counts = values.drop_nulls().rename("value").value_counts(name="count")
    ordered = counts.filter((pl.col("count") >= min_count) & (pl.col("value") != "")).select("value").sort("value")
    return ordered.select(pl.int_range(pl.len(), dtype=pl.Int32).alias("code"), "value")


def _coded(column: pl.Series, values: pl.Series, codes: pl.Series) -> pl.Series:
    """Each value's code, of values or of lists of them; one that has no code is null, or left out of its list."""

    def code(of: pl.Expr) -> pl.Expr:
        # The cast: of a column with no values at all polars keeps the type.
        return of.replace_strict(values, codes, default=None, return_dtype=pl.Int32).cast(pl.Int32)

    whole = pl.col(column.name)
    listed = isinstance(column.dtype, pl.List)
    coded = whole.list.eval(code(pl.element()).drop_nulls()) if listed else code(whole)
    return column.to_frame().select(coded).to_series()


def _categorical(declared: Declared, column: pl.Series, min_count: int, text_buckets: int) -> Encoded:
    if isinstance(column.dtype, pl.List | pl.Array):
        raise TypeError("a list; use multi_categorical")
    values = column.cast(pl.String)
    vocabulary = _vocabulary(values, min_count)
    codes = _coded(values, vocabulary["value"], vocabulary["code"])
    return Encoded(_sparse(declared, declared.name, len(vocabulary)), [codes], vocabulary)


def _multi_categorical(declared: Declared, column: pl.Series, min_count: int, text_buckets: int) -> Encoded:
    lists = column.cast(pl.List(pl.String)).fill_null([])
    vocabulary = _vocabulary(lists.explode(), min_count)
    codes = _coded(lists, vocabulary["value"], vocabulary["code"])
    return Encoded(_sparse(declared, declared.name, len(vocabulary)), [codes], vocabulary)


def _text(declared: Declared, column: pl.Series, min_count: int, text_buckets: int) -> Encoded:
    text = column.cast(pl.String).fill_null("")
    words = split_words(text)
    known = words.explode().drop_nulls().unique()
    buckets = pl.Series([word_bucket(w, text_buckets) for w in known], dtype=pl.Int32)
    name = f"{declared.name}_tokens"
    tokens = _coded(words, known, buckets).rename(name)
    return Encoded(_sparse(declared, name, text_buckets), [text.rename(declared.name), tokens], None)


def split_words(text: pl.Series) -> pl.Series:
    """Texts → lists of words in lower case."""
    return text.str.to_lowercase().str.extract_all(r"[\p{L}\p{N}]+")


def word_bucket(word: str, buckets: int) -> int:
    """Code of a word, by a hash that is the same on every machine and in every version, unlike Python's and polars'."""
    return zlib.crc32(word.encode()) % buckets


def _numeric(declared: Declared, column: pl.Series, min_count: int, text_buckets: int) -> Encoded:
    numbers = column.cast(pl.Float64)
    numbers = numbers.set(~numbers.is_finite().fill_null(False), None)
    mean, spread = float(numbers.mean() or 0.0), float(numbers.std() or 1.0)  # type: ignore[arg-type]
    scaled = ((numbers - mean) / spread).cast(pl.Float32)
    if not scaled.is_finite().all():
        raise DataError(
            f"{declared.entity} feature '{declared.name}': its largest numbers cannot be"
            " standardised; mend or scale the column"
        )
    return Encoded(replace(_dense(declared, 1), mean=mean, deviation=spread), [scaled], None)


def _vector(declared: Declared, column: pl.Series, min_count: int, text_buckets: int) -> Encoded:
    lists = column.cast(pl.List(pl.Float32))
    widths = lists.list.len().drop_nulls().unique().sort().to_list()
    if len(widths) != 1 or widths[0] == 0:
        found = f"vectors of widths {', '.join(map(str, widths[:5]))}" if widths else "no vector"
        raise DataError(
            f"{declared.entity} feature '{declared.name}': {found}; a dense feature needs one width above 0 for all"
        )
    whole = lists.list.eval(pl.element().is_finite().fill_null(False)).list.all()
    return Encoded(_dense(declared, widths[0]), [lists.set(~whole, None).list.to_array(widths[0])], None)


_ENCODERS = {
    "categorical": _categorical,
    "multi_categorical": _multi_categorical,
    "text": _text,
    "numeric": _numeric,
    "dense": _vector,
}


def _sparse(declared: Declared, column: str, cardinality: int) -> Feature:
    table = f"{declared.entity}_{declared.name}"
    return Feature(declared.name, declared.entity, declared.kind, column, table=table, cardinality=max(1, cardinality))


def _dense(declared: Declared, width: int) -> Feature:
    return Feature(declared.name, declared.entity, declared.kind, declared.name, width=width)
