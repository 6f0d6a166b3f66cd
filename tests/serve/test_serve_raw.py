"""A running server, over HTTP and HTTPS, against bytes that no HTTP library would send, and against its own client."""

from __future__ import annotations

import http.client
import json
import logging
import socket
import ssl
from collections.abc import Iterator
from pathlib import Path
from typing import cast

import pytest

from flm_torchrec.client import Client, ServiceError
from flm_torchrec.serve.app import ServerLimits, create_app
from flm_torchrec.serve.event_store import EventStore
from flm_torchrec.serve.service import Service
from tests.serve.fake_service import FakeService
from tests.serve.serving import ADMIN_KEY, KEYS, certificate, running

LIMITS = ServerLimits(hosts=("localhost", "127.0.0.1"), keys=KEYS, body_bytes=100_000)


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    with running(create_app(cast(Service, FakeService()), LIMITS)) as port:
        yield port


def answer(port: int, sent: bytes) -> tuple[int, bytes]:
    """Status and body of what comes until the server closes the connection."""
    with socket.create_connection(("127.0.0.1", port), timeout=60) as made:
        made.sendall(sent)
        with made.makefile("rb") as stream:
            head, _, body = stream.read().partition(b"\r\n\r\n")
    length = int(head.lower().partition(b"content-length:")[2].partition(b"\r\n")[0])
    return int(head.split(b" ", 2)[1]), body[:length]


def get(path: str, *headers: str) -> bytes:
    lines = [f"GET {path} HTTP/1.1", *(headers or ("Host: localhost",)), "Connection: close", "", ""]
    return "\r\n".join(lines).encode("latin-1")


def post(body: bytes, *headers: str) -> bytes:
    first = ["POST /v1/recommend HTTP/1.1", "Host: localhost", f"X-API-Key: {ADMIN_KEY}", "Connection: close"]
    kind = ["Content-Type: application/json"]
    return "\r\n".join([*first, *kind, *(headers or (f"Content-Length: {len(body)}",)), "", ""]).encode() + body


HOSTILE = {
    "TLS on a port of HTTP": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\0" * 500,
    "HTTP/2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "HTTP/0.9": b"GET /health\r\n\r\n",
    "no method": b"\r\n /health HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "a flood of headers": get("/health", "Host: localhost", *["X-One: two"] * 5000),
    "a long header": get("/health", "Host: localhost", "X-One: " + "a" * 40_000),
    "a long path": get("/" + "a" * 40_000),
    "a path longer than a file's name": get("/" + "a" * 5000),
    "no host": get("/v1/users", "X-API-Key: " + ADMIN_KEY),
    "two hosts": get("/v1/users", "Host: localhost", "Host: evil.example", "X-API-Key: " + ADMIN_KEY),
    "another host": get("/health", "Host: evil.example"),
    "another host's address": get("http://evil.example/health"),
    "a host that is no text": get("/health", "Host: \xff\xfe"),
    "a header without a colon": get("/health", "Host: localhost", "nothing"),
    "a space before the colon": get("/health", "Host: localhost", "X-One : two"),
    "a NUL in a header": get("/health", "Host: localhost", "X-One: a\0b"),
    "all options": b"OPTIONS * HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n",
    "a proxy": b"CONNECT evil.example:443 HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n",
    **{f"traversal {path}": get(path) for path in (
        "/../../etc/passwd", "/%2e%2e/%2e%2e/etc/passwd", "/..%2f..%2fetc%2fpasswd", "/..\\..\\etc", "//etc/passwd",
        "/%00", "/app.js%00", "/%ff%fe", "/./..//.", "/....//....//etc/passwd", "/page/%5c..%5c..",
    )},
    "no key": get("/v1/users"),
    "a wrong key": get("/v1/users", "Host: localhost", "Authorization: Bearer \xff\xfe"),
    "a very long key": get("/v1/users", "Host: localhost", "X-API-Key: " + "k" * 30_000),
    "two lengths": post(b"{}", "Content-Length: 2", "Content-Length: 3"),
    "a length and chunks": post(b"0\r\n\r\n", "Content-Length: 2", "Transfer-Encoding: chunked"),
    "a negative length": post(b"", "Content-Length: -1"),
    "a length that is no number": post(b"", "Content-Length: 1e3"),
    "an endless length": post(b"", "Content-Length: " + "9" * 19),
    "a chunk that is none": post(b"zz\r\n{}\r\n0\r\n\r\n", "Transfer-Encoding: chunked"),
    "an unknown encoding": post(b"{}", "Transfer-Encoding: gzip"),
    "a body beyond the limit in chunks": post(
        b"10000\r\n" + b" " * 65_536 + b"\r\n10000\r\n" + b" " * 65_536 + b"\r\n0\r\n\r\n", "Transfer-Encoding: chunked"
    ),
    "a packed body": post(b"\x1f\x8b\x08\0\0", "Content-Length: 5", "Content-Encoding: gzip"),
    "deep JSON": post(b'{"features":' * 7_000 + b"1" + b"}" * 7_000),
    "deep JSON beyond the limit": post(b'{"features":' * 100_000 + b"1" + b"}" * 100_000),
    "deep lists": post(b"[" * 90_000),
    "UTF-16": post('{"user": "u"}'.encode("utf-16")),
    "Latin-1": post(b'{"user": "\xe9"}'),
}  # fmt: skip


