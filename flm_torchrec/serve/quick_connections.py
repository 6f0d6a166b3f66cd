"""Connections on which plain requests are answered by `quick`, and all others by the HTTP library and the framework."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import Any

import h11
from starlette.responses import Response
from uvicorn.protocols.http.flow_control import CLOSE_HEADER

from flm_torchrec.serve.connections import GuardedProtocol
from flm_torchrec.serve.quick import QuickRequest, QuickRequests, encoded


class _Nobody:
    """Stands for uvicorn's event of a body that comes, or a client that goes: a plain request waits for neither."""

    def set(self) -> None:
        """Nothing."""


@dataclass
class QuickCycle:
    """A plain request under way, as `GuardedProtocol` and uvicorn look at one."""

    default_headers: list[tuple[bytes, bytes]]
    keep_alive: bool = True
    disconnected: bool = False
    more_body: bool = False
    response_started: bool = False
    response_complete: bool = False
    message_event: _Nobody = field(default_factory=_Nobody)


class QuickProtocol(GuardedProtocol):
    """The protocol of `flm serve`.

    Args:
        quick: what answers plain requests.
    """

    def __init__(self, *args: Any, quick: QuickRequests, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.quick = quick
        self.held = b""
        """What came behind a plain request that is under way."""
        self.answered_at = 0.0

    def data_received(self, data: bytes) -> None:
        """Answer a plain request, and pass all else on. What comes before an answer waits for it."""
        if isinstance(self.cycle, QuickCycle) and self._in_request():
            self.held += data
            self.flow.pause_reading()
            return
        request = self.quick.take(data, self.client) if self._is_free() else None
        if request is None:
            super().data_received(data)
        else:
            self._begin(request)

    def timeout_keep_alive_handler(self) -> None:
        """As of uvicorn. Plain requests leave the timer as it is, so it may be early: it is set again."""
        left = self.answered_at + self.timeout_keep_alive - self.loop.time()
        if self._in_request() or left > 0:
            again = left if left > 0 else self.timeout_keep_alive
            self.timeout_keep_alive_task = self.loop.call_later(again, self.timeout_keep_alive_handler)
        else:
            super().timeout_keep_alive_handler()

    def _is_free(self) -> bool:
        """Whether a request may begin: none is under way, no part of one is here, and the client takes answers."""
        return (
            not self.refused
            and not self._in_request()
            and self.conn.our_state is h11.IDLE
            and not self.conn.trailing_data[0]
            and self.taking is None
            and CLOSE_HEADER not in self.server_state.default_headers
            and not self.transport.is_closing()
        )

    def _begin(self, request: QuickRequest) -> None:
        self._stop()
        self.waiting.drop(self)
        cycle = QuickCycle(self.server_state.default_headers)
        self.cycle = cycle  # type: ignore[assignment]
        left = self.quick.begin(request, partial(self._answer, cycle))
        if left is not None:
            task = self.loop.create_task(left)
            self.tasks.add(task)
            task.add_done_callback(self.tasks.discard)

    def _answer(self, cycle: QuickCycle, response: Response) -> None:
        cycle.response_started = cycle.response_complete = True
        if cycle.disconnected or self.transport.is_closing():
            return
        closes = response.headers.get("connection") == "close"
        before = cycle.default_headers
        if not cycle.keep_alive and not closes and CLOSE_HEADER not in before:
            before = [*before, CLOSE_HEADER]
        self.lingering.transport.write(encoded(response, before))
        if closes or CLOSE_HEADER in before:
            self.transport.close()
        self._end()

    def _end(self) -> None:
        """The server waits for the next request."""
        self.server_state.total_requests += 1
        self.answered, self.answered_at = True, self.loop.time()
        if self.transport.is_closing():
            return
        if self.timeout_keep_alive_task is None:
            self.timeout_keep_alive_task = self.loop.call_later(
                self.timeout_keep_alive, self.timeout_keep_alive_handler
            )
        self.flow.resume_reading()
        self._note()
        if self.held:
            data, self.held = self.held, b""
            self.data_received(data)
