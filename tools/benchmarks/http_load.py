"""A client that costs little: requests are made beforehand, and one thread waits for all connections.

It shares the processors with the server that it measures. A request takes about 35 microseconds of its time here, a
client of asyncio ten times that.
"""

from __future__ import annotations

import json
import select
import socket
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

HOST = "127.0.0.1"
KEY = "the-key-of-the-benchmark"
END = b"\r\n\r\n"


def request(port: int, path: str, body: bytes) -> bytes:
    """A request as it is sent."""
    head = f"POST {path} HTTP/1.1\r\nHost: {HOST}:{port}\r\nContent-Type: application/json\r\nX-API-Key: {KEY}\r\n"
    return head.encode() + f"Content-Length: {len(body)}\r\n\r\n".encode() + body


@dataclass
class Tally:
    """What a client saw."""

    seconds: list[float] = field(default_factory=list)
    """From when each request was due to the end of its answer."""
    late: list[float] = field(default_factory=list)
    """From when each request was due to when it was sent: no connection was free, or the client had no turn."""
    failed: list[str] = field(default_factory=list)
    wall: float = 0.0
    busy: float = 0.0
    """Seconds of this process's own work."""

    @property
    def rate(self) -> float:
        """Requests a second."""
        return len(self.seconds) / self.wall

    def quantile(self, part: float) -> float:
        """Milliseconds within which this part of the requests was answered."""
        return float(np.quantile(self.seconds, part)) * 1e3

    def __str__(self) -> str:
        return (
            f"p50 {self.quantile(0.5):6.2f} ms  p99 {self.quantile(0.99):6.2f} ms  longest {self.quantile(1):7.2f} ms"
            f"  {self.rate:6.0f} requests/s  {len(self.failed)} of {len(self.seconds)} failed"
            f"  (client busy {self.busy / self.wall:.0%})"
        )


@dataclass(eq=False)
class Connection:
    """A connection, and the request that it waits for."""

    port: int
    due: float = 0.0
    received: bytes = b""

    def __post_init__(self) -> None:
        self.open()

    def open(self) -> None:
        """Connect, anew where it was connected."""
        self.socket = socket.create_connection((HOST, self.port), timeout=120)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.received = b""

    def fileno(self) -> int:
        """As `select` asks."""
        return self.socket.fileno()

    def problem(self, items: int) -> str | None:
        """Read; None: the answer is not complete; empty: it is as it should be; else what is wrong."""
        try:
            part = self.socket.recv(1 << 18)
        except OSError:  # as where it was closed
            part = b""
        self.received += part
        if not part:
            self.socket.close()
            self.open()
            return "closed without an answer"
        head, end, body = self.received.partition(END)
        if not end:
            return None
        before, _, length = head.lower().partition(b"content-length:")
        if len(body) < int(length.partition(b"\r\n")[0]):
            return None
        answer, self.received = self.received, b""
        good = before[9:12] == b"200" and answer.count(b'"score":') == items
        return "" if good else f"{answer!r:.300}"


class Load:
    """Requests to a server over connections that are kept.

    Args:
        requests: sent in turn, see `request`.
        items: that each answer must have.
        rate: requests a second of all connections together, evenly; 0: each sends as soon as it has been answered. A
            request that finds no free connection waits for one, and its time counts from when it was due.
    """

    def __init__(self, port: int, requests: Sequence[bytes], connections: int, items: int, rate: float = 0.0) -> None:
        self.requests = requests
        self.items = items
        self.rate = rate
        self.free = deque(Connection(port) for _ in range(connections))
        """In turn: the server would close one that stays idle, perhaps just as a request comes."""
        self.waiting: set[Connection] = set()
        self.sent = 0

    def run(self, seconds: float) -> Tally:
        """Send for so long, and wait for all answers."""
        tally, busy, self.start = Tally(), time.process_time(), time.perf_counter()
        end = self.start + seconds
        while True:
            now = time.perf_counter()
            if now < end:
                self._send(tally)
            elif not self.waiting:
                break
            pause = max(0.0, self._due(now) - now) if self.free and now < end else 1.0
            for connection in select.select(self.waiting, (), (), pause)[0]:
                self._take(connection, tally)
        tally.wall, tally.busy = time.perf_counter() - self.start, time.process_time() - busy
        for connection in self.free:
            connection.socket.close()
        return tally

    def _due(self, now: float) -> float:
        return self.start + self.sent / self.rate if self.rate else now

    def _send(self, tally: Tally) -> None:
        while self.free and self._due(now := time.perf_counter()) <= now:
            connection = self.free.popleft()
            connection.due = self._due(now)
            connection.socket.sendall(self.requests[self.sent % len(self.requests)])
            tally.late.append(now - connection.due)
            self.waiting.add(connection)
            self.sent += 1

    def _take(self, connection: Connection, tally: Tally) -> None:
        problem = connection.problem(self.items)
        if problem is None:
            return
        tally.seconds.append(time.perf_counter() - connection.due)
        self.waiting.discard(connection)
        self.free.append(connection)
        if problem:
            tally.failed.append(problem)


def ask(port: int, path: str, body: object) -> tuple[int, bytes]:
    """Status and body of the answer to one request on a connection of its own."""
    with socket.create_connection((HOST, port), timeout=600) as made:
        made.sendall(request(port, path, json.dumps(body).encode()).replace(END, b"\r\nConnection: close" + END, 1))
        with made.makefile("rb") as stream:
            head, _, answer = stream.read().partition(END)
    return int(head.split(b" ", 2)[1]), answer