@pytest.mark.parametrize("sent", HOSTILE.values(), ids=HOSTILE)
def test_every_answer_is_4xx_in_one_line(port: int, sent: bytes, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.ERROR):
        status, body = answer(port, sent)
    assert 400 <= status < 500 and body.strip() and b"\n" not in body.strip(), (status, body[:200])
    assert not caplog.records
    assert answer(port, get("/health"))[0] == 200


def test_a_client_over_https_asks_the_real_service(exported: Path, tmp_path: Path) -> None:
    made = certificate(tmp_path, "one")
    service = Service(exported, EventStore(tmp_path / "events.sqlite"))
    with running(create_app(service, LIMITS), made) as port:
        url, trusting = f"https://localhost:{port}", ssl.create_default_context(cafile=made.certificate)
        client = Client(url, ADMIN_KEY, tls=trusting)
        first = client.recommend(user="u7", k=5)
        assert len(first.items) == 5 and client.add_event("u7", first.items[0].item) == 1
        assert first.items[0] not in client.recommend(user="u7", k=5).items
        assert client.events("u7")[-1]["item"] == first.items[0].item
        for wrong, status, reason in (
            (Client(url, ADMIN_KEY), 0, "certificate verify failed"),
            (Client(f"https://127.0.0.1:{port}", ADMIN_KEY, tls=trusting), 0, "not valid for '127.0.0.1'"),
            (Client(f"http://localhost:{port}", ADMIN_KEY), 0, "is 'flm serve' running there"),
            (Client(url, "another-key-of-the-tests", tls=trusting), 401, "Authorization: Bearer"),
        ):
            with pytest.raises(ServiceError, match=reason) as told:
                wrong.recommend(user="u7")
            assert told.value.status == status
        old = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        old.load_verify_locations(made.certificate)
        old.minimum_version, old.maximum_version = ssl.TLSVersion.TLSv1, ssl.TLSVersion.TLSv1_1
        with pytest.raises(ServiceError):
            Client(url, ADMIN_KEY, tls=old).health()
        asked = http.client.HTTPSConnection("localhost", port, context=trusting)
        asked.request("POST", "/v1/recommend", b"{", {"X-API-Key": ADMIN_KEY, "Content-Type": "application/json"})
        found = asked.getresponse()
        assert found.status == 400 and "Invalid JSON" in json.loads(found.read())["detail"]
        asked.close()  # the server would wait for the end of its TLS session
        assert client.health()["status"] == "ok"
