"""Joint data: each domain's part is that domain's data, users are shared by key, and nothing wrong is joined."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flm_torchrec.claim import claim
from flm_torchrec.cli import main
from flm_torchrec.data.dataset import PreparedData, fingerprint_of, load_prepared
from flm_torchrec.data.keys import tombstone
from flm_torchrec.data.schema import Feature, Schema
from flm_torchrec.data.splits import Examples, SplitSettings, split
from flm_torchrec.data.survey import load_streamed
from flm_torchrec.errors import DataError
from flm_torchrec.prepare.join import Joining, join, made_of
from flm_torchrec.prepare.joined import join_once

BRANDS = ["acme", "bolt", "crux"]


@dataclass(frozen=True)
class Made:
    """A domain to write: by user the items in order, by item its brand, its words and its price."""

    users: dict[str, list[int]]
    brands: list[int]
    words: list[list[int]]
    prices: list[float | None]
    timestamps: bool = True

    def time(self, user: str, place: int) -> int:
        """The time of a user's event: users and domains differ, and some times are equal."""
        return 100 * place + len(self.brands) % 7 + (hash_of(user) % 3) if self.timestamps else place


def hash_of(text: str) -> int:
    """A number of a text, the same in every process."""
    return sum(map(ord, text))


def write(folder: Path, made: Made, features: Sequence[Feature] = ()) -> Path:
    """Write prepared data by hand: faster than a preparation."""
    (folder / "interactions").mkdir(parents=True)
    (folder / "vocab").mkdir()
    known = sorted({brand for brand in made.brands})
    names = [BRANDS[brand] for brand in known]
    prices = pl.Series(made.prices, dtype=pl.Float64)
    mean, spread = float(prices.mean() or 0.0), float(prices.std() or 1.0)  # type: ignore[arg-type]
    items = pl.DataFrame(
        {
            "item_id": pl.Series(range(len(made.brands)), dtype=pl.Int64),
            "item_key": [f"i{number}" for number in range(len(made.brands))],
            "brand": pl.Series([known.index(brand) for brand in made.brands], dtype=pl.Int32),
            "title": [" ".join(map(str, words)) for words in made.words],
            "title_tokens": pl.Series(made.words, dtype=pl.List(pl.Int32)),
            "price": ((prices - mean) / (spread or 1.0)).cast(pl.Float32),
        }
    )
    rows = [
        (number, item, made.time(user, place), 0, 1.0 + place)
        for number, (user, sequence) in enumerate(made.users.items())
        for place, item in enumerate(sequence)
    ]
    columns = {"user_id": pl.Int64, "item_id": pl.Int64, "timestamp": pl.Int64, "event": pl.Int32, "value": pl.Float32}
    interactions = pl.DataFrame(rows, schema=columns, orient="row")
    interactions.write_parquet(folder / "interactions" / "part-00000.parquet")
    items.write_parquet(folder / "items.parquet")
    pl.DataFrame({"user_id": range(len(made.users)), "user_key": list(made.users)}).write_parquet(
        folder / "users.parquet"
    )
    pl.DataFrame({"code": pl.Series(range(len(names)), dtype=pl.Int32), "value": names}).write_parquet(
        folder / "vocab" / "item_brand.parquet"
    )
    own = (
        Feature("brand", "item", "categorical", "brand", "item_brand", max(1, len(names))),
        Feature("title", "item", "text", "title_tokens", "item_title", 50, ngrams=1),
        Feature("price", "item", "numeric", "price", width=1, mean=mean, deviation=spread or 1.0),
    )
    schema = Schema(
        folder.name,
        "table",
        len(made.users),
        len(items),
        len(rows),
        timestamps=made.timestamps,
        title="title",
        features=tuple(features or own),
    )
    schema.save(folder / "schema.yaml")
    (folder / "report.json").write_text("{}")
    return folder


@st.composite
def domains(draw: st.DrawFn) -> list[Made]:
    """Two or three domains, with and without timestamps, whose users are partly the same."""
    found = []
    for timestamps in draw(st.lists(st.booleans(), min_size=2, max_size=3)):
        count = draw(st.integers(2, 6))
        users = draw(st.lists(st.sampled_from(["u1", "u2", "u10", "v"]), min_size=1, unique=True))
        if draw(st.booleans()):
            users.insert(1, tombstone(1))
        item = st.integers(0, count - 1)
        made = Made(
            {user: draw(st.lists(item, min_size=1, max_size=7)) for user in users},
            draw(st.lists(st.integers(0, 2), min_size=count, max_size=count)),
            draw(st.lists(st.lists(st.integers(0, 49), max_size=3), min_size=count, max_size=count)),
            draw(st.lists(st.none() | st.integers(-9, 9).map(float), min_size=count, max_size=count)),
            timestamps,
        )
        found.append(made)
    return found


