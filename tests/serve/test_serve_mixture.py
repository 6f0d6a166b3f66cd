"""A served mixture against brute force: users, filters, reasons and cold items."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from fastapi.testclient import TestClient

from flm_torchrec.export.tower.reader import TowerQuery
from flm_torchrec.mixture import Mixture
from flm_torchrec.serve.app import create_app
from flm_torchrec.serve.loaded_export import Query
from flm_torchrec.serve.service import Service
from tests.serve.serving import known, post

SCALE, BIAS = [9.0, 14.0, 11.0], [0.5, -1.0, 0.0]


@pytest.fixture(scope="module")
def folder(exported: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    copied = tmp_path_factory.mktemp("mixture") / "one"
    shutil.copytree(exported, copied)
    record = json.loads((copied / "manifest.json").read_text())
    record["mixture"] = {"scale": SCALE, "bias": BIAS}
    (copied / "manifest.json").write_text(json.dumps(record))
    return copied


@pytest.fixture
def service(folder: Path) -> Service:
    return Service(folder)


@pytest.fixture
def client(service: Service) -> Iterator[TestClient]:
    with TestClient(create_app(service), raise_server_exceptions=False) as client:
        yield client


def brute_force(service: Service, query: TowerQuery) -> np.ndarray:
    """The mixture's score of each item, added ones last."""
    loaded = service.loaded
    (found,) = loaded.represent([query])
    by_head = found.heads[:3].astype(np.float64) @ loaded.vectors(np.arange(loaded.size)).T.astype(np.float64)
    return np.log(np.exp(by_head * np.array(SCALE)[:, None] + np.array(BIAS)[:, None]).sum(0))


@pytest.mark.parametrize(("user", "k"), [("u7", 10), ("u0", 1), ("u31", 1000)])
def test_fused_is_the_mixture_of_all_unseen_items(service: Service, client: TestClient, user: str, k: int) -> None:
    answer = post(client, "/v1/recommend", user=user, k=k)
    loaded, scores = service.loaded, brute_force(service, known(service, user))
    scores[loaded.seen[loaded.user_of[user]].as_py()] = -np.inf
    want = np.sort(scores[np.isfinite(scores)])[::-1][:k]
    found = [(loaded.row(item["item"]), item["score"]) for item in answer["items"]]
    np.testing.assert_allclose([score for _, score in found], want, atol=1e-5)
    np.testing.assert_allclose([scores[row] for row, _ in found], want, atol=1e-5)


def test_one_head_alone_is_its_dot_product(service: Service, client: TestClient) -> None:
    answer = post(client, "/v1/recommend", user="u7", head="content", k=5, exclude_seen=False)
    loaded = service.loaded
    (found,) = loaded.represent([known(service, "u7")])
    scores = np.sort(loaded.vectors(np.arange(loaded.size)) @ found.heads[0])[::-1]
    np.testing.assert_allclose([item["score"] for item in answer["items"]], scores[:5], atol=1e-5)


def test_filters_hold_and_may_leave_nothing(service: Service, client: TestClient) -> None:
    loaded, scores = service.loaded, brute_force(service, known(service, "u3"))
    (genre,) = loaded.catalogue.attributes["genre"].values.to_pylist()[:1]
    rows = [row for row in range(loaded.size) if genre in loaded.attributes(row)["genre"]]
    told = {"user": "u3", "filter": {"genre": [genre]}, "exclude_seen": False}
    answer = post(client, "/v1/recommend", k=4, **told)
    np.testing.assert_allclose([i["score"] for i in answer["items"]], np.sort(scores[rows])[::-1][:4], atol=1e-5)
    history = [{"item": loaded.key(row)} for row in rows]
    none = post(client, "/v1/recommend", history=history, filter={"genre": [genre]}, k=4, explain=True)
    assert none["items"] == []


def test_shares_are_the_heads_parts_of_the_probability(service: Service, client: TestClient) -> None:
    for item in post(client, "/v1/recommend", user="u5", k=6, explain=True)["items"]:
        shares = item["why"]["shares"]
        assert [s["head"] for s in shares] == ["content", "collaborative", "sequential"]
        assert sum(s["share"] for s in shares) == pytest.approx(1)
        assert all(s["weight"] is None for s in shares)
        for share, scale, bias in zip(shares, SCALE, BIAS, strict=True):
            want = np.exp(scale * share["score"] + bias - item["score"])
            assert share["share"] == pytest.approx(want, rel=1e-4)


def test_a_cold_item_is_scored_by_the_mixture(service: Service, client: TestClient) -> None:
    features = {"title": "The Brand New One", "genre": "war"}
    post(client, "/v1/items", item="new", title="The Brand New One", features=features)
    answer = post(client, "/v1/recommend", user="u1", k=1000, exclude_seen=False, explain=True)
    scores = brute_force(service, known(service, "u1"))
    by_key = {item["item"]: item for item in answer["items"]}
    assert len(by_key) == service.loaded.size == len(scores)
    assert by_key["new"]["score"] == pytest.approx(scores[-1], abs=1e-5)
    assert sum(s["share"] for s in by_key["new"]["why"]["shares"]) == pytest.approx(1)
    assert [i["score"] for i in answer["items"]] == sorted((i["score"] for i in answer["items"]), reverse=True)


@pytest.mark.parametrize(("count", "width"), [(7, 16), (50, 64), (129, 33)])
def test_equal_vectors_have_equal_scores_in_any_batch(count: int, width: int) -> None:
    rng = np.random.default_rng(count)
    vectors, heads = rng.standard_normal((count, width), np.float32), rng.standard_normal((3, width), np.float32)
    vectors[count // 2 :] = vectors[0]
    for query in (Query(heads[:1]), Query(heads, Mixture(tuple(SCALE), tuple(BIAS)))):
        alone = query.score(vectors[:1])
        assert set(query.score(vectors)[count // 2 :]) == set(query.score(vectors[1:])[count // 2 :]) == set(alone)
