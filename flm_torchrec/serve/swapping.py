"""Other exports in place of the one served: checked first, for all users at once or for a share of them for a time."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flm_torchrec.errors import RunError
from flm_torchrec.export.manifest import read_manifest
from flm_torchrec.export.tower.reader import Represented
from flm_torchrec.safe_text import first_line, visible
from flm_torchrec.serve.cold_items import with_fitting
from flm_torchrec.serve.event_store import StoreError
from flm_torchrec.serve.loaded_export import UNSOUND, LoadedExport
from flm_torchrec.serve.recall import SAMPLE, measured_recall, sample_recall
from flm_torchrec.serve.resolve import Refused
from flm_torchrec.serve.split import draw

if TYPE_CHECKING:
    from flm_torchrec.serve.service import Service

LEAST_RECALL = 0.9
"""Default of the recall@100 that a fresh export must have."""
CHECK_SECONDS = 30.0
"""Between two measurements of a canary's recall."""
PAUSE = 0.1
"""Seconds between two tries."""
BUSY, NO_STORE = 409, 503
"""Statuses of refusals that pass: another export is being loaded, or the store cannot be read."""


@dataclass(frozen=True)
class CanaryTerms:
    """Who gets a fresh export before all do, and how long."""

    share: float
    """Of the users, 0 … 1."""
    until: float
    """`time.time()` at which it takes over."""


@dataclass(eq=False)
class Canary:
    """A fresh export that a share of the users gets."""

    fresh: LoadedExport
    terms: CanaryTerms
    answered: deque[Represented] = field(default_factory=lambda: deque(maxlen=SAMPLE))
    """Its last users, by which its recall is measured."""
    check_at: float = field(default_factory=lambda: time.monotonic() + CHECK_SECONDS)

    def takes(self, unit: str | None) -> bool:
        """Whether a user gets the fresh export. Each model draws other users."""
        return unit is not None and draw(f"canary {self.fresh.manifest.model_version}", unit) < self.terms.share

    def shown(self) -> dict[str, Any]:
        """What anyone may know of it."""
        return {"model_version": self.fresh.manifest.model_version, **asdict(self.terms)}

    def state(self) -> dict[str, Any]:
        """What another process needs to do the same."""
        return {"export": str(self.fresh.folder), **asdict(self.terms)}


