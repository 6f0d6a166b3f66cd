"""Keys of users in a source, of data whose users `flm prepare --hash-users` hashed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import polars as pl

from flm_torchrec.data.keys import HASHED, tombstone
from flm_torchrec.errors import ConfigError, DataError
from flm_torchrec.prepare.hash_users import hash_keys, read_secret


class UserKeys:
    """Hashes keys as those of the run's users are, or refuses keys that are not hashed.

    Args:
        vocabulary: folder of the run, for messages.
        known: ids of the run's users by key.
        key_file: the secret to hash with; None: keys come hashed, where those of the run are.

    Raises:
        ConfigError: a secret is given, and the run's keys are not hashed.
        DataError: the secret cannot be read.
    """

    def __init__(self, vocabulary: Path, known: Mapping[str, int], key_file: Path | None) -> None:
        self.vocabulary = vocabulary
        there = [key for key, user in known.items() if key != tombstone(user)]
        self.hashed = bool(there) and all(map(HASHED.fullmatch, there))
        self.secret = read_secret(key_file) if key_file else b""
        if self.secret and not self.hashed:
            raise ConfigError(f"--key-file: the keys of users in {vocabulary} are not hashed; leave it out")

    def read(self, keys: pl.Series, where: Sequence[str]) -> pl.Series:
        """[n] keys of a source, null where there is none → [n] keys as the run has them.

        Args:
            where: names each row in errors, which never have the key itself.

        Raises:
            DataError: a key is not hashed, and there is no secret to hash it with.
        """
        if self.secret:
            found = [None if key is None else hash_keys([key], self.secret)[0] for key in keys]
            return pl.Series(keys.name, found, dtype=pl.String)
        plain = keys.is_not_null() & ~keys.str.contains(f"^{HASHED.pattern}$")
        if self.hashed and plain.any():
            raise DataError(
                f"{where[int(plain.arg_max() or 0)]}: its user is not hashed, as all users in {self.vocabulary} are;"
                " give --key-file FILE with the secret of flm prepare --hash-users, or hash the users of all events"
            )
        return keys
