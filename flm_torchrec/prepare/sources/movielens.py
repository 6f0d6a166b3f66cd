"""MovieLens 100K (Harper & Konstan, ACM TiiS 2015): GroupLens' own files, or RecBole's atomic ones."""

from __future__ import annotations

from pathlib import Path

import polars as pl

from flm_torchrec.errors import DataError
from flm_torchrec.prepare.sources.source_data import DeclaredFeature, SourceData
from flm_torchrec.prepare.sources.tables import check_unique, read_csv, with_row_numbers

GENRES = (
    "unknown",
    "Action",
    "Adventure",
    "Animation",
    "Children's",
    "Comedy",
    "Crime",
    "Documentary",
    "Drama",
    "Fantasy",
    "Film-Noir",
    "Horror",
    "Musical",
    "Mystery",
    "Romance",
    "Sci-Fi",
    "Thriller",
    "War",
    "Western",
)
"""The flags at the end of a line of u.item, in their order."""
FEATURES = (
    DeclaredFeature("title", "item", "text"),
    DeclaredFeature("release_year", "item", "categorical"),
    DeclaredFeature("genres", "item", "multi_categorical"),
    DeclaredFeature("age", "user", "numeric"),
    DeclaredFeature("gender", "user", "categorical"),
    DeclaredFeature("occupation", "user", "categorical"),
    DeclaredFeature("region", "user", "categorical"),
)


def read(folder: Path) -> SourceData:
    """Read u.data, u.item, u.user, or ml-100k.inter, .item, .user, whichever the folder has.

    Raises:
        DataError: neither set of files is complete, or a column is missing.
    """
    if (folder / "u.data").is_file():
        inter, items, users = _grouplens(folder)
    elif (folder / "ml-100k.inter").is_file():
        inter, items, users = _atomic(folder)
    else:
        raise DataError(f"{folder}: neither u.data nor ml-100k.inter is here; --input must be the folder with them")
    for side, keys in (("item", items["key"]), ("user", users["key"])):
        check_unique(keys, folder, f"id of the {side}s")
    return SourceData(
        name="ml-100k",
        source="movielens-100k",
        interactions=inter.select(
            "file",
            "row",
            "user",
            "item",
            pl.col("timestamp").cast(pl.Float64, strict=False).cast(pl.Int64, strict=False),
            pl.lit("rating").alias("event"),
            pl.col("rating").cast(pl.Float64, strict=False).alias("value"),
        ),
        items=items,
        users=users.with_columns(
            age=pl.col("age").cast(pl.Float64, strict=False), region=pl.col("zip").str.slice(0, 1)
        ),
        features=FEATURES,
        title="title",
    )


def _atomic(folder: Path) -> tuple[pl.DataFrame, pl.DataFrame, pl.DataFrame]:
    inter = {"user_id": "user", "item_id": "item", "rating": "rating", "timestamp": "timestamp"}
    items = {"item_id": "key", "movie_title": "title", "release_year": "release_year", "class": "genres"}
    users = {"user_id": "key", "age": "age", "gender": "gender", "occupation": "occupation", "zip_code": "zip"}
    return (
        with_row_numbers(_named(folder / "ml-100k.inter", inter), folder / "ml-100k.inter"),
        _named(folder / "ml-100k.item", items).with_columns(genres=pl.col("genres").str.split(" ")),
        _named(folder / "ml-100k.user", users),
    )


def _named(file: Path, names: dict[str, str]) -> pl.DataFrame:
    """Atomic columns are called name:type."""
    frame = read_csv(file, "\t", quoted=False)
    present = {column.split(":")[0]: column for column in frame.columns}
    for name in names:
        if name not in present:
            raise DataError(f"{file}: no column '{name}' (it has {', '.join(present)}); download the file again")
    return frame.select(pl.col(present[old]).alias(new) for old, new in names.items())


def _grouplens(folder: Path) -> tuple[pl.DataFrame, pl.DataFrame, pl.DataFrame]:
    inter = read_csv(folder / "u.data", "\t", names=("user", "item", "rating", "timestamp"), quoted=False)
    users = read_csv(folder / "u.user", "|", names=("key", "age", "gender", "occupation", "zip"), quoted=False)
    columns = ("key", "title", "release_date", "video_date", "url", *GENRES)
    items = read_csv(folder / "u.item", "|", names=columns, encoding="latin-1", quoted=False)
    flags = [pl.when(pl.col(g) == "1").then(pl.lit(g)) for g in GENRES]
    items = items.select(
        "key",
        # The year stands in a column of its own; the title repeats it in brackets.
        pl.col("title").str.replace(r"\s*\(\d{4}\)\s*$", ""),
        pl.col("release_date").str.extract(r"(\d{4})").alias("release_year"),
        pl.concat_list(flags).list.drop_nulls().alias("genres"),
    )
    return with_row_numbers(inter, folder / "u.data"), items, users
