"""Traces of requests (OpenTelemetry). FastAPI makes a span for each request, which goes on with the client's trace."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from opentelemetry import trace
from starlette.types import Scope

from flm_torchrec.errors import RunError
from flm_torchrec.safe_text import redact_address

if TYPE_CHECKING:
    from fastapi.telemetry import TelemetryConfig

PATIENCE = 5.0
"""Seconds for one message to the collector. Requests never wait for it."""
EXTRA = "pip install 'flm_torchrec[traces]'"


def check_traces(url: str) -> None:
    """Raise RunError where this is no address of a collector, or what sends traces is not installed."""
    try:
        parts = urlsplit(url)
        sound = parts.scheme in ("http", "https") and bool(parts.hostname)
    except ValueError:
        sound = False
    if not sound:
        raise RunError(f"--traces {redact_address(url)}: give the address of a collector: http://HOST:4318/v1/traces")
    _sdk()


def collector(url: str) -> Any:
    """A provider of tracers whose spans go to a collector, many at once and from a thread of its own (OTLP over HTTP).

    Raises:
        RunError: the packages are not installed.
    """
    sdk, exporter = _sdk()
    resource = sdk.resources.Resource.create({"service.name": "flm serve"})  # OTEL_SERVICE_NAME comes first
    provider = sdk.trace.TracerProvider(resource=resource)
    provider.add_span_processor(sdk.trace.export.BatchSpanProcessor(exporter(endpoint=url, timeout=PATIENCE)))
    return provider


def telemetry(provider: Any) -> TelemetryConfig:
    """FastAPI's settings: traces alone, by this provider; None: by one that `opentelemetry-instrument` has set up."""
    return {
        "tracer_provider": provider,
        "operation_spans": False,
        "metrics": False,  # Prometheus has them
        "logs": False,  # they would have what clients sent
        "auto_configure": False,
    }


def describe(request_id: str, scope: Scope) -> str:
    """Put a request's id and exports on its span, and take its query off: that may name a user. The trace's id.

    It is empty where nobody traces the request.
    """
    span = trace.get_current_span()
    if not span.is_recording():
        return ""
    span.set_attribute("flm.request_id", request_id)
    exports = scope["state"].get("exports")
    if exports:
        span.set_attribute("flm.exports", exports)
    if scope.get("query_string"):
        span.set_attribute("url.query", "REDACTED")
    return trace.format_trace_id(span.get_span_context().trace_id)


def _sdk() -> tuple[Any, Any]:
    """OpenTelemetry's SDK, and its exporter.

    Raises:
        RunError: they are not installed, or FastAPI is too old to make spans.
    """
    try:
        import fastapi.telemetry  # noqa: F401
        import opentelemetry.sdk.resources
        import opentelemetry.sdk.trace.export
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    except ModuleNotFoundError as error:
        raise RunError(f"--traces: needs {error.name}; {EXTRA}") from error
    return opentelemetry.sdk, OTLPSpanExporter
