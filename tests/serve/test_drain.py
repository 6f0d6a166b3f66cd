"""A server that is told to stop answers what has reached it, and tells clients to go elsewhere."""

from __future__ import annotations

import asyncio
import logging
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from fastapi import FastAPI

from flm_torchrec.serve import server as server_module
from flm_torchrec.serve.connections import ConnectionLimits, listening
from flm_torchrec.serve.server import Certificate, HttpServer, Tell, http_server
from tests.serve.serving import certificate

REQUEST = b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"
ANSWER = b'"ok"'


class Stopped:
    """A server in a thread, its address, and the moment at which it accepts nothing more."""

    def __init__(self, tls: Certificate | None = None) -> None:
        ready, self.stopping, self.slow = threading.Event(), threading.Event(), threading.Event()
        app, self.began = FastAPI(), threading.Event()

        @app.get("/")
        async def fast() -> str:
            return "ok"

        @app.get("/slow")
        async def slow() -> str:
            self.began.set()
            await asyncio.to_thread(self.slow.wait, 30)
            return "ok"

        @app.get("/blocked")
        async def blocked() -> str:
            self.began.set()
            time.sleep(0.3)  # the event loop accepts nothing meanwhile
            return "ok"

        bound = listening("127.0.0.1", 0)
        self.address = bound.getsockname()
        limits = ConnectionLimits(64, lingering_seconds=0.1)
        self.server: HttpServer = http_server(app, limits, tls, Tell(ready.set, self.stopping.set))
        self.thread = threading.Thread(target=self.server.run, kwargs={"sockets": [bound]})
        self.thread.start()
        assert ready.wait(60)

    def connect(self, sent: bytes = b"") -> socket.socket:
        made = socket.create_connection(self.address, timeout=60)
        made.sendall(sent)
        return made

    def stop(self) -> None:
        self.server.should_exit = True
        assert self.stopping.wait(60)

    def end(self) -> None:
        self.slow.set()
        self.server.should_exit = True
        self.thread.join(60)
        assert not self.thread.is_alive()


@pytest.fixture
def stopped() -> Iterator[Stopped]:
    made = Stopped()
    yield made
    made.end()


def rest(made: socket.socket) -> bytes:
    """All that comes until the server closes the connection; an error where it does not close it properly."""
    with made, made.makefile("rb") as stream:
        return stream.read().lower()


def is_last(answer: bytes) -> bool:
    return answer.count(b"200 ok") == 1 and b"connection: close" in answer and answer.endswith(ANSWER)


def test_connections_without_a_request_may_send_one_more(stopped: Stopped) -> None:
    used, fresh, half = stopped.connect(REQUEST), stopped.connect(), stopped.connect(REQUEST[:20])
    while not (answer := used.recv(65536)).endswith(ANSWER):
        assert answer
    stopped.stop()
    for made, sent in ((used, REQUEST), (fresh, REQUEST), (half, REQUEST[20:])):
        made.sendall(sent)
        assert is_last(rest(made))
    with pytest.raises(OSError):
        stopped.connect()


def test_a_header_that_is_coming_has_its_usual_time(stopped: Stopped, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_module, "DRAIN_SECONDS", 0.0)
    half, silent = stopped.connect(REQUEST[:20]), stopped.connect()
    while len(stopped.server.server_state.connections) < 2:
        time.sleep(0.01)
    time.sleep(0.1)  # the part of the header is read
    stopped.stop()
    assert rest(silent) == b""
    half.sendall(REQUEST[20:])
    assert is_last(rest(half))


def test_what_runs_is_answered_and_says_that_it_is_the_last(stopped: Stopped) -> None:
    made = stopped.connect(REQUEST.replace(b"/ ", b"/slow ", 1))
    assert stopped.began.wait(60)
    stopped.stop()
    stopped.slow.set()
    assert is_last(rest(made))


def test_connections_that_wait_to_be_accepted_are_answered(stopped: Stopped) -> None:
    first = stopped.connect(REQUEST.replace(b"/ ", b"/blocked ", 1))
    assert stopped.began.wait(60)
    waiting = [stopped.connect(REQUEST) for _ in range(30)]
    stopped.server.should_exit = True
    answers = [rest(made) for made in (first, *waiting)]
    assert all(answer.count(b"200 ok") == 1 and answer.endswith(ANSWER) for answer in answers)


def test_clients_that_are_silent_over_tls_do_not_hold_up_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(server_module, "DRAIN_SECONDS", 0.2)
    made = certificate(tmp_path, "one")
    stopped, trusting = Stopped(made), ssl.create_default_context(cafile=made.certificate)
    connections = [trusting.wrap_socket(stopped.connect(), server_hostname="localhost") for _ in range(3)]
    for used in connections[:2]:
        used.sendall(REQUEST)
        while not used.recv(65536).endswith(ANSWER):
            continue
    with caplog.at_level(logging.ERROR):
        stopped.stop()
        connections[1].sendall(REQUEST)  # its answer is the last one; the client never closes its side
        stopped.end()
    assert not caplog.records  # else the time of the stop was over before the connections were
    last = b""
    while not last.endswith(ANSWER):
        last += connections[1].recv(65536).lower()
        assert last
    assert is_last(last)
    for silent in connections:
        silent.close()
