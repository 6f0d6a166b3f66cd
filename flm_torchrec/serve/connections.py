"""Connections of `flm serve`: how many there may be, how long each may be silent, and how they end with the server."""

from __future__ import annotations

import asyncio
import json
import os
import resource
import select
import socket
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import h11
from uvicorn.protocols.http.flow_control import CLOSE_HEADER
from uvicorn.protocols.http.h11_impl import H11Protocol

from flm_torchrec.errors import RunError
from flm_torchrec.safe_text import visible

BACKLOG = 128
"""Connections that wait in the system until the server accepts them; it may accept all of these at once."""
SPARE = 128
"""File descriptors kept for files: loading another export opens some."""
PIECE = 4096
"""Bytes of a header that are looked at at once."""
LOOKED_AT = 32
"""Connections among which one without an unread request is looked for, where one must be closed."""
LOOK_AGAIN = 0.01
"""Seconds until an idle connection is closed whose next request lay unread when its time was over."""
FEWEST = 16
"""Minimum of connections with which the server starts."""


@dataclass(frozen=True)
class ConnectionLimits:
    """How many connections there may be, and how long each may take."""

    most: int
    header_seconds: float = 10.0
    """From the opening of a connection, or the first byte of a later request, to the end of the request's header."""
    taking_seconds: float = 30.0
    """In which a client must take a part of an answer that waits to be sent."""
    lingering_seconds: float = 2.0
    """For which a client that was refused may go on sending."""


def most_connections() -> int:
    """Raise the limit of file descriptors as far as this process may; return how many connections fit into it.

    Raises:
        RunError: there is room for fewer than `FEWEST`.
    """
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    most = min(hard if hard != resource.RLIM_INFINITY else 1 << 20, 1 << 20)
    in_use = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else SPARE
    left = most - in_use - SPARE - BACKLOG
    if left < FEWEST:
        raise RunError(f"open files: the limit of {most} leaves no room for connections; give 'ulimit -n 4096'")
    return left


