"""Several prepared data sets → one joint set: shared users by key, each item with its domain, events in time order.

All is out of core: keys and features of users and items by `join_entities`, events a bucket of users at a time.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from flm_torchrec.claim import claim
from flm_torchrec.data.dataset import fingerprint_of, read_report
from flm_torchrec.data.row_groups import RowGroups
from flm_torchrec.data.schema import Entity, Feature, Schema, sparsity
from flm_torchrec.errors import DataError
from flm_torchrec.files import replacing, telling
from flm_torchrec.folders import SCHEMA
from flm_torchrec.prepare.engine import DuckEngine
from flm_torchrec.prepare.interactions import InteractionCounts
from flm_torchrec.prepare.join_entities import join_items, join_users, write_standardised
from flm_torchrec.prepare.join_events import DomainEvents, write_joined
from flm_torchrec.prepare.join_features import Domain, JointFeature, joint_features
from flm_torchrec.prepare.memory import memory_bytes
from flm_torchrec.prepare.prepare import check_output

SOURCE = "join"
"""`source` in the schema of joint data."""


def read_domains(folders: Sequence[str | Path]) -> list[Domain]:
    """The prepared data sets of these folders, in the order of their names, which are the folders' names.

    Raises:
        DataError: fewer than two folders, one twice, two of one name, joint data, or a folder without prepared data or
            without items to choose from.
    """
    domains: dict[str, Domain] = {}
    for folder in map(Path, folders):
        name = folder.resolve().name
        if name in domains:
            other = domains[name].folder
            if other.resolve() == folder.resolve():
                raise DataError(f"{folder}: is given twice; name each folder once")
            raise DataError(f"{folder}: is called '{name}', as {other} is; rename one: it is the name of the domain")
        schema = Schema.load(folder / SCHEMA)
        if schema.domains:
            raise DataError(f"{folder}: is joint data of {', '.join(schema.domains)}; give the folders it was made of")
        if schema.items < 2:
            raise DataError(f"{folder}: has one item, so nothing can be told from it; leave the folder out")
        domains[name] = Domain(name, folder, schema, fingerprint_of(folder))
    if len(domains) < 2:
        raise DataError(f"{', '.join(map(str, folders))}: one folder; name two or more to join")
    return [domains[name] for name in sorted(domains)]


def join(
    folders: Sequence[str | Path],
    output: Path,
    apart: Sequence[str] = (),
    overwrite: bool = False,
    memory: int | None = None,
) -> dict[str, Any]:
    """Write the joint data of prepared folders; returns the report. The folder appears complete or not at all.

    The same folders give the same bytes in any order.

    Args:
        apart: names of features whose values mean something else in each domain, such as numbers of categories.
        overwrite: replace older prepared data; anything else at the output is never replaced.
        memory: bytes for the whole; what does not fit goes to disk beside the output. None: half of the machine's.

    Raises:
        DataError: the folders cannot be joined, or the output is in use.
        InUse: another process writes the output.
    """
    domains = read_domains(folders)
    features = joint_features(domains, apart)
    check_output(output, overwrite)
    with claim(output):
        check_output(output, overwrite)
        return Joining(domains, features, tuple(apart), memory or memory_bytes("")).write_to(output)


@dataclass(frozen=True)
class Joining:
    """From domains that fit together to joint data."""

    domains: Sequence[Domain]
    features: Sequence[JointFeature]
    apart: tuple[str, ...]
    memory: int
    """Bytes for the whole."""

    def write_to(self, output: Path) -> dict[str, Any]:
        """Write the folder, which must have been claimed; returns the report.

        Raises:
            DataError: the domains' files are broken or do not fit together.
        """
        with telling(output), replacing(output) as fresh:
            work = fresh / "work"
            work.mkdir()
            report = self._write(fresh, work)
            shutil.rmtree(work)
        return report

    def _write(self, folder: Path, work: Path) -> dict[str, Any]:
        for_users, for_items, spill, buckets = (work / name for name in ("users", "items", "spill", "events"))
        for path in (for_users, for_items, spill, buckets):
            path.mkdir()
        with DuckEngine(self.memory, 0, spill) as engine:
            users = join_users(engine, self.domains, self._of("user"), for_users)
        items = join_items(self.domains, self._of("item"), self.title, for_items)
        made = write_standardised("user", self._of("user"), for_users, folder)
        made |= write_standardised("item", self._of("item"), for_items, folder)
        events = sorted({name for domain in self.domains for name in domain.schema.events})
        timed = all(domain.schema.timestamps for domain in self.domains)
        counts = write_joined(
            self._events(users.ids, events), users.count, folder / "interactions", buckets, timed=timed
        )
        (folder / "vocab").mkdir()
        for joint in self.features:
            if joint.vocabulary is not None:
                joint.vocabulary.write_parquet(
                    folder / "vocab" / f"{joint.feature.entity}_{joint.feature.name}.parquet"
                )
        features = [made.get((joint.feature.entity, joint.feature.name), joint.feature) for joint in self.features]
        schema = self._schema(users.count, items, counts.per_user.events, events, timed, features)
        report = self._report(schema, counts, users.shared)
        (folder / "report.json").write_text(json.dumps(report, indent=2), encoding="utf-8")
        schema.save(folder / SCHEMA)  # last: what has a schema is complete
        return report

    @property
    def title(self) -> str:
        """Column of items.parquet with what people see; empty where no domain has one."""
        titles = {domain.schema.title for domain in self.domains}
        if titles == {""}:
            return ""
        return titles.pop() if len(titles) == 1 else "shown"

    def _of(self, entity: Entity) -> list[JointFeature]:
        return [joint for joint in self.features if joint.feature.entity == entity]

    def _events(self, user_ids: Sequence[np.ndarray], names: Sequence[str]) -> list[DomainEvents]:
        parts, first_item = [], 0
        for domain, users in zip(self.domains, user_ids, strict=True):
            groups = RowGroups(domain.folder)
            if groups.rows == 0:
                raise DataError(f"{domain.folder / 'interactions'}: no rows; leave the folder out")
            codes = np.array([names.index(name) for name in domain.schema.events], np.int32)
            offsets = DomainEvents.first_rows(groups, domain.schema)
            contexts = {joint.feature.column: joint.codes(domain) for joint in self._of("event")}
            parts.append(DomainEvents(groups, offsets, users, first_item, codes, contexts))
            first_item += domain.schema.items
        return parts

    def _schema(
        self, users: int, items: int, rows: int, events: Sequence[str], timed: bool, features: Sequence[Feature]
    ) -> Schema:
        names = tuple(domain.name for domain in self.domains)
        tables = self._tables()
        return Schema(
            "+".join(names),
            SOURCE,
            users,
            items,
            rows,
            tuple(events),
            timed,
            self.title,
            tuple(features),
            tables,
            names,
            any(domain.schema.weights for domain in self.domains),
        )

    def _tables(self) -> dict[str, Any]:
        """How ids share rows: for each table as all domains that have it say.

        Raises:
            DataError: two domains say something else; names both folders.
        """
        said: dict[str, tuple[Domain, Any]] = {}
        for domain in self.domains:
            for name in ("user_id", "item_id", *(f.table for f in domain.schema.features if f.sparse)):
                other, table = said.setdefault(name, (domain, domain.schema.table(name)))
                if table != domain.schema.table(name):
                    raise DataError(
                        f"table '{name}': its rows are {table.kind} in {other.folder} and"
                        f" {domain.schema.table(name).kind} in {domain.folder}, or of another number; prepare both with"
                        " the same --tables"
                    )
        return {name: table for name, (_, table) in said.items() if table.kind != "direct"}

    def _report(self, schema: Schema, counts: InteractionCounts, shared: int) -> dict[str, Any]:
        kept = sum(domain.schema.interactions for domain in self.domains)
        warnings = []
        ordered_only = [domain.name for domain in self.domains if not domain.schema.timestamps]
        if ordered_only:
            warnings.append(
                f"{', '.join(ordered_only)}: no timestamps, so the events of a user of several domains stand"
                " together, a domain after the other"
            )
        if not shared:
            warnings.append("no user of one domain is a user of another: domains meet in words and values alone")
        return {
            "source": SOURCE,
            "rows_read": kept,
            "rows_kept": schema.interactions,
            "dropped": {},
            "users": schema.users,
            "items": schema.items,
            "users_of_several_domains": shared,
            "events_per_user": counts.per_user.quantiles(),
            "sparsity": sparsity(counts.pairs, schema.users, schema.items),
            "warnings": warnings,
            "options": {"apart": list(self.apart)},
            "domains": {
                domain.name: {
                    "fingerprint": domain.fingerprint,
                    "users": domain.schema.users,
                    "items": domain.schema.items,
                    "interactions": domain.schema.interactions,
                }
                for domain in self.domains
            },
        }


def made_of(folder: Path) -> dict[str, str]:
    """By name of a domain, the fingerprint of the data that joint data were made of; empty for other data."""
    return {name: one["fingerprint"] for name, one in read_report(folder).get("domains", {}).items()}
