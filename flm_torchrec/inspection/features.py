"""Features that a model can learn nothing from: unknown, constant, or a name for each row."""

from __future__ import annotations

from flm_torchrec.data.schema import Feature
from flm_torchrec.inspection.inspect import Inspection
from flm_torchrec.pages import PageTable, Section

UNKNOWN = 0.99
"""Share of unknown rows from which a feature is taken for dead."""
UNIQUE = 0.9
"""Values for each row that has one, from which a categorical feature is taken for an id."""
ENOUGH = 100
"""Rows below which all may well differ."""


def look_at_features(data: Inspection) -> None:
    """A line a feature; dead ones are findings."""
    rows = []
    for feature in data.schema.features:
        if feature.entity == "event":
            continue  # the interactions have it
        entity = f"{feature.entity}s"
        entities = data.one(f"SELECT count(*) FROM {entity}")[0]
        filled, values, commonest = (_codes if feature.sparse else _numbers)(data, feature, entity)
        commonest_share = f"{commonest / filled:.1%}" if filled and feature.sparse else ""
        unused = f"{feature.cardinality - values:,}" if feature.sparse and feature.kind != "text" else ""
        share = f"{filled / max(entities, 1):.1%}"
        rows.append((feature.name, feature.entity, feature.kind, share, f"{values:,}", commonest_share, unused))
        if problem := _problem(data, feature, filled, entities, values):
            names = f"{feature.entity} feature '{feature.name}'"
            data.findings.append(f"{names} {problem}: leave it out with --data.features, or prepare without it")
    header = ("feature", "of", "kind", "known", "values", "commonest", "codes never used")
    notes = () if rows else ("none: only ids can be learnt",)
    data.sections.append(Section("Features", notes, [PageTable("", header, rows)] if rows else []))


def _problem(data: Inspection, feature: Feature, filled: int, entities: int, values: int) -> str:
    """What is wrong with a feature; empty: nothing."""
    if filled == 0:
        return "is unknown in every row"
    if filled < entities * (1 - UNKNOWN):
        return f"is unknown in {1 - filled / entities:.1%} of rows"
    if values == 1:
        return "is constant"
    if feature.kind == "categorical" and filled >= ENOUGH and values >= UNIQUE * filled:
        return f"has {values} values in {filled} rows, so it is nearly an id"
    direct = feature.kind != "text" and feature.sparse and data.schema.table(feature.table).kind == "direct"
    if direct and values < feature.cardinality / 2:
        return f"uses {values} of {feature.cardinality} codes, so most of its table is never learnt"
    return ""


def _codes(data: Inspection, feature: Feature, entity: str) -> tuple[int, int, int]:
    """Rows that have a code, codes that occur, rows of the commonest."""
    column = data.column(entity, feature.column)
    listed = feature.kind in ("multi_categorical", "text")
    is_filled = f"len({column}) > 0" if listed else f"{column} IS NOT NULL"
    codes = f"unnest(list_distinct({column}))" if listed else column
    rows = data.one(f"SELECT count(*) FROM {entity} WHERE {is_filled}")[0]
    values, most = data.one(
        f"SELECT count(*), coalesce(max(n), 0) FROM (SELECT code, count(*) AS n FROM (SELECT {codes} AS code FROM"
        f" {entity} WHERE {is_filled}) GROUP BY code)"
    )
    return rows, values, most


def _numbers(data: Inspection, feature: Feature, entity: str) -> tuple[int, int, int]:
    """Rows that have a number or a vector, different ones (about, by a sketch of their hashes), and nothing."""
    column = data.column(entity, feature.column)
    rows, values = data.one(
        f"SELECT count({column}), approx_count_distinct(hash({column})) FILTER ({column} IS NOT NULL) FROM {entity}"
    )
    return rows, values, 0
