"""User keys that cannot be told from a log without a secret."""

from __future__ import annotations

import hmac
from collections.abc import Iterable


def hash_keys(keys: Iterable[str], secret: bytes) -> list[str]:
    """HMAC-SHA256 of each key under the secret, as 64 hexadecimal digits (RFC 2104).

    The same key and secret give the same digits in every preparation, so events still belong together; without the
    secret nobody can try keys until one fits.

    Raises:
        ValueError: the secret is empty.
    """
    if not secret:
        raise ValueError("the secret is empty")
    return [hmac.digest(secret, key.encode("utf-8"), "sha256").hex() for key in keys]
