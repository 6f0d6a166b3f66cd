"""Places besides data and runs that hold users: exports, files of live events, vector databases, servers."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa
import pyarrow.dataset as pds

from flm_torchrec.client import Client, ServiceError
from flm_torchrec.errors import RunError
from flm_torchrec.export.forget import AGAIN, forget_in_export, users_with
from flm_torchrec.export.manifest import FILE, load_manifest
from flm_torchrec.export.stores.forget import UserCollection
from flm_torchrec.privacy.forget_in_data import keys_and_ids, replaced_values, tombstone
from flm_torchrec.privacy.record import Removal
from flm_torchrec.safe_text import redact_address
from flm_torchrec.serve.live_store import existing_store
from flm_torchrec.serve.messages import MOST_FORGOTTEN

EXPORTED = {".parquet": "parquet", ".arrow": "feather", ".feather": "feather"}
"""Formats of an export's rows, by suffix."""
SWAP_SECONDS = 600.0
"""Seconds that a server may take to load an export."""
FOLLOW_SECONDS = 60.0
"""Seconds that the other processes of a server may take to follow a swap."""
BUSY = (429, 503)
BUSY_SECONDS = 30.0
"""Seconds to ask again while a server answers that it has too many requests."""
AGREEING = 16
"""Answers in a row, each of some process of a server, by which all of them have followed."""


class Place(Protocol):
    """Somewhere that users are removed from."""

    kind: str
    """What it is, for the record."""

    def find(self, keys: Sequence[str]) -> set[str]:
        """The users whom the place has. Nothing is changed.

        Raises:
            FlmError: it cannot be reached, or is no such place.
        """

    def forget(self, keys: Sequence[str]) -> Removal:
        """Remove users.

        Raises:
            FlmError: they could not be removed.
        """

    def mend(self) -> str:
        """How to remove users who are there after `forget`."""


@dataclass(frozen=True)
class ExportPlace:
    """A folder of `flm export`, which is rewritten. A delta is not: it names only what has changed."""

    folder: Path
    data: Path
    """The prepared data that it was made of."""
    kind = "export"

    def __str__(self) -> str:
        return str(self.folder)

    def find(self, keys: Sequence[str]) -> set[str]:
        """As of `Place`."""
        if not self.folder.is_dir():
            raise RunError(f"{self.folder}: not found; --export must name a folder of 'flm export'")
        found = _rows_of(self.folder, keys)
        if found and (self.folder / FILE).is_file():
            self._check_of_data(keys)
        return found

    def _check_of_data(self, keys: Sequence[str]) -> None:
        """Raise RunError where the users have other ids in the data, so that the export is of other data."""
        manifest = load_manifest(self.folder)
        all_keys, _ = keys_and_ids(self.data / "users.parquet")
        for user, key in users_with(self.folder, manifest, keys):
            # Users whom a follower took in have ids behind those of the data.
            if user < len(all_keys) and all_keys[user] not in (key, tombstone(user)):
                raise RunError(f"{self.folder}: made of other data than {self.data}; give the --data that it is of")

    def forget(self, keys: Sequence[str]) -> Removal:
        """As of `Place`."""
        whole = (self.folder / FILE).is_file()
        users = forget_in_export(self.folder, keys, replaced_values(self.data)) if whole else 0
        return Removal(str(self), self.kind, {"users": users}, f"{users} users forgotten, their rows are empty")

    def mend(self) -> str:
        """As of `Place`."""
        return "write it again with 'flm export --overwrite', or delete it, and load no index from it"


@dataclass(frozen=True)
class EventsPlace:
    """A store of live events of `flm serve`."""

    address: str
    kind = "events"

    def __str__(self) -> str:
        return redact_address(self.address)

    def find(self, keys: Sequence[str]) -> set[str]:
        """As of `Place`."""
        store = existing_store(self.address)
        found = set(store.counts(keys))
        store.close()
        return found

    def forget(self, keys: Sequence[str]) -> Removal:
        """As of `Place`."""
        store = existing_store(self.address)
        counts = store.forget(keys)
        store.close()
        return _of_events(self, len(counts), sum(counts.values()))

    def mend(self) -> str:
        """As of `Place`."""
        return f"events have come since; {AGAIN}"


@dataclass(frozen=True)
class StorePlace:
    """A collection of users in a vector database."""

    users: UserCollection
    kind = "store"

    def __str__(self) -> str:
        return str(self.users)

    def find(self, keys: Sequence[str]) -> set[str]:
        """As of `Place`."""
        return self.users.find(keys)

    def forget(self, keys: Sequence[str]) -> Removal:
        """As of `Place`."""
        users = self.users.forget(keys)
        return Removal(str(self), self.kind, {"users": users}, f"{users} users taken out")

    def mend(self) -> str:
        """As of `Place`."""
        return f"another process has put them in; {AGAIN}"


