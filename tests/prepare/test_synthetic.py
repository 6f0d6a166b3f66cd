"""What the synthetic source plants, and that its oracle knows it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flm_torchrec.cli import main
from flm_torchrec.data.dataset import load_prepared
from flm_torchrec.errors import DataError
from flm_torchrec.prepare.options import PrepareOptions
from flm_torchrec.prepare.prepare import prepare
from flm_torchrec.prepare.sources import synthetic
from flm_torchrec.prepare.sources.source_data import SourceData
from flm_torchrec.prepare.sources.synthetic import MECHANISMS, Recipe
from tests.conftest import rows_of

SMALL = Recipe(users=1200, items=400, events=24, seed=3)


@pytest.fixture(scope="module")
def raw() -> SourceData:
    return synthetic.read(SMALL)


def codes(raw: SourceData) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """User, item and segment of each event, in order."""
    rows = rows_of(raw)
    user, item = (rows[name].str.slice(1).cast(int).to_numpy() for name in ("user", "item"))
    return user, item, rows["segment"].to_numpy()


@settings(max_examples=15)
@given(
    users=st.integers(10, 300), items=st.integers(100, 200), events=st.integers(3, 25), seed=st.integers(0, 99),
    strengths=st.tuples(*[st.sampled_from([0.0, 0.5, 2.0])] * 3).filter(any),
)  # fmt: skip
def test_any_recipe_gives_whole_users_with_no_item_twice(users, items, events, seed, strengths) -> None:  # type: ignore[no-untyped-def]
    content, collaborative, sequential = strengths
    recipe = Recipe(users, items, events, content, collaborative, sequential, seed=seed)
    raw = synthetic.read(recipe)
    rows = rows_of(raw)
    assert rows["user"].n_unique() == users
    assert rows.select("user", "item").is_unique().all()
    assert (rows.group_by("user").len()["len"] >= 3).all()
    assert set(rows["segment"]) <= {m for m, s in zip(MECHANISMS, strengths, strict=True) if s}
    # Ascending in a user, so that the last row is the last event.
    times = rows["timestamp"].to_numpy()
    assert (np.diff(times)[np.diff(codes(raw)[0]) == 0] > 0).all()
    assert rows.equals(rows_of(synthetic.read(recipe)))


def test_shares_and_lengths_follow_the_recipe() -> None:
    recipe = Recipe(users=500, items=200, events=20, content=1, collaborative=0, sequential=3)
    rows = rows_of(synthetic.read(recipe))
    shares = dict(rows["segment"].value_counts(normalize=True).iter_rows())
    assert shares["sequential"] == pytest.approx(0.75, abs=0.02) and "collaborative" not in shares
    assert len(rows) / 500 == pytest.approx(20, rel=0.05)


def test_another_seed_gives_other_data(raw: SourceData) -> None:
    assert not rows_of(raw).equals(rows_of(synthetic.read(Recipe(users=1200, items=400, events=24, seed=4))))


def test_popularity_is_skewed_but_moderately(raw: SourceData) -> None:
    counts = np.sort(np.bincount(codes(raw)[1], minlength=SMALL.items))[::-1]
    top = counts[: SMALL.items // 10].sum() / counts.sum()
    assert 0.15 < top < 0.5


def test_an_event_follows_the_planted_successors_where_the_sequence_drew_it(raw: SourceData) -> None:
    user, item, segment = codes(raw)
    same = np.flatnonzero(user[1:] == user[:-1])
    pair = item[same] * SMALL.items + item[same + 1]
    counts = np.bincount(pair, minlength=SMALL.items**2)
    by = {m: (counts[pair[segment[same + 1] == m]] >= 4).mean() for m in MECHANISMS}
    assert by["sequential"] > 0.7 and max(by["content"], by["collaborative"]) < 0.1


def test_content_events_share_visible_features_and_collaborative_ones_do_not(raw: SourceData) -> None:
    user, item, segment = codes(raw)
    assert raw.items is not None and raw.users is not None
    genre = raw.items["genre"].to_numpy()
    interests = raw.users["interests"].to_list()
    told = np.array([genre[i] in interests[u] for u, i in zip(user, item, strict=True)])
    chance = told[segment == "sequential"].mean()
    assert told[segment == "content"].mean() > 2.5 * chance
    assert told[segment == "collaborative"].mean() == pytest.approx(chance, abs=0.04)


def popularity(raw: SourceData) -> dict[str, float]:
    """NDCG@10 of ranking each user's last item by the count of all earlier events, by segment."""
    user, item, segment = codes(raw)
    last = np.append(user[1:] != user[:-1], True)
    counts = np.bincount(item[~last], minlength=SMALL.items).astype(float)
    scores = np.tile(counts, (SMALL.users, 1))
    truth = scores[user[last], item[last]]
    scores[user[~last], item[~last]] = -1
    gain = (ranks := (scores >= truth[:, None]).sum(1)) <= 10
    ndcg = gain / np.log2(ranks + 1)
    return {m: ndcg[segment[last] == m].mean() for m in MECHANISMS}


