"""Silent, slow, broken and too many connections: the server goes on, and nobody else waits for these."""

from __future__ import annotations

import gc
import json
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest
import uvicorn
from fastapi import FastAPI, Request, Response

from flm_torchrec.cli import main
from flm_torchrec.serve.connections import (
    ConnectionLimits,
    GuardedProtocol,
    Waiting,
    listening,
)
from flm_torchrec.serve.hosts import KnownHosts, host_name
from flm_torchrec.serve.middleware import MeasuringMiddleware, RequestRecords, add_error_handlers, read_body

MOST, SECONDS = 8, 0.5


class Counted:
    """What `RequestRecords` needs of measures: statuses in the order they came."""

    def __init__(self) -> None:
        self.statuses: list[int] = []

    def count(self, route: str, status: int, seconds: float, exports: Iterable[str]) -> None:
        self.statuses.append(status)


@pytest.fixture
def counted() -> Counted:
    return Counted()


@pytest.fixture
def address(counted: Counted) -> Iterator[tuple[str, int]]:
    """A server of an echo behind the edge of `flm serve`."""
    app = FastAPI()
    add_error_handlers(app)
    app.add_middleware(KnownHosts, hosts=("localhost", "address"))
    app.add_middleware(MeasuringMiddleware, records=RequestRecords(counted))  # type: ignore[arg-type]

    @app.post("/")
    async def echo(request: Request) -> int:
        return len(await read_body(request, 1000, SECONDS))

    @app.get("/long")
    async def long() -> Response:
        return Response(b"x" * 50_000_000)

    bound = listening("127.0.0.1", 0)
    guarded = partial(GuardedProtocol, limits=ConnectionLimits(MOST, SECONDS, SECONDS), waiting=Waiting())
    server = uvicorn.Server(uvicorn.Config(app, http=guarded, log_level="critical"))  # type: ignore[arg-type]
    thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]})
    thread.start()
    yield bound.getsockname()
    server.should_exit = True
    thread.join()


def opened(address: tuple[str, int], sent: bytes = b"") -> socket.socket:
    made = socket.create_connection(address, timeout=60)
    made.sendall(sent)
    return made


def answer(made: socket.socket) -> bytes:
    """All that comes until the server closes the connection."""
    parts = []
    try:
        while part := made.recv(65536):
            parts.append(part)
    except ConnectionResetError:
        pass
    return b"".join(parts)


def post(body: bytes, *headers: str, host: str = "localhost") -> bytes:
    lines = ["POST / HTTP/1.1", f"Host: {host}", "Content-Type: application/json", "Connection: close", *headers]
    if not any(line.lower().startswith(("content-length", "transfer")) for line in headers):
        lines.append(f"Content-Length: {len(body)}")
    return "\r\n".join([*lines, "", ""]).encode() + body


@pytest.mark.parametrize("sent", [b"", b"POST / HTTP/1.1\r\nHost: loc"])
def test_half_open_connections_give_way(address: tuple[str, int], sent: bytes) -> None:
    held = [opened(address, sent) for _ in range(3 * MOST)]
    assert all(answer(one) == b"" for one in held)  # at once beyond the most, the others when their time is over
    assert answer(opened(address, post(b"{}"))).startswith(b"HTTP/1.1 200")