@dataclass(frozen=True)
class ServerPlace:
    """A running `flm serve`: live events are removed, and the cleaned export is swapped in."""

    client: Client
    exports: tuple[Path, ...] = ()
    """Exports that are cleaned."""
    kind = "server"

    def __str__(self) -> str:
        return self.client.url

    def find(self, keys: Sequence[str]) -> set[str]:
        """As of `Place`."""
        found: set[str] = set()
        for batch in _batches(keys):
            answer = self._ask(self.client, batch, check=True)
            found |= _users_of(answer)
            for export in (*answer["exports"].values(), *answer.get("canaries", {}).values()):
                self._check_cleaned(Path(export))
        return found

    def _check_cleaned(self, export: Path) -> None:
        """Raise RunError where a folder on this machine is served and will not be cleaned."""
        if export.is_dir() and export.resolve() not in [cleaned.resolve() for cleaned in self.exports]:
            raise RunError(f"{self}: serves {export}, which has the users; name it with --export too")

    def forget(self, keys: Sequence[str]) -> Removal:
        """As of `Place`. Ends when all processes of the server have followed the swap, or after a minute."""
        patient = replace(self.client, timeout=SWAP_SECONDS)
        users: set[str] = set()
        exports: dict[str, str] = {}
        canaries: dict[str, str] = {}
        events = 0
        for batch in _batches(keys):
            answer = self._ask(patient, batch, check=False)
            events += sum(answer["live_events"].values())
            users |= _users_of(answer)
            exports |= answer["exports"]
            canaries |= answer.get("canaries", {})
        for name, export in exports.items():
            try:
                patient.swap(export, replaces=name)
            except ServiceError as error:
                raise RunError(f"{self}: could not swap to {export}: {error}; {AGAIN}") from error
        more = f"; serves {', '.join(exports.values())} anew" if exports else ""
        if canaries:
            more += f"; no longer tries {', '.join(canaries.values())} as a canary"
        if more:
            self._wait(keys)
        return _of_events(self, len(users), events, more)

    def _wait(self, keys: Sequence[str]) -> None:
        until = time.monotonic() + FOLLOW_SECONDS
        agreeing = 0
        while agreeing < AGREEING and time.monotonic() < until:
            agreeing = 0 if self.find(keys) else agreeing + 1
            time.sleep(0 if agreeing else 0.1)

    def _ask(self, client: Client, keys: Sequence[str], check: bool) -> dict[str, Any]:
        until = time.monotonic() + BUSY_SECONDS
        while True:
            try:
                return client.forget(keys, check)
            except ServiceError as error:
                if error.status not in BUSY or time.monotonic() > until:
                    raise self._refused(error) from error
            time.sleep(1)

    def _refused(self, error: ServiceError) -> RunError:
        where = "" if str(error).startswith(self.client.url) else f"{self.client.url}: "
        hint = ""
        if error.status in (401, 403):
            hint = " (give an admin key of the server with --server-key)"
        elif error.status in (404, 405):
            hint = " (an older server, or none of 'flm serve')"
        return RunError(f"{where}{error}{hint}")

    def mend(self) -> str:
        """As of `Place`."""
        return f"the export that it serves has them still; name its folder with --export, then {AGAIN}"


def _users_of(answer: dict[str, Any]) -> set[str]:
    """The users whom a server has, by its answer to /v1/forget; an older server tells nothing of canaries."""
    return {*answer["in_export"], *answer.get("in_canary", ()), *answer["live_events"]}


def _of_events(place: Place, users: int, events: int, more: str = "") -> Removal:
    line = f"{users} users and their {events} live events forgotten{more}"
    return Removal(str(place), place.kind, {"users": users, "live_events": events}, line)


def _rows_of(export: Path, keys: Sequence[str]) -> set[str]:
    """The keys that any file of rows of an export or a delta has.

    Raises:
        RunError: a file cannot be read.
    """
    found: set[str] = set()
    for file in sorted(f for f in export.rglob("*") if f.suffix in EXPORTED and f.is_file()):
        try:
            rows = pds.dataset(file, format=EXPORTED[file.suffix])
            if "user_key" in rows.schema.names:
                there = pds.field("user_key").isin(list(keys))
                found |= set(rows.to_table(columns=["user_key"], filter=there)["user_key"].to_pylist())
        except (pa.ArrowInvalid, OSError) as error:
            raise RunError(f"{file}: not readable ({str(error).splitlines()[0]}); export again") from error
    return found


def _batches(keys: Sequence[str]) -> list[Sequence[str]]:
    """Keys in requests; one without keys where there are none, so that the server is asked in any case."""
    return [keys[start : start + MOST_FORGOTTEN] for start in range(0, max(1, len(keys)), MOST_FORGOTTEN)]
