"""The edge of the HTTP side: bodies read and checked, errors told in one line, every answer counted and timed."""

from __future__ import annotations

import asyncio
import time
from typing import Any, TypeVar

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from flm_torchrec.serve.metrics import ServerMetrics
from flm_torchrec.serve.resolve import Refused

M = TypeVar("M", bound=BaseModel)
BROKEN_OFF = 499
"""Status counted where the client has gone, as nginx does; nobody gets it."""
CLOSING = (408, 413)
"""After these the rest of a body may still come: the connection is closed."""
HEADERS = (
    (b"content-security-policy", b"default-src 'self'"),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
)


async def read_body(request: Request, most: int, seconds: float) -> bytes:
    """The body of a request of JSON.

    Raises:
        Refused: it says to be something else, is longer than `most` bytes, of which no more are read, takes longer
            than `seconds` to come, or is broken off.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise Refused(415, "Content-Type: send application/json")
    told = request.headers.get("content-length", "")
    if told.isascii() and told.isdigit() and (len(told) > 18 or int(told) > most):
        raise Refused(413, f"body: more than {most} bytes; ask for less at once")
    body = bytearray()
    try:
        async with asyncio.timeout(seconds):
            async for chunk in request.stream():
                body += chunk
                if len(body) > most:
                    raise Refused(413, f"body: more than {most} bytes; ask for less at once")
    except TimeoutError as error:
        raise Refused(408, f"body: did not come within {seconds:g} seconds; send it faster") from error
    except ClientDisconnect as error:
        raise Refused(BROKEN_OFF, "body: broken off") from error
    return bytes(body)


def parse(message: type[M], body: bytes) -> M:
    """JSON → a checked message.

    Raises:
        Refused: it is no JSON, or not such a message.
    """
    try:
        return message.model_validate_json(body)
    except ValidationError as error:
        problem = error.errors(include_url=False, include_context=False, include_input=False)[0]
        raise Refused(400 if problem["type"] == "json_invalid" else 422, _line(problem)) from error


def _line(problem: Any) -> str:
    where = ".".join(str(part) for part in problem["loc"])
    return _printable(f"{where}: {problem['msg']}" if where else problem["msg"])


def _printable(text: str) -> str:
    """As UTF-8 can hold it: what came in may be half a character."""
    return text.encode("utf-8", "replace").decode("utf-8")[:500]


def tell_errors(app: FastAPI) -> None:
    @app.exception_handler(Refused)
    async def refused(_: Request, error: Refused) -> JSONResponse:
        headers = {"Retry-After": "1"} if error.status == 503 else {}
        if error.status in CLOSING:
            headers["Connection"] = "close"
        return JSONResponse({"detail": _printable(str(error))}, error.status, headers)

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> JSONResponse:
        return JSONResponse({"detail": _line(error.errors()[0])}, 422)

    @app.exception_handler(HTTPException)
    async def other(_: Request, error: HTTPException) -> JSONResponse:
        return JSONResponse({"detail": _printable(str(error.detail))}, error.status_code, error.headers)


class MeasuringMiddleware:
    """Counts and times every answer, and adds the headers that all have."""

    def __init__(self, app: ASGIApp, measures: ServerMetrics) -> None:
        self.app = app
        self.measures = measures

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        start, status = time.perf_counter(), 500

        async def sending(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", ()), *HEADERS]
            await send(message)

        try:
            await self.app(scope, receive, sending)
        finally:
            route = getattr(scope.get("route"), "path", "other")
            self.measures.requests.labels(route, status).inc()
            self.measures.seconds.labels(route).observe(time.perf_counter() - start)