def listening(host: str, port: int) -> socket.socket:
    """A socket that listens at the address.

    Raises:
        RunError: there is no such address, or another process uses it.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        bound = socket.socket(family, kind, protocol)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
        bound.listen(BACKLOG)  # the port is now in use; a client that comes before the export is loaded waits
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise RunError(f"--host {host} --port {port}: {reason}; give another address") from error
    return bound


@dataclass
class Waiting:
    """Connections of a server that it waits for: for a request, for the rest of one, or to take an answer."""

    strangers: dict[GuardedProtocol, None] = field(default_factory=dict)
    """Those without an answer so far, in the order in which the waiting began."""
    clients: dict[GuardedProtocol, None] = field(default_factory=dict)
    """The others."""

    def add(self, connection: GuardedProtocol) -> None:
        """Take it up, unless it is here."""
        (self.clients if connection.answered else self.strangers).setdefault(connection)

    def drop(self, connection: GuardedProtocol) -> None:
        """Take it out."""
        self.strangers.pop(connection, None)
        self.clients.pop(connection, None)

    def first(self) -> GuardedProtocol | None:
        """The one to close where there are too many; None: the server waits for none.

        One of which something came that the server has not read yet, as it was busy, is spared if another can go.
        """
        candidates = list(islice(self.strangers or self.clients, LOOKED_AT))
        return next((one for one in candidates if not one.has_unread()), next(iter(candidates), None))


class GuardedProtocol(H11Protocol):
    """uvicorn's protocol that also closes connections beyond a limit, and those that send or take nothing in time.

    A client may open thousands of connections and send nothing. Without a limit these use up the file descriptors, and
    the server can accept no other client. uvicorn itself closes only connections that are idle after an answer. Where
    there are too many, the one that the server has waited for longest is closed, so that new clients are served.

    Args:
        waiting: one for all connections of a server.
    """

    def __init__(self, *args: Any, limits: ConnectionLimits, waiting: Waiting, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.limits = limits
        self.waiting = waiting
        self.refused = self.answered = self.stopping = False
        self.deadline: asyncio.TimerHandle | None = None
        self.taking: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        """Accept the connection and wait for a request. Where there are too many, close another one, or this one."""
        if len(self.connections) >= self.limits.most:
            other = self.waiting.first()
            if other is None:
                self.refused = True
                transport.abort()
                return
            other.give_way()
        self.lingering = Lingering(transport, self._linger)
        super().connection_made(self.lingering)  # type: ignore[arg-type]
        self._await_header()
        self._note()

    def give_way(self) -> None:
        """Close this connection at once."""
        self.waiting.drop(self)
        self.connections.discard(self)
        self.transport.abort()

    def data_received(self, data: bytes) -> None:
        """Pass the data on; the deadline ends once the header of the request is complete."""
        if self.refused or self.transport.is_closing():
            return
        rest = memoryview(data)
        while rest and not self._in_request() and not self.transport.is_closing():
            super().data_received(bytes(rest[:PIECE]))  # h11 limits a header only as long as it is incomplete
            rest = rest[PIECE:]
        if rest and not self.transport.is_closing():
            super().data_received(bytes(rest))
        if self._in_request():
            self._stop()
        elif self.deadline is None:
            self._await_header()
        self._note()

    def on_response_complete(self) -> None:
        """As of uvicorn; the server now waits for the next request."""
        super().on_response_complete()
        self.waiting.drop(self)
        self.answered = True
        self._note()

    def timeout_keep_alive_handler(self) -> None:
        """As of uvicorn, unless the next request is here and was not read yet, as the event loop was busy."""
        if self.has_unread():
            self.timeout_keep_alive_task = self.loop.call_later(LOOK_AGAIN, self.timeout_keep_alive_handler)
        else:
            super().timeout_keep_alive_handler()

    def has_unread(self) -> bool:
        """Whether the client has sent what was not read yet, or has closed the connection."""
        if self.transport.is_closing():
            return False
        poll = select.poll()
        poll.register(self.transport.get_extra_info("socket"), select.POLLIN)
        return bool(poll.poll(0))

    def connection_lost(self, exc: Exception | None) -> None:
        """End the deadlines."""
        self._stop()
        self._taken()
        self.waiting.drop(self)
        if not self.refused:
            super().connection_lost(exc)

    def eof_received(self) -> None:
        """As of uvicorn, but for a connection that was not accepted."""
        if not self.refused:
            super().eof_received()

    def pause_writing(self) -> None:
        """The client takes no more for now: it has some time, then the connection is closed."""
        super().pause_writing()
        if self.taking is None:
            self._await_taking()
            self._note()

    def resume_writing(self) -> None:
        """The client has taken what was waiting."""
        self._taken()
        super().resume_writing()
        self._note()

    def drain(self) -> None:
        """The server stops: say so in the answer under way. Those to later requests say it by themselves."""
        if not self._in_request():
            return
        if self.cycle.response_started:
            self.cycle.keep_alive = False
        else:
            self.cycle.default_headers = [*self.cycle.default_headers, CLOSE_HEADER]

    def shutdown(self) -> None:
        """As of uvicorn, but a request whose header has begun to come has its usual time."""
        self.stopping = True
        if self.transport.is_closing():
            self._abandon_later()
        elif self._in_request() or not self.conn.trailing_data[0]:
            super().shutdown()

    def send_400_response(self, msg: str) -> None:
        """Answer what is no HTTP as all other errors are answered."""
        if self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE):
            self.transport.abort()  # an answer has begun
            return
        body = json.dumps({"detail": msg}).encode()
        headers = [("content-type", "application/json"), ("content-length", str(len(body))), ("connection", "close")]
        for event in (h11.Response(status_code=400, headers=headers), h11.Data(data=body), h11.EndOfMessage()):
            self.transport.write(self.conn.send(event))
        self.transport.close()

    def _linger(self, transport: Any) -> None:
        """Close the connection. What the client still sends is read: else the system would throw away the answer."""
        complete = self.cycle is not None and not self.cycle.more_body
        if complete or not transport.can_write_eof():
            transport.close()
            if self.stopping:
                self._abandon_later()
            return
        transport.write_eof()
        transport.resume_reading()
        self.loop.call_later(self.limits.lingering_seconds, transport.abort)

    def _abandon_later(self) -> None:
        """End a closed connection after a moment: with TLS, a silent client would hold up the end of the server."""
        self.loop.call_later(self.limits.lingering_seconds, self._abandon)

    def _abandon(self) -> None:
        if self.taking is None:  # else the client still takes the last answer
            self.lingering.transport.abort()

    def _note(self) -> None:
        """Take the connection up among those that the server waits for, or out of them."""
        waits = not self._in_request() or self.cycle.more_body or self.taking is not None
        if waits and not self.lingering.transport.is_closing():
            self.waiting.add(self)
        else:
            self.waiting.drop(self)

    def _await_taking(self) -> None:
        waiting = self.transport.get_write_buffer_size()
        self.taking = self.loop.call_later(self.limits.taking_seconds, self._check_taking, waiting)

    def _check_taking(self, before: int) -> None:
        if self.transport.get_write_buffer_size() < before:
            self._await_taking()  # slowly, but the client takes the answer
        else:
            self.transport.abort()

    def _taken(self) -> None:
        if self.taking is not None:
            self.taking.cancel()
            self.taking = None

    def _in_request(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _await_header(self) -> None:
        self.deadline = self.loop.call_later(self.limits.header_seconds, self._late)

    def _stop(self) -> None:
        if self.deadline is not None:
            self.deadline.cancel()
            self.deadline = None

    def _late(self) -> None:
        self.deadline = None
        if not self._in_request():
            self.transport.abort()


class Lingering:
    """A transport whose `close` is left to the protocol; it counts as closing from then on."""

    def __init__(self, transport: Any, close: Callable[[Any], None]) -> None:
        self.transport = transport
        self.closing = close
        self.closed = False

    def close(self) -> None:
        """Once."""
        if not self.is_closing():
            self.closed = True
            self.closing(self.transport)

    def is_closing(self) -> bool:
        """As of the transport."""
        return self.closed or bool(self.transport.is_closing())

    def __getattr__(self, name: str) -> Any:
        return getattr(self.transport, name)


def report_accept_errors_once(loop: asyncio.AbstractEventLoop) -> None:
    """Print one line for all connections that cannot be accepted; asyncio logs a traceback for each."""
    reported = False

    def handle(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        nonlocal reported
        if "accept" not in context.get("message", ""):
            loop.default_exception_handler(context)
        elif not reported:
            reported = True
            print(f"connections: {visible(str(context.get('exception')))}; told once, tried on", flush=True)

    loop.set_exception_handler(handle)
