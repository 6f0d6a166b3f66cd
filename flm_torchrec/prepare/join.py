"""Several prepared data sets → one joint set: shared users by key, each item with its domain, events in time order.

Keys and features of users and items are in memory, events a bucket of users at a time.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from flm_torchrec.claim import claim
from flm_torchrec.data.dataset import DOMAIN, fingerprint_of, read_report
from flm_torchrec.data.keys import TOMBSTONE
from flm_torchrec.data.row_groups import RowGroups
from flm_torchrec.data.schema import Entity, Feature, Schema, sparsity
from flm_torchrec.errors import DataError
from flm_torchrec.files import replacing, telling
from flm_torchrec.prepare.interactions import InteractionCounts
from flm_torchrec.prepare.join_events import DomainEvents, write_joined
from flm_torchrec.prepare.join_features import Domain, JointFeature, joint_features, standardised
from flm_torchrec.prepare.key_order import ordered
from flm_torchrec.prepare.prepare import check_output

SOURCE = "join"
"""`source` in the schema of joint data."""
FORGOTTEN = "\0"
"""Before the key of a forgotten user while domains are joined; no key begins so."""


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
        schema = Schema.load(folder / "schema.yaml")
        if schema.domains:
            raise DataError(f"{folder}: is joint data of {', '.join(schema.domains)}; give the folders it was made of")
        if schema.items < 2:
            raise DataError(f"{folder}: has one item, so nothing can be told from it; leave the folder out")
        domains[name] = Domain(name, folder, schema, fingerprint_of(folder))
    if len(domains) < 2:
        raise DataError(f"{', '.join(map(str, folders))}: one folder; name two or more to join")
    return [domains[name] for name in sorted(domains)]


def join(
    folders: Sequence[str | Path], output: Path, apart: Sequence[str] = (), overwrite: bool = False
) -> dict[str, Any]:
    """Write the joint data of prepared folders; returns the report. The folder appears complete or not at all.

    The same folders give the same bytes in any order.

    Args:
        apart: names of features whose values mean something else in each domain, such as numbers of categories.
        overwrite: replace older prepared data; anything else at the output is never replaced.

    Raises:
        DataError: the folders cannot be joined, or the output is in use.
        InUse: another process writes the output.
    """
    domains = read_domains(folders)
    features = joint_features(domains, apart)
    check_output(output, overwrite)
    with claim(output):
        check_output(output, overwrite)
        return Joining(domains, features, tuple(apart)).write_to(output)


@dataclass(frozen=True)
class Joining:
    """From domains that fit together to joint data."""

    domains: Sequence[Domain]
    features: Sequence[JointFeature]
    apart: tuple[str, ...]

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
        rows = {entity: [domain.rows(entity) for domain in self.domains] for entity in ("user", "item")}
        users, user_ids = self._users(rows["user"])
        items = self._items(rows["item"])
        events = sorted({name for domain in self.domains for name in domain.schema.events})
        timed = all(domain.schema.timestamps for domain in self.domains)
        parts = self._events(user_ids, events)
        counts = write_joined(parts, len(users), folder / "interactions", work, timed=timed)
        made = []
        for joint in self.features:
            if joint.feature.entity == "event":
                made.append(joint.feature)
                continue
            frames = {"user": users, "item": items}
            feature, frame = standardised(joint, frames[joint.feature.entity])
            made.append(feature)
            users, items = (frame, items) if feature.entity == "user" else (users, frame)
        users.write_parquet(folder / "users.parquet")
        items.write_parquet(folder / "items.parquet")
        (folder / "vocab").mkdir()
        for joint in self.features:
            if joint.vocabulary is not None:
                joint.vocabulary.write_parquet(
                    folder / "vocab" / f"{joint.feature.entity}_{joint.feature.name}.parquet"
                )
        schema = self._schema(len(users), len(items), counts.per_user.events, events, timed, made)
        report = self._report(schema, counts, rows["user"])
        (folder / "report.json").write_text(json.dumps(report, indent=2), encoding="utf-8")
        schema.save(folder / "schema.yaml")  # last: what has a schema is complete
        return report

    def _users(self, rows: Sequence[pl.DataFrame]) -> tuple[pl.DataFrame, list[np.ndarray]]:
        """Users by key, and for each domain the id of each of its users. Of two values the first domain's counts."""
        keys = [_shared_keys(domain, frame) for domain, frame in zip(self.domains, rows, strict=True)]
        users = ordered(pl.DataFrame({"user_key": pl.concat(keys).unique()}), "user_key")
        users = users.select(pl.int_range(pl.len(), dtype=pl.Int64).alias("user_id"), "user_key")
        ids = [
            key.to_frame("user_key").join(users, "user_key", "left", maintain_order="left")["user_id"].to_numpy()
            for key in keys
        ]
        for joint in self._of("user"):
            found = None
            for key, domain, frame in zip(keys, self.domains, rows, strict=True):
                own = pl.DataFrame([key.rename("user_key"), *joint.column(domain, frame)])
                own = users.select("user_key").join(own, "user_key", "left", maintain_order="left").drop("user_key")
                found = own if found is None else _first_known(found, own)
            assert found is not None
            users = users.hstack(_complete(joint, found))
        forgotten = pl.col("user_key").str.starts_with(FORGOTTEN)
        names_nobody = pl.lit(TOMBSTONE) + pl.col("user_id").cast(pl.String)
        return users.with_columns(user_key=pl.when(forgotten).then(names_nobody).otherwise("user_key")), ids

    def _items(self, rows: Sequence[pl.DataFrame]) -> pl.DataFrame:
        """The items of each domain, one after the other; a key has the name of its domain before it."""
        parts = []
        for domain, frame in zip(self.domains, rows, strict=True):
            columns = [
                pl.Series("item_key", domain.name + "/" + frame["item_key"]),
                pl.Series(DOMAIN, [domain.name] * len(frame)),
            ]
            for joint in self._of("item"):
                columns += _complete(joint, pl.DataFrame(joint.column(domain, frame))).get_columns()
            if self.title not in (column.name for column in columns) and self.title:
                columns.append(_title(domain, frame).rename(self.title))
            parts.append(pl.DataFrame(columns))
        return pl.concat(parts).with_row_index("item_id").with_columns(pl.col("item_id").cast(pl.Int64))

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

    def _report(self, schema: Schema, counts: InteractionCounts, users: Sequence[pl.DataFrame]) -> dict[str, Any]:
        kept = sum(domain.schema.interactions for domain in self.domains)
        warnings = []
        ordered_only = [domain.name for domain in self.domains if not domain.schema.timestamps]
        if ordered_only:
            warnings.append(
                f"{', '.join(ordered_only)}: no timestamps, so the events of a user of several domains are merged by"
                " their place in each domain's sequence"
            )
        shared = _several(users, self.domains)
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