class Swaps:
    """The swaps of one service.

    Args:
        least: recall@100 that a fresh export must have, see `measured_recall`; 0: any.
        announce: called with `state` after each change that began in this process.
    """

    def __init__(self, service: Service, least: float, announce: Callable[[dict[str, Any]], None]) -> None:
        self.service = service
        self.least = least
        self.announce = announce
        self.swapping = threading.Lock()
        self.recall: float | None = None
        """As measured last."""

    def state(self) -> dict[str, Any]:
        """The exports that are served, as JSON for other processes."""
        canary = self.service.canary
        return {"export": str(self.service.loaded.folder), "canary": canary and canary.state()}

    def swap(self, export: Path, terms: CanaryTerms | None = None) -> None:
        """Load another export beside the one served and check it. Then serve it to all, or to a share first.

        The export of a canary is not loaded again: given without terms it takes over at once, and with the export
        that is served to the others the canary ends.

        Raises:
            Refused: the export is in another folder than the first one, cannot be served, or its index finds too few
                of the best items; or the store cannot be read now. What was served stays.
        """
        self._take(self._target(export), terms)
        self.announce(self.state())

    def follow(self, state: Mapping[str, Any]) -> None:
        """Do as another process did; what is wrong is printed, since nobody waits for an answer."""
        while True:
            try:
                self._become(state)
                return
            except Refused as refused:
                if refused.status not in (BUSY, NO_STORE):
                    print(f"not swapped: {visible(str(refused))}", flush=True)
                    return
                time.sleep(PAUSE)

    def tend(self) -> None:
        """Measure a canary's recall now and then, roll it back where that has fallen, and let it take over in time."""
        canary = self.service.canary
        if canary is None:
            return
        over = time.time() >= canary.terms.until
        if canary.answered and (over or time.monotonic() >= canary.check_at):
            canary.check_at = time.monotonic() + CHECK_SECONDS
            if not self._finds_enough(canary):
                return
        if over:
            try:
                self.swap(canary.fresh.folder)
            except Refused:
                return  # another swap is under way, which decides; or it is tried again when the store can be read
            print(visible(f"canary: {canary.fresh.folder}: served to all"), flush=True)

    def _finds_enough(self, canary: Canary) -> bool:
        """Measure a canary's recall on its last users; False where it was rolled back."""
        try:
            self.recall = measured_recall(canary.fresh, list(canary.answered))
        except UNSOUND as error:
            self.failed(canary, error)
            return False
        if not self.recall >= self.least:
            self.roll_back(canary, f"recall@100 has fallen to {self.recall:.3f}, below {self.least:g}")
        return self.recall >= self.least

    def roll_back(self, canary: Canary, reason: str) -> None:
        """End a canary: its users get the export of the others again."""
        with self.service.changing:
            if self.service.canary is not canary:
                return
            self.service.canary = None
        print(visible(f"canary: {canary.fresh.folder}: rolled back: {reason}"), flush=True)
        self.announce(self.state())

    def failed(self, canary: Canary, error: Exception) -> None:
        """Roll back a canary whose export could not answer."""
        self.roll_back(canary, f"it could not answer ({type(error).__name__}: {first_line(error)})")

    def _target(self, export: Path) -> Path:
        try:
            target = export.resolve()
        except (OSError, ValueError) as error:
            raise Refused(422, f"export: {error}") from error
        if not target.is_relative_to(self.service.exports):
            place = f"{self.service.exports}, the only place exports are taken from"
            raise Refused(403, f"export: '{export}' is not in {place}")
        return target

    def _take(self, target: Path, terms: CanaryTerms | None) -> None:
        service = self.service
        if not self.swapping.acquire(blocking=False):
            raise Refused(BUSY, "export: another one is being loaded; try again when it is served")
        try:
            if service.canary is not None and terms is None and self._serves(target):
                with service.changing:
                    service.canary = None
                return
            fresh = self._prepared(target)
            with service.changing:
                # All items of the store: those that the export served does not take may fit this one.
                fresh = with_fitting(fresh, service.store.items_after(0))
                if terms is None:
                    service.loaded, service.canary = fresh, None
                else:
                    service.canary = Canary(fresh, terms)
        except (RunError, OSError) as error:
            raise Refused(422, f"export: {error}") from error
        except StoreError as error:
            raise Refused(NO_STORE, str(error)) from error
        finally:
            self.swapping.release()

    def _prepared(self, target: Path) -> LoadedExport:
        """The export, loaded and checked; that of a canary has been."""
        service = self.service
        if service.canary is not None and service.canary.fresh.folder == target:
            return service.canary.fresh
        fresh = service.load(target, service.loaded.number + 1)
        try:
            recall = sample_recall(fresh)
        except UNSOUND as error:
            raise RunError(f"{target}: cannot answer ({type(error).__name__}: {first_line(error)})") from error
        if not recall >= self.least:
            raise RunError(
                f"{target}: its index finds {recall:.3f} of the 100 best items, below {self.least:g}; export again, or"
                " start the server with a lower --least-recall"
            )
        self.recall = recall
        return fresh

    def _become(self, state: Mapping[str, Any]) -> None:
        service, wanted, canary = self.service, Path(state["export"]), state["canary"]
        if not self._serves(wanted) or (service.canary is not None and canary is None):
            self._take(self._target(wanted), None)
        if canary is not None and (service.canary is None or service.canary.state() != canary):
            self._take(self._target(Path(canary["export"])), CanaryTerms(canary["share"], canary["until"]))

    def _serves(self, folder: Path) -> bool:
        """Whether this export is served, as it is now on the disk."""
        loaded = self.service.loaded
        try:
            return folder == loaded.folder and read_manifest(folder) == loaded.manifest
        except RunError:
            return False  # loading it says what is wrong
