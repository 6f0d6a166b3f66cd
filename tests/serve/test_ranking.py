"""Similar items, rules, diversity, pinned items and pages, against brute force over all items."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fastapi.testclient import TestClient

from flm_torchrec.serve.app import create_app
from flm_torchrec.serve.loaded_export import LoadedExport
from flm_torchrec.serve.ranking import diverse, unit
from flm_torchrec.serve.service import Service


@pytest.fixture(scope="module")
def service(exported: Path) -> Service:
    return Service(exported)


@pytest.fixture(scope="module")
def client(service: Service) -> Iterator[TestClient]:
    with TestClient(create_app(service), raise_server_exceptions=False) as client:
        yield client


def items(client: TestClient, path: str = "/v1/recommend", **body: Any) -> list[dict[str, Any]]:
    response = client.post(path, json=body)
    assert response.status_code == 200, response.text
    return response.json()["items"]


def keys(found: list[dict[str, Any]]) -> list[str]:
    return [item["item"] for item in found]


@pytest.mark.parametrize("cosine", [True, False])
@pytest.mark.parametrize("row", [0, 17])
def test_similar_items_are_the_nearest_by_cosine(
    service: Service, client: TestClient, row: int, cosine: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = service.loaded
    monkeypatch.setattr(loaded.tower, "cosine", cosine)
    vectors = unit(loaded.vectors(np.arange(loaded.size)))
    cosines = vectors @ vectors[row]
    cosines[row] = -2
    found = items(client, "/v1/similar", item=loaded.key(row), k=7)
    assert [item["score"] for item in found] == pytest.approx(np.sort(cosines)[::-1][:7].tolist(), abs=1e-5)
    assert loaded.key(row) not in keys(found)
    same = items(client, "/v1/similar", vector=(3 * vectors[row]).tolist(), k=8)
    assert keys(same)[0] == loaded.key(row) and keys(same)[1:] == keys(found)
    without = items(client, "/v1/similar", item=loaded.key(row), k=6, exclude=keys(found)[:1])
    assert keys(without) == keys(found)[1:]
    genre = loaded.catalogue.attributes["genre"].values[0].as_py()
    only = items(client, "/v1/similar", item=loaded.key(row), k=1000, filter={"genre": [genre]})
    assert only and all(genre in item["attributes"]["genre"] for item in only)


def test_pages_follow_one_another(client: TestClient) -> None:
    whole = keys(items(client, user="u3", k=30))
    pages = [keys(items(client, user="u3", k=10, offset=offset)) for offset in (0, 10, 20)]
    assert [key for page in pages for key in page] == whole
    assert items(client, user="u3", k=10, offset=990) == []


def test_pinned_items_come_first_and_once(service: Service, client: TestClient) -> None:
    whole = items(client, user="u3", k=10)
    pinned = [whole[4]["item"], service.loaded.key(int(service.loaded.seen[service.loaded.user_of["u3"]][0].as_py()))]
    found = items(client, user="u3", k=10, pinned=pinned)
    assert keys(found)[:2] == pinned and len(set(keys(found))) == 10
    assert [key for key in keys(found)[2:]] == [key for key in keys(whole) if key not in pinned][:8]
    assert found[0]["score"] == pytest.approx(whole[4]["score"], abs=1e-5)
    assert keys(items(client, user="u3", k=1, pinned=pinned)) == pinned[:1]
    assert keys(items(client, user="u3", k=3, offset=1, pinned=pinned)) == keys(found)[1:4]


def test_rules_add_to_scores(service: Service, client: TestClient) -> None:
    genres = service.loaded.catalogue.attributes["genre"].values.to_pylist()[:2]
    plain = {item["item"]: item for item in items(client, user="u5", k=1000)}
    rules = {"genre": {genres[0]: 0.3, genres[1]: -9.0}}
    found = items(client, user="u5", k=1000, boost=rules)
    wanted = {
        key: item["score"] + sum(by for value, by in rules["genre"].items() if value in item["attributes"]["genre"])
        for key, item in plain.items()
    }
    assert {item["item"]: item["score"] for item in found} == pytest.approx(wanted, abs=1e-5)
    assert [item["score"] for item in found] == sorted((item["score"] for item in found), reverse=True)
    few = items(client, user="u5", k=4, boost=rules, filter={"genre": genres})
    assert keys(few) == [key for key in keys(found) if set(plain[key]["attributes"]["genre"]) & set(genres)][:4]


@pytest.mark.parametrize("diversity", [0.8, 1.0])
def test_diverse_items_are_those_of_maximal_marginal_relevance(
    service: Service, client: TestClient, diversity: float
) -> None:
    pool = items(client, user="u8", k=25)
    rows = [service.loaded.row(item["item"]) for item in pool]
    vectors = unit(service.loaded.vectors(np.array(rows)))
    scores = np.array([item["score"] for item in pool])
    relevance = (scores - scores[-1]) / (scores[0] - scores[-1])
    chosen: list[int] = []
    for _ in range(5):
        gain = [
            -np.inf if n in chosen
            else (1 - diversity) * relevance[n] - diversity * max((vectors[n] @ vectors[c] for c in chosen), default=0)
            for n in range(25)
        ]  # fmt: skip
        chosen.append(int(np.argmax(gain)))
    found = items(client, user="u8", k=5, diversity=diversity)
    assert keys(found) == [pool[n]["item"] for n in chosen] and keys(found) != keys(pool)[:5]


def test_equal_items_do_not_break_diversity(service: Service) -> None:
    loaded: LoadedExport = replace(service.loaded, number=9)
    same = [(3, 0.5), (3, 0.5), (4, 0.5)]
    assert diverse(loaded, same, 2, 0.5, 2) == [(3, 0.5), (4, 0.5)]
    assert diverse(loaded, [], 5, 0.5, 5) == []


@pytest.mark.parametrize("pinned", [[], ["i3", "i4"]])
def test_no_item_is_on_two_pages_of_diverse_items(client: TestClient, pinned: list[str]) -> None:
    asked: dict[str, Any] = {"user": "u8", "k": 10, "diversity": 0.8, "pinned": pinned}
    shown = [key for start in range(0, 1000, 10) for key in keys(items(client, **asked, offset=start))]
    assert len(set(shown)) == len(shown) > 100 and shown[: len(pinned)] == pinned


@pytest.mark.parametrize(
    ("path", "body", "reason"),
    [
        ("/v1/similar", {}, "give either item or vector"),
        ("/v1/similar", {"item": "i1", "vector": [1.0]}, "give either item or vector"),
        ("/v1/similar", {"item": "i1x"}, "item: no item 'i1x'; did you mean"),
        ("/v1/similar", {"vector": [1.0, 2.0]}, "vector: has 2 numbers, item vectors have 32"),
        ("/v1/similar", {"vector": [0.0] * 32}, "vector: has no direction"),
        ("/v1/similar", {"vector": ["a"]}, "vector.0: Input should be a valid number"),
        ("/v1/similar", {"item": "i1", "exclude": ["x"]}, "exclude.0: no item 'x'"),
        ("/v1/similar", {"item": "i1", "filter": {"genre": ["x"]}}, "filter.genre: no value 'x'"),
        ("/v1/recommend", {"k": 600, "offset": 600}, "offset + k is more than 1000"),
        ("/v1/recommend", {"diversity": 1.1}, "diversity: Input should be less than or equal to 1"),
        ("/v1/recommend", {"pinned": ["x"]}, "pinned.0: no item 'x'"),
        ("/v1/recommend", {"pinned": ["i1", "i1"]}, "pinned: names an item twice"),
        ("/v1/recommend", {"boost": {"genre": {"x": 1.0}}}, "boost.genre: no value 'x'"),
        ("/v1/recommend", {"boost": {"genr": {"war": 1.0}}}, "boost: no feature 'genr'; did you mean 'genre'"),
        ("/v1/recommend", {"boost": {"genre": {"war": 1e30}}}, "boost.genre.war: Input should be less than"),
    ],
)
def test_wrong_wishes_are_told(client: TestClient, path: str, body: Any, reason: str) -> None:
    response = client.post(path, json=body)
    assert response.status_code == 422 and reason in response.json()["detail"], response.text


def test_one_wrong_request_of_a_batch_is_named(client: TestClient) -> None:
    response = client.post("/v1/recommend/batch", json={"requests": [{}, {"pinned": ["x"]}]})
    assert response.status_code == 422 and response.json()["detail"].startswith("requests.1: pinned.0: no item 'x'")
