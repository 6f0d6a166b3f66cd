"""A few threads that answer requests, and a bounded queue before them."""

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
    """A few threads with a bounded queue before them. All requests for recommendations that wait go in one batch."""

    def __init__(self, service: Service, threads: int, waiting: int) -> None:
        self.service = service
        self.pool = ThreadPoolExecutor(threads, thread_name_prefix="flm", initializer=_one_thread)
        self.threads = threads
        self.most = threads + waiting
        self.under_way = 0
        self.asked: deque[tuple[Recommend, asyncio.Future[dict[str, Any] | Refused]]] = deque()
        self.batches: set[asyncio.Task[None]] = set()

    async def do(self, work: Callable[[], Result]) -> Result:
        """In a thread.

        Raises:
            Refused: too many requests are under way.
        """
        with self._place():
            return await asyncio.get_running_loop().run_in_executor(self.pool, work)

    async def recommend(self, request: Recommend) -> dict[str, Any]:
        """The answer, made together with those of other requests that wait for a thread.

        Raises:
            Refused: too many requests are under way, or this one has no answer.
        """
        with self._place():
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
            except Exception as error:  # each of them is told: a batch must not leave a request without an answer
                answers = [error] * len(taken)  # type: ignore[list-item]
            for (_, future), answer in zip(taken, answers, strict=True):
                _settle(future, answer)

    @contextmanager
    def _place(self) -> Iterator[None]:
        if self.under_way >= self.most:
            raise Refused(503, f"overloaded: {self.most} requests are under way; try again in a second")
        self.under_way += 1
        try:
            yield
        finally:
            self.under_way -= 1


def _settle(future: asyncio.Future[Any], answer: Any) -> None:
    if future.done():  # the client has gone
        return
    if isinstance(answer, Exception) and not isinstance(answer, Refused):
        future.set_exception(answer)
    else:
        future.set_result(answer)


def _one_thread() -> None:
    """Requests run side by side; more threads inside one would only wait for each other."""
    torch.set_num_threads(1)
    faiss.omp_set_num_threads(1)
