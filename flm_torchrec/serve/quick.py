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
from collections.abc import Awaitable, Callable, Collection
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
from flm_torchrec.serve.middleware import HEADERS, RequestRecords, error_response, request_id, stopping_response
from flm_torchrec.serve.resolve import Refused

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
Answer = Callable[[bytes, dict[str, Any]], Awaitable[bytes]]
"""A body and the request's state → the body of the answer."""


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
        self.routes: dict[bytes, tuple[Route, Answer]] = {}

    def add(self, route: Route, answer: Answer) -> None:
        """Answer a route's requests."""
        self.routes[route.path.encode()] = route, answer

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
        route, _ = self.routes[found[1]]
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

    async def answer(self, request: QuickRequest) -> Response:
        """The answer, whatever happens; it is counted and timed."""
        scope = request.scope
        _, answer = self.routes[scope["path"].encode()]
        given = scope["state"]["request_id"] = request_id(scope)
        try:
            response = Response(await answer(request.body, scope["state"]), media_type="application/json")
        except (Refused, StoreError) as error:
            response = error_response(error)
        except asyncio.CancelledError:  # the server stops, and the request has had its time
            response = stopping_response()
        except Exception as error:
            logging.getLogger("uvicorn.error").error("Exception in an answer\n", exc_info=error)
            response = PlainTextResponse("Internal Server Error", 500, {"Connection": "close"})
        response.raw_headers += [*HEADERS, (b"x-request-id", given.encode())]
        self.records.add(scope, response.status_code, time.perf_counter() - request.begun)
        return response


def encoded(response: Response, before: list[tuple[bytes, bytes]]) -> bytes:
    """An answer as HTTP/1.1 sends it, with the headers `before` its own."""
    lines = [name + b": " + value for name, value in (*before, *response.raw_headers)]
    return LINES[response.status_code] + b"\r\n".join(lines) + b"\r\n\r\n" + bytes(response.body)
