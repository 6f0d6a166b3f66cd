"""HTTP around the routes: bodies are read and checked, errors become one line, answers are counted and timed."""

from __future__ import annotations

import asyncio
import json
import random
import re
import time
from dataclasses import dataclass
from typing import Any, TypeVar

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from flm_torchrec.safe_text import visible
from flm_torchrec.serve.access import address_of, now
from flm_torchrec.serve.event_store import StoreError
from flm_torchrec.serve.metrics import ServerMetrics
from flm_torchrec.serve.resolve import Refused
from flm_torchrec.serve.tracing import describe

M = TypeVar("M", bound=BaseModel)
BROKEN_OFF = 499
"""Status that is counted where the client has closed the connection, as in nginx. No client receives it."""
UNANSWERED = 500
"""Status that is counted where there was no answer."""
STOPPING = "the server is stopping; try again in a second"
CLOSING = (408, 413)
"""The connection is closed after these, since the rest of the body may still come."""
ANSWERS: TypeAdapter[Any] = TypeAdapter(Any, config=ConfigDict(ser_json_inf_nan="constants"))
"""Writes JSON in a tenth of the time of the standard library."""
PLAIN_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
HEADERS = (
    (b"content-security-policy", b"default-src 'self'"),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
)


async def read_body(request: Request, most: int, seconds: float) -> bytes:
    """The body of a request of JSON.

    Raises:
        Refused: the body has another content type, is longer than `most` bytes (no more are read), does not come within
            `seconds`, or the client breaks off.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise Refused(415, "Content-Type: send application/json")
    length = request.headers.get("content-length", "")
    if length.isascii() and length.isdigit() and (len(length) > 18 or int(length) > most):
        raise _too_long(most)
    try:
        async with asyncio.timeout(seconds):
            return await _read_at_most(request, most)
    except TimeoutError as error:
        raise Refused(408, f"body: did not come within {seconds:g} seconds; send it faster") from error
    except ClientDisconnect as error:
        raise Refused(BROKEN_OFF, "body: broken off") from error


async def _read_at_most(request: Request, most: int) -> bytes:
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > most:
            raise _too_long(most)
    return bytes(body)


def _too_long(most: int) -> Refused:
    return Refused(413, f"body: more than {most} bytes; ask for less at once")


def parse(message: type[M], body: bytes) -> M:
    """JSON → a checked message.

    Raises:
        Refused: the body is no JSON (400), or no such message (422).
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
    """The text as UTF-8 can encode it: a request may contain half a surrogate pair."""
    return text.encode("utf-8", "replace").decode("utf-8")[:500]


def add_error_handlers(app: FastAPI) -> None:
    """Answer every error with its status and `{"detail": one line}`."""

    @app.exception_handler(Refused)
    @app.exception_handler(StoreError)
    async def refused(_: Request, error: Refused | StoreError) -> JSONResponse:
        return error_response(error)

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> JSONResponse:
        return JSONResponse({"detail": _line(error.errors()[0])}, 422)

    @app.exception_handler(HTTPException)
    async def other(_: Request, error: HTTPException) -> JSONResponse:
        return JSONResponse({"detail": _printable(str(error.detail))}, error.status_code, error.headers)


def error_response(error: Refused | StoreError) -> JSONResponse:
    """The answer to a request that is refused, or for which there is no store."""
    status = error.status if isinstance(error, Refused) else 503
    headers = {"Retry-After": "1"} if status == 503 else {}
    if status in CLOSING:
        headers["Connection"] = "close"
    return JSONResponse({"detail": _printable(str(error))}, status, headers)


def stopping_response() -> JSONResponse:
    """The answer to a request that is under way when the server's time to stop is over."""
    return JSONResponse({"detail": STOPPING}, 503, {"Retry-After": "1", "Connection": "close"})


def json_bytes(answer: Any) -> bytes:
    """An answer as JSON.

    Raises:
        ValueError: it has NaN or infinity, which JSON has not.
    """
    made = ANSWERS.dump_json(answer)
    if b"NaN" in made or b"Infinity" in made:  # a number, or part of a text
        return json.dumps(answer, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()
    return made


def request_id(scope: Scope) -> str:
    """The id that a client or a proxy has given in `X-Request-ID`, if it is a plain one, or else a random one."""
    given = Headers(scope=scope).get("x-request-id", "")
    return given if PLAIN_ID.fullmatch(given) else f"{random.getrandbits(64):016x}"  # no secret


@dataclass(frozen=True)
class RequestRecords:
    """Counts and times answers.

    Args:
        log: print a line of JSON for each request. It has the route, not what was asked for: that may be about a user.
    """

    measures: ServerMetrics
    log: bool = False

    def add(self, scope: Scope, status: int, seconds: float, traced: str = "") -> None:
        """A request has been answered.

        Args:
            traced: id of its trace; empty: it has none.
        """
        route = getattr(scope.get("route"), "path", "other")
        state = scope["state"]
        self.measures.count(route, status, seconds, state.get("exports", ()))
        if self.log:
            line = {"request": state["request_id"], "time": now(), "method": scope["method"][:20], "route": route}
            line |= {"status": status, "seconds": round(seconds, 6), "address": address_of(scope)}
            line |= {"trace": traced} if traced else {}
            print(visible(json.dumps(line)), flush=True)


class MeasuringMiddleware:
    """Records every answer, adds the headers that all answers have, and gives every request an id."""

    def __init__(self, app: ASGIApp, records: RequestRecords) -> None:
        self.app = app
        self.records = records

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        start, status, given, traced = time.perf_counter(), UNANSWERED, request_id(scope), ""
        scope.setdefault("state", {})["request_id"] = given

        async def sending(message: Message) -> None:
            nonlocal status, traced
            if message["type"] == "http.response.start":
                status = message["status"]
                traced = describe(given, scope)  # the span ends with the answer
                message["headers"] = [*message.get("headers", ()), *HEADERS, (b"x-request-id", given.encode())]
            await send(message)

        try:
            await self.app(scope, receive, sending)
        except asyncio.CancelledError:  # the server stops, and the request has had its time
            if status == UNANSWERED:
                await stopping_response()(scope, receive, sending)
        finally:
            self.records.add(scope, status, time.perf_counter() - start, traced or describe(given, scope))