@pytest.mark.parametrize(
    "sent", [b"", b"POST / HTTP/1.1\r\nHost: loc", b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 9\r\n\r\n1"]
)
def test_among_too_many_silent_connections_those_that_ask_are_answered(address: tuple[str, int], sent: bytes) -> None:
    held = []
    for _ in range(3):
        held += [opened(address, sent) for _ in range(2 * MOST)]
        assert answer(opened(address, post(b"{}"))).startswith(b"HTTP/1.1 200")
    for one in held:
        one.close()


def test_a_client_that_was_answered_gives_way_after_silent_ones(address: tuple[str, int]) -> None:
    client = opened(address, post(b"{}").replace(b"Connection: close\r\n", b""))
    assert client.recv(65536).startswith(b"HTTP/1.1 200")
    held = [opened(address) for _ in range(3 * MOST)]
    assert held[0].recv(1) == b""  # so the server has seen more than it may have
    client.sendall(post(b"{}"))
    assert answer(client).removeprefix(b"2").startswith(b"HTTP/1.1 200")
    for one in held:
        one.close()


@dataclass(eq=False)
class Silent:
    """What `Waiting` needs of a connection."""

    answered: bool = True
    unread: bool = False

    def has_unread(self) -> bool:
        return self.unread


def test_a_connection_with_a_request_that_was_not_read_yet_is_spared() -> None:
    waiting, asking, idle = Waiting(), Silent(unread=True), Silent()
    assert waiting.first() is None
    waiting.add(asking)  # type: ignore[arg-type]
    assert waiting.first() is asking  # there is no other
    waiting.add(idle)  # type: ignore[arg-type]
    assert waiting.first() is idle
    stranger = Silent(answered=False, unread=True)
    waiting.add(stranger)  # type: ignore[arg-type]
    assert waiting.first() is stranger  # such may be thousands, and a client that was answered is worth more


def test_a_later_request_of_a_connection_has_its_time_too(address: tuple[str, int]) -> None:
    made = opened(address, post(b"{}").replace(b"Connection: close\r\n", b""))
    assert made.recv(65536).startswith(b"HTTP/1.1 200")
    made.sendall(b"POST / HT")
    assert answer(made) in (b"", b"2")  # the body of the answer before may come by itself


def test_a_client_that_takes_no_answer_is_cut_off(address: tuple[str, int]) -> None:
    made, slow = (
        opened(address, b"GET /long HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n") for _ in range(2)
    )
    taken = 0
    for _ in range(20):
        time.sleep(SECONDS / 5)
        taken += len(slow.recv(1_000_000))
    assert len(answer(made)) < 50_000_000 < taken + len(answer(slow))


def test_a_body_that_does_not_come_is_408_and_a_large_one_413_before_it_is_sent(
    address: tuple[str, int], counted: Counted
) -> None:
    assert answer(opened(address, post(b"{", "Content-Length: 900"))).startswith(b"HTTP/1.1 408")
    for length in ("1001", "9" * 18):
        assert answer(opened(address, post(b"", f"Content-Length: {length}"))).startswith(b"HTTP/1.1 413")
    until = time.monotonic() + 10  # the service counts an answer after it has sent it
    while len(counted.statuses) < 3 and time.monotonic() < until:
        time.sleep(0.01)
    assert counted.statuses == [408, 413, 413]


def test_an_upload_that_is_broken_off_is_no_error_of_the_server(address: tuple[str, int], counted: Counted) -> None:
    for headers, body in (("Content-Length: 900", b"{"), ("Transfer-Encoding: chunked", b"5\r\n12")):
        opened(address, post(body, headers)).close()
    while len(counted.statuses) < 2:
        answer(opened(address, b"GET / HTTP/1.1\r\nHost: elsewhere\r\nConnection: close\r\n\r\n"))
    assert set(counted.statuses) <= {400, 499} and counted.statuses.count(499) >= 1


@pytest.mark.parametrize(
    ("host", "served"),
    [
        ("localhost", True), ("LOCALHOST:80", True), ("127.0.0.1:1", True), ("[::1]:8000", True), ("10.0.0.7", True),
        ("evil.example", False), ("localhost.evil.example", False), ("", False), ("127.0.0.1.evil.example:80", False),
    ],
)  # fmt: skip
def test_only_known_hosts_are_answered(address: tuple[str, int], host: str, served: bool) -> None:
    found = answer(opened(address, post(b"{}", host=host)))
    assert found.startswith(b"HTTP/1.1 200" if served else b"HTTP/1.1 400")
    if not served:
        assert "--allowed-hosts" in json.loads(found.partition(b"\r\n\r\n")[2])["detail"]


@pytest.mark.parametrize(
    ("given", "name"), [("a.B:80", "a.b"), ("[fe80::1%eth0]:80", "fe80::1%eth0"), ("a.", "a"), ("a.:80", "a")]
)
def test_the_name_of_a_host_header(given: str, name: str) -> None:
    assert host_name(given) == name


def test_a_wildcard_names_all_below_it() -> None:
    hosts = KnownHosts(lambda *_: None, ["*.example.org"])  # type: ignore[arg-type, return-value]
    assert hosts._known("a.example.org:8000") and hosts._known("a.b.example.org")
    assert not hosts._known("example.org") and not hosts._known("aexample.org") and not hosts._known("127.0.0.1")


def test_a_busy_port_and_an_unknown_address_are_told_before_loading(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(signal, "signal", lambda *_: None)  # those of the test run stay as they are
    with socket.socket() as busy:
        busy.bind(("127.0.0.1", 0))
        busy.listen()
        assert main(["serve", "--export", "none", "--port", str(busy.getsockname()[1])]) == 2
    assert main(["serve", "--export", "none", "--host", "no.such.host.invalid"]) == 2
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 2 and "in use" in told[0] and "give another address" in told[1]


def test_objects_that_are_frozen_while_serving_are_free_at_the_end(
    exported: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else nanobind prints dozens of lines of leaks after the server was stopped."""
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    with socket.create_server(("127.0.0.1", 0)) as once:
        port = str(once.getsockname()[1])
    frozen: list[int] = []
    monkeypatch.setattr("flm_torchrec.cli.serve._serve", lambda *_: frozen.append(gc.get_freeze_count()))
    assert main(["serve", "--export", str(exported), "--port", port]) == 0
    assert frozen[0] > 0 and gc.get_freeze_count() == 0


LIMITED = """
import resource
resource.setrlimit(resource.RLIMIT_NOFILE, ({limit}, {limit}))
from flm_torchrec.serve.connections import most_connections
print(most_connections())
"""


def test_the_limit_of_descriptors_limits_connections() -> None:
    def limited(limit: int) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-c", LIMITED.format(limit=limit)], capture_output=True, text=True, check=False
        )

    assert 0 < int(limited(512).stdout) < 300
    assert "ulimit -n" in limited(200).stderr


STOPPED = """
import threading
from functools import partial
import signal, os, uvicorn
from fastapi import FastAPI
from flm_torchrec.cli.serve import _stop
from flm_torchrec.serve.connections import ConnectionLimits, GuardedProtocol, Waiting, listening
signal.signal(signal.{name}, _stop)
app = FastAPI()
app.router.add_event_handler("startup", lambda: threading.Timer(0.2, os.kill, (os.getpid(), signal.{name})).start())
guarded = partial(GuardedProtocol, limits=ConnectionLimits(9), waiting=Waiting())
uvicorn.Server(uvicorn.Config(app, http=guarded)).run(sockets=[listening("127.0.0.1", 0)])
"""


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_a_signal_ends_a_server_with_0(name: str) -> None:
    found = subprocess.run(
        [sys.executable, "-c", STOPPED.format(name=name)], capture_output=True, text=True, check=False
    )
    assert found.returncode == 0, found.stderr
    assert "Traceback" not in found.stderr
