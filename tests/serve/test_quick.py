"""Plain requests are answered without the HTTP library and the framework, and as these would answer them."""

from __future__ import annotations

import json
import logging
import socket
import threading
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, cast

import h11
import pytest
from fastapi import FastAPI
from hypothesis import given, settings
from hypothesis import strategies as st

from flm_torchrec.serve import server as server_module
from flm_torchrec.serve.access import Access, read_keys
from flm_torchrec.serve.app import ServerLimits, create_app
from flm_torchrec.serve.middleware import json_bytes
from flm_torchrec.serve.quick import Done, QuickRequest, QuickRequests
from flm_torchrec.serve.quick_connections import QuickProtocol
from flm_torchrec.serve.resolve import Refused
from flm_torchrec.serve.service import Service
from flm_torchrec.serve.workers import MEASURED
from tests.serve.fake_service import ANSWER, FakeService
from tests.serve.serving import ADMIN_KEY, KEYS, running

WHOLE = "X-Forwarded-Proto: http"
"""A header that makes a request one for the framework, and changes nothing else."""
KEY = f"X-API-Key: {ADMIN_KEY}"


class Answering(FakeService):
    """Refuses, fails or waits for users of these names."""

    def __init__(self) -> None:
        super().__init__()
        self.began, self.go_on = threading.Event(), threading.Event()
        self.in_thread: list[bool] = []
        """Of each batch: whether one of the app's threads has answered, or else the event loop."""

    def recommend(self, requests: Any) -> list[Any]:
        self.in_thread.append(threading.current_thread().name.startswith("flm"))
        names = [request.user for request in requests]
        if "slow" in names:
            self.began.set()
            self.go_on.wait(60)
        if "fault" in names:
            raise ValueError("a fault")
        return [Refused(404, "no é") if name == "nobody" else {**ANSWER, "user": name} for name in names]


def post(body: bytes, *headers: str, path: str = "/v1/recommend") -> bytes:
    lines = [f"POST {path} HTTP/1.1", "Host: localhost", "Content-Type: application/json", *headers]
    return "\r\n".join([*lines, f"Content-Length: {len(body)}", "", ""]).encode() + body


def asking(user: str, *headers: str) -> bytes:
    return post(json.dumps({"user": user}).encode(), KEY, *headers)


def read(made: socket.socket) -> tuple[bytes, dict[bytes, bytes], bytes]:
    """Status line, headers and body of one answer."""
    with made.makefile("rb") as stream:
        first, headers = stream.readline().strip(), {}
        while line := stream.readline().strip():
            name, _, value = line.partition(b": ")
            headers[name.lower()] = value
        return first, headers, stream.read(int(headers[b"content-length"]))


class Served:
    """A server, and how many requests it has answered quickly."""

    def __init__(self, app: FastAPI, port: int, service: Answering) -> None:
        self.app, self.port, self.service, self.quick = app, port, service, 0
        begin = app.state.quick.begin

        def counting(request: QuickRequest, done: Done) -> Any:
            self.quick += 1
            return begin(request, done)

        app.state.quick.begin = counting

    def connect(self, sent: bytes = b"") -> socket.socket:
        made = socket.create_connection(("127.0.0.1", self.port), timeout=60)
        made.sendall(sent)
        return made

    def told(self, *sent: bytes) -> list[tuple[bytes, dict[bytes, bytes], bytes]]:
        """Answers to requests of one connection, one after the other, without what each has of its own."""
        found = []
        with self.connect() as made:
            for one in sent:
                made.sendall(one)
                first, headers, body = read(made)
                headers.pop(b"date")
                assert len(headers.pop(b"x-request-id")) == 16
                found.append((first, headers, body))
        return found


@pytest.fixture
def served() -> Iterator[Served]:
    service = Answering()
    limits = ServerLimits(hosts=("localhost",), keys=KEYS, body_bytes=100_000)
    app = create_app(cast(Service, service), limits)
    with running(app) as port:
        yield Served(app, port, service)
        service.go_on.set()


@pytest.mark.parametrize(
    "sent",
    [
        asking("u7"), asking("nobody"), post(b"{", KEY), post(b'{"k": 0}', KEY), post(b'{"user": "\xff"}', KEY),
        post(b'{"item": "i1"}', KEY, path="/v1/similar"),
        post(b'{"user": "u", "item": "i"}', KEY, path="/v1/events"),
    ],
)  # fmt: skip
def test_answers_are_those_of_the_framework(served: Served, sent: bytes) -> None:
    whole = sent.replace(b"Host: localhost\r\n", f"Host: localhost\r\n{WHOLE}\r\n".encode(), 1)
    quick, other, again = served.told(sent, whole, sent)
    assert quick == other == again and served.quick == 2


