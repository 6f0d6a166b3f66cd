"""Requests in the plainest form: read, admitted and answered without the HTTP library and the framework.

These two took four fifths of a request's processor time. One regular expression says what is plain: a POST to one of a
few paths, headers of printable ASCII, each once, and a body that has come with them. Whatever is not plain, or is
refused before its body is read, takes the usual way, and has its answer from there.
"""

from __future__ import annotations

import asyncio
import logging
import re
import time
from collections.abc import Awaitable, Callable, Collection, Coroutine
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

from opentelemetry import trace
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import Scope

from flm_torchrec.serve.access import Access
from flm_torchrec.serve.event_store import StoreError
from flm_torchrec.serve.hosts import host_names, is_known
from flm_torchrec.serve.middleware import (
    HEADERS,
    RequestRecords,
    error_response,
    json_bytes,
    request_id,
    stopping_response,
)
from flm_torchrec.serve.resolve import Refused
from flm_torchrec.serve.workers import Settle

HEADER = rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+:[\t\x20-\x7e]*\r\n"
PLAIN = re.compile(rb"POST (/[a-z0-9/]{1,64}) HTTP/1\.1\r\n((?:%b){1,64})\r\n" % HEADER)
MOST_BYTES = 65_536
"""Of a plain request, with its header."""
OTHERWISE = frozenset(
    (b"transfer-encoding", b"expect", b"upgrade", b"forwarded", b"x-forwarded-for", b"x-forwarded-proto")
)
"""Headers of requests that are not plain."""
ALIVE = (b"", b"keep-alive")
KINDS = (b"application/json", b"application/json; charset=utf-8", b"application/json;charset=utf-8")
LINES = {status.value: f"HTTP/1.1 {status.value} {status.phrase}\r\n".encode() for status in HTTPStatus}
Done = Callable[[Response], None]
"""Sends an answer."""


def never(asked: Any, settle: Settle) -> bool:
    """No request of a route is answered in the event loop."""
    return False


@dataclass(frozen=True)
class QuickRoute:
    """How the requests of a route are answered."""

    route: Route
    read: Callable[[bytes, dict[str, Any]], Any]
    """A body and the request's state → the message; a body that is none raises Refused."""
    answer: Callable[[Any], Awaitable[Any]]
    """A message → what to answer."""
    soon: Callable[[Any, Settle], bool]
    """As of `Workers.recommend_soon`."""


@dataclass(frozen=True)
class QuickRequest:
    """A plain request that was admitted."""

    scope: Scope
    """As of ASGI, as far as the records and the rules of access read it."""
    body: bytes
    begun: float


def traced_elsewhere() -> bool:
    """Whether this process traces its requests, which FastAPI does: then no request is quick."""
    return not isinstance(trace.get_tracer_provider(), trace.ProxyTracerProvider)


class QuickRequests:
    """Takes plain requests and answers them.

    Args:
        hosts: as of `KnownHosts`.
        most: bytes of a body; a longer one is refused on the usual way.
    """

    def __init__(self, hosts: Collection[str], access: Access, records: RequestRecords, most: int) -> None:
        self.hosts = host_names(hosts)
        self.access = access
        self.records = records
        self.most = min(most, MOST_BYTES)
        self.routes: dict[bytes, QuickRoute] = {}

    def add(self, route: QuickRoute) -> None:
        """Answer a route's requests."""
        self.routes[route.route.path.encode()] = route

    def take(self, data: bytes, client: tuple[str, int] | None) -> QuickRequest | None:
        """The request that the data are, if it is a plain one, and may be answered; it counts for its client's rate."""
        begun = time.perf_counter()
        found = PLAIN.match(data) if len(data) <= MOST_BYTES else None
        if found is None or found[1] not in self.routes:
            return None
        lines = [line.partition(b":") for line in found[2].split(b"\r\n")[:-1]]
        headers = {name.lower(): value.strip(b" \t") for name, _, value in lines}
        if len(headers) < len(lines) or not self._is_plain(headers, len(data) - found.end()):
            return None
        route = self.routes[found[1]].route
        scope: dict[str, Any] = {"type": "http", "method": "POST", "path": route.path, "headers": list(headers.items())}
        scope |= {"client": client, "route": route, "state": {}}
        return QuickRequest(scope, data[found.end() :], begun) if self.access.admits(scope) else None

    def _is_plain(self, headers: dict[bytes, bytes], length: int) -> bool:
        """Whether nothing about a request asks for more than an answer to a body of so many bytes."""
        return (
            headers.get(b"content-length") == b"%d" % length
            and length <= self.most
            and headers.get(b"content-type", b"").lower() in KINDS
            and headers.get(b"connection", b"").lower() in ALIVE
            and OTHERWISE.isdisjoint(headers)
            and is_known(headers.get(b"host", b"").decode("ascii"), self.hosts)
        )

    def begin(self, request: QuickRequest, done: Done) -> Coroutine[Any, Any, None] | None:
        """Answer a request: at once, or in one of the event loop's next turns; or else return what is left to await.

        `done` gets the answer, whatever happens; it is counted and timed.
        """
        scope = request.scope
        scope["state"]["request_id"] = request_id(scope)
        route = self.routes[scope["path"].encode()]

        def settle(found: Any) -> None:
            done(self._answered(request, found))

        try:
            asked = route.read(request.body, scope["state"])
            if route.soon(asked, settle):
                return None
        except Exception as error:
            settle(error)
            return None
        return self._waiting(route.answer(asked), settle)

    async def _waiting(self, answer: Awaitable[Any], settle: Callable[[Any], None]) -> None:
        try:
            found = await answer
        except (Exception, asyncio.CancelledError) as error:
            found = error
        settle(found)

    def _answered(self, request: QuickRequest, found: Any) -> Response:
        """The answer that was found, or that tells why there is none."""
        scope = request.scope
        response = _response(found)
        response.raw_headers += [*HEADERS, (b"x-request-id", scope["state"]["request_id"].encode())]
        self.records.add(scope, response.status_code, time.perf_counter() - request.begun)
        return response


def _response(found: Any) -> Response:
    if isinstance(found, (Refused, StoreError)):
        return error_response(found)
    if isinstance(found, asyncio.CancelledError):  # the server stops, and the request has had its time
        return stopping_response()
    if not isinstance(found, Exception):
        try:
            return Response(json_bytes(found), media_type="application/json")
        except ValueError as error:
            found = error
    logging.getLogger("uvicorn.error").error("Exception in an answer\n", exc_info=found)
    return PlainTextResponse("Internal Server Error", 500, {"Connection": "close"})


def encoded(response: Response, before: list[tuple[bytes, bytes]]) -> bytes:
    """An answer as HTTP/1.1 sends it, with the headers `before` its own."""
    lines = [name + b": " + value for name, value in (*before, *response.raw_headers)]
    return LINES[response.status_code] + b"\r\n".join(lines) + b"\r\n\r\n" + bytes(response.body)
