"""How ranks find each other, the first time and after the launcher started them anew."""

from __future__ import annotations

import os
import time
import uuid
from datetime import timedelta

import torch.distributed as dist

from flm_torchrec.errors import RunError

POLL = 0.05
"""Seconds between looks at who has joined."""


def join(backend: str, timeout: timedelta) -> tuple[dist.Store, dist.Store | None]:
    """Make the process group that the launcher described in the environment, or one of this process alone.

    Returns the store of this attempt's ranks, and the launcher's own, which its later attempts share; None if there is
    no launcher.

    Raises:
        RunError: a rank did not come within the timeout.
    """
    if "WORLD_SIZE" not in os.environ:
        store: dist.Store = dist.HashStore()
        dist.init_process_group(backend, store=store, rank=0, world_size=1, timeout=timeout)
        return store, None
    given, rank, world_size = next(iter(dist.rendezvous("env://", timeout=timeout)))
    store = fresh_store(given, rank, world_size, timeout)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout)
    return store, given


def fresh_store(store: dist.Store, rank: int, world_size: int, timeout: timedelta) -> dist.Store:
    """A part of the launcher's store that no earlier attempt of the job has written to; every rank calls it.

    torchrun keeps one store over its restarts, and does not number attempts alike on all nodes. Without this, ranks
    read the addresses that those before them left, and connect to the dead. Rank 0 draws a name for the attempt, and
    answers each rank under a key that this rank has just made up, since what lies under any other may be old.

    Raises:
        RunError: a rank did not come within the timeout.
    """
    own = uuid.uuid4().hex
    until = time.monotonic() + timeout.total_seconds()
    if rank:
        store.set(f"join/{rank}", own)
        answer = f"answer/{own}"
        while not store.check([answer]):
            if time.monotonic() > until:
                raise RunError(f"rank {rank}: rank 0 did not come within {timeout}; see its log")
            time.sleep(POLL)
        name = store.get(answer).decode()
        store.set(f"joined/{name}/{rank}", "")
        return dist.PrefixStore(name, store)
    while missing := [r for r in range(1, world_size) if not store.check([f"joined/{own}/{r}"])]:
        for other in missing:
            if store.check([f"join/{other}"]):
                store.set(f"answer/{store.get(f'join/{other}').decode()}", own)
        if time.monotonic() > until:
            raise RunError(f"rank {', '.join(map(str, missing))} did not come within {timeout}; see the log of each")
        time.sleep(POLL)
    return dist.PrefixStore(own, store)