def test_answers_are_the_same_from_a_thread_and_from_the_event_loop(served: Served) -> None:
    sent = [asking("u7"), asking("nobody"), post(b'{"k": 0}', KEY), post(b'{"user": "u", "item": "i"}', KEY)]
    first = served.told(*sent)
    served.told(*[asking("u1")] * MEASURED)
    assert served.told(*sent) == first and served.quick == len(sent) * 2 + MEASURED
    assert served.service.in_thread[:2] == [True, True] and served.service.in_thread[-2:] == [False, False]


def test_requests_of_several_connections_get_answers_of_their_own(served: Served) -> None:
    served.told(*[asking("u1")] * MEASURED)
    users = [f"u{n}" for n in range(8)]
    made = [served.connect(asking(user)) for user in users]
    assert [json.loads(read(one)[2])["user"] for one in made] == users
    for one in made:
        one.close()


def test_refused_requests_take_the_usual_way(served: Served) -> None:
    for sent, status in (
        (post(b"{}"), b"401"),
        (post(b"{}", KEY + "x"), b"401"),
        (post(b"{}", KEY).replace(b"localhost", b"elsewhere"), b"400"),
        (post(b"{}", KEY).replace(b"application/json", b"text/plain"), b"415"),
        (post(b"{}", KEY, path="/v1/nothing"), b"405"),
    ):
        ((first, _, _),) = served.told(sent)
        assert first.split()[1] == status
    assert not served.quick


def test_requests_in_parts_and_several_at_once_are_answered_in_order(served: Served) -> None:
    sent = asking("u1")
    with served.connect() as made:
        for cut in (1, 20, len(sent) - 60, len(sent) - 3):
            made.sendall(sent[:cut])
            time.sleep(0.02)
            made.sendall(sent[cut:])
            assert read(made)[2].endswith(b'"u1"}')
        made.sendall(asking("slow"))
        assert served.service.began.wait(60)
        made.sendall(asking("u2") + asking("u3", WHOLE) + asking("u4")[:30])
        time.sleep(0.05)
        made.sendall(asking("u4")[30:])
        served.service.go_on.set()
        with made.makefile("rb") as stream:
            users: list[str] = []
            while len(users) < 4:
                line = stream.readline()
                if line.lower().startswith(b"content-length"):
                    length = int(line.split()[1])
                    while stream.readline().strip():
                        continue
                    users.append(json.loads(stream.read(length))["user"])
        assert users == ["slow", "u2", "u3", "u4"] and served.quick >= 1


def test_a_fault_is_told_and_ends_the_connection(served: Served, caplog: pytest.LogCaptureFixture) -> None:
    with served.connect(asking("fault")) as made, caplog.at_level(logging.ERROR), made.makefile("rb") as stream:
        answer = stream.read().lower()
    assert answer.startswith(b"http/1.1 500") and b"connection: close" in answer and b"a fault" not in answer
    assert [record.exc_info[1].args for record in caplog.records if record.exc_info and record.exc_info[1]] == [
        ("a fault",)
    ]


def test_answers_are_counted_as_those_of_the_framework(served: Served) -> None:
    served.told(asking("u1"), asking("u1", WHOLE), asking("nobody"), asking("nobody", WHOLE))
    with served.connect(f"GET /metrics HTTP/1.1\r\nHost: localhost\r\n{KEY}\r\n\r\n".encode()) as made:
        text = read(made)[2].decode()
    for status in (200, 404):
        labels = f'route="/v1/recommend",status="{status}"'
        assert f"flm_requests_total{{{labels}}} 2.0" in text
        assert f'flm_export_requests_total{{export="fake",{labels}}} 2.0' in text


def test_a_request_under_way_is_answered_when_the_server_stops(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_module, "DRAIN_SECONDS", 0.2)
    service = Answering()
    app = create_app(cast(Service, service), ServerLimits(keys=KEYS))
    with running(app) as port:
        served = Served(app, port, service)
        made, idle = served.connect(asking("slow")), served.connect(asking("u1"))
        read(idle)
        assert service.began.wait(60)
        threading.Timer(0.1, service.go_on.set).start()
    with made, made.makefile("rb") as stream:
        answer = stream.read()
    assert b"connection: close" in answer.lower() and answer.endswith(b'"slow"}') and idle.recv(9) == b""
    assert served.quick == 2


def test_an_idle_connection_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_module, "IDLE_SECONDS", 0.2)
    service = Answering()
    app = create_app(cast(Service, service), ServerLimits(keys=KEYS))
    with running(app) as port, Served(app, port, service).connect() as made:
        for user in ("u1", "u2", "u3"):
            made.sendall(asking(user))
            assert read(made)[2].endswith(f'"{user}"}}'.encode())
            time.sleep(0.1)
        assert made.recv(1) == b""


