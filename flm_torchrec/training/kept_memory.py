"""Memory that a process keeps between the steps of a training on a CPU, in large pages. For Linux with glibc."""

from __future__ import annotations

import ctypes
import mmap
import platform

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX = -1, -3, -4
"""Parameters of glibc's `mallopt`."""
MOST_MAPS = 65536
"""Of `M_MMAP_MAX`, as glibc has it by default."""
LARGEST = 2**26
"""Bytes from which on an allocation is a mapping of its own, which the system gets back."""
ROOM = 2**31
"""Bytes of addresses that large pages are asked for. They take no memory before they are written."""


def keep_memory() -> None:
    """Let this process keep what it frees, and have it in pages of 2 MiB where the system has such on request.

    A step makes and frees hundreds of tensors of megabytes. By default glibc gives their memory back and asks for it
    again, and it is in pages of 4 KiB, which a processor does not find again among so many, least in a virtual machine.

    Changes nothing where there is no glibc, and asks for no large pages where so many addresses may not be had.
    """
    if platform.libc_ver()[0] != "glibc":
        return
    libc = ctypes.CDLL(None)
    libc.malloc.restype = ctypes.c_void_p
    libc.malloc.argtypes = (ctypes.c_size_t,)
    libc.free.argtypes = (ctypes.c_void_p,)
    libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    libc.mallopt(M_TRIM_THRESHOLD, -1)  # never
    libc.mallopt(M_MMAP_MAX, 0)  # this block is a part of the heap
    block = libc.malloc(ROOM)
    libc.mallopt(M_MMAP_MAX, MOST_MAPS)
    libc.mallopt(M_MMAP_THRESHOLD, LARGEST)
    if block is not None:
        first = -(-block // mmap.PAGESIZE) * mmap.PAGESIZE
        libc.madvise(first, (block + ROOM - first) // mmap.PAGESIZE * mmap.PAGESIZE, mmap.MADV_HUGEPAGE)
        libc.free(block)