def events_of(data: PreparedData, domain: str = "") -> dict[str, list[tuple[str, float]]]:
    """By user, item and value of the events in order; of one domain, with its own keys."""
    found = defaultdict(list)
    for number, (start, end) in enumerate(zip(data.offsets[:-1], data.offsets[1:], strict=True)):
        user = user_of(data, number)
        for row in range(start, end):
            key = data.item_keys[data.item[row]]
            if key.startswith(f"{domain}/") or not domain:
                found[user].append((key.removeprefix(f"{domain}/"), float(data.value[row])))
    return dict(found)


def predicted(data: PreparedData, examples: Examples, domain: str = "") -> set[tuple[str, str, int]]:
    """User, item and number of known events of the domain, of each example of it."""
    found = set()
    for user, end in zip(examples.user, examples.end, strict=True):
        key = data.item_keys[data.item[end]]
        known = [data.item_keys[item] for item in data.item[data.offsets[user] : end]]
        if key.startswith(f"{domain}/") or not domain:
            mine = [other for other in known if other.startswith(f"{domain}/") or not domain]
            found.add((user_of(data, user), key.removeprefix(f"{domain}/"), len(mine)))
    return found


def described(data: PreparedData, domain: str = "") -> list[tuple[object, ...]]:
    """Key, brand, words and price of the items, of one domain or of all."""
    brands = pl.read_parquet(data.path / "vocab" / "item_brand.parquet")["value"].to_list()
    price = next(f for f in data.schema.features if f.name == "price")
    found = []
    for item, key in enumerate(data.item_keys):
        if key.startswith(f"{domain}/") or not domain:
            brand = [brands[code] for code in data.items.sparse["brand"].row(item)]
            words = data.items.sparse["title"].row(item).tolist()
            number = float(data.items.dense[item, 0]) * price.deviation + price.mean
            found.append(
                (
                    key.removeprefix(f"{domain}/"),
                    *brand,
                    words,
                    data.titles[item].removeprefix(f"{domain}/"),
                    round(number, 3),
                )
            )
    return found


@settings(max_examples=12)
@given(domains())
def test_each_domain_keeps_its_events_features_and_split(made: list[Made]) -> None:
    with TemporaryDirectory() as temporary:
        folders = [write(Path(temporary) / f"d{number}", one) for number, one in enumerate(made)]
        join(folders[::-1], Path(temporary) / "joint")
        join(folders, Path(temporary) / "again")
        assert fingerprint_of(Path(temporary) / "joint") == fingerprint_of(Path(temporary) / "again")
        joint = load_prepared(Path(temporary) / "joint")
        assert joint.schema.timestamps == all(one.timestamps for one in made)
        times = [joint.timestamp[a:b] for a, b in zip(joint.offsets[:-1], joint.offsets[1:], strict=True)]
        assert all((np.diff(time) >= 0).all() for time in times)
        if not joint.schema.timestamps:
            check_order(joint)
        splits, mask = None, None
        if any(len(events) > 2 for one in made for events in one.users.values()):
            splits = split(joint, "leave-one-out", 0.1)
            mask = splits.train_mask(joint)
        for folder in folders:
            check_part(joint, folder)
            if splits is not None and mask is not None:
                check_split(joint, splits, mask, folder)


def check_order(joint: PreparedData) -> None:
    """Without timestamps a user's events of a domain stay together, and users begin with each domain in turn."""
    assert joint.item_domain is not None
    count = len(joint.schema.domains)
    for user, (start, end) in enumerate(zip(joint.offsets[:-1], joint.offsets[1:], strict=True)):
        found = joint.item_domain[joint.item[start:end]]
        own = [one for one in np.roll(np.arange(count), user % count) if one in found]
        assert found[np.diff(found, prepend=-1) != 0].tolist() == own


def check_part(joint: PreparedData, folder: Path) -> None:
    """The part of a domain has the domain's events in their order, and its features."""
    alone, name = load_prepared(folder), folder.name
    assert events_of(joint, name) == events_of(alone)
    for mine, theirs in zip(described(alone), described(joint, name), strict=True):
        if alone.items.dense[int(str(mine[0])[1:]), 0] == 0:  # unknown, or the mean
            mine, theirs = mine[:-1], theirs[:-1]
        assert mine == theirs
    assert joint.item_domain is not None
    number = joint.schema.domains.index(name)
    assert [key.startswith(f"{name}/") for key in joint.item_keys] == (joint.item_domain == number).tolist()


