"""Plain requests that take little processor time are answered in the event loop, all others by threads."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import pytest
from fastapi.testclient import TestClient

from flm_torchrec.serve.app import create_app
from flm_torchrec.serve.messages import Recommend
from flm_torchrec.serve.resolve import Refused
from flm_torchrec.serve.workers import LONGEST_TURN, MEASURED, Batches, Pace
from tests.serve.fake_service import FakeService


@dataclass(frozen=True)
class Request:
    number: int
    plain: bool = True


def answers(requests: Sequence[Request]) -> list[Any]:
    """The thread that answers; request 7 is refused, request 8 is a fault."""
    if any(request.number == 8 for request in requests):
        raise ValueError("a fault")
    return [Refused(404, "no 7") if r.number == 7 else {"thread": threading.get_ident()} for r in requests]


def asked(pace: Pace | None, *requests: Request) -> list[Any]:
    """Answers, or errors, of requests that come at once."""

    async def ask() -> list[Any]:
        batches: Batches[Request] = Batches(pool, answers, 1, pace)
        return await asyncio.gather(*(batches.answer(request) for request in requests), return_exceptions=True)

    with ThreadPoolExecutor(1) as pool:
        return asyncio.run(asyncio.wait_for(ask(), 60))


def known(seconds: float) -> Pace:
    """A pace that has been measured."""
    pace = Pace()
    for _ in range(MEASURED):
        pace.note(2 * seconds, 2)
    return pace


def in_loop(found: list[Any]) -> list[bool]:
    return [answer["thread"] == threading.get_ident() for answer in found]


def test_requests_that_are_known_to_be_quick_are_answered_in_the_loop() -> None:
    assert in_loop(asked(known(LONGEST_TURN / 8), Request(1), Request(2))) == [True, True]


def test_more_than_fit_into_a_turn_are_answered_in_several() -> None:
    turns: list[int] = []

    def noted(requests: Sequence[Request]) -> list[Any]:
        turns.append(len(requests))
        return answers(requests)

    async def other() -> None:
        while True:
            turns.append(0)
            await asyncio.sleep(0)

    async def ask() -> list[Any]:
        batches: Batches[Request] = Batches(pool, noted, 1, known(LONGEST_TURN / 2))
        beside = asyncio.create_task(other())
        found = await asyncio.gather(*(batches.answer(Request(number)) for number in range(1, 6)))
        beside.cancel()
        return found

    with ThreadPoolExecutor(1) as pool:
        assert all(in_loop(asyncio.run(ask())))
    assert [size for size in turns if size] == [2, 2, 1]
    assert turns[turns.index(2) + 1] == 0  # the event loop does other things between


@pytest.mark.parametrize(
    ("pace", "requests"),
    [
        (None, [Request(1)]),
        (Pace(), [Request(1)]),
        (known(2 * LONGEST_TURN), [Request(1)]),
        (known(LONGEST_TURN / 8), [Request(2, plain=False)]),
    ],
    ids=["never", "not measured", "slow", "not plain"],
)
def test_all_others_are_answered_by_a_thread(pace: Pace | None, requests: list[Request]) -> None:
    assert not any(in_loop(asked(pace, *requests)))


def test_requests_that_have_become_slow_are_left_to_threads() -> None:
    pace = known(LONGEST_TURN / 2)

    def slower(requests: Sequence[Request]) -> list[Any]:
        pace.note(LONGEST_TURN * 1000, 1)
        return answers(requests)

    async def ask() -> list[Any]:
        batches: Batches[Request] = Batches(pool, slower, 1, pace)
        return await asyncio.gather(*(batches.answer(Request(n)) for n in range(4)))

    with ThreadPoolExecutor(1) as pool:
        assert in_loop(asyncio.run(asyncio.wait_for(ask(), 60))) == [True, True, False, False]


def test_errors_in_the_loop_reach_the_request_that_has_them() -> None:
    first, second = asked(known(1e-4), Request(7), Request(1))
    assert isinstance(first, Refused) and in_loop([second]) == [True]
    assert [type(error) for error in asked(known(1e-4), Request(8), Request(1))] == [ValueError, ValueError]


def test_the_pace_follows_what_requests_take() -> None:
    pace = known(LONGEST_TURN / 10)
    assert pace.turn() == pytest.approx(10, abs=1)
    pace.note(LONGEST_TURN * 100, 1)  # such as a hint for an unknown user
    assert pace.turn() == 0
    for _ in range(100):
        pace.note(LONGEST_TURN / 10, 1)
    assert pace.turn() >= 9


def test_what_a_batch_takes_for_its_beginning_does_not_keep_batches_small() -> None:
    pace = Pace()
    for number in range(2 * MEASURED):
        size = 1 + number % 3
        pace.note(LONGEST_TURN * (0.4 + 0.1 * size), size)  # the mean of a request alone would allow three
    assert pace.turn() == pytest.approx(6, abs=1)


@pytest.mark.parametrize(
    ("fields", "plain"),
    [
        ({}, True),
        ({"user": "u", "k": 100}, True),
        ({"k": 101}, False),
        ({"k": 60, "offset": 60}, False),
        ({"history": [{"item": "i"}] * 101}, False),
        ({"explain": True}, False),
        ({"diversity": 0.5}, False),
        ({"filter": {"brand": ["b"]}}, False),
        ({"boost": {"brand": {"b": 1.0}}}, False),
        ({"pinned": ["i"]}, False),
        ({"features": {"age": 3}}, False),
    ],
)
def test_plain_requests_ask_for_little(fields: dict[str, Any], plain: bool) -> None:
    assert Recommend(**fields).plain is plain


def test_routes_that_read_their_body_are_described_measured_and_refuse_other_methods() -> None:
    with TestClient(create_app(FakeService())) as client:  # type: ignore[arg-type]
        assert [client.post("/v1/recommend", json={}).status_code for _ in range(2 * MEASURED)] == [200] * 2 * MEASURED
        wrong = client.get("/v1/recommend")
        assert (wrong.status_code, list(wrong.json())) == (404, ["detail"])  # as of a page that there is not
        assert client.post("/v1/similar", json={"item": "i1"}).json()["model_version"] == "fake"
        metrics = client.get("/metrics").text
        assert f'flm_requests_total{{route="/v1/recommend",status="200"}} {2.0 * MEASURED}' in metrics
        paths = client.get("/openapi.json").json()["paths"]
        assert "requestBody" in paths["/v1/recommend"]["post"] and "/v1/similar" in paths
