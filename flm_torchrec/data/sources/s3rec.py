"""Amazon reviews as preprocessed for S3-Rec (Zhou et al., CIKM 2020): NAME.txt and NAME_item2attributes.json."""

from __future__ import annotations

import json
from pathlib import Path

import polars as pl

from flm_torchrec.data.raw import Declared, Raw
from flm_torchrec.errors import DataError


def read(folder: Path) -> Raw:
    """Read any NAME of that layout: a line a user, `user item item …` in order of time; attributes by item.

    Raises:
        DataError: a file is missing or malformed; names file and line.
    """
    found = sorted(folder.glob("*_item2attributes.json"))
    if len(found) != 1:
        raise DataError(
            f"{folder}: {len(found)} files NAME_item2attributes.json; --input must be a folder with one, and NAME.txt"
        )
    name = found[0].name.removesuffix("_item2attributes.json")
    return Raw(
        name=name.lower(),
        source="amazon-s3rec",
        interactions=_sequences(folder / f"{name}.txt"),
        items=_attributes(found[0]),
        features=(Declared("attributes", "item", "multi_categorical"),),
        timestamps=False,
    )


def _sequences(file: Path) -> pl.DataFrame:
    if not file.is_file():
        raise DataError(f"{file}: not found; it must stand beside the attributes")
    users, items, lines = [], [], []
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), start=1):
        user, *sequence = line.split()[:1] + line.split()[1:] or [""]
        if not sequence:
            raise DataError(f"{file}:{number}: needs a user and at least one item, separated by spaces")
        users.append(user)
        items.append(sequence)
        lines.append(number)
    if not users:
        raise DataError(f"{file}: is empty")
    frame = pl.DataFrame({"file": file.name, "row": lines, "user": users, "item": items})
    places = pl.col("item").list.len().map_elements(lambda n: list(range(n)), return_dtype=pl.List(pl.Int64))
    return (
        frame.with_columns(timestamp=places)
        .explode("item", "timestamp")
        .with_columns(event=pl.lit("review"), value=pl.lit(1.0))
    )


def _attributes(file: Path) -> pl.DataFrame:
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
        values = [[str(a) for a in attributes] for attributes in record.values()]
    except (ValueError, AttributeError, TypeError) as error:
        raise DataError(f"{file}: must be JSON of the form {{item: [attribute, …]}} ({error})") from error
    return pl.DataFrame({"key": list(record), "attributes": values}, schema_overrides={"attributes": pl.List(pl.String)})
