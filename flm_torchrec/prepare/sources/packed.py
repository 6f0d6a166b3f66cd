"""Packed files: which endings of names are known, and the bytes of one, all of them or an error."""

from __future__ import annotations

import bz2
import gzip
import lzma
import zipfile
import zlib
from collections.abc import Callable
from functools import partial
from pathlib import PurePosixPath
from typing import IO, Any

import pyarrow as pa

from flm_torchrec.errors import DataError

ERRORS = (OSError, EOFError, zlib.error, lzma.LZMAError, zipfile.BadZipFile)
"""What reading a packed file raises where it is cut off or not packed as its name says."""
SHOWN = 3
"""Files of an archive that an error lists."""


def plain_name(name: str) -> str:
    """The name in small letters, without the ending that says how the file is packed."""
    name = name.lower()
    return name.rsplit(".", 1)[0] if name.endswith((*UNPACK, ZIP)) else name


def unpacked(stream: IO[bytes], name: str) -> IO[bytes]:
    """The contents of a stream, unpacked if the ending of its name says so.

    Raises:
        DataError: an archive of several files, or of none.
        One of ERRORS: now or while reading.
    """
    ending = PurePosixPath(name).suffix.lower()
    if ending == ZIP:
        return _only_member(stream, name)
    return UNPACK[ending](stream) if ending in UNPACK else stream


def _with_arrow(codec: str, stream: Any) -> IO[bytes]:
    # The readers of zstandard end without an error where a file is cut off, and after the first of several frames.
    return pa.CompressedInputStream(pa.PythonFile(stream, mode="r"), codec)


def _only_member(stream: Any, name: str) -> IO[bytes]:
    archive = zipfile.ZipFile(stream)
    members = [member for member in archive.infolist() if not member.is_dir()]
    if len(members) != 1:
        listed = ", ".join(member.filename for member in members[:SHOWN])
        raise DataError(f"{name}: holds {len(members)} files ({listed}), and one is read; unpack it into a folder")
    try:
        return archive.open(members[0])
    except (RuntimeError, NotImplementedError) as error:  # a password, a method of packing that Python does not know
        raise zipfile.BadZipFile(str(error)) from error


UNPACK: dict[str, Callable[[Any], Any]] = {
    ".gz": lambda stream: gzip.GzipFile(fileobj=stream),
    ".bz2": bz2.BZ2File,
    ".xz": lzma.LZMAFile,
    ".lzma": lzma.LZMAFile,
    ".zst": partial(_with_arrow, "zstd"),
    ".lz4": partial(_with_arrow, "lz4"),
}
"""By ending, a stream → its contents."""
ZIP = ".zip"
