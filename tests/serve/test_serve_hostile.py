"""Whatever is sent gets an answer with a reason, and never one that says that the server broke."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flm_torchrec.serve.app import ServerLimits, create_app
from flm_torchrec.serve.event_store import EventStore, StoreLimits
from flm_torchrec.serve.service import Service
from tests.serve.serving import AS_ADMIN, KEYS

JSON = {"Content-Type": "application/json"}
POSTS = ("/v1/recommend", "/v1/recommend/batch", "/v1/items", "/v1/events", "/v1/swap", "/v1/forget")


@pytest.fixture(scope="module")
def client(exported: Path) -> Iterator[TestClient]:
    service = Service(exported, EventStore(None, StoreLimits(added_items=50, live_users=50)))
    app = create_app(service, ServerLimits(body_bytes=100_000, keys=KEYS))
    with TestClient(app, raise_server_exceptions=False, headers=AS_ADMIN) as client:
        yield client


def event(**more: Any) -> dict[str, Any]:
    return {"item": "i1", **more}


@pytest.mark.parametrize(
    ("path", "body", "status", "reason"),
    [
        ("/v1/recommend", {"history": [event()] * 10_000}, 413, "more than 100000 bytes"),
        ("/v1/recommend", {"history": [event()] * 1001}, 422, "history: List should have at most 1000 items"),
        ("/v1/recommend", {"history": [{"item": "i1x"}]}, 422, "history.0.item: no item 'i1x'; did you mean 'i1"),
        ("/v1/recommend", {"history": [{"item": 7}]}, 422, "history.0.item: Input should be a valid string"),
        ("/v1/recommend", {"history": [event(event="viw")]}, 422, "no kind of event 'viw'; did you mean 'view'"),
        ("/v1/recommend", {"history": [event(timestamp=-1)]}, 422, "history.0.timestamp"),
        ("/v1/recommend", {"history": [event(timestamp=10**30)]}, 422, "history.0.timestamp"),
        ("/v1/recommend", {"history": [event(timestamp=True)]}, 422, "history.0.timestamp"),
        ("/v1/recommend", {"history": [event(timestamp="2024-01-31T12:00:00Z")]}, 422, "give seconds since 1970"),
        ("/v1/events", {"user": "u1", "item": "i1", "timestamp": 1.7e12}, 422, "timestamp: give seconds since 1970"),
        ("/v1/items", {"item": "new", "features": {"genre": True}}, 422, "features.genre: give a text of up to"),
        ("/v1/recommend", {"history": [event(timestamp=9), event(timestamp=8)]}, 422, "order them by time"),
        ("/v1/recommend", {"history": {"item": "i1"}}, 422, "history: Input should be a valid array"),
        ("/v1/recommend", {"user": "nobody"}, 404, "user 'nobody': not known; did you mean"),
        ("/v1/recommend", {"user": ""}, 422, "user: String should have at least 1 character"),
        ("/v1/recommend", {"user": "u" * 600}, 422, "user: String should have at most 512"),
        ("/v1/recommend", {"k": 0}, 422, "k: Input should be greater than or equal to 1"),
        ("/v1/recommend", {"k": 1001}, 422, "k: Input should be less than or equal to 1000"),
        ("/v1/recommend", {"k": "10"}, 422, "k: Input should be a valid integer"),
        ("/v1/recommend", {"k": 1.5}, 422, "k: Input should be a valid integer"),
        ("/v1/recommend", {"head": "fusd"}, 422, "head: Input should be 'content', 'collaborative'"),
        ("/v1/recommend", {"filter": {"genr": ["war"]}}, 422, "filter: no feature 'genr'; did you mean 'genre'"),
        ("/v1/recommend", {"filter": {"genre": ["wer"]}}, 422, "filter.genre: no value 'wer'; did you mean"),
        ("/v1/recommend", {"filter": {"genre": []}}, 422, "filter.genre: List should have at least 1"),
        ("/v1/recommend", {"features": {"height": 2}}, 422, "no user feature 'height'; known: interests, spending"),
        ("/v1/recommend", {"features": {"spending": "much"}}, 422, "features.spending: takes one number"),
        ("/v1/recommend", {"features": {"spending": 1e300}}, 422, "features.spending"),
        ("/v1/recommend", {"usr": "u1"}, 422, "usr: Extra inputs are not permitted"),
        ("/v1/recommend", [], 422, "Input should be an object"),
        ("/v1/recommend/batch", {"requests": []}, 422, "requests: List should have at least 1 item"),
        ("/v1/recommend/batch", {"requests": [{}] * 65}, 422, "requests: List should have at most 64 items"),
        ("/v1/items", {"item": "n", "features": {"genr": "war"}}, 422, "no item feature 'genr'; did you mean 'genre'"),
        ("/v1/events", {"user": "u1"}, 422, "item: Field required"),
        ("/v1/events", {"user": "u1", "item": "i1", "weight": 2.0}, 422, "weight: Extra inputs are not permitted"),
        ("/v1/events", {"user": "u1", "item": "i1", "timestamp": 2**33}, 422, "is in the future"),
        (
            "/v1/events",
            {"user": "u1", "item": "i1", "timestamp": 2**33 + 1},
            422,
            "timestamp: give seconds since 1970",
        ),
        ("/v1/events", {"user": "u1", "item": "i1", "timestamp": 1}, 422, "is before the user's last event"),
        ("/v1/events", {"user": "u1", "item": "i9999"}, 422, "item: no item 'i9999'; did you mean"),
        ("/v1/swap", {"export": "/etc"}, 403, "the only place exports are taken from"),
        ("/v1/swap", {"export": "a\0b"}, 422, "export: embedded null byte"),
        ("/v1/swap", {"export": "a" * 4000}, 403, "export: 'aaa"),
    ],
)
def test_a_wrong_request_is_told_why(client: TestClient, path: str, body: Any, status: int, reason: str) -> None:
    response = client.post(path, json=body)
    assert response.status_code == status, response.text
    assert reason in response.json()["detail"]


@pytest.mark.parametrize(
    ("body", "status", "reason"),
    [
        (b"", 400, "Invalid JSON"),
        (b"{", 400, "Invalid JSON"),
        (b"\xff\xfe", 400, "Invalid JSON"),
        (b"[" * 50_000, 400, "Invalid JSON: recursion limit exceeded"),
        (b'{"user": "\\ud800"}', 400, "Invalid JSON"),
        (b'{"user": "a\\u0000b"}', 404, "not known"),
        (b'{"k": ' + b"9" * 4000 + b"}", 422, "k: "),
        (b'{"k": ' + b"9" * 5000 + b"}", 400, "Invalid JSON: number out of range"),
        (b'{"history": [{"item": "i1", "value": NaN}]}', 422, "history.0.value: Input should be a finite number"),
        (b'{"history": [{"item": "i1", "value": Infinity}]}', 422, "history.0.value"),
        (b'{"history": [{"item": "i1", "value": 1e999}]}', 422, "history.0.value"),
        (b'{"features": {"spending": NaN}}', 422, "features.spending"),
        (b'{"k": 3, "k": 0}', 422, "k: "),
    ],
)
def test_broken_json_and_numbers_that_are_none_are_refused(
    client: TestClient, body: bytes, status: int, reason: str
) -> None:
    response = client.post("/v1/recommend", content=body, headers=JSON)
    assert response.status_code == status, response.text
    assert reason in response.json()["detail"]


def test_other_content_types_methods_and_paths_are_refused(client: TestClient) -> None:
    assert client.post("/v1/recommend", content=b"{}", headers={"Content-Type": "text/plain"}).status_code == 415
    assert client.post("/v1/recommend", content=b"{}").status_code == 415
    assert client.put("/v1/recommend").status_code == 405
    assert client.get("/v1/recommend").status_code == 404  # to GET, the page answers for all else
    assert client.get("/v1/nothing").status_code == 404
    assert client.get("/v1/items", params={"limit": "many"}).status_code == 422
    assert client.get("/v1/items", params={"limit": 10**30}).status_code == 422
    assert client.get("/v1/items", params={"query": "a" * 201}).status_code == 422
    assert client.get("/v1/items?query=%ff%fe").status_code == 200


def test_a_body_that_never_ends_is_cut_off(client: TestClient) -> None:
    sent = []

    def endless() -> Iterator[bytes]:
        for _ in range(1000):
            sent.append(1)
            yield b" " * 1000

    response = client.post("/v1/recommend", content=endless(), headers=JSON)
    assert response.status_code == 413


# Names that mean something, so that what hypothesis makes up gets past the first check now and then.
NAMES = (
    "user", "history", "features", "head", "k", "exclude_seen", "filter", "explain", "requests", "item", "title",
    "event", "value", "timestamp", "export", "genre", "brand", "price", "interests", "spending", "u1", "i1", "view",
    "war", "fused", "content",
)  # fmt: skip
scalars = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.sampled_from(NAMES)
    | st.text(st.characters(exclude_categories=()), max_size=20)
)  # fmt: skip
anything = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(NAMES) | st.text(max_size=5), inner, max_size=5)
    ),
    max_leaves=12,
)
events = st.lists(
    st.fixed_dictionaries(
        {"item": st.sampled_from(["i1", "i2", "n1"])},
        optional={"value": scalars, "timestamp": scalars, "event": st.sampled_from(["view", "buy"])},
    ),
    max_size=12,
)
recommend = st.fixed_dictionaries(
    {},
    optional={
        "user": st.sampled_from(["u1", "u2", "n1"]),
        "history": events,
        "features": st.dictionaries(st.sampled_from(["interests", "spending"]), anything, max_size=2),
        "head": st.sampled_from(["fused", "content"]),
        "k": st.integers(-1, 1001),
        "exclude_seen": st.booleans(),
        "filter": st.dictionaries(st.sampled_from(["genre", "brand"]), st.lists(st.sampled_from(["war", "brand 1"]))),
        "explain": st.booleans(),
    },
)
new_item = st.fixed_dictionaries(
    {
        "item": st.sampled_from(["n1", "i1"]),
        "features": st.dictionaries(st.sampled_from(["genre", "price", "title"]), anything),
    }
)
new_event = st.fixed_dictionaries(
    {"user": st.sampled_from(["u1", "n1"]), "item": st.sampled_from(["i1", "n1"])},
    optional={"value": scalars, "timestamp": scalars},
)
plausible = recommend | st.fixed_dictionaries({"requests": st.lists(recommend, max_size=3)}) | new_item | new_event


@settings(max_examples=300, suppress_health_check=list(HealthCheck))
@given(path=st.sampled_from(POSTS), body=anything | plausible)
def test_no_json_breaks_the_server(client: TestClient, path: str, body: Any) -> None:
    response = client.post(path, content=json.dumps(body).encode(), headers=JSON)
    assert response.status_code < 500, response.text
    answer = json.loads(response.content, parse_constant=lambda name: pytest.fail(f"{name} in an answer"))
    assert response.status_code == 200 or answer["detail"]


@settings(max_examples=100, suppress_health_check=list(HealthCheck))
@given(path=st.sampled_from(POSTS), body=st.binary(max_size=200))
def test_no_bytes_break_the_server(client: TestClient, path: str, body: bytes) -> None:
    assert 400 <= client.post(path, content=body, headers=JSON).status_code < 500
