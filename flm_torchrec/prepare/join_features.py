"""Features of several prepared data sets → one set: values by what they are, numbers on one scale, words as hashed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from flm_torchrec.data.dataset import DOMAIN
from flm_torchrec.data.schema import Entity, Feature, Schema
from flm_torchrec.errors import DataError
from flm_torchrec.names import nearest
from flm_torchrec.prepare.blocks import blocks
from flm_torchrec.safe_text import first_line


@dataclass(frozen=True)
class Domain:
    """One of the prepared data sets that are joined."""

    name: str
    folder: Path
    schema: Schema
    fingerprint: str

    def parts(self, entity: Entity) -> Iterator[pl.DataFrame]:
        """users.parquet or items.parquet in blocks, in order of id.

        Raises:
            DataError: the file is missing or broken, has another number of rows than the schema says, or another order.
        """
        file, rows = self.folder / f"{entity}s.parquet", 0
        try:
            for part in blocks([file], pq.read_schema(file).names):
                if (part[f"{entity}_id"] != pl.int_range(rows, rows + len(part), dtype=pl.Int64, eager=True)).any():
                    raise DataError(f"{file}: its rows are not in order of {entity}_id; prepare the data again")
                rows += len(part)
                yield part
        except (OSError, pa.ArrowException, pl.exceptions.PolarsError) as error:
            raise _unreadable(file, error) from error
        wanted = self.schema.users if entity == "user" else self.schema.items
        if rows != wanted:
            raise DataError(f"{self.folder}: {entity}s.parquet has {rows} rows, schema.yaml says {wanted}")

    def values(self, feature: Feature) -> pl.Series:
        """[codes] String: the value behind each code of a feature of this domain."""
        file = self.folder / "vocab" / f"{feature.entity}_{feature.name}.parquet"
        return _read(file).sort("code")["value"].cast(pl.String)

    def feature(self, entity: Entity, name: str) -> Feature | None:
        """The feature of that name, if the domain has it."""
        return next((f for f in self.schema.features if (f.entity, f.name) == (entity, name)), None)


@dataclass(frozen=True)
class JointFeature:
    """One feature of the joint data."""

    feature: Feature
    vocabulary: pl.DataFrame | None
    """Columns code and value, of kinds with values."""
    apart: bool
    """Values of two domains are never the same, even if they are written alike."""

    @property
    def coded(self) -> bool:
        """True for the kinds whose values have codes."""
        return self.vocabulary is not None

    def reader(self, domain: Domain) -> Callable[[pl.DataFrame], list[pl.Series]]:
        """What makes the columns of rows of a domain, in the codes of the joint data.

        Numbers are as before they were standardised.
        """
        own = domain.feature(self.feature.entity, self.feature.name)
        codes = self._codes(domain, own) if self.coded and own is not None else None
        return lambda rows: self._columns(own, codes, rows)

    def _columns(self, own: Feature | None, codes: pl.Series | None, rows: pl.DataFrame) -> list[pl.Series]:
        feature = self.feature
        extra = [_texts(own, rows, feature.name)] if feature.kind == "text" else []
        if own is None:
            return [*extra, pl.Series(feature.column, [None] * len(rows), dtype=_type(feature))]
        column = rows[own.column].rename(feature.column)
        if feature.kind == "numeric":
            column = column.cast(pl.Float64) * own.deviation + own.mean
        elif codes is not None:
            column = _recoded(column, codes)
        return [*extra, column.cast(_type(feature))]

    def codes(self, domain: Domain) -> np.ndarray:
        """[codes of the domain] int32: the code of each in the joint data; empty where the domain lacks the feature."""
        own = domain.feature(self.feature.entity, self.feature.name)
        return np.zeros(0, np.int32) if own is None else self._codes(domain, own).to_numpy()

    def _codes(self, domain: Domain, own: Feature) -> pl.Series:
        assert self.vocabulary is not None
        values = pl.DataFrame({"value": named(domain, domain.values(own), self.apart)})
        return values.join(self.vocabulary, "value", "left", maintain_order="left")["code"]


def joint_features(domains: Sequence[Domain], apart: Sequence[str]) -> list[JointFeature]:
    """The features that any domain has, in the order in which the domains name them.

    Args:
        apart: names of features whose values mean something else in each domain.

    Raises:
        DataError: two domains have one feature in two ways, or no domain has a feature that is named.
    """
    first: dict[tuple[Entity, str], tuple[Domain, Feature]] = {}
    for domain in domains:
        for feature in domain.schema.features:
            if (feature.entity, DOMAIN) in (("item", feature.column), ("item", feature.name)):
                raise DataError(
                    f"{domain.folder}: item feature '{DOMAIN}': joint data have a column of that name; rename it"
                )
            other, same = first.setdefault((feature.entity, feature.name), (domain, feature))
            _check_alike(other, same, domain, feature)
    names = [name for _, name in first]
    for name in apart:
        if name not in names:
            raise DataError(f"--apart '{name}': no domain has such a feature; {nearest(name, names)}")
    return [_joint(feature, domains, apart) for _, feature in first.values()]


def named(domain: Domain, values: pl.Series, apart: bool) -> pl.Series:
    """Values as the joint data write them: with the domain's name before them if they mean something else elsewhere."""
    return domain.name + "/" + values if apart else values


