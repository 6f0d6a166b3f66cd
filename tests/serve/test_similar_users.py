"""Users alike, against the cosines of all users' vectors, and who may ask for them. Reasons of items alike."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fastapi.testclient import TestClient

from flm_torchrec.cli import main
from flm_torchrec.config.heads import HEADS
from flm_torchrec.export.parts import ExportRows
from flm_torchrec.export.vectors import decode
from flm_torchrec.mixture import Mixture
from flm_torchrec.serve.app import ServerLimits, create_app
from flm_torchrec.serve.ranking import unit
from flm_torchrec.serve.service import Service, ServiceOptions
from flm_torchrec.serve.user_vectors import load_user_vectors
from tests.serve.serving import AS_ADMIN, KEYS

PATH = "/v1/users/similar"


def service_of(export: Path) -> Service:
    return Service(export, options=ServiceOptions(similar_users=True))


@pytest.fixture(scope="module")
def service(one_tower: None, exported: Path) -> Service:
    return service_of(exported)


@pytest.fixture(scope="module")
def client(service: Service) -> Iterator[TestClient]:
    limits = ServerLimits(keys=KEYS)
    with TestClient(create_app(service, limits), raise_server_exceptions=False, headers=AS_ADMIN) as client:
        yield client


def ask(client: TestClient, **body: Any) -> list[dict[str, Any]]:
    response = client.post(PATH, json=body)
    assert response.status_code == 200, response.text
    return response.json()["users"]


def vectors(service: Service, *heads: str) -> list[np.ndarray]:
    table = ExportRows(service.loaded.folder, service.loaded.manifest, "users").table(heads)
    return [unit(decode(table[head])) for head in heads]


@pytest.mark.parametrize("user", ["u7", "u30"])
def test_the_nearest_are_those_of_the_largest_cosine(service: Service, client: TestClient, user: str) -> None:
    (all_users,) = vectors(service, "fused")
    row = service.loaded.user_of[user]
    cosines = all_users @ all_users[row]
    cosines[row] = -2
    found = ask(client, user=user, k=6)
    assert [one["score"] for one in found] == pytest.approx(np.sort(cosines)[::-1][:6].tolist(), abs=0.02)  # int8 tower
    assert user not in [one["user"] for one in found]
    exact = {service.loaded.users[n].as_py(): float(cosines[n]) for n in range(len(cosines))}
    assert all(one["score"] == pytest.approx(exact[one["user"]], abs=0.02) for one in found)
    without = ask(client, user=user, k=5, exclude=[found[0]["user"]])
    assert [one["user"] for one in without] == [one["user"] for one in found[1:]]
    assert len(ask(client, user=user, k=1000)) == service.loaded.manifest.users - 1


def test_a_mixture_compares_each_head(one_tower: None, exported: Path) -> None:
    service = service_of(exported)
    mixture = Mixture(scale=(2.0,) * len(HEADS), bias=(0.0,) * len(HEADS))
    manifest = replace(service.loaded.manifest, mixture=mixture)
    index = load_user_vectors(service.loaded.folder, manifest)
    service.loaded = replace(service.loaded, manifest=manifest, user_vectors=index)
    row = service.loaded.user_of["u5"]
    cosines = np.mean([by_head @ by_head[row] for by_head in vectors(service, *HEADS)], axis=0)
    cosines[row] = -2
    with TestClient(create_app(service, ServerLimits(keys=KEYS)), headers=AS_ADMIN) as client:
        found = ask(client, user="u5", k=4)
    assert [one["score"] for one in found] == pytest.approx(np.sort(cosines)[::-1][:4].tolist(), abs=0.02)


def test_a_history_finds_who_did_the_same(service: Service, client: TestClient) -> None:
    loaded = service.loaded
    seen = loaded.seen[loaded.user_of["u9"]].as_py()
    typed = [{"item": loaded.key(row)} for row in seen]
    found = ask(client, history=typed, k=1000, explain=True)
    by_user = {one["user"]: one for one in found}
    assert by_user["u9"]["why"]["items_in_common"] == len(set(seen)) and len(by_user) == loaded.manifest.users
    for one in found:
        common = set(loaded.seen[loaded.user_of[one["user"]]].as_py()) & set(seen)
        assert one["why"]["items_in_common"] == len(common)
        assert {i["item"] for i in one["why"]["items"]} <= {loaded.key(row) for row in common}


def test_nobody_without_a_key_learns_of_others(one_tower: None, exported: Path) -> None:
    for limits, headers, status in (
        (ServerLimits(), {}, 403),
        (ServerLimits(keys=KEYS), {}, 401),
        (ServerLimits(keys=KEYS), AS_ADMIN, 200),
    ):
        with TestClient(create_app(service_of(exported), limits), headers=headers) as client:
            assert client.post(PATH, json={"user": "u1"}).status_code == status
            slash = client.post(PATH + "/", json={"user": "u1"}, follow_redirects=False)
            assert slash.status_code in (status, 307, 404, 405)
    with TestClient(create_app(Service(exported), ServerLimits(keys=KEYS)), headers=AS_ADMIN) as client:
        off = client.post(PATH, json={"user": "u1"})
        assert off.status_code == 403 and "--similar-users" in off.json()["detail"]


def test_the_option_needs_keys(exported: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "--export", str(exported), "--port", "18473", "--similar-users"]) == 2
    told = capsys.readouterr().err
    assert "--similar-users: " in told and "--keys FILE" in told and told.count("\n") == 1


@pytest.mark.parametrize(
    ("body", "status", "reason"),
    [
        ({}, 422, "give user, history or features"),
        ({"user": "nobody"}, 404, "user 'nobody': not known"),
        ({"user": "u1", "exclude": ["nobody"]}, 422, "exclude.0: no user 'nobody' in the export"),
        ({"user": "u1", "k": 0}, 422, "k: Input should be"),
        ({"user": "u1", "head": "fused"}, 422, "head: Extra inputs"),
        ({"history": [{"item": "x"}]}, 422, "history.0.item: no item 'x'"),
    ],
)
def test_wrong_wishes_are_told(client: TestClient, body: Any, status: int, reason: str) -> None:
    response = client.post(PATH, json=body)
    assert response.status_code == status and reason in response.json()["detail"], response.text


def test_similar_items_say_what_they_share(service: Service, client: TestClient) -> None:
    loaded = service.loaded
    mine = loaded.attributes(17)
    answer = client.post("/v1/similar", json={"item": loaded.key(17), "k": 1000, "explain": True}).json()["items"]
    for item in answer:
        shared = {name: [v for v in values if v in mine[name]] for name, values in item["attributes"].items()}
        told = {name: [one["value"] for one in values] for name, values in item["why"]["in_common"].items()}
        assert told == {name: values for name, values in shared.items() if values}
    vector = {"vector": [1.0] * loaded.manifest.dim, "k": 1, "explain": True}
    assert client.post("/v1/similar", json=vector).json()["items"][0]["why"] == {"in_common": {}}


def test_rules_are_part_of_the_reason(service: Service, client: TestClient) -> None:
    genre = service.loaded.catalogue.attributes["genre"].values[0].as_py()
    pinned = service.loaded.key(int(service.loaded.catalogue.attributes["genre"].items_with(genre)[0]))
    body = {"user": "u5", "k": 1000, "boost": {"genre": {genre: 0.25}}, "explain": True, "pinned": [pinned]}
    for item in client.post("/v1/recommend", json=body).json()["items"]:
        why = item["why"]
        boosted = 0.25 if genre in item["attributes"]["genre"] and item["item"] != pinned else 0.0
        assert why["boost"] == boosted
        assert sum(s["share"] for s in why["shares"]) + boosted == pytest.approx(item["score"], abs=1e-5)
