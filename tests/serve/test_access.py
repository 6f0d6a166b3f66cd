"""API keys, roles, rates and the record of admin acts, and what a hostile client may send around them."""

from __future__ import annotations

import json
import logging
import re
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import cast

import httpx2
import pytest
from fastapi.testclient import TestClient
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flm_torchrec.cli import main
from flm_torchrec.errors import RunError
from flm_torchrec.serve.access import CLIENTS, ApiKeys, Rates, read_keys, role_of
from flm_torchrec.serve.app import ServerLimits, create_app
from flm_torchrec.serve.server import Certificate, RareTracebacks
from flm_torchrec.serve.service import Service
from tests.conftest import ROOT
from tests.serve.fake_service import FakeService
from tests.serve.serving import certificate

KEYS = {role: f"{role}-key-of-this-test" for role in ("read", "write", "admin")}
LINES = "\n".join(["# keys", "", *(f"{role} {key} {role}er" for role, key in KEYS.items())])
BODIES = {
    "/v1/recommend": {"user": "u"},
    "/v1/events": {"user": "u", "item": "i"},
    "/v1/items": {"item": "i"},
    "/v1/swap": {"export": "e"},
    "/v1/forget": {"users": ["u"]},
}


def client_of(keys: str = "", rate: float = 0.0) -> TestClient:
    limits = ServerLimits(keys=read_keys(keys, "test") if keys else ApiKeys(), rate=rate)
    return TestClient(create_app(cast(Service, FakeService()), limits), raise_server_exceptions=False)


@pytest.fixture(scope="module")
def client() -> Iterator[TestClient]:
    with client_of(LINES) as client:
        yield client


@pytest.mark.parametrize("how", ["Authorization", "X-API-Key"])
@pytest.mark.parametrize(
    ("role", "allowed"), [("read", ["/v1/recommend"]), ("write", list(BODIES)[:3]), ("admin", list(BODIES))]
)
def test_a_key_opens_what_its_role_may(client: TestClient, how: str, role: str, allowed: list[str]) -> None:
    headers = {how: f"Bearer {KEYS[role]}" if how == "Authorization" else KEYS[role]}
    for path, body in BODIES.items():
        response = client.post(path, json=body, headers=headers)
        assert response.status_code == (200 if path in allowed else 403), (path, response.text)
        if path not in allowed:
            assert f"key: is for {role}" in response.json()["detail"] and "\n" not in response.text
    assert client.get("/v1/users", headers=headers).json() == ["u"]


@pytest.mark.parametrize("given_key", ["", "Bearer ", "Bearer wrong", "Basic cmVhZC1rZXk=", "Bearer " + "x" * 5000])
def test_no_key_and_a_wrong_key_open_nothing(given_key: str) -> None:
    with client_of(LINES) as client:
        headers = {"Authorization": given_key} if given_key else {}
        for path in ("/v1/users", "/metrics", "/v1/nothing"):
            response = client.get(path, headers=headers)
            assert (response.status_code, response.headers["WWW-Authenticate"]) == (401, "Bearer")
        assert client.post("/v1/swap/", json=BODIES["/v1/swap"], headers=headers).status_code == 401
        assert client.get("/health").status_code == 200 and client.get("/").status_code == 200


def test_guessing_keys_is_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flm_torchrec.serve.access.WRONG_KEYS", 0.01)
    with client_of(LINES) as client:
        found = [client.get("/v1/users", headers={"X-API-Key": f"guess-{n}"}).status_code for n in range(20)]
        assert found[0] == 401 and found[-1] == 429
        assert client.get("/v1/users", headers={"X-API-Key": KEYS["read"]}).status_code == 200


@pytest.mark.parametrize("lines", ["", f"read {KEYS['read']}\nwrite {KEYS['write']}"])
def test_admin_routes_are_off_without_an_admin_key(lines: str) -> None:
    with client_of(lines) as client:
        headers = {"X-API-Key": KEYS["write"]} if lines else {}
        response = client.post("/v1/swap", json={"export": "e"}, headers=headers)
        assert response.status_code == 403 and "--keys" in response.json()["detail"]
        assert client.post("/v1/events", json=BODIES["/v1/events"], headers=headers).status_code == 200


