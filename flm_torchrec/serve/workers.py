"""A few threads that answer requests from a bounded queue."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, TypeVar

import faiss
import torch

from flm_torchrec.serve.messages import MOST_BATCH, Recommend
from flm_torchrec.serve.resolve import Refused
from flm_torchrec.serve.service import Service

Result = TypeVar("Result")


class Workers:
    """A few threads with a bounded queue. All waiting requests for recommendations are answered in one batch."""

    def __init__(self, service: Service, threads: int, waiting: int) -> None:
        self.service = service
        self.pool = ThreadPoolExecutor(threads, thread_name_prefix="flm", initializer=_one_thread)
        self.threads = threads
        self.most = threads + waiting
        self.running = 0
        self.asked: deque[tuple[Recommend, asyncio.Future[dict[str, Any] | Refused]]] = deque()
        self.batches: set[asyncio.Task[None]] = set()

    async def do(self, call: Callable[[], Result]) -> Result:
        """Make the call in a thread.

        Raises:
            Refused: too many requests are running or waiting.
        """
        with self._slot():
            return await asyncio.get_running_loop().run_in_executor(self.pool, call)

    async def recommend(self, request: Recommend) -> dict[str, Any]:
        """The answer, computed in one batch with other requests that wait for a thread.

        Raises:
            Refused: too many requests are running or waiting, or this one is refused.
        """
        with self._slot():
            future: asyncio.Future[dict[str, Any] | Refused] = asyncio.get_running_loop().create_future()
            self.asked.append((request, future))
            if len(self.batches) < self.threads:
                task = asyncio.create_task(self._batches())
                self.batches.add(task)
                task.add_done_callback(self.batches.discard)
            answer = await future
        if isinstance(answer, Refused):
            raise answer
        return answer

    async def _batches(self) -> None:
        loop = asyncio.get_running_loop()
        while self.asked:
            taken = [self.asked.popleft() for _ in range(min(len(self.asked), MOST_BATCH))]
            taken = [(request, future) for request, future in taken if not future.done()]
            try:
                answers = await loop.run_in_executor(self.pool, self.service.recommend, [r for r, _ in taken])
            except Exception as error:  # each request gets the error: none may stay without an answer
                answers = [error] * len(taken)  # type: ignore[list-item]
            for (_, future), answer in zip(taken, answers, strict=True):
                _settle(future, answer)

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