def _joint(feature: Feature, domains: Sequence[Domain], apart: Sequence[str]) -> JointFeature:
    if not feature.sparse or feature.kind == "text":
        return JointFeature(feature, None, False)
    values = []
    for domain in domains:
        sharing = [f for f in domain.schema.features if f.table == feature.table]
        values += [named(domain, domain.values(f), f.name in apart) for f in sharing]
    distinct = pl.concat(values).unique()
    if feature.kind == "quantile":
        distinct = distinct.to_frame("value").sort(pl.col("value").cast(pl.Float64), "value")["value"]
    else:
        distinct = distinct.sort()
    vocabulary = pl.DataFrame({"code": pl.int_range(len(distinct), dtype=pl.Int32, eager=True), "value": distinct})
    return JointFeature(replace(feature, cardinality=max(1, len(distinct))), vocabulary, feature.name in apart)


def _check_alike(one: Domain, feature: Feature, other: Domain, same: Feature) -> None:
    """Raise DataError where two domains have one feature in two ways; the message names both folders."""
    compared = ["kind", "table", "column"]
    compared += {"text": ["cardinality", "ngrams"], "dense": ["width", "encoder"]}.get(feature.kind, [])
    for name in compared:
        before, now = getattr(feature, name), getattr(same, name)
        if before != now:
            raise DataError(
                f"{feature.entity} feature '{feature.name}': its {name} is {before} in {one.folder} and {now} in"
                f" {other.folder}; prepare both alike, or give one of the features another name"
            )
    if feature.kind == "numeric" and not (feature.deviation and same.deviation):
        folder = other.folder if feature.deviation else one.folder
        raise DataError(f"{folder}: feature '{feature.name}' has no deviation in schema.yaml; prepare the data again")


def _type(feature: Feature) -> pl.DataType:
    if feature.kind == "dense":
        return pl.Array(pl.Float32, feature.width)
    if feature.kind == "numeric":
        return pl.Float64()
    return pl.List(pl.Int32) if feature.kind in ("multi_categorical", "text") else pl.Int32()


def _recoded(column: pl.Series, codes: pl.Series) -> pl.Series:
    """Codes of a domain, or lists of them → those of the joint data, by [codes of the domain]."""
    before = pl.Series(range(len(codes)), dtype=pl.Int32)

    def code(of: pl.Expr) -> pl.Expr:
        return of.replace_strict(before, codes, default=None, return_dtype=pl.Int32)

    of = pl.col(column.name)
    listed = isinstance(column.dtype, pl.List)
    return column.to_frame().select(of.list.eval(code(pl.element())) if listed else code(of)).to_series()


def _texts(own: Feature | None, rows: pl.DataFrame, name: str) -> pl.Series:
    texts = rows[name] if own is not None and name in rows.columns else pl.Series([None] * len(rows), dtype=pl.String)
    return texts.rename(name)


def _read(file: Path) -> pl.DataFrame:
    try:
        return pl.read_parquet(file)
    except (OSError, pl.exceptions.PolarsError) as error:
        raise _unreadable(file, error) from error


def _unreadable(file: Path, error: Exception) -> DataError:
    return DataError(f"{file}: not readable ({first_line(error)}); prepare the data again")