def user_of(data: PreparedData, row: int) -> str:
    """The key of a user; all who were forgotten are one, of which a domain has one at most."""
    key = data.user_keys[row]
    return "gone" if key == tombstone(row) else key


def check_split(joint: PreparedData, splits: object, mask: np.ndarray, folder: Path) -> None:
    """The domain's validation, test and training events are those of its own split."""
    alone, name = load_prepared(folder), folder.name
    try:
        own = split(alone, "leave-one-out", 0.1)
    except DataError:
        return
    for part in ("valid", "test"):
        assert predicted(joint, getattr(splits, part), name) == predicted(alone, getattr(own, part))
    assert joint.item_domain is not None
    here = joint.item_domain[joint.item] == joint.schema.domains.index(name)
    assert mask[here].sum() == own.train_mask(alone).sum()


def two(folder: Path, **changes: object) -> list[Path]:
    """Two domains with one user in both."""
    shop = Made({"u1": [0, 1, 2, 0], "u2": [2, 1, 0]}, [0, 1, 2], [[1], [2], []], [1.0, 2.0, None])
    books = Made({"u2": [1, 0, 1, 1, 0], "w": [0, 1, 1]}, [2, 0], [[1, 2], [3]], [5.0, 7.0])
    return [write(folder / "shop", replace(shop, **changes)), write(folder / "books", books)]  # type: ignore[arg-type]


