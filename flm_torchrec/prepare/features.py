"""Feature columns of a source → codes, tokens and numbers, and what the schema says of them.

A column is read twice, part by part: once to learn what codes and numbers depend on, once to encode it. What is held
for a column is its vocabulary, or a few numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import polars as pl

from flm_torchrec.data.history import CONTEXT
from flm_torchrec.data.schema import Feature
from flm_torchrec.data.text import split_words, word_bucket
from flm_torchrec.errors import DataError
from flm_torchrec.prepare.options import PrepareOptions
from flm_torchrec.prepare.sources.source_data import DeclaredFeature

ROUNDING = 1e-12
"""Of a mean: a smaller standard deviation is nothing but rounding, which is 1e-16 of each number."""

Encode = Callable[[pl.Series], list[pl.Series]]
"""A part of a column → the column of codes or numbers; for a text, the text before it."""


class Column(Protocol):
    """A feature of all users or items, in the order of their ids."""

    @property
    def dtype(self) -> pl.DataType:
        """Its type."""

    def __iter__(self) -> Iterator[pl.Series]:
        """Its parts; each call begins anew."""

    def ascending(self, numbers: Callable[[pl.Series], pl.Series]) -> Iterable[np.ndarray]:
        """What `numbers` makes of each part, all of it together in ascending order, in parts again."""


@dataclass(frozen=True)
class EncodedFeature:
    """One feature, ready to be written."""

    feature: Feature
    encode: Encode
    vocabulary: pl.DataFrame | None
    """Columns code and value, of categorical kinds."""


def learn(declared: DeclaredFeature, column: Column, options: PrepareOptions) -> EncodedFeature:
    """Learn how to encode a column, a row an entity.

    Raises:
        DataError: the column's type does not fit its kind.
    """
    # An item that is left has enough users, and they all have its values.
    people = options.min_users if declared.entity == "user" else 1
    options = replace(options, min_count=max(options.min_count, people), min_users=people)
    with _fitting(declared, column.dtype):
        learnt = _LEARNERS[declared.kind](declared, column, options)

    def encode(part: pl.Series) -> list[pl.Series]:
        with _fitting(declared, column.dtype):
            return learnt.encode(part)

    return replace(learnt, encode=encode)


@contextmanager
def _fitting(declared: DeclaredFeature, dtype: pl.DataType) -> Iterator[None]:
    try:
        yield
    except (pl.exceptions.PolarsError, TypeError) as error:
        reason = str(error).splitlines()[0]
        raise DataError(
            f"{declared.entity} feature '{declared.name}': its column is {dtype}, which does not fit kind"
            f" {declared.kind} ({reason}); declare another kind or mend the column"
        ) from error


def context_feature(declared: DeclaredFeature, contexts: Mapping[str, pl.Series]) -> EncodedFeature:
    """A feature of events, whose codes are written with the interactions.

    Args:
        contexts: by column, the values in order of code.
    """
    column = f"{CONTEXT}{declared.name}"
    values = contexts[column].rename("value")
    vocabulary = values.to_frame().select(pl.int_range(pl.len(), dtype=pl.Int32).alias("code"), "value")
    return EncodedFeature(_sparse(declared, column, len(values)), lambda part: [], vocabulary)


def _vocabulary(parts: Iterable[pl.Series], min_count: int) -> pl.DataFrame:
    """Columns code and value: the values that occur often enough, sorted; null and the empty text are none."""
    counted = pl.DataFrame(schema={"value": pl.String, "count": pl.UInt64})
    waiting, rows = [counted], 0
    for part in parts:
        waiting.append(part.drop_nulls().rename("value").value_counts(name="count").cast({"count": pl.UInt64}))
        rows += len(waiting[-1])
        if rows > len(waiting[0]):  # so that merging costs no more than counting does
            waiting, rows = [_merged(waiting)], 0
    kept = _merged(waiting).filter((pl.col("count") >= min_count) & (pl.col("value") != ""))
    return kept.select("value").sort("value").select(pl.int_range(pl.len(), dtype=pl.Int32).alias("code"), "value")


def _merged(counts: list[pl.DataFrame]) -> pl.DataFrame:
    return pl.concat(counts).group_by("value").sum()


def _coded(column: pl.Series, values: pl.Series, codes: pl.Series) -> pl.Series:
    """The code of each value, in a column of values or of lists; without a code it is null, or left out of its list."""

    def code(of: pl.Expr) -> pl.Expr:
        # The cast: of a column with no values at all polars keeps the type.
        return of.replace_strict(values, codes, default=None, return_dtype=pl.Int32).cast(pl.Int32)

    values_of = pl.col(column.name)
    listed = isinstance(column.dtype, pl.List)
    coded = values_of.list.eval(code(pl.element()).drop_nulls()) if listed else code(values_of)
    return column.to_frame().select(coded).to_series()


def _categorical(declared: DeclaredFeature, column: Column, options: PrepareOptions) -> EncodedFeature:
    if isinstance(column.dtype, pl.List | pl.Array):
        raise TypeError("a list; use multi_categorical")
    vocabulary = _vocabulary((part.cast(pl.String) for part in column), options.min_count)

    def encode(part: pl.Series) -> list[pl.Series]:
        return [_coded(part.cast(pl.String), vocabulary["value"], vocabulary["code"])]

    return EncodedFeature(_sparse(declared, declared.name, len(vocabulary)), encode, vocabulary)


def _multi_categorical(declared: DeclaredFeature, column: Column, options: PrepareOptions) -> EncodedFeature:
    def lists(part: pl.Series) -> pl.Series:
        return part.cast(pl.List(pl.String)).fill_null([])

    def counted(part: pl.Series) -> pl.Series:
        # else one user could be counted several times
        return lists(part).list.unique() if options.min_users > 1 else lists(part)

    vocabulary = _vocabulary((counted(part).explode() for part in column), options.min_count)

    def encode(part: pl.Series) -> list[pl.Series]:
        return [_coded(lists(part), vocabulary["value"], vocabulary["code"])]

    return EncodedFeature(_sparse(declared, declared.name, len(vocabulary)), encode, vocabulary)


def _text(declared: DeclaredFeature, column: Column, options: PrepareOptions) -> EncodedFeature:
    def words_of(text: pl.Series) -> pl.Series:
        return split_words(text, options.text_ngrams)

    def text_of(part: pl.Series) -> pl.Series:
        return part.cast(pl.String).fill_null("")

    shared = None  # words that enough users have
    if options.min_users > 1:
        parts = (words_of(text_of(part)).list.unique().explode() for part in column)
        shared = _vocabulary(parts, options.min_users)["value"]
    name = f"{declared.name}_tokens"

    def encode(part: pl.Series) -> list[pl.Series]:
        text = text_of(part)
        words = words_of(text)
        distinct = words.explode().drop_nulls().unique()
        if shared is not None:
            distinct = distinct.filter(distinct.is_in(shared.to_list()))
            text = pl.Series([""] * len(text), dtype=pl.String)  # a text as a whole may be one user's alone
        buckets = pl.Series([word_bucket(word, options.text_buckets) for word in distinct], dtype=pl.Int32)
        return [text.rename(declared.name), _coded(words, distinct, buckets).rename(name)]

    feature = replace(_sparse(declared, name, options.text_buckets), ngrams=options.text_ngrams)
    return EncodedFeature(feature, encode, None)


def _finite(part: pl.Series) -> pl.Series:
    """Numbers, null where one is missing or not finite."""
    numbers = part.cast(pl.Float64)
    return numbers.set(~numbers.is_finite().fill_null(False), None)


def _numeric(declared: DeclaredFeature, column: Column, options: PrepareOptions) -> EncodedFeature:
    mean, spread = _moments(map(_finite, column))

    def encode(part: pl.Series) -> list[pl.Series]:
        scaled = ((_finite(part) - mean) / spread).cast(pl.Float32)
        if not scaled.is_finite().all():
            raise DataError(
                f"{declared.entity} feature '{declared.name}': its largest numbers cannot be"
                " standardised; mend or scale the column"
            )
        return [scaled]

    return EncodedFeature(replace(_dense(declared, 1), mean=mean, deviation=spread), encode, None)


def _moments(parts: Iterable[pl.Series]) -> tuple[float, float]:
    """Mean and `divisor` of all parts, where they are not null.

    The parts are joined as in Chan, Golub & LeVeque, *Updating formulae and a pairwise algorithm* (1979).
    """
    count, mean, squares, spread = 0, 0.0, 0.0, 0.0
    for part in parts:
        numbers = part.drop_nulls()
        if not len(numbers):
            continue
        own, deviation = float(numbers.mean()), float(numbers.std() or 0.0)  # type: ignore[arg-type]
        if not count:
            count, mean, squares, spread = len(numbers), own, deviation * deviation * (len(numbers) - 1), deviation
            continue
        total, away = count + len(numbers), own - mean
        squares += deviation * deviation * (len(numbers) - 1) + away * away * count * len(numbers) / total
        mean += away * len(numbers) / total
        count, spread = total, float(np.sqrt(squares / (total - 1)))
    return mean, divisor(mean, spread)


def divisor(mean: float, spread: float) -> float:
    """By what numbers are divided to standardise them: their standard deviation, or 1 where all are alike.

    A sum rounds, so that the deviation of numbers that are all alike is not always exactly 0.
    """
    return spread if spread > ROUNDING * abs(mean) else 1.0


def _quantile(declared: DeclaredFeature, column: Column, options: PrepareOptions) -> EncodedFeature:
    ascending = column.ascending(lambda part: _finite(part).drop_nulls())
    count = sum(map(len, ascending))
    # Edges are values that occur, each once, so that no bucket is empty.
    places = np.arange(1, options.quantiles) * count // options.quantiles
    least, edges = _at(ascending, np.array([0])), np.unique(_at(ascending, places))
    edges = edges[edges > least[0]] if count else edges
    below = sum((np.searchsorted(part, edges, "left") for part in ascending), np.zeros(len(edges), np.int64))
    edges = _apart(edges, below, count, options.min_users)
    enough = count >= options.min_users
    lowest = ["-inf", *(repr(float(edge)) for edge in edges)] if count and enough else []
    vocabulary = pl.DataFrame({"code": pl.int_range(len(lowest), dtype=pl.Int32, eager=True), "value": lowest})

    def encode(part: pl.Series) -> list[pl.Series]:
        numbers = _finite(part)
        found = np.searchsorted(edges, numbers.fill_null(0).to_numpy(), "right").astype(np.int32)
        codes = pl.Series(part.name, found).set(numbers.is_null(), None)
        return [codes if enough else codes.clear(len(codes))]

    return EncodedFeature(_sparse(declared, declared.name, len(lowest)), encode, vocabulary)


def _at(parts: Iterable[np.ndarray], places: np.ndarray) -> np.ndarray:
    """The numbers at places, in ascending order, of what the parts are together; none where there are no numbers."""
    found, begin = [], 0
    for part in parts:
        here = places[(places >= begin) & (places < begin + len(part))] - begin
        found.append(part[here])
        begin += len(part)
    return np.concatenate(found) if found else np.zeros(0)


def _apart(edges: np.ndarray, below: np.ndarray, count: int, least: int) -> np.ndarray:
    """The edges of buckets that each hold at least so many numbers.

    Args:
        below: [edges] numbers that are smaller than each.
        count: numbers in all.
    """
    kept: list[float] = []
    before = 0
    for edge, under in zip(edges, below.tolist(), strict=True):
        if under - before >= least and count - under >= least:
            kept.append(edge)
            before = under
    return np.array(kept, edges.dtype)


def _vector(declared: DeclaredFeature, column: Column, options: PrepareOptions) -> EncodedFeature:
    def lists(part: pl.Series) -> pl.Series:
        return part.cast(pl.List(pl.Float32))

    widths = sorted({width for part in column for width in lists(part).list.len().drop_nulls().unique().to_list()})
    if len(widths) != 1 or widths[0] == 0:
        shown = f"vectors of widths {', '.join(map(str, widths[:5]))}" if widths else "no vector"
        raise DataError(
            f"{declared.entity} feature '{declared.name}': {shown}; a dense feature needs one width above 0 for all"
        )

    def encode(part: pl.Series) -> list[pl.Series]:
        vectors = lists(part)
        finite = vectors.list.eval(pl.element().is_finite().fill_null(False)).list.all()
        return [vectors.set(~finite, None).list.to_array(widths[0])]

    return EncodedFeature(_dense(declared, widths[0]), encode, None)


_LEARNERS = {
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
