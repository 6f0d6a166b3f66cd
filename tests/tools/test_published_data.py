"""The published sets are prepared in their own order, with what is known of items and users."""

from __future__ import annotations

import json
from pathlib import Path

import polars as pl
import pytest

from flm_torchrec.data.dataset import PreparedData, load_prepared
from tools.studies import published_data

SEQUENCES = "9 5 3 4\n2 3 5\n"


def prepared(folder: Path, monkeypatch: pytest.MonkeyPatch) -> PreparedData:
    """What the tool makes of a folder."""
    output = folder / "prepared"
    monkeypatch.setattr("sys.argv", ["published_data.py", "--input", str(folder), "--output", str(output)])
    published_data.main()
    return load_prepared(output)


def events(data: PreparedData) -> dict[str, list[str]]:
    """The items of each user in order, by the keys of the source."""
    users, items = data.user_keys, data.item_keys
    spans = zip(users, data.offsets[:-1], data.offsets[1:], strict=True)
    return {user: [items[i] for i in data.item[start:end]] for user, start, end in spans}


def test_amazon_with_key_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "Toys.txt").write_text(SEQUENCES)
    (tmp_path / "Toys_item2attributes.json").write_text(json.dumps({"5": [1, 2], "3": [], "4": [2]}))
    (tmp_path / "item_words.tsv").write_text('item\twords\n5\tred "ball\n3\tblue ball\n')
    data = prepared(tmp_path, monkeypatch)
    assert events(data) == {"9": ["5", "3", "4"], "2": ["3", "5"]}
    assert [f.name for f in data.schema.of("item", sparse=True)] == ["attributes", "words"]
    values = pl.read_parquet(data.path / "vocab" / "item_attributes.parquet")["value"].drop_nulls().to_list()
    assert sorted(value for value in values if value) == [f"{tmp_path.name}/1", f"{tmp_path.name}/2"]


def test_movielens_with_people(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sequences.txt").write_text(SEQUENCES)
    (tmp_path / "movies.dat").write_text(
        "3::Amélie (2001)::Comedy|Romance\n4::Heat::Action\n5::Up::\n", encoding="latin-1"
    )
    (tmp_path / "users.dat").write_text("9::F::1::10::48067\n2::M::56::16::70072\n", encoding="latin-1")
    data = prepared(tmp_path, monkeypatch)
    assert events(data) == {"9": ["5", "3", "4"], "2": ["3", "5"]}
    assert [f.name for f in data.schema.of("user", sparse=True)] == ["gender", "age", "occupation"]
