"""What a Redis server has on its disk: each change before it is acknowledged, and no bytes of what was forgotten."""

from __future__ import annotations

import time
from typing import Any

from flm_torchrec.errors import RunError
from flm_torchrec.safe_text import first_line
from flm_torchrec.serve.event_store import StoreError

PERSISTENCE = {"appendonly": "yes", "appendfsync": "always", "no-appendfsync-on-rewrite": "no"}
"""Settings with which an answer means that the change is on the disk."""
RUNNING = ("aof_rewrite_in_progress", "aof_rewrite_scheduled", "rdb_bgsave_in_progress")
REWRITE_SECONDS = 120.0
"""In which the files must have been written anew."""


def check_settings(client: Any, where: str) -> bool:
    """Check that what the server acknowledges is on the disk, and stays; whether it also writes snapshots.

    Args:
        client: `redis.Redis`.
        where: the option and address, for errors.

    Raises:
        RunError: it is not set up so, or does not tell.
    """
    from redis import ResponseError

    names = (*PERSISTENCE, "save", "maxmemory", "maxmemory-policy")
    try:
        found = {name: client.config_get(name).get(name) for name in names}
    except ResponseError as error:
        raise RunError(
            f"{where}: its settings cannot be read ({first_line(error, where)}); allow CONFIG GET"
        ) from error
    if any(found[name] != value for name, value in PERSISTENCE.items()):
        has, wants = (", ".join(f"{name} {values[name]}" for name in PERSISTENCE) for values in (found, PERSISTENCE))
        raise RunError(f"{where}: has {has}, so that acknowledged events could be lost; set {wants} in redis.conf")
    policy = found["maxmemory-policy"]
    if int(found["maxmemory"] or 0) and policy != "noeviction":
        raise RunError(f"{where}: has maxmemory-policy {policy}, which may drop events; set noeviction in redis.conf")
    return bool(found["save"])


def rewrite_files(client: Any, snapshots: bool) -> None:
    """Have the server write its files anew from what it has in memory, and wait for it.

    Args:
        client: `redis.Redis`.
        snapshots: whether it writes these, beside the log of all commands.

    Raises:
        StoreError: that takes too long, or fails.
    """
    end = time.monotonic() + REWRITE_SECONDS
    jobs = [(client.bgrewriteaof, "aof_last_bgrewrite_status")]
    jobs += [(client.bgsave, "rdb_last_bgsave_status")] if snapshots else []
    for begin, status in jobs:
        _idle(client, end)  # one that has begun before may have the old bytes still
        begin()
        found = _idle(client, end)
        if found[status] != "ok":
            raise StoreError(f"events: Redis could not write its files anew ({status} {found[status]}); see its log")


def _idle(client: Any, end: float) -> dict[str, Any]:
    """Wait until no file is being written anew; what the server says about its files."""
    while True:
        found: dict[str, Any] = client.info("persistence")
        if not any(found[job] for job in RUNNING):
            return found
        if time.monotonic() > end:
            raise StoreError("events: Redis writes its files for too long; give the same command again")
        time.sleep(0.05)
