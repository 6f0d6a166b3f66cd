"""A few threads that answer requests from a bounded queue."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, Generic, TypeVar

import faiss
import torch

from flm_torchrec.serve.messages import MOST_BATCH, NewEvent, Recommend
from flm_torchrec.serve.resolve import Refused
from flm_torchrec.serve.variants import Variants

Result = TypeVar("Result")
Asked = TypeVar("Asked")
Answer = dict[str, Any]


class Workers:
    """A few threads with a bounded queue. Waiting requests of one kind are answered in one batch."""

    def __init__(self, served: Variants, threads: int, waiting: int) -> None:
        self.pool = ThreadPoolExecutor(threads, thread_name_prefix="flm", initializer=_one_thread)
        self.most = threads + waiting
        self.running = 0
        self.recommending: Batches[Recommend] = Batches(self.pool, served.recommend, threads)
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
        if self.running >= self.most:
            raise Refused(503, f"overloaded: {self.most} requests are under way; try again in a second")
        self.running += 1
        try:
            yield
        finally:
            self.running -= 1


class Batches(Generic[Asked]):
    """Requests of one kind, answered together as threads become free.

    Args:
        make: requests → an answer for each, or why it is refused.
        most: batches that are under way at once.
    """

    def __init__(
        self, pool: ThreadPoolExecutor, make: Callable[[Sequence[Asked]], Sequence[Answer | Refused]], most: int
    ) -> None:
        self.pool = pool
        self.make = make
        self.most = most
        self.asked: deque[tuple[Asked, asyncio.Future[Answer | Refused]]] = deque()
        self.running = 0
        self.tasks: set[asyncio.Task[None]] = set()
        """Kept from the garbage collector; a task that has ended is here for a moment longer."""

    async def answer(self, request: Asked) -> Answer:
        """The answer to one request.

        Raises:
            Refused: the request is refused.
        """
        future: asyncio.Future[Answer | Refused] = asyncio.get_running_loop().create_future()
        self.asked.append((request, future))
        if self.running < self.most:
            self.running += 1
            task = asyncio.create_task(self._run())
            self.tasks.add(task)
            task.add_done_callback(self.tasks.discard)
        answer = await future
        if isinstance(answer, Refused):
            raise answer
        return answer

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        while self.asked:
            taken = [self.asked.popleft() for _ in range(min(len(self.asked), MOST_BATCH))]
            taken = [(request, future) for request, future in taken if not future.done()]
            try:
                answers = await loop.run_in_executor(self.pool, self.make, [r for r, _ in taken])
            except Exception as error:  # each request gets the error: none may stay without an answer
                answers = [error] * len(taken)  # type: ignore[list-item]
            for (_, future), answer in zip(taken, answers, strict=True):
                _settle(future, answer)
        self.running -= 1  # at once: a request that comes before the task is gone would wait for the next one


def _settle(future: asyncio.Future[Any], answer: Any) -> None:
    if future.done():  # the client has gone
        return
    if isinstance(answer, Exception) and not isinstance(answer, Refused):
        future.set_exception(answer)
    else:
        future.set_result(answer)


def _one_thread() -> None:
    """One thread for each request: requests already run in parallel."""
    torch.set_num_threads(1)
    faiss.omp_set_num_threads(1)
