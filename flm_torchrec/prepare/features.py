"""Feature columns of a source → codes, tokens and numbers, and what the schema says of them."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import polars as pl

from flm_torchrec.data.schema import Feature
from flm_torchrec.data.text import split_words, word_bucket
from flm_torchrec.errors import DataError
from flm_torchrec.prepare.sources.raw import Declared


@dataclass(frozen=True)
class Encoded:
    """One feature, ready to be written."""

    feature: Feature
    columns: list[pl.Series]
    """The column of codes or numbers; for a text, the text before it."""
    vocabulary: pl.DataFrame | None
    """Columns code and value, of categorical kinds."""


@dataclass(frozen=True)
class Coding:
    """How columns are encoded."""

    min_count: int = 1
    """Rarer values of a categorical feature become unknown."""
    text_buckets: int = 10_000
    """Rows of a text feature's table, into which its words are hashed."""
    text_ngrams: int = 1
    """Runs of up to so many words are hashed."""
    quantiles: int = 100
    """Buckets of a quantile feature, at most."""


def encode(declared: Declared, column: pl.Series, coding: Coding) -> Encoded:
    """Encode one column, a row an entity.

    Raises:
        DataError: the column's type does not fit its kind.
    """
    try:
        return _ENCODERS[declared.kind](declared, column, coding)
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


def _categorical(declared: Declared, column: pl.Series, coding: Coding) -> Encoded:
    if isinstance(column.dtype, pl.List | pl.Array):
        raise TypeError("a list; use multi_categorical")
    values = column.cast(pl.String)
    vocabulary = _vocabulary(values, coding.min_count)
    codes = _coded(values, vocabulary["value"], vocabulary["code"])
    return Encoded(_sparse(declared, declared.name, len(vocabulary)), [codes], vocabulary)


def _multi_categorical(declared: Declared, column: pl.Series, coding: Coding) -> Encoded:
    lists = column.cast(pl.List(pl.String)).fill_null([])
    vocabulary = _vocabulary(lists.explode(), coding.min_count)
    codes = _coded(lists, vocabulary["value"], vocabulary["code"])
    return Encoded(_sparse(declared, declared.name, len(vocabulary)), [codes], vocabulary)


def _text(declared: Declared, column: pl.Series, coding: Coding) -> Encoded:
    text = column.cast(pl.String).fill_null("")
    words = split_words(text, coding.text_ngrams)
    known = words.explode().drop_nulls().unique()
    buckets = pl.Series([word_bucket(w, coding.text_buckets) for w in known], dtype=pl.Int32)
    name = f"{declared.name}_tokens"
    tokens = _coded(words, known, buckets).rename(name)
    feature = replace(_sparse(declared, name, coding.text_buckets), ngrams=coding.text_ngrams)
    return Encoded(feature, [text.rename(declared.name), tokens], None)


def _numeric(declared: Declared, column: pl.Series, coding: Coding) -> Encoded:
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


def _quantile(declared: Declared, column: pl.Series, coding: Coding) -> Encoded:
    numbers = column.cast(pl.Float64)
    known = numbers.filter(numbers.is_finite().fill_null(False)).sort().to_numpy()
    # Edges are values that occur; equal ones are one, so that no bucket is empty for want of differing values.
    at = np.arange(1, coding.quantiles) * len(known) // coding.quantiles
    edges = np.unique(known[at]) if len(known) else known
    edges = edges[edges > known[0]] if len(known) else edges
    codes = pl.Series(column.name, np.searchsorted(edges, numbers.fill_null(0).to_numpy(), "right").astype(np.int32))
    codes = codes.set(~numbers.is_finite().fill_null(False), None)
    least = ["-inf", *(repr(float(edge)) for edge in edges)] if len(known) else []
    vocabulary = pl.DataFrame({"code": pl.int_range(len(least), dtype=pl.Int32, eager=True), "value": least})
    return Encoded(_sparse(declared, declared.name, len(least)), [codes], vocabulary)


def _vector(declared: Declared, column: pl.Series, coding: Coding) -> Encoded:
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
    "quantile": _quantile,
    "dense": _vector,
}


def _sparse(declared: Declared, column: str, cardinality: int) -> Feature:
    table = f"{declared.entity}_{declared.name}"
    return Feature(declared.name, declared.entity, declared.kind, column, table=table, cardinality=max(1, cardinality))


def _dense(declared: Declared, width: int) -> Feature:
    return Feature(declared.name, declared.entity, declared.kind, declared.name, width=width)
