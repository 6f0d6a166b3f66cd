"""The process that serves: HTTP or HTTPS on a socket that listens already, until a signal ends it."""

from __future__ import annotations

import asyncio
import logging
import select
import ssl
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from socket import socket
from typing import Any

import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.flow_control import CLOSE_HEADER

from flm_torchrec.errors import RunError
from flm_torchrec.serve.connections import BACKLOG, ConnectionLimits, GuardedProtocol, Waiting
from flm_torchrec.serve.quick import QuickRequests
from flm_torchrec.serve.quick_connections import QuickProtocol

ACCEPTED = 1
"""Connections that a process accepts at once. If it took all that wait, another process would be idle."""
GRACE = 20
"""Seconds that running requests have to end after SIGTERM."""
DRAIN_SECONDS = 2.0
"""Seconds after SIGTERM in which a connection without a request may still send one; the answer then closes it."""
STEPS = 4
"""Turns of the event loop until a connection that was accepted has its protocol."""
IDLE_SECONDS = 5
"""Seconds that a connection may wait for its next request."""
HANDSHAKE_SECONDS = 10.0
"""Seconds within which a TLS connection must be agreed on."""
MOST_HEADER_BYTES = 32_768
"""Maximum length of a request's header."""
BETWEEN_TRACEBACKS = 60.0
"""Seconds between two tracebacks in the log, so that nobody can fill a disk with them."""


@dataclass(frozen=True)
class Certificate:
    """Files of a TLS certificate, with the chain up to its root, and of its key; both PEM."""

    certificate: Path
    key: Path

    def check(self) -> None:
        """Raise RunError where the files are no certificate and its key."""
        try:
            ssl.create_default_context(ssl.Purpose.CLIENT_AUTH).load_cert_chain(self.certificate, self.key, password="")
        except (OSError, ValueError) as error:
            reason = getattr(error, "reason", None) or getattr(error, "strerror", None) or str(error)
            raise RunError(
                f"--tls-certificate {self.certificate} --tls-key {self.key}: {reason}; give PEM files that belong"
                " together, the key without a password"
            ) from error


@dataclass(frozen=True)
class Tell:
    """What is called as a server begins and ends."""

    started: Callable[[], None]
    """Requests are answered."""
    stopping: Callable[[], None] = lambda: None
    """No new connections are accepted; those that there are will be answered."""


class HttpServer(uvicorn.Server):
    """uvicorn's server, which tells when it answers, drains its connections, and limits the time of a TLS handshake."""

    def __init__(self, config: uvicorn.Config, tell: Tell) -> None:
        super().__init__(config)
        self.tell = tell

    async def startup(self, sockets: list[socket] | None = None) -> None:
        """As of uvicorn, then tell."""
        loop = asyncio.get_running_loop()
        if self.config.is_ssl:
            patient: Any = partial(loop.create_server, ssl_handshake_timeout=HANDSHAKE_SECONDS)
            loop.create_server = patient  # type: ignore[method-assign]
        await super().startup(sockets)
        for listening in sockets or ():
            listening.listen(BACKLOG)  # asyncio gives the system the number that it accepts at once
        if self.started:
            self.tell.started()

    async def shutdown(self, sockets: list[socket] | None = None) -> None:
        """As of uvicorn, once no client has a reason to send another request here.

        uvicorn alone closes a connection on which the next request is under way, and leaves out one that has just been
        accepted. Here connections that wait to be accepted are, and for a while each connection may send one request
        more: its answer has `Connection: close`, so the client opens another one, at another process.
        """
        for _ in range(BACKLOG):
            if not select.select(sockets or (), (), (), 0)[0]:
                break
            await asyncio.sleep(0)  # accepts one
        for listening in sockets or ():
            asyncio.get_running_loop().remove_reader(listening)
        for _ in range(STEPS):
            await asyncio.sleep(0)
        for server in self.servers:
            server.close()
        self.tell.stopping()
        self.server_state.default_headers = [*self.server_state.default_headers, CLOSE_HEADER]
        connections: set[GuardedProtocol] = self.server_state.connections  # type: ignore[assignment]
        for connection in list(connections):
            connection.drain()
        end = time.monotonic() + DRAIN_SECONDS  # with TLS, connections that are still being agreed on come later
        while (connections or self.config.is_ssl) and time.monotonic() < end and not self.force_exit:
            await asyncio.sleep(0.02)
        await super().shutdown(sockets)


def serve(app: FastAPI, bound: socket, limits: ConnectionLimits, tls: Certificate | None, tell: Tell) -> None:
    """Answer requests until SIGTERM or SIGINT; running requests then have `GRACE` seconds to end.

    Args:
        bound: listens.
    """
    http_server(app, limits, tls, tell).run(sockets=[bound])


def http_server(app: FastAPI, limits: ConnectionLimits, tls: Certificate | None, tell: Tell) -> HttpServer:
    """The server of `serve`, which does not run yet."""
    logging.getLogger("uvicorn.error").addFilter(RareTracebacks())
    quick: QuickRequests | None = getattr(app.state, "quick", None)
    protocol: Any = GuardedProtocol if quick is None else partial(QuickProtocol, quick=quick)
    config = uvicorn.Config(
        app,
        log_level="error",  # warnings are about what clients send: anyone could fill the log with them
        access_log=False,
        loop="asyncio",
        timeout_graceful_shutdown=GRACE,
        timeout_keep_alive=IDLE_SECONDS,
        h11_max_incomplete_event_size=MOST_HEADER_BYTES,
        http=partial(protocol, limits=limits, waiting=Waiting()),  # type: ignore[arg-type]
        ws="none",
        backlog=ACCEPTED,
        server_header=False,
        ssl_certfile=tls.certificate if tls else None,
        ssl_keyfile=tls.key if tls else None,
    )
    return HttpServer(config, tell)


class RareTracebacks(logging.Filter):
    """Lets one traceback a minute through; the others are counted as answers 500 in the metrics."""

    def __init__(self) -> None:
        super().__init__()
        self.last = -BETWEEN_TRACEBACKS

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether the record is printed."""
        if not record.exc_info:
            return True
        now = time.monotonic()
        if now - self.last < BETWEEN_TRACEBACKS:
            return False
        self.last = now
        return True
