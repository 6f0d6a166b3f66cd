"""An iterator that runs ahead in a thread."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Generator, Iterator
from typing import Generic, TypeVar

T = TypeVar("T")


class Prefetch(Generic[T]):
    """Runs an iterator in a thread, `depth` items ahead. An exception in the thread is raised where items are taken."""

    def __init__(self, source: Iterator[T], depth: int = 2) -> None:
        self.source = source
        self.buffer: queue.Queue[T | BaseException | None] = queue.Queue(depth)
        self.stopped = threading.Event()
        self.waited = 0.0
        """Seconds that were spent waiting for items."""

    def __iter__(self) -> Generator[T, None, None]:
        thread = threading.Thread(target=self._fill, daemon=True)
        thread.start()
        try:
            while (item := self._get()) is not None:
                if isinstance(item, BaseException):
                    raise item
                yield item
        finally:
            self.stopped.set()
            thread.join()  # a thread still inside PyTorch when the interpreter ends would abort the process

    def _get(self) -> T | BaseException | None:
        began = time.monotonic()
        item = self.buffer.get()
        self.waited += time.monotonic() - began
        return item

    def _fill(self) -> None:
        try:
            for item in self.source:
                if not self._put(item):
                    return
            self._put(None)
        except BaseException as error:
            self._put(error)

    def _put(self, item: T | BaseException | None) -> bool:
        while not self.stopped.is_set():
            try:
                self.buffer.put(item, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False