def test_admin_acts_are_recorded_without_the_key(client: TestClient, capsys: pytest.CaptureFixture[str]) -> None:
    for export, key in (("good", "admin"), ("bad", "admin"), ("good", "write"), ("new\nline", "admin")):
        client.post("/v1/swap", json={"export": export}, headers={"X-API-Key": KEYS[key]})
    printed = capsys.readouterr().out
    told = [json.loads(line) for line in printed.splitlines()]
    assert [(line["status"], line["key"], line.get("export")) for line in told] == [
        (200, "adminer", "good"),
        (422, "adminer", "bad"),
        (403, "writeer", None),
        (200, "adminer", "new\nline"),
    ]
    assert all(line["audit"] == "POST /v1/swap" and line["time"].endswith("Z") for line in told)
    assert not any(key in printed for key in KEYS.values())


def test_a_client_has_its_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr("flm_torchrec.serve.access.time.monotonic", lambda: now[0])
    rates = Rates(2)
    assert [rates.take("a") for _ in range(3)] == [True, True, False] and rates.take("b")
    now[0] += 0.5
    assert [rates.take("a") for _ in range(2)] == [True, False]
    now[0] += 100
    assert [rates.take("a") for _ in range(3)] == [True, True, False]
    slow = Rates(0.5)
    assert slow.take("a") and not slow.take("a")


def test_clients_and_routes_that_are_counted_are_bounded() -> None:
    rates = Rates(1)
    for number in range(CLIENTS + 5):
        rates.take(str(number))
    assert len(rates.left) == CLIENTS and "0" not in rates.left
    with client_of() as client:
        counted = []
        for path in range(20):
            client.get(f"/nothing/{path}")
            client.request(f"M{path}", "/v1/users")
            counted.append(client.get("/metrics").text.count("flm_requests_total{"))
        assert counted[-1] == counted[1]


def test_beyond_the_rate_there_is_429_and_the_probes_go_on() -> None:
    with client_of(rate=0.001) as client:
        found = [client.get("/v1/users") for _ in range(2)]
        assert [response.status_code for response in found] == [200, 429] and found[1].headers["Retry-After"] == "1"
        assert client.get("/health").status_code == 200


@pytest.mark.parametrize(
    ("lines", "reason"),
    [
        ("", "has no key"),
        ("# nothing\n", "has no key"),
        ("reed aaaaaaaaaaaaaaaaaaaa", "line 1: no role 'reed'; did you mean 'read'"),
        ("\nread short", "line 2: a key has at least 16"),
        ("read kéyyyyyyyyyyyyyyyyyyyy", "line 1: a key has at least 16"),
        ("read", "line 1: has 1 words"),
        ("read aaaaaaaaaaaaaaaaaaaa b c", "line 1: has 4 words"),
        ("read aaaaaaaaaaaaaaaaaaaa\nadmin aaaaaaaaaaaaaaaaaaaa", "line 2: the key of an earlier line"),
    ],
)
def test_wrong_keys_are_told_without_being_shown(lines: str, reason: str) -> None:
    with pytest.raises(RunError, match="keys: ") as told:
        read_keys(lines, "keys")
    assert reason in str(told.value) and "aaaa" not in str(told.value)


@pytest.mark.parametrize(
    ("method", "path", "role"),
    [
        ("GET", "/", None), ("GET", "/health", None), ("GET", "/metrics", "read"), ("GET", "/v1/users", "read"),
        ("POST", "/v1/recommend", "read"), ("POST", "/v1/recommend/", "read"), ("POST", "/v1/new", "write"),
        ("DELETE", "/v1/recommendations", "write"), ("POST", "/v1/swap", "admin"), ("GET", "/v1/swap/", "admin"),
    ],
)  # fmt: skip
def test_the_role_that_a_route_needs(method: str, path: str, role: str | None) -> None:
    assert role_of(method, path) == role


PATHS = ("/v1/recommend", "/v1/events", "/v1/swap", "/v1/../v1/swap", "//v1/swap", "/%2e%2e/etc/passwd", "/v1/users")


@settings(max_examples=150, suppress_health_check=list(HealthCheck))
@given(
    method=st.sampled_from(["GET", "POST", "PUT", "DELETE", "OPTIONS", "TRACE", "FOO"]),
    path=st.sampled_from(PATHS) | st.text(max_size=20).map(lambda text: "/" + text),
    headers=st.dictionaries(
        st.sampled_from(["Authorization", "X-API-Key", "Content-Type", "Content-Length", "X-Request-ID", "Accept"]),
        st.binary(max_size=40).map(lambda raw: raw.replace(b"\r", b"").replace(b"\n", b"").replace(b"\0", b"").strip()),
        max_size=5,
    ),
    body=st.binary(max_size=50),
)
def test_no_header_opens_or_breaks_the_server(
    client: TestClient, method: str, path: str, headers: dict[str, bytes], body: bytes
) -> None:
    named = [(name.encode(), value) for name, value in headers.items()]
    try:
        response = client.request(method, path, headers=named, content=body, follow_redirects=False)
    except (ValueError, UnicodeError, httpx2.InvalidURL):
        return  # the client itself refuses to send it
    assert response.status_code < 500
    if path.startswith("/v1/"):
        assert response.status_code >= 300 and "\n" not in response.text.strip()


