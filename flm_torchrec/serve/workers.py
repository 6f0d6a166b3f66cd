"""A few threads that answer requests from a bounded queue; quick requests are answered in the event loop itself."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import Any, Generic, TypeVar

import faiss
import torch

from flm_torchrec.serve.event_store import EventStore
from flm_torchrec.serve.messages import MOST_BATCH, NewEvent, Recommend
from flm_torchrec.serve.resolve import Refused
from flm_torchrec.serve.variants import Variants

Result = TypeVar("Result")
Asked = TypeVar("Asked")
Answer = dict[str, Any]
Settle = Callable[[Answer | Exception], None]
"""Takes an answer, or why there is none. It does not raise."""
LONGEST_TURN = 0.004
"""Seconds of processor time for which answers may hold up the event loop, which also accepts and reads."""
MEASURED = 20
"""Batches after which it is known how long a request takes."""
WEIGHT = 0.1
"""Of the last batch in the mean."""


class Workers:
    """A few threads with a bounded queue. Waiting requests of one kind are answered in one batch."""

    def __init__(self, served: Variants, threads: int, waiting: int) -> None:
        self.pool = ThreadPoolExecutor(threads, thread_name_prefix="flm", initializer=one_thread)
        self.most = threads + waiting
        self.running = 0
        # Another machine that holds the store may be slow: the event loop never waits for it.
        pace = Pace() if isinstance(served.store, EventStore) else None
        self.recommending: Batches[Recommend] = Batches(self.pool, served.recommend, threads, pace)
        self.taking: Batches[NewEvent] = Batches(self.pool, served.add_events, 1)  # the store has one writer

    async def do(self, call: Callable[[], Result]) -> Result:
        """Make the call in a thread.

        Raises:
            Refused: too many requests are running or waiting.
        """
        with self._slot():
            return await asyncio.get_running_loop().run_in_executor(self.pool, call)

    async def recommend(self, request: Recommend) -> Answer:
        """The answer, computed in one batch with other requests that wait for a thread.

        Raises:
            Refused: too many requests are running or waiting, or this one is refused.
        """
        with self._slot():
            return await self.recommending.answer(request)

    def recommend_soon(self, request: Recommend, settle: Settle) -> bool:
        """As of `recommend`, but without a task: `settle` gets the answer in one of the event loop's next turns.

        False: the request takes too long for that; `settle` is not called.

        Raises:
            Refused: too many requests are running or waiting.
        """
        if not self.recommending.is_quick(request):
            return False
        self._enter()

        def settled(answer: Answer | Exception) -> None:
            self.running -= 1
            settle(answer)

        self.recommending.soon(request, settled)
        return True

    async def add_event(self, event: NewEvent) -> Answer:
        """Keep an event, in one transaction with other events that wait for the disk.

        Raises:
            Refused: too many requests are running or waiting, or this event is refused.
            StoreError: it could not be kept.
        """
        with self._slot():
            return await self.taking.answer(event)

    @contextmanager
    def _slot(self) -> Iterator[None]:
        """Count a request while it runs or waits.

        Raises:
            Refused: too many requests are running or waiting.
        """
        self._enter()
        try:
            yield
        finally:
            self.running -= 1

    def _enter(self) -> None:
        if self.running >= self.most:
            raise Refused(503, f"overloaded: {self.most} requests are under way; try again in a second")
        self.running += 1


class Pace:
    """The processor time of a plain request: where it is short, a thread costs more than it gives.

    Passing a request to a thread and back takes two wake-ups, and both threads want the one lock of the interpreter.
    """

    def __init__(self) -> None:
        self.batches = 0
        self.means = [0.0] * 4
        """Of requests n, seconds t, n · n and n · t, the last batches before all others."""

    def note(self, seconds: float, requests: int) -> None:
        """A batch has taken so long."""
        self.batches += 1
        weight = max(WEIGHT, 1 / self.batches)
        fresh = (requests, seconds, requests * requests, requests * seconds)
        self.means = [mean + weight * (new - mean) for mean, new in zip(self.means, fresh, strict=True)]

    def turn(self) -> int:
        """Plain requests that may be answered in the event loop at once; 0: none.

        A batch takes `begin` seconds and `each` for a request, by least squares over batches of different sizes. The
        mean of a request alone would keep batches small that are small: these take longer for each.
        """
        if self.batches < MEASURED:
            return 0
        n, t, nn, nt = self.means
        mean, spread = max(t, 1e-6) / n, nn - n * n
        slope = (nt - n * t) / spread if spread > 1e-3 * nn else mean
        each = min(mean, max(slope, mean / 4))
        begin = max(t, 1e-6) - each * n
        return max(0, int((LONGEST_TURN - begin) / each))


class Batches(Generic[Asked]):
    """Requests of one kind, answered together as threads become free, or in the event loop where they are quick.

    Args:
        make: requests → an answer for each, or why it is refused.
        most: batches that are under way at once.
        pace: of requests with a true `plain`; None: all are answered by threads.
    """

    def __init__(
        self,
        pool: ThreadPoolExecutor,
        make: Callable[[Sequence[Asked]], Sequence[Answer | Refused]],
        most: int,
        pace: Pace | None = None,
    ) -> None:
        self.pool = pool
        self.make = make
        self.most = most
        self.pace = pace
        self.asked: deque[tuple[Asked, Settle]] = deque()
        """Requests for a thread."""
        self.running = 0
        self.tasks: set[asyncio.Task[None]] = set()
        """Kept from the garbage collector; a task that has ended is here for a moment longer."""
        self.quick: deque[tuple[Asked, Settle]] = deque()
        """Requests for the next turn of the event loop."""
        self.turning = False
        """Whether there is a next turn."""

    async def answer(self, request: Asked) -> Answer:
        """The answer to one request.

        Raises:
            Refused: the request is refused.
        """
        future: asyncio.Future[Answer | Refused] = asyncio.get_running_loop().create_future()
        way = self.soon if self.is_quick(request) else self._later
        way(request, partial(_settle, future))
        answer = await future
        if isinstance(answer, Refused):
            raise answer
        return answer

    def is_quick(self, request: Asked) -> bool:
        """Whether a request may be answered in the event loop."""
        return self.pace is not None and _is_plain(request) and self.pace.turn() > 0

    def soon(self, request: Asked, settle: Settle) -> None:
        """Answer a quick request in one of the event loop's next turns, with others that come in this one."""
        self.quick.append((request, settle))
        if not self.turning:
            self.turning = True
            asyncio.get_running_loop().call_soon(self._turn)

    def _later(self, request: Asked, settle: Settle) -> None:
        """Answer a request by a thread."""
        self.asked.append((request, settle))
        if self.running < self.most:
            self.running += 1
            task = asyncio.create_task(self._run())
            self.tasks.add(task)
            task.add_done_callback(self.tasks.discard)

    def _turn(self) -> None:
        """Answer as many quick requests as fit into a turn. If they take too long by now, leave them to threads."""
        assert self.pace is not None
        most = min(self.pace.turn(), MOST_BATCH)
        while self.quick and not most:
            self._later(*self.quick.popleft())
        taken = [self.quick.popleft() for _ in range(min(len(self.quick), most))]
        self.turning = bool(self.quick)
        if self.turning:  # the answers are sent, and others read, before the next turn
            asyncio.get_running_loop().call_soon(self._turn)
        if taken:
            self._answer_here(taken, self.pace)

    def _answer_here(self, taken: Sequence[tuple[Asked, Settle]], pace: Pace) -> None:
        answers: Sequence[Answer | Exception]
        try:
            answers, seconds = self._timed([request for request, _ in taken])
            pace.note(seconds, len(taken))
        except Exception as error:  # each request gets the error: none may stay without an answer
            answers = [error] * len(taken)
        for (_, settle), answer in zip(taken, answers, strict=True):
            settle(answer)

    async def _run(self) -> None:
        """Answer by threads, until no request waits."""
        while self.asked:
            taken = [self.asked.popleft() for _ in range(min(len(self.asked), MOST_BATCH))]
            answers: Sequence[Answer | Exception]
            try:
                answers = await self._answers([request for request, _ in taken])
            except Exception as error:
                answers = [error] * len(taken)
            for (_, settle), answer in zip(taken, answers, strict=True):
                settle(answer)
        self.running -= 1  # at once: a request that comes before the task is gone would wait for the next one

    async def _answers(self, requests: list[Asked]) -> Sequence[Answer | Refused]:
        loop = asyncio.get_running_loop()
        if self.pace is None or not all(map(_is_plain, requests)):
            return await loop.run_in_executor(self.pool, self.make, requests)
        answers, seconds = await loop.run_in_executor(self.pool, self._timed, requests)
        self.pace.note(seconds, len(requests))
        return answers

    def _timed(self, requests: list[Asked]) -> tuple[Sequence[Answer | Refused], float]:
        """The answers, and the seconds of processor time that they took."""
        begin = time.thread_time()
        return self.make(requests), time.thread_time() - begin


def _is_plain(request: Any) -> bool:
    return bool(getattr(request, "plain", False))


def _settle(future: asyncio.Future[Any], answer: Any) -> None:
    """Give a future its answer, or the error; a refusal is an answer."""
    if future.done():  # the client has gone
        return
    if isinstance(answer, Exception) and not isinstance(answer, Refused):
        future.set_exception(answer)
    else:
        future.set_result(answer)


def one_thread() -> None:
    """Compute in the calling thread alone: requests already run in parallel."""
    torch.set_num_threads(1)
    faiss.omp_set_num_threads(1)
