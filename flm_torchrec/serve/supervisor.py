"""Several processes that serve one port: started, watched, started again after a crash, and stopped together.

The workers accept connections from one listening socket, so a worker that dies takes along only the connections that it
had. The supervisor loads nothing itself. It has a socket pair to each worker, over which both send lines of JSON:

* worker → supervisor: `{"ready": true}`; `{"stopping": true}`, it accepts nothing more, so another one is started
  while it answers what it has; `{"swapped": {NAME: STATE}}`, what is served now under a name;
* supervisor → all workers: `{"swap": {NAME: STATE}}`, in one order, so that all end in one state. Its end tells a
  worker that the supervisor is gone.
"""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

POLL = 0.1
"""Seconds between two looks at the workers."""
LONGEST_PAUSE = 30.0
"""Maximum of seconds before a worker that does not become ready is started again; the pause doubles each time."""
PATIENCE = 30.0
"""Seconds after SIGTERM until workers that still run are killed."""


Swapped = dict[str, Any]
"""By name: what is served under it, as `Swaps.state` has it."""


class Link:
    """A worker's line to its supervisor."""

    def __init__(self, end: socket.socket) -> None:
        self.end = end

    def tell(self, message: dict[str, Any]) -> None:
        """Send a message; nothing happens where the supervisor is gone."""
        try:
            self.end.sendall(json.dumps(message).encode() + b"\n")
        except OSError:
            return  # `follow` stops the worker

    def follow(self, swap: Callable[[Swapped], None]) -> None:
        """Do in a thread what the supervisor says, and stop this process when the supervisor is gone."""
        threading.Thread(target=self._follow, args=(swap,), daemon=True).start()

    def _follow(self, swap: Callable[[Swapped], None]) -> None:
        with self.end.makefile("rb") as lines:
            for line in lines:
                swap(json.loads(line)["swap"])
        os.kill(os.getpid(), signal.SIGTERM)


Work = Callable[[Link, Swapped], None]
"""What a worker does until it is stopped: its line to the supervisor, and what was swapped in since the start."""


@dataclass(eq=False)
class Worker:
    """One place of a worker, and the process that has it now."""

    pid: int = 0
    """0: none runs."""
    end: socket.socket | None = None
    received: bytes = b""
    ready: bool = False
    failures: int = 0
    """Times in a row that it ended before it was ready."""
    start_at: float = 0.0
    """`time.monotonic()` from which it may be started."""


@dataclass
class Supervisor:
    """Runs `work` in processes of their own.

    Args:
        work: what a worker does. It runs in a fork of this process, so nothing may have used threads before.
        fail: prints why a worker ended, and gives its exit code.
        ready: called when all workers are ready for the first time.
        stop: called when a signal ends all, before the workers are told.
    """

    work: Work
    fail: Callable[[BaseException], int]
    ready: Callable[[], None]
    stop: Callable[[], None] = lambda: None
    workers: list[Worker] = field(default_factory=list)
    leaving: list[Worker] = field(default_factory=list)
    """Those that were told to end and answer what they have; others are in their places."""
    swapped: Swapped = field(default_factory=dict)
    """What was swapped in last under each name."""
    stopping: bool = False
    served: bool = False
    """Whether all workers have been ready once."""

    def run(self, count: int) -> int:
        """Run so many workers until SIGTERM or SIGINT; the exit code: 0, or that of a worker that could not begin."""
        self.workers = [Worker() for _ in range(count)]
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._stop)
        code = 0
        while not self.stopping and not code:
            for worker in self.workers:
                if not worker.pid and worker.start_at <= time.monotonic():
                    self._start(worker)
            self._listen()
            code = max(self._collect(), default=0)
            if not self.served and all(worker.ready for worker in self.workers):
                self.served = True
                self.ready()
        self._end()
        return code

    def _stop(self, number: int, frame: object) -> None:
        self.stopping = True

    def _start(self, worker: Worker) -> None:
        mine, theirs = socket.socketpair()
        sys.stdout.flush()
        pid = os.fork()
        if pid == 0:
            for end in (mine, *(other.end for other in [*self.workers, *self.leaving])):
                if end is not None:
                    end.close()  # else a worker would not see the end of the supervisor
            os._exit(self._worked(Link(theirs)))
        theirs.close()
        worker.pid, worker.end, worker.received, worker.ready = pid, mine, b"", False

    def _worked(self, link: Link) -> int:
        """Run `work` in a worker, and give its exit code."""
        try:
            signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
            signal.signal(signal.SIGINT, lambda *_: sys.exit(0))
            self.work(link, self.swapped)
            return 0
        except SystemExit as error:
            return error.code if isinstance(error.code, int) else 1
        except BaseException as error:
            return self.fail(error)
        finally:
            sys.stdout.flush()
            sys.stderr.flush()

    def _listen(self) -> None:
        """Read what workers say, for a moment at most."""
        ends = {worker.end: worker for worker in [*self.workers, *self.leaving] if worker.end is not None}
        try:
            said, _, _ = select.select(list(ends), [], [], POLL)
        except InterruptedError:
            return
        for end in said:
            worker = ends[end]
            try:
                data = end.recv(65536)
            except ConnectionError:
                data = b""
            if not data:  # it has ended: `_collect` sees it
                end.close()
                worker.end = None
                continue
            *lines, worker.received = (worker.received + data).split(b"\n")
            for line in lines:
                self._heard(worker, json.loads(line))

    def _heard(self, worker: Worker, message: dict[str, Any]) -> None:
        if "ready" in message:
            worker.ready, worker.failures = True, 0
        if "stopping" in message and self.served and not self.stopping and worker in self.workers:
            print(f"worker {worker.pid} ends as it was told; another one is started", flush=True)
            self.leaving.append(worker)
            self.workers[self.workers.index(worker)] = Worker()
        if "swapped" in message:
            self.swapped |= message["swapped"]
            for other in self.workers:
                if other.end is not None:
                    Link(other.end).tell({"swap": message["swapped"]})

    def _collect(self) -> Iterator[int]:
        """Take note of workers that have ended; the exit codes of those that end before the first service."""
        self.leaving = _running(self.leaving)
        for worker in self.workers:
            if not worker.pid:
                continue
            pid, status = os.waitpid(worker.pid, os.WNOHANG)
            if not pid:
                continue
            code = os.waitstatus_to_exitcode(status)
            worker.failures = 0 if worker.ready else worker.failures + 1
            worker.pid, worker.ready = 0, False
            if not self.served:
                yield code if code > 0 else 1
                continue
            pause = min(LONGEST_PAUSE, 2.0**worker.failures - 1)
            worker.start_at = time.monotonic() + pause
            how = f"exit code {code}" if code >= 0 else f"signal {-code}"
            print(f"worker {pid} ended ({how}); started again in {pause:g} s", flush=True)

    def _end(self) -> None:
        """Stop all workers: SIGTERM, and SIGKILL for those that do not end."""
        self.stop()
        running = [*self.leaving, *(worker for worker in self.workers if worker.pid)]
        until = time.monotonic() + PATIENCE
        for worker in running:
            os.kill(worker.pid, signal.SIGTERM)
        while running and time.monotonic() < until:
            running = _running(running)
            time.sleep(POLL)
        for worker in running:
            os.kill(worker.pid, signal.SIGKILL)
            os.waitpid(worker.pid, 0)


def _running(workers: list[Worker]) -> list[Worker]:
    """Those of these workers whose processes have not ended."""
    return [worker for worker in workers if not os.waitpid(worker.pid, os.WNOHANG)[0]]