def test_joint_data_do_not_depend_on_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Users and items are read a block at a time, and a block may be one row."""
    folders = [str(folder) for folder in two(tmp_path)]
    for folder in folders:
        users = pl.read_parquet(f"{folder}/users.parquet")
        age = pl.Series("age", [None if n % 2 else n - 0.5 for n in range(len(users))], pl.Float32)
        users.with_columns(age).write_parquet(f"{folder}/users.parquet")
        schema = Schema.load(Path(folder) / "schema.yaml")
        more = Feature("age", "user", "numeric", "age", width=1, mean=40.0, deviation=2.0)
        replace(schema, features=(*schema.features, more)).save(Path(folder) / "schema.yaml")
    join(folders, tmp_path / "one")
    monkeypatch.setattr("flm_torchrec.prepare.blocks.BLOCK", 1)
    assert main(["join", *folders, "--output", str(tmp_path / "many"), "--memory", "100MiB"]) == 0
    assert fingerprint_of(tmp_path / "one") == fingerprint_of(tmp_path / "many")
    users = pl.read_parquet(tmp_path / "many" / "users.parquet")
    ages = dict(zip(users["user_key"], users["age"].is_null(), strict=True))
    assert ages == {"u1": False, "u2": False, "w": True}, "u2 has no age in the shop, and one in the books"
    assert main(["join", *folders, "--output", str(tmp_path / "no"), "--memory", "9MiB"]) == 2


@pytest.mark.parametrize("entity", ["user", "item"])
def test_rows_that_are_not_in_order_are_refused(tmp_path: Path, entity: str) -> None:
    folders = two(tmp_path)
    file = folders[1] / f"{entity}s.parquet"
    pl.read_parquet(file).reverse().write_parquet(file)
    with pytest.raises(DataError, match=rf"books/{entity}s.parquet: its rows are not in order of {entity}_id"):
        join(folders, tmp_path / "joint")
    pl.read_parquet(file).reverse().head(1).write_parquet(file)
    with pytest.raises(DataError, match=rf"{entity}s.parquet has 1 rows, schema.yaml says 2"):
        join(folders, tmp_path / "joint")


def test_streamed_joint_data_are_split_as_in_memory(tmp_path: Path) -> None:
    join(two(tmp_path), tmp_path / "joint")
    whole = load_prepared(tmp_path / "joint")
    for kind in ("leave-one-out", "cold-start", "time"):
        splits = split(whole, kind, 0.3)
        streamed = load_streamed(tmp_path / "joint", "all", SplitSettings(kind, 0.3), 10, 0)
        np.testing.assert_array_equal(streamed.stream.train_end, splits.train_end)
        np.testing.assert_array_equal(streamed.stream.counts, whole.item_counts(splits.train_mask(whole)))
        user = whole.event_users()
        assert streamed.stream.rule is not None
        mask = (np.arange(len(user)) < splits.train_end[user]) & ~streamed.stream.rule.held_out(
            user, whole.item, whole.event
        )
        np.testing.assert_array_equal(mask, splits.train_mask(whole))


def test_a_time_split_predicts_the_first_event_of_each_domain(tmp_path: Path) -> None:
    join(two(tmp_path), tmp_path / "joint")
    data = load_prepared(tmp_path / "joint")
    assert data.item_domain is not None
    splits = split(data, "time", 0.4)
    pairs = list(zip(splits.test.user, data.item_domain[data.item[splits.test.end]], strict=True))
    assert len(set(pairs)) == len(pairs) > len(set(splits.test.user))


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (lambda a, b: [a, a], "is given twice"),
        (lambda a, b: [a], "one folder"),
        (lambda a, b: [a, b.parent / "nothing"], "schema.yaml: not found"),
        (
            lambda a, b: [a, write(b.parent / "other" / "shop", Made({"u": [0]}, [0, 1], [[], []], [1.0, 2.0]))],
            "rename",
        ),
        (lambda a, b: [a, write(b.parent / "one", Made({"u": [0]}, [0], [[]], [1.0]))], "has one item"),
        (lambda a, b: [a, _of_kind(b, kind="multi_categorical")], "its kind is multi_categorical in"),
        (lambda a, b: [a, _of_kind(b, table="other")], "its table is other in"),
        (lambda a, b: [a, _of_kind(b, number=1, cardinality=60)], "its cardinality is 60 in"),
        (lambda a, b: [a, _of_kind(b, number=0, name="domain")], "item feature 'domain'"),
    ],
)
def test_what_cannot_be_joined_is_told_in_a_line(tmp_path: Path, spoil, told: str, capsys) -> None:  # type: ignore[no-untyped-def]
    folders = spoil(*two(tmp_path))
    assert main(["join", *map(str, folders), "--output", str(tmp_path / "joint")]) == 2
    error = capsys.readouterr().err
    assert told in error and error.count("\n") == 1
    assert not (tmp_path / "joint").exists() and not list(tmp_path.glob(".*"))


def _of_kind(folder: Path, number: int = 0, **changes: object) -> Path:
    """The domain with another feature."""
    schema = Schema.load(folder / "schema.yaml")
    features = list(schema.features)
    features[number] = replace(features[number], **changes)  # type: ignore[arg-type]
    replace(schema, features=tuple(features)).save(folder / "schema.yaml")
    return folder


def test_processes_of_one_job_join_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folders, output = two(tmp_path), tmp_path / "run-data"
    written: list[Path] = []
    monkeypatch.setattr("flm_torchrec.prepare.joined.POLL", 0.01)
    write_to = Joining.write_to

    def counted(joining: Joining, folder: Path) -> dict[str, Any]:
        """Write, and note where."""
        written.append(folder)
        return write_to(joining, folder)

    monkeypatch.setattr(Joining, "write_to", counted)
    with ThreadPoolExecutor(3) as pool:
        with claim(output):
            waiting = [pool.submit(join_once, folders, output) for _ in range(3)]
            time.sleep(0.05)
            assert not any(one.done() for one in waiting) and not output.exists()
        for one in waiting:
            one.result()
    assert written == [output] and made_of(output).keys() == {"books", "shop"}


def test_values_can_be_kept_apart(tmp_path: Path) -> None:
    folders = [str(folder) for folder in two(tmp_path)]
    assert main(["join", *folders, "--apart", "brand", "--output", str(tmp_path / "joint")]) == 0
    values = pl.read_parquet(tmp_path / "joint" / "vocab" / "item_brand.parquet")["value"].to_list()
    assert values == ["books/acme", "books/crux", "shop/acme", "shop/bolt", "shop/crux"]
    with pytest.raises(DataError, match=r"--apart 'brnd'.*brand"):
        join(folders, tmp_path / "other", ["brnd"])


def test_a_runs_joint_data_are_made_once_and_refused_when_the_sources_change(tmp_path: Path) -> None:
    folders, joint = two(tmp_path), tmp_path / "run-data"
    join_once(folders, joint)
    made = (joint / "report.json").stat().st_mtime_ns
    join_once(folders[::-1], joint)
    assert (joint / "report.json").stat().st_mtime_ns == made
    users = pl.read_parquet(folders[0] / "users.parquet").with_columns(user_key=pl.Series(["u1", "x"]))
    users.write_parquet(folders[0] / "users.parquet")
    with pytest.raises(DataError, match=r"was not made of what .*shop.* hold now"):
        join_once(folders, joint)
    join_once(folders, joint, replace=True)
    assert "x" in load_prepared(joint).user_keys
    (tmp_path / "else").mkdir()
    (tmp_path / "else" / "note.txt").write_text("mine")
    with pytest.raises(DataError, match="holds no prepared data"):
        join_once(folders, tmp_path / "else", replace=True)
    with pytest.raises(DataError, match="is joint data of books, shop"):
        join([joint, folders[0]], tmp_path / "more")
