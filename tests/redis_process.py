"""A real Redis on a loopback port."""

from __future__ import annotations

import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path
from types import TracebackType

import pytest

DURABLE = ("--appendonly", "yes", "--appendfsync", "always", "--save", "")


class RedisProcess:
    """`redis-server` with files in a folder; skips where it is not installed.

    Args:
        settings: options beside the port and the folder.
    """

    def __init__(self, folder: Path, settings: tuple[str, ...] = DURABLE) -> None:
        pytest.importorskip("redis", reason="install flm_torchrec[redis]")
        if shutil.which("redis-server") is None:
            pytest.skip("no redis-server: apt-get install redis-server")
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        self.folder = folder
        self.command = ["redis-server", "--port", str(self.port), "--bind", "127.0.0.1", "--dir", str(folder)]
        self.command += settings
        self.address = f"redis://127.0.0.1:{self.port}/0"

    def __enter__(self) -> RedisProcess:
        self.start()
        return self

    def start(self) -> None:
        """Start it, and wait until it answers."""
        import redis

        self.process = subprocess.Popen(self.command, stdout=subprocess.DEVNULL)
        end, client = time.monotonic() + 60, redis.Redis.from_url(self.address)
        while True:
            try:
                client.ping()
                break
            except (redis.ConnectionError, redis.BusyLoadingError):  # it reads its files
                assert time.monotonic() < end and self.process.poll() is None, "redis-server does not answer"
                time.sleep(0.02)
        client.close()

    def kill(self) -> None:
        """As a crash."""
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()
