"""Removing users from a vector database that `flm load --entity users` has filled."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from flm_torchrec.errors import RunError
from flm_torchrec.export.stores.load import BATCH, NAME, STORES, opened
from flm_torchrec.safe_text import redact_address


@dataclass(frozen=True)
class UserCollection:
    """A collection of users: `to` as of `flm load --to`."""

    to: str
    collection: str = "users"

    @classmethod
    def of(cls, text: str) -> UserCollection:
        """From KIND:PLACE or KIND:PLACE#COLLECTION."""
        to, hash_, name = text.rpartition("#")
        return cls(to, name) if hash_ and NAME.fullmatch(name) else cls(text)

    def __str__(self) -> str:
        return f"{redact_address(self.to)}#{self.collection}"

    def find(self, keys: Sequence[str]) -> set[str]:
        """Those of the keys that the collection has. Nothing is made where there is none.

        Raises:
            RunError: the database cannot be reached, or has no such collection of users.
        """
        kind, _, place = self.to.partition(":")
        local = kind in STORES and kind != "postgresql" and "://" not in place
        if local and place and not Path(place).exists():
            raise RunError(f"--store {self}: {place} not found; give the --to of 'flm load'")
        with opened(self.to, self.collection, "users", "--store") as store:
            return {found for batch in _batches(keys) for found in store.find(batch)}

    def forget(self, keys: Sequence[str]) -> int:
        """Remove users, and what the database keeps of them as far as a client can; how many it had.

        Raises:
            RunError: as of `find`, or the database refuses the change.
        """
        gone = 0
        with opened(self.to, self.collection, "users", "--store") as store:
            for batch in _batches(keys):
                found = store.find(batch)
                gone += len(found)
                if found:
                    store.delete(found)
            if keys:
                store.purge()  # also after an earlier call that was killed before it
        return gone


def _batches(keys: Sequence[str]) -> list[list[str]]:
    return [list(keys[start : start + BATCH]) for start in range(0, len(keys), BATCH)]
