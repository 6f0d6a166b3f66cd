"""Values of features as people write them → codes and numbers, by the values that prepared data have codes for."""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow.parquet as pq

from flm_torchrec.data.keys import stripped
from flm_torchrec.data.schema import DENSE_KINDS, Feature
from flm_torchrec.data.text import split_words, word_bucket
from flm_torchrec.errors import DataError

MOST_DEVIATIONS = 1e6
"""Maximum of a feature in standard deviations: float32 layers give only noise beyond it."""


@dataclass(frozen=True)
class FeatureValues:
    """A feature of items or users, with the values that it has codes for: what a value given by people becomes."""

    name: str
    entity: str
    kind: str
    width: int = 0
    mean: float = 0.0
    deviation: float = 0.0
    buckets: int = 0
    ngrams: int = 1
    values: tuple[str, ...] = ()
    codes: Mapping[str, int] = field(default_factory=dict)
    """By value; for categorical kinds."""

    @classmethod
    def described(cls, description: Mapping[str, Any]) -> FeatureValues:
        """The feature of a description: the fields of this class but `codes`."""
        values = tuple(description.get("values", ()))
        return cls(**{**description, "values": values, "codes": {value: code for code, value in enumerate(values)}})

    @property
    def dense(self) -> bool:
        """True for kinds with numbers, False for kinds with codes."""
        return self.kind in DENSE_KINDS

    def code(self, value: str) -> int | None:
        """The code of a value, None where it has none. White space around it does not count."""
        return self.codes.get(value, self.codes.get(stripped(value)))  # older data may have values with it

    def shown(self, given: Any, known: Container[str]) -> list[str]:
        """The attribute values that people and filters see, as in the catalogue: for a number, its bucket.

        Args:
            known: those of the catalogue. An older one has buckets by their minimum.
        """
        if self.kind == "quantile":
            older = any(value in known for value in self.values)
            names = self.values if older else bucket_names(self.values)
            return [names[code] for code in codes_of(self, given, [])]
        values = given if isinstance(given, list) else [given]
        return [stripped(str(value)) for value in values if value is not None]


def bucket_names(minima: Sequence[str]) -> list[str]:
    """What people and filters call the buckets of numbers, by the minimum of each: "10 to below 20"."""
    edges = [value.removesuffix(".0") for value in minima]
    if len(edges) < 2:
        return ["any number"] * len(edges)
    between = [f"{least} to below {above}" for least, above in pairwise(edges[1:])]
    return [f"below {edges[1]}", *between, f"{edges[-1]} or more"]


def describe(folder: Path, feature: Feature) -> dict[str, Any]:
    """A feature of prepared data as `FeatureValues.described` and `tower.json` have it."""
    described: dict[str, Any] = {"name": feature.name, "entity": feature.entity, "kind": feature.kind}
    if not feature.sparse:
        return {**described, "width": feature.width, "mean": feature.mean, "deviation": feature.deviation}
    if feature.kind == "text":
        return {**described, "buckets": feature.cardinality, "ngrams": max(1, feature.ngrams)}
    vocabulary = pq.read_table(folder / "vocab" / f"{feature.entity}_{feature.name}.parquet").sort_by("code")
    return {**described, "values": vocabulary["value"].to_pylist()}


def codes_of(feature: FeatureValues, given: Any, left_out: list[str], where: str = "features") -> Iterator[int]:
    """The codes of a value, of a kind with codes; none for None.

    Args:
        left_out: gets one line for each value without a code.
        where: what messages call the features.

    Raises:
        DataError: the value does not fit the kind.
    """
    if given is None:
        return
    if feature.kind == "text":
        if not isinstance(given, str):
            raise DataError(f"{where}.{feature.name}: a text, not {_shown(given)}")
        words = split_words(pl.Series([given]), feature.ngrams)[0]
        yield from (word_bucket(word, feature.buckets) for word in words)
        return
    if feature.kind == "quantile":
        if not isinstance(given, int | float):
            raise DataError(f"{where}.{feature.name}: takes one number, not {_shown(given)}")
        if feature.values:  # the minimum of each bucket
            yield int(np.searchsorted([float(v) for v in feature.values], given, "right")) - 1
        return
    several = feature.kind == "multi_categorical"
    values = given if isinstance(given, list) and several else [given]
    for value in values:
        if not isinstance(value, str | int):
            wanted = "texts, or a list of them" if several else "one text"
            raise DataError(f"{where}.{feature.name}: takes {wanted}, not {_shown(value)}")
        code = feature.code(str(value))
        if code is None:
            left_out.append(f"{where}.{feature.name}: '{value}' was not in training")
        else:
            yield code


def numbers_of(feature: FeatureValues, given: Any) -> list[float]:
    """The numbers of a value, of a kind with numbers, standardised; zeros for None.

    Raises:
        DataError: the value does not fit the kind.
    """
    if given is None:
        return [0.0] * feature.width
    values = given if isinstance(given, list) and feature.kind == "dense" else [given]
    if len(values) != feature.width or not all(isinstance(v, int | float) for v in values):
        wanted = "one number" if feature.kind == "numeric" else f"a list of {feature.width} numbers"
        raise DataError(f"features.{feature.name}: takes {wanted}, not {_shown(given)}")
    try:
        numbers = np.array(values, np.float64)
    except OverflowError as error:
        raise DataError(f"features.{feature.name}: a number is too large") from error
    if feature.deviation:
        numbers = (numbers - feature.mean) / feature.deviation
    if not (np.abs(numbers) < MOST_DEVIATIONS).all():
        raise DataError(f"features.{feature.name}: a number is too large")
    return [float(n) for n in numbers]


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else text[:37] + "..."
