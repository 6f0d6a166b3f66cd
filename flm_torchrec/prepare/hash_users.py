"""Keys of users that name nobody without a secret."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Iterable
from pathlib import Path

from flm_torchrec.errors import DataError

LEAST_SECRET = 32
"""Bytes: as many as the digest, below which HMAC is weaker than its hash (RFC 2104, section 3)."""


def hash_keys(keys: Iterable[str], secret: bytes) -> list[str]:
    """HMAC-SHA256 of each key, in hexadecimal: the same for the same secret, and not to be guessed without it."""
    return [hmac.new(secret, key.encode(), hashlib.sha256).hexdigest() for key in keys]


def read_secret(file: Path) -> bytes:
    """The bytes of a key file.

    Raises:
        DataError: no such file, or it is too short to keep a secret.
    """
    if not file.is_file():
        raise DataError(f"{file}: not found; make a key with: head -c {LEAST_SECRET} /dev/urandom > {file}")
    secret = file.read_bytes()
    if len(secret) < LEAST_SECRET:
        raise DataError(f"{file}: {len(secret)} bytes; a key needs {LEAST_SECRET}: head -c {LEAST_SECRET} /dev/urandom")
    return secret