def _several(users: Sequence[pl.DataFrame], domains: Sequence[Domain]) -> int:
    """The number of users whom two domains or more have."""
    keys = pl.concat([_shared_keys(d, f) for d, f in zip(domains, users, strict=True)])
    return keys.value_counts(name="n").filter(pl.col("n") > 1).height


def _shared_keys(domain: Domain, users: pl.DataFrame) -> pl.Series:
    """Keys of a domain's users; one who was forgotten names nobody, and is a user of this domain alone."""
    gone = pl.col("user_key") == pl.lit(TOMBSTONE) + pl.col("user_id").cast(pl.String)
    own = pl.when(gone).then(pl.lit(f"{FORGOTTEN}{domain.name}/") + pl.col("user_key")).otherwise("user_key")
    return users.select(own.alias("user_key"))["user_key"]


def _first_known(found: pl.DataFrame, later: pl.DataFrame) -> pl.DataFrame:
    """The values of `found`, and where it has none those of `later`."""

    def known(column: pl.Series) -> pl.Series:
        return column.set(column.list.len() == 0, None) if isinstance(column.dtype, pl.List) else column

    columns = []
    for one, other in zip(found.get_columns(), later.get_columns(), strict=True):
        both = pl.DataFrame([known(one).rename("one"), known(other).rename("other")])
        columns.append(both.select(pl.coalesce("one", "other").alias(one.name)).to_series())
    return pl.DataFrame(columns)


def _complete(joint: JointFeature, columns: pl.DataFrame) -> pl.DataFrame:
    """Columns with an empty list where a list is not known, and an empty text where a text is not."""
    listed = isinstance(columns[joint.feature.column].dtype, pl.List)
    if not listed:
        return columns
    filled = columns.with_columns(pl.col(joint.feature.column).fill_null([]))
    texts = [name for name in columns.columns if name != joint.feature.column]
    return filled.with_columns(pl.col(texts).fill_null("")) if texts else filled


def _title(domain: Domain, rows: pl.DataFrame) -> pl.Series:
    if not domain.schema.title:
        return pl.Series([None] * len(rows), dtype=pl.String)
    return rows[domain.schema.title].cast(pl.String)
