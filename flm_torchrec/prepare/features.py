"""Feature columns of a source → codes, tokens and numbers, and what the schema says of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import polars as pl

from flm_torchrec.data.schema import Feature
from flm_torchrec.data.text import split_words, word_bucket
from flm_torchrec.errors import DataError
from flm_torchrec.prepare.options import PrepareOptions
from flm_torchrec.prepare.sources.source_data import CONTEXT, DeclaredFeature


@dataclass(frozen=True)
class EncodedFeature:
    """One feature, ready to be written."""

    feature: Feature
    columns: list[pl.Series]
    """The column of codes or numbers; for a text, the text before it."""
    vocabulary: pl.DataFrame | None
    """Columns code and value, of categorical kinds."""


def encode(declared: DeclaredFeature, column: pl.Series, options: PrepareOptions) -> EncodedFeature:
    """Encode one column, a row an entity.

    Raises:
        DataError: the column's type does not fit its kind.
    """
    # An item that is left has enough users, and they all have its values.
    people = options.min_users if declared.entity == "user" else 1
    options = replace(options, min_count=max(options.min_count, people), min_users=people)
    try:
        return _ENCODERS[declared.kind](declared, column, options)
    except (pl.exceptions.PolarsError, TypeError) as error:
        reason = str(error).splitlines()[0]
        raise DataError(
            f"{declared.entity} feature '{declared.name}': its column is {column.dtype}, which does not fit kind"
            f" {declared.kind} ({reason}); declare another kind or mend the column"
        ) from error


def encode_context(declared: DeclaredFeature, contexts: Mapping[str, pl.Series]) -> EncodedFeature:
    """A feature of events, whose codes are written with the interactions.

    Args:
        contexts: by column, the values in order of code.
    """
    column = f"{CONTEXT}{declared.name}"
    values = contexts[column].rename("value")
    vocabulary = values.to_frame().select(pl.int_range(pl.len(), dtype=pl.Int32).alias("code"), "value")
    return EncodedFeature(_sparse(declared, column, len(values)), [], vocabulary)


def _vocabulary(values: pl.Series, min_count: int) -> pl.DataFrame:
    counts = values.drop_nulls().rename("value").value_counts(name="count")
    ordered = counts.filter((pl.col("count") >= min_count) & (pl.col("value") != "")).select("value").sort("value")
    return ordered.select(pl.int_range(pl.len(), dtype=pl.Int32).alias("code"), "value")


def _coded(column: pl.Series, values: pl.Series, codes: pl.Series) -> pl.Series:
    """The code of each value, in a column of values or of lists; without a code it is null, or left out of its list."""

    def code(of: pl.Expr) -> pl.Expr:
        # The cast: of a column with no values at all polars keeps the type.
        return of.replace_strict(values, codes, default=None, return_dtype=pl.Int32).cast(pl.Int32)

    values_of = pl.col(column.name)
    listed = isinstance(column.dtype, pl.List)
    coded = values_of.list.eval(code(pl.element()).drop_nulls()) if listed else code(values_of)
    return column.to_frame().select(coded).to_series()


def _categorical(declared: DeclaredFeature, column: pl.Series, options: PrepareOptions) -> EncodedFeature:
    if isinstance(column.dtype, pl.List | pl.Array):
        raise TypeError("a list; use multi_categorical")
    values = column.cast(pl.String)
    vocabulary = _vocabulary(values, options.min_count)
    codes = _coded(values, vocabulary["value"], vocabulary["code"])
    return EncodedFeature(_sparse(declared, declared.name, len(vocabulary)), [codes], vocabulary)


def _multi_categorical(declared: DeclaredFeature, column: pl.Series, options: PrepareOptions) -> EncodedFeature:
    lists = column.cast(pl.List(pl.String)).fill_null([])
    counted = lists.list.unique() if options.min_users > 1 else lists  # else one user could be counted several times
    vocabulary = _vocabulary(counted.explode(), options.min_count)
    codes = _coded(lists, vocabulary["value"], vocabulary["code"])
    return EncodedFeature(_sparse(declared, declared.name, len(vocabulary)), [codes], vocabulary)


def _text(declared: DeclaredFeature, column: pl.Series, options: PrepareOptions) -> EncodedFeature:
    text = column.cast(pl.String).fill_null("")
    words = split_words(text, options.text_ngrams)
    distinct = words.explode().drop_nulls().unique()
    if options.min_users > 1:
        distinct = _vocabulary(words.list.unique().explode(), options.min_users)["value"]
        text = pl.Series([""] * len(text), dtype=pl.String)  # a text as a whole may be one user's alone
    buckets = pl.Series([word_bucket(word, options.text_buckets) for word in distinct], dtype=pl.Int32)
    name = f"{declared.name}_tokens"
    tokens = _coded(words, distinct, buckets).rename(name)
    feature = replace(_sparse(declared, name, options.text_buckets), ngrams=options.text_ngrams)
    return EncodedFeature(feature, [text.rename(declared.name), tokens], None)


def _numeric(declared: DeclaredFeature, column: pl.Series, options: PrepareOptions) -> EncodedFeature:
    numbers = column.cast(pl.Float64)
    numbers = numbers.set(~numbers.is_finite().fill_null(False), None)
    mean, spread = float(numbers.mean() or 0.0), float(numbers.std() or 1.0)  # type: ignore[arg-type]
    scaled = ((numbers - mean) / spread).cast(pl.Float32)
    if not scaled.is_finite().all():
        raise DataError(
            f"{declared.entity} feature '{declared.name}': its largest numbers cannot be"
            " standardised; mend or scale the column"
        )
    return EncodedFeature(replace(_dense(declared, 1), mean=mean, deviation=spread), [scaled], None)


def _quantile(declared: DeclaredFeature, column: pl.Series, options: PrepareOptions) -> EncodedFeature:
    numbers = column.cast(pl.Float64)
    finite = numbers.filter(numbers.is_finite().fill_null(False)).sort().to_numpy()
    # Edges are values that occur, each once, so that no bucket is empty.
    at = np.arange(1, options.quantiles) * len(finite) // options.quantiles
    edges = np.unique(finite[at]) if len(finite) else finite
    edges = edges[edges > finite[0]] if len(finite) else edges
    edges = _apart(edges, finite, options.min_users)
    codes = pl.Series(column.name, np.searchsorted(edges, numbers.fill_null(0).to_numpy(), "right").astype(np.int32))
    codes = codes.set(~numbers.is_finite().fill_null(False), None)
    if len(finite) < options.min_users:
        codes, finite = codes.set(codes.is_not_null(), None), finite[:0]
    lowest = ["-inf", *(repr(float(edge)) for edge in edges)] if len(finite) else []
    vocabulary = pl.DataFrame({"code": pl.int_range(len(lowest), dtype=pl.Int32, eager=True), "value": lowest})
    return EncodedFeature(_sparse(declared, declared.name, len(lowest)), [codes], vocabulary)


def _apart(edges: np.ndarray, ordered: np.ndarray, least: int) -> np.ndarray:
    """The edges of buckets that each hold at least so many of the ordered numbers."""
    kept: list[float] = []
    before = 0
    for edge, below in zip(edges, np.searchsorted(ordered, edges, "left"), strict=True):
        if below - before >= least and len(ordered) - below >= least:
            kept.append(edge)
            before = below
    return np.array(kept, edges.dtype)


def _vector(declared: DeclaredFeature, column: pl.Series, options: PrepareOptions) -> EncodedFeature:
    lists = column.cast(pl.List(pl.Float32))
    widths = lists.list.len().drop_nulls().unique().sort().to_list()
    if len(widths) != 1 or widths[0] == 0:
        shown = f"vectors of widths {', '.join(map(str, widths[:5]))}" if widths else "no vector"
        raise DataError(
            f"{declared.entity} feature '{declared.name}': {shown}; a dense feature needs one width above 0 for all"
        )
    finite = lists.list.eval(pl.element().is_finite().fill_null(False)).list.all()
    return EncodedFeature(_dense(declared, widths[0]), [lists.set(~finite, None).list.to_array(widths[0])], None)


_ENCODERS = {
    "categorical": _categorical,
    "multi_categorical": _multi_categorical,
    "text": _text,
    "numeric": _numeric,
    "quantile": _quantile,
    "dense": _vector,
}


def _sparse(declared: DeclaredFeature, column: str, cardinality: int) -> Feature:
    table = f"{declared.entity}_{declared.name}"
    return Feature(declared.name, declared.entity, declared.kind, column, table=table, cardinality=max(1, cardinality))


def _dense(declared: DeclaredFeature, width: int) -> Feature:
    encoder = declared.encoder
    return Feature(declared.name, declared.entity, declared.kind, declared.name, width=width, encoder=encoder)