def test_others_are_trusted_only_on_request(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as once:
        port = str(once.getsockname()[1])
    for host in ("0.0.0.0", "::"):
        assert main(["serve", "--export", str(tmp_path), "--host", host, "--port", port]) == 2
        assert "give --keys FILE, or --without-keys" in capsys.readouterr().err
    (tmp_path / "keys").write_text("read short")
    for keys in ("keys", "none"):
        assert main(["serve", "--export", str(tmp_path), "--keys", str(tmp_path / keys)]) == 2
        told = capsys.readouterr().err
        assert f"{tmp_path / keys}: " in told and told.count("\n") == 1


def test_keys_of_the_environment_are_read_and_not_shown(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FLM_SERVE_KEYS", "writ secret-secret-secret")
    assert main(["serve", "--export", str(tmp_path)]) == 2
    told = capsys.readouterr().err
    assert "FLM_SERVE_KEYS: line 1: no role 'writ'" in told and "secret-secret" not in told


def test_a_certificate_and_a_key_that_do_not_fit_are_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one, two = certificate(tmp_path, "one"), certificate(tmp_path, "two")
    one.check()
    for wrong in (Certificate(one.certificate, two.key), Certificate(tmp_path / "none", one.key)):
        options = ["--tls-certificate", str(wrong.certificate), "--tls-key", str(wrong.key)]
        assert main(["serve", "--export", str(tmp_path), *options]) == 2
        assert "give PEM files that belong together" in capsys.readouterr().err
    assert main(["serve", "--export", str(tmp_path), "--tls-key", str(one.key)]) == 2
    assert "give both, or neither" in capsys.readouterr().err


def test_one_traceback_a_minute_is_printed() -> None:
    rare = RareTracebacks()
    error = (ValueError, ValueError("x"), None)
    with_traceback = logging.LogRecord("uvicorn.error", logging.ERROR, "", 0, "broke", None, error)
    plain = logging.LogRecord("uvicorn.error", logging.ERROR, "", 0, "stops", None, None)
    assert [rare.filter(record) for record in (with_traceback, with_traceback, plain)] == [True, False, True]
    rare.last -= 61
    assert rare.filter(with_traceback)


@pytest.mark.parametrize(
    ("given_id", "kept"),
    [("abc-1.2_3", True), ("", False), ("a" * 65, False), ("a b", False), ('"},{"', False), ("\u00e9", False)],
)
def test_every_request_has_an_id(
    client: TestClient, given_id: str, kept: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    headers = {b"X-Request-ID": given_id.encode("latin-1"), b"X-API-Key": KEYS["admin"].encode()}
    answer = client.post("/v1/swap", json={"export": "e"}, headers=headers)
    found = answer.headers["X-Request-ID"]
    assert (found == given_id) == kept and 0 < len(found) <= 64
    assert json.loads(capsys.readouterr().out)["request"] == found


def test_requests_are_logged_without_what_they_ask_for(capsys: pytest.CaptureFixture[str]) -> None:
    app = create_app(cast(Service, FakeService()), ServerLimits(log_requests=True))
    with TestClient(app) as client:
        client.get("/v1/users", params={"query": "someone"}, headers={"X-Request-ID": "one"})
        client.post("/v1/recommend", json={"k": 0, "user": "someone"})
        client.get("/someone")
    printed = capsys.readouterr().out
    told = [json.loads(line) for line in printed.splitlines()]
    assert [(line["route"], line["status"]) for line in told[:2]] == [("/v1/users", 200), ("/v1/recommend", 422)]
    assert told[0]["request"] == "one" and all(line["seconds"] >= 0 for line in told) and "someone" not in printed


def test_the_dashboard_asks_for_metrics_that_there_are(client: TestClient) -> None:
    panels = json.loads((ROOT / "configs" / "grafana-serve.json").read_text())["panels"]
    asked = set(re.findall(r"flm_\w+", " ".join(target["expr"] for panel in panels for target in panel["targets"])))
    client.post("/v1/recommend", json={}, headers={"X-API-Key": KEYS["read"]})
    told = client.get("/metrics", headers={"X-API-Key": KEYS["read"]}).text
    assert asked and all(re.search(rf"^{name}[ {{]", told, re.MULTILINE) for name in asked)
