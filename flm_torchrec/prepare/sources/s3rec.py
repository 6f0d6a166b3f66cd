"""Amazon reviews as preprocessed for S3-Rec (Zhou et al., CIKM 2020): NAME.txt and NAME_item2attributes.json."""

from __future__ import annotations

import json
from pathlib import Path

import polars as pl

from flm_torchrec.errors import DataError
from flm_torchrec.prepare.sources.source_data import DeclaredFeature, SourceData


def read(folder: Path) -> SourceData:
    """Read the data set NAME: one line a user, `user item item …` in order of time; attributes by item.

    Raises:
        DataError: a file is missing or malformed; names file and line.
    """
    files = sorted(folder.glob("*_item2attributes.json"))
    if len(files) != 1:
        raise DataError(
            f"{folder}: {len(files)} files NAME_item2attributes.json; --input must be a folder with one, and NAME.txt"
        )
    name = files[0].name.removesuffix("_item2attributes.json")
    return SourceData(
        name=name.lower(),
        source="amazon-s3rec",
        interactions=sequences(folder / f"{name}.txt"),
        items=_attributes(files[0]),
        features=(DeclaredFeature("attributes", "item", "multi_categorical"),),
        timestamps=False,
    )


def sequences(file: Path) -> pl.DataFrame:
    """A row an event, in the order of the file: `user item item …` a line.

    Raises:
        DataError: the file is missing, or a line is malformed; names the line.
    """
    if not file.is_file():
        raise DataError(f"{file}: not found; it must stand beside the attributes")
    sequences: dict[str, tuple[int, list[str]]] = {}
    for number, line in enumerate(_text(file).splitlines(), start=1):
        user, *items = line.split() or [""]
        if not items:
            raise DataError(f"{file}:{number}: needs a user and at least one item, separated by spaces")
        if user in sequences:
            first = sequences[user][0]
            raise DataError(f"{file}:{number}: user '{user}' has a line already, {first}; join the two")
        sequences[user] = number, items
    if not sequences:
        raise DataError(f"{file}: is empty; it needs a line a user")
    frame = pl.DataFrame(
        {
            "row": [number for number, _ in sequences.values()],
            "user": list(sequences),
            "item": [items for _, items in sequences.values()],
        }
    )
    return (
        frame.with_columns(timestamp=pl.int_ranges(pl.col("item").list.len()))
        .explode("item", "timestamp")
        .with_columns(file=pl.lit(file.name), event=pl.lit("review"), value=pl.lit(1.0))
    )


def _attributes(file: Path) -> pl.DataFrame:
    try:
        record = json.loads(_text(file))
    except json.JSONDecodeError as error:
        raise DataError(f"{file}:{error.lineno}: not JSON ({error.msg}); mend the file") from error
    if not isinstance(record, dict):
        raise DataError(f"{file}: must be JSON of the form {{item: [attribute, …]}}, not a {type(record).__name__}")
    for item, attributes in record.items():
        if not isinstance(attributes, list):
            raise DataError(f"{file}: item '{item}' must have a list of attributes, not {attributes!r}")
    values = [[str(a) for a in attributes] for attributes in record.values()]
    return pl.DataFrame({"key": list(record), "attributes": values}, schema_overrides=_TYPES)


_TYPES: dict[str, pl.DataType | type[pl.DataType]] = {"key": pl.String, "attributes": pl.List(pl.String)}


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{file}: not UTF-8 at byte {error.start}; save it as UTF-8") from error