@pytest.mark.parametrize("headers", [[], [WHOLE]])
def test_a_request_that_comes_just_as_the_idle_time_is_over_is_answered(
    monkeypatch: pytest.MonkeyPatch, headers: list[str]
) -> None:
    monkeypatch.setattr(server_module, "IDLE_SECONDS", 0.2)
    handler, due, sent = QuickProtocol.timeout_keep_alive_handler, threading.Event(), threading.Event()

    def late(connection: QuickProtocol) -> None:
        """The event loop is busy, so what is sent now is not read before the connection's time is over."""
        due.set()
        sent.wait(60)
        handler(connection)

    monkeypatch.setattr(QuickProtocol, "timeout_keep_alive_handler", late)
    service = Answering()
    app = create_app(cast(Service, service), ServerLimits(keys=KEYS))
    with running(app) as port, Served(app, port, service).connect(asking("u1", *headers)) as made:
        read(made)
        assert due.wait(60)
        made.sendall(asking("u2", *headers))
        sent.set()
        assert read(made)[2].endswith(b'"u2"}')
        assert made.recv(1) == b""  # and then it is closed


def quick(rate: float = 0.0) -> QuickRequests:
    made = QuickRequests(["localhost"], Access(read_keys("read 0123456789abcdef", "x"), rate), cast(Any, None), 1000)
    made.routes[b"/v1/recommend"] = cast(Any, SimpleNamespace(route=SimpleNamespace(path="/v1/recommend")))
    return made


PLAIN = post(b'{"k":3}', "X-API-Key: 0123456789abcdef", "Accept: */*", "Connection: keep-alive")


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (b"POST", b"post"), (b"POST", b"PUT"), (b"1.1", b"1.0"), (b"/v1/recommend", b"/v1/swap"), (b"\r\n", b"\n"),
        (b"/v1/recommend", b"http://localhost/v1/recommend"), (b"/v1/recommend", b"/v1/recommend?a=1"),
        (b"Host:", b"Host :"), (b"Host:", b" Host:"), (b"Accept:", b"Host:"), (b"Accept: */*", b"Accept"),
        (b"Accept: */*", b"Accept: \0"), (b"Accept: */*", b"Accept: \xff"), (b"Accept: */*", b"Expect: 100-continue"),
        (b"Accept: */*", b"Transfer-Encoding: chunked"), (b"Accept: */*", b"Content-Length: 7"),
        (b"keep-alive", b"close"), (b"keep-alive", b"Upgrade"), (b"Length: 7", b"Length: 8"),
        (b"Length: 7", b"Length: +7"), (b"Length: 7", b"Length: 07"), (b"localhost", b"evil.example"),
        (b"Content-Length: 7", b"Accept-Language: 7"), (b"cdef", b"cdee"), (b"application/json", b"text/plain"),
        (b"Accept: */*\r\n", b"X: y\r\n" * 90), (b"Accept: */*", b"X-Forwarded-For: 1.2.3.4"), (b'"k":3}', b'"k":3} '),
        (b'{"k":3}', b""),
    ],
)  # fmt: skip
def test_what_is_not_plain_is_left_to_the_library(before: bytes, after: bytes) -> None:
    assert quick().take(PLAIN, None) and before in PLAIN
    assert quick().take(PLAIN.replace(before, after, 1), None) is None


def test_a_client_beyond_its_rate_is_refused_by_the_framework() -> None:
    limited = quick(2.0)
    assert [limited.take(PLAIN, None) is None for _ in range(4)] == [False, False, True, True]


@settings(max_examples=300)
@given(
    st.lists(
        st.tuples(
            st.integers(0, len(PLAIN)), st.integers(0, 3), st.sampled_from([b"", b"\r\n", b":", b" ", b"a", b"\0"])
        ),
        min_size=1,
        max_size=3,
    )
)
def test_what_is_taken_is_what_the_library_reads(changes: list[tuple[int, int, bytes]]) -> None:
    sent = PLAIN
    for place, gone, fresh in changes:
        sent = sent[:place] + fresh + sent[place + gone :]
    taken = quick().take(sent, None)
    if taken is not None:
        library = h11.Connection(h11.SERVER)
        library.receive_data(sent)
        head, data, end, rest = (library.next_event() for _ in range(4))
        assert isinstance(head, h11.Request) and isinstance(data, h11.Data) and isinstance(end, h11.EndOfMessage)
        assert rest is h11.PAUSED or rest is h11.NEED_DATA
        assert (head.target.decode(), list(head.headers), bytes(data.data)) == (
            taken.scope["path"], taken.scope["headers"], taken.body
        )  # fmt: skip


@pytest.mark.parametrize("answer", [{"a": [1, 0.1, 1e-7, None, True, 'é"\n\u2028']}, {"NaN": "Infinity é"}, []])
def test_answers_are_json(answer: Any) -> None:
    assert json.loads(json_bytes(answer)) == answer and "é".encode() in json_bytes(["é"])


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf")])
def test_a_number_that_json_has_not_is_a_fault(number: float) -> None:
    with pytest.raises(ValueError, match="JSON"):
        json_bytes({"score": number})
