"""Prepare a set of the published tables, in its order, with all that is known of items and users.

    python tools/studies/published_data.py --input ../shared/data/beauty --output data/beauty-words
    python tools/studies/published_data.py --input ../shared/data/beauty --people --output data/people/beauty

Amazon sets in S3-Rec's layout with `item_words.tsv` beside them (attributes and key words of items), and MovieLens 1M
as `sequences.txt`, `movies.dat` and `users.dat`. With --people a user's key is the pseudonym of the person in
`user_person.tsv`, which is the same in all sets; without it, the key is a number that means another person in each set.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import polars as pl

import flm_torchrec as flm
from flm_torchrec.prepare.sources import s3rec

COLUMNS = {"user": "user", "item": "item"}


def amazon(folder: Path, people: bool = False) -> dict[str, Any]:
    """What `flm.prepare` takes for a set in S3-Rec's layout with key words of items.

    Args:
        people: users are the persons of `user_person.tsv`.
    """
    source = s3rec.read(folder)
    assert isinstance(source.interactions, pl.DataFrame) and source.items is not None
    events = source.interactions.select("user", "item")
    if people:
        persons = pl.read_csv(folder / "user_person.tsv", separator="\t", infer_schema=False)
        events = events.join(persons, on="user", how="left", maintain_order="left").select("item", user="person")
    words = pl.read_csv(folder / "item_words.tsv", separator="\t", quote_char=None, infer_schema=False)
    # Each set gave its attributes numbers of its own: 7 must not be one value in two sets.
    own = pl.col("attributes").list.eval(pl.format("{}/{}", pl.lit(folder.name), pl.element()))
    return {
        "events": events,
        "items": source.items.join(words, left_on="key", right_on="item", how="left").with_columns(own),
        "item_key": "key",
        "item_features": {"attributes": "multi_categorical", "words": "text"},
    }


def movielens(folder: Path) -> dict[str, Any]:
    """What `flm.prepare` takes for MovieLens 1M: genres and titles of movies; gender, age and occupation of users."""
    movies = _table(folder / "movies.dat", ("item", "title", "genres"))
    users = _table(folder / "users.dat", ("user", "gender", "age", "occupation", "zip"))
    return {
        "events": s3rec.sequences(folder / "sequences.txt").select("user", "item"),
        "items": movies.with_columns(pl.col("genres").str.split("|")),
        "item_key": "item",
        "item_features": {"title": "text", "genres": "multi_categorical"},
        "users": users.drop("zip"),
        "user_key": "user",
        "user_features": {name: "categorical" for name in ("gender", "age", "occupation")},
        "title": "title",
    }


def _table(file: Path, names: tuple[str, ...]) -> pl.DataFrame:
    rows = [line.split("::") for line in file.read_text(encoding="latin-1").splitlines()]
    return pl.DataFrame(rows, schema=dict.fromkeys(names, pl.String), orient="row")


def main() -> None:
    """Read the set that the folder holds, and prepare it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", required=True, type=Path, help="folder of the set")
    parser.add_argument("--people", action="store_true", help="users are persons, by user_person.tsv of an Amazon set")
    parser.add_argument("--output", required=True, help="folder to write")
    args = parser.parse_args()
    options = movielens(args.input) if (args.input / "movies.dat").is_file() else amazon(args.input, args.people)
    data = flm.prepare(options.pop("events"), args.output, columns=COLUMNS, **options)
    print(data.path)


if __name__ == "__main__":
    main()