def test_each_mechanism_alone_is_far_above_popularity_on_its_segment(raw: SourceData) -> None:
    assert raw.oracle is not None
    base = popularity(raw)
    for name in MECHANISMS:
        assert raw.oracle[f"only_{name}"]["ndcg@10"] > 5 * base[name], name


def test_the_oracle_ranks_by_the_probability_that_draws() -> None:
    """Expected HR@10, computed from the probabilities, agrees with what was drawn from them."""
    recipe = Recipe(users=3000, items=150, events=9, seed=1)
    rng = np.random.default_rng(recipe.seed)
    world = synthetic._world(recipe, np.full(3, 1 / 3), rng)
    drawn = synthetic._draw(recipe, world, rng)
    expected = []
    for u, (items, length) in enumerate(zip(drawn.item, drawn.lengths, strict=True)):
        earlier, user = items[: length - 1], np.array([u])
        p = np.zeros(recipe.items)
        for table in (
            synthetic._content(world, user), synthetic._collaborative(world, user),
            synthetic._sequential(world, earlier[-1:]),
        ):  # fmt: skip
            left = table[0].copy()
            left[earlier] = 0
            p += left / left.sum() / 3
        expected.append(np.sort(p)[-10:].sum())
    found = synthetic._oracle(synthetic._truth(world, drawn))["all"]["hr@10"]
    assert found == pytest.approx(np.mean(expected), abs=4 * 0.5 / np.sqrt(recipe.users))


def test_the_oracle_of_one_mechanism_is_that_of_the_mixture_where_there_is_no_other() -> None:
    oracle = synthetic.read(Recipe(users=100, items=120, events=10, content=0, sequential=0)).oracle
    assert oracle is not None and set(oracle) == {"all", "collaborative", "only_collaborative"}
    assert oracle["all"] == oracle["collaborative"] == oracle["only_collaborative"]


def test_prepared_it_says_that_it_is_made_up(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--synthetic-users", "50", "--synthetic-items", "120", "--synthetic-events", "6"]
    assert main(["prepare", "--output", str(tmp_path / "d"), *options]) == 0
    shown = capsys.readouterr().out
    assert "synthetic: made up" in shown and f"next: flm train --data.path {tmp_path / 'd'}" in shown
    report = json.loads((tmp_path / "d" / "report.json").read_text())
    assert report["source"] == "synthetic" and "made up" in report["synthetic"] and report["oracle"]["all"]
    data = load_prepared(tmp_path / "d")
    assert data.schema.source == "synthetic" and data.segment is not None and data.user_keys[:2] == ["u0", "u1"]
    assert data.user_keys[2] == "u2" and data.titles[0].startswith("The ")


def test_the_oracle_is_not_told_of_thinned_out_data(tmp_path: Path) -> None:
    raw = synthetic.read(Recipe(users=50, items=120, events=6))
    report = prepare(raw, tmp_path / "d", PrepareOptions(k_core=3))
    assert 0 < report["rows_kept"] < report["rows_read"] and "oracle" not in report


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        (Recipe(users=1), "do not go together"),
        (Recipe(items=100, events=26), "do not go together"),
        (Recipe(content=-1.0), "strengths must be finite"),
        (Recipe(content=float("nan")), "strengths must be finite"),
        (Recipe(content=0, collaborative=0, sequential=0), "one of them above 0"),
        (Recipe(seed=-1), "seed -1 must be 0 or more"),
    ],
)
def test_impossible_recipes_are_refused(recipe: Recipe, message: str) -> None:
    with pytest.raises(DataError, match=message):
        synthetic.read(recipe)
