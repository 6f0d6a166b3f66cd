"""How ranks find each other, at the first start and after a restart by the launcher."""

from __future__ import annotations

import os
import sys
import time
import uuid
from datetime import timedelta

import torch.distributed as dist

from flm_torchrec.errors import RunError

POLL = 0.05
"""Seconds between two checks of the store."""


def join(backend: str, timeout: timedelta) -> tuple[dist.Store, dist.Store | None]:
    """Create the process group that the environment describes, or a group of this process alone.

    Returns:
        The store of this attempt of the job, and the launcher's own store, which later attempts share; None without a
        launcher.

    Raises:
        RunError: a rank did not join within the timeout.
    """
    if "WORLD_SIZE" not in os.environ:
        store: dist.Store = dist.HashStore()
        hook = sys.excepthook
        dist.init_process_group(backend, store=store, rank=0, world_size=1, timeout=timeout)
        sys.excepthook = hook  # PyTorch's writes [rank0] before every later traceback of a notebook
        return store, None
    given, rank, world_size = next(iter(dist.rendezvous("env://", timeout=timeout)))
    store = fresh_store(given, rank, world_size, timeout)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout)
    return store, given


def fresh_store(store: dist.Store, rank: int, world_size: int, timeout: timedelta) -> dist.Store:
    """A prefix of the launcher's store that no earlier attempt of the job has used. Every rank calls this.

    torchrun keeps one store over its restarts, and its numbers of attempts can differ between nodes. Without a fresh
    prefix, ranks would read addresses of an earlier attempt and connect to dead processes. Rank 0 draws a name for the
    attempt. Each rank makes up a key, and rank 0 answers under this key, because other keys may hold old values.

    Raises:
        RunError: a rank did not join within the timeout.
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
