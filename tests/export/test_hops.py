"""From an item over users or items to items, with the path; and an export of joint data, which knows its domains."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from fastapi.testclient import TestClient

import flm_torchrec as flm
from flm_torchrec.cli import main
from flm_torchrec.data.dataset import PreparedData
from flm_torchrec.errors import RunError
from flm_torchrec.serve.app import create_app
from flm_torchrec.serve.service import Service
from tests.serve.serving import post, write_export


@pytest.fixture(scope="module")
def export(joint: PreparedData, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An export of joint data."""
    folder = tmp_path_factory.mktemp("joint-export") / "one"
    write_export(joint, folder)
    return folder


@pytest.fixture(scope="module")
def recommender(export: Path) -> flm.Recommender:
    return flm.Recommender(export)


def had(data: PreparedData) -> np.ndarray:
    """[users, items] 1 where the user has had the item."""
    found = np.zeros((data.schema.users, data.schema.items))
    found[data.event_users(), data.item] = 1
    return found


@pytest.mark.parametrize("domain", [None, "books", "shop"])
@pytest.mark.parametrize("row", [3, 150])
def test_over_users_is_a_random_walk(
    joint: PreparedData, recommender: flm.Recommender, row: int, domain: str | None
) -> None:
    walk = had(joint)
    expected = (walk[:, row] / walk[:, row].sum()) @ (walk / walk.sum(1, keepdims=True))
    expected[row] = 0
    if domain is not None:
        assert joint.item_domain is not None
        expected[joint.item_domain != joint.schema.domains.index(domain)] = 0
    wanted = {} if domain is None else {"domain": [domain]}
    found = recommender.hops(joint.item_keys[row], 8, filter=wanted)
    assert isinstance(found, pl.DataFrame) and found["rank"].to_list() == list(range(1, len(found) + 1))
    reached = [joint.item_keys.index(key) for key in found["reached"]]
    best = np.sort(expected)[::-1][: len(found)]
    np.testing.assert_allclose(found["score"], best, rtol=1e-5)
    np.testing.assert_allclose(expected[reached], best, rtol=1e-9)
    for item, via, paths in zip(reached, found["via"], found["paths"], strict=True):
        both = walk[:, row] * walk[:, item]
        lengths = np.where(both > 0, walk.sum(1), np.inf)
        user = joint.user_keys.index(via)
        assert both[user] == 1 and lengths[user] == lengths.min() and paths == both.sum()


@pytest.mark.parametrize(("row", "domain"), [(5, None), (5, "shop"), (200, "books")])
def test_over_items_is_the_best_product_of_cosines(
    joint: PreparedData, recommender: flm.Recommender, row: int, domain: str | None
) -> None:
    vectors = np.stack(recommender.embeddings("items")["embedding"].to_list())  # type: ignore[union-attr]
    cosine = vectors @ vectors.T / np.linalg.norm(vectors, axis=1)[:, None] / np.linalg.norm(vectors, axis=1)
    middle = np.argsort(-np.where(np.arange(len(cosine)) == row, -2, cosine[row]), kind="stable")[:100]
    products = np.maximum(cosine[row, middle], 0)[:, None] * np.maximum(cosine[middle], 0)
    products[np.arange(len(middle)), middle] = 0  # a hop leads away
    expected = products.max(0)
    expected[row] = 0
    if domain is not None:
        assert joint.item_domain is not None
        expected[joint.item_domain != joint.schema.domains.index(domain)] = 0
    wanted = {} if domain is None else {"domain": [domain]}
    found = recommender.hops(joint.item_keys[row], 6, over="items", filter=wanted)
    np.testing.assert_allclose(found["score"], np.sort(expected)[::-1][:6], rtol=1e-4)
    for via, item, score in zip(found["via"], found["reached"], found["score"], strict=True):
        one, other = joint.item_keys.index(via), joint.item_keys.index(item)
        np.testing.assert_allclose(cosine[row, one] * cosine[one, other], score, rtol=1e-4)


def test_the_command_shows_the_path(joint: PreparedData, export: Path, capsys: pytest.CaptureFixture[str]) -> None:
    item = joint.item_keys[3]
    given = ["recommend", "--export", str(export), "--item", item, "-k", "3", "--json"]
    assert main([*given, "--hops", "2", "--domain", "shop"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert len(found) == 3
    for one in found:
        begin, user, end = one["path"]
        assert begin == item and user in joint.user_keys and end == one["item"] and end.startswith("shop/")
    assert main([*given, "--hops", "2", "--over", "items"]) == 0
    assert all(one["path"][1] in joint.item_keys for one in json.loads(capsys.readouterr().out))
    assert main(given) == 0
    assert all(one["path"] == [item, one["item"]] for one in json.loads(capsys.readouterr().out))
    assert main([*given[:-1], "--hops", "2"]) == 0
    assert "→" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (["--user", "user1", "--hops", "2"], "--hops: is of --item"),
        (["--item", "books/item1", "--over", "items"], "--over: is of --hops 2"),
        (["--item", "books/item1", "--include-seen"], "leave them out with --item"),
        (["--item", "nothing", "--hops", "2"], "no item 'nothing'"),
        (["--item", "KEY", "--hops", "2", "-k", "0"], "ask for at least 1 item"),
        (["--item", "KEY", "--hops", "2", "--domain", "toys"], "filter.domain: no value 'toys'"),
    ],
)
def test_wrong_options_are_told(
    joint: PreparedData, export: Path, given: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [joint.item_keys[0] if part == "KEY" else part for part in given]
    assert main(["recommend", "--export", str(export), *given]) == 2
    error = capsys.readouterr().err
    assert told in error and error.count("\n") == 1


def test_an_item_without_users_has_paths_over_items_alone(joint: PreparedData, recommender: flm.Recommender) -> None:
    unseen = np.flatnonzero(had(joint).sum(0) == 0)
    if not len(unseen):
        pytest.skip("every item has a user")
    with pytest.raises(RunError, match=r"no user has had it; ask for paths over items \(--over items\)"):
        recommender.hops(joint.item_keys[unseen[0]])


def test_paths_lead_over_users_or_items(recommender: flm.Recommender, joint: PreparedData) -> None:
    with pytest.raises(RunError, match="--over 'friends': choose users or items"):
        recommender.hops(joint.item_keys[0], over="friends")  # type: ignore[arg-type]


def test_the_service_answers_for_one_domain(joint: PreparedData, export: Path) -> None:
    assert joint.item_domain is not None
    alone = next(
        key
        for key, start, end in zip(joint.user_keys, joint.offsets[:-1], joint.offsets[1:], strict=True)
        if (joint.item_domain[joint.item[start:end]] == 1).all()
    )
    with TestClient(create_app(Service(export))) as client:
        for asked in ({"user": alone}, {"history": [{"item": joint.item_keys[-1]}]}):
            answer = post(client, "/v1/recommend", **asked, k=9, filter={"domain": ["books"]})
            assert len(answer["items"]) == 9 and all(one["item"].startswith("books/") for one in answer["items"])
        refused = client.post("/v1/recommend", json={"user": alone, "filter": {"domain": ["toys"]}})
        assert refused.status_code == 422 and "filter.domain: no value 'toys'" in refused.text
