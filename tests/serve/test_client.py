"""The Python client against a server of HTTP."""

from __future__ import annotations

from collections.abc import Iterator
from typing import cast

import pytest

from flm_torchrec.client import Client, ServiceError
from flm_torchrec.serve.access import read_keys
from flm_torchrec.serve.app import ServerLimits, create_app
from flm_torchrec.serve.service import Service
from tests.serve.fake_service import FakeService
from tests.serve.serving import running

KEY = "write-key-of-this-test"


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    app = create_app(cast(Service, FakeService()), ServerLimits(keys=read_keys(f"write {KEY}", "test")))
    with running(app) as port:
        yield f"http://127.0.0.1:{port}"


def test_answers_are_typed(url: str) -> None:
    client = Client(url + "/", KEY)
    answer = client.recommend(user="u", k=2)
    assert [(item.item, item.score) for item in answer.items] == [("i1", 0.5)] and answer.model_version == "fake"
    assert client.recommend_batch([{"user": "u"}, {"k": 1}]) == [answer, answer]
    assert client.similar(item="i1").items == answer.items
    assert client.add_event("u", "i1", value=2.0) == 1 and client.add_item("new", "New", genre="war") == []
    assert client.find_items("i")[0].title == "One" and client.health()["status"] == "ok"


def test_what_is_refused_says_why(url: str) -> None:
    for client, status, reason in (
        (Client(url), 401, "Authorization: Bearer"),
        (Client(url, KEY), 422, "k: Input should be"),
    ):
        with pytest.raises(ServiceError, match=reason) as told:
            client.recommend(k=0)
        assert told.value.status == status
    with pytest.raises(ServiceError, match="is off"):
        Client(url, KEY).swap("exports/two")
    with pytest.raises(ServiceError, match="is 'flm serve' running there"):
        Client("http://127.0.0.1:1").health()
    with pytest.raises(ValueError, match="JSON compliant"):
        Client(url, KEY).recommend(features={"spending": float("nan")})


def test_every_operation_has_a_name_and_a_model(url: str) -> None:
    described = Client(url).get("/openapi.json")
    names = [one["operationId"] for path in described["paths"].values() for one in path.values()]
    assert len(names) == len(set(names)) and {"recommend", "similar", "add_event", "swap"} <= set(names)
    body = described["paths"]["/v1/recommend"]["post"]
    assert "history" in body["requestBody"]["content"]["application/json"]["schema"]["properties"]
    assert "items" in body["responses"]["200"]["content"]["application/json"]["schema"]["properties"]
