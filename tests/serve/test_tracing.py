"""Spans of requests: whose trace they go on with, what they say, and what they keep to themselves."""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any, cast

import pytest
from fastapi.testclient import TestClient

from flm_torchrec.cli import main
from flm_torchrec.serve.app import ServerLimits, create_app
from flm_torchrec.serve.service import Service
from flm_torchrec.serve.tracing import collector
from tests.serve.fake_service import FakeService

MISSING = "install flm_torchrec[traces]"
PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


def client_of(provider: Any, log: bool = False) -> TestClient:
    limits = ServerLimits(traces=provider, log_requests=log)
    return TestClient(create_app(cast(Service, FakeService()), limits), raise_server_exceptions=False)


def test_a_span_has_the_request_and_goes_on_with_the_trace(capsys: pytest.CaptureFixture[str]) -> None:
    sdk = pytest.importorskip("opentelemetry.sdk.trace", reason=MISSING)
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    kept, provider = InMemorySpanExporter(), sdk.TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(kept))
    with client_of(provider, log=True) as client:
        client.get("/v1/users?query=someone", headers={"traceparent": PARENT, "X-Request-ID": "one"})
        client.post("/v1/recommend", json={"user": "someone"})
        client.post("/v1/recommend", json={"k": 0})
        spans = kept.get_finished_spans()
    assert [span.name for span in spans] == ["GET /v1/users", "POST /v1/recommend", "POST /v1/recommend"]
    first, second, wrong = (dict(span.attributes or {}) for span in spans)
    assert f"{spans[0].context.trace_id:032x}" == PARENT.split("-")[1]
    assert spans[0].parent is not None and f"{spans[0].parent.span_id:016x}" == PARENT.split("-")[2]
    assert first["flm.request_id"] == "one" and first["http.response.status_code"] == 200
    assert second["flm.exports"] == ("fake",) and wrong["http.response.status_code"] == 422
    assert "someone" not in str([span.to_json() for span in spans])
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["trace"] for line in lines] == [f"{span.context.trace_id:032x}" for span in spans]


def test_without_a_provider_nothing_is_traced(capsys: pytest.CaptureFixture[str]) -> None:
    with client_of(None, log=True) as client:
        assert client.get("/v1/users", headers={"traceparent": PARENT}).status_code == 200
    assert "trace" not in json.loads(capsys.readouterr().out)


def test_spans_reach_a_collector() -> None:
    pytest.importorskip("opentelemetry.sdk.trace", reason=MISSING)
    received: list[tuple[str, bytes]] = []

    class Collector(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            received.append((self.path, self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            return

    server = HTTPServer(("127.0.0.1", 0), Collector)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    with client_of(collector(f"http://127.0.0.1:{server.server_port}/v1/traces")) as client:
        client.get("/health", headers={"X-Request-ID": "told-to-the-collector"})
    server.shutdown()
    thread.join()
    server.server_close()
    assert [path for path, _ in received] == ["/v1/traces"] and b"flm serve" in received[0][1]


@pytest.mark.parametrize("url", ["collector:4318", "ftp://host/", "http://", "http://[", ""])
def test_a_wrong_address_is_one_line(url: str, tmp_path: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "--export", str(tmp_path), "--traces", url]) == 2
    told = capsys.readouterr().err
    assert "--traces" in told and "http://HOST:4318/v1/traces" in told and told.count("\n") == 1


def test_what_is_not_installed_is_named(
    tmp_path: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "opentelemetry.sdk.resources", None)
    assert main(["serve", "--export", str(tmp_path), "--traces", "http://127.0.0.1:4318/v1/traces"]) == 2
    assert "flm_torchrec[traces]" in capsys.readouterr().err
