"""A delta holds what changed and no more, and an older export with it is the newer one, bit for bit."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flm_torchrec.claim import InUse, claim
from flm_torchrec.data.dataset import PreparedData
from flm_torchrec.errors import RunError
from flm_torchrec.export.delta import Delta, apply_delta, export_delta, load_delta
from flm_torchrec.export.manifest import Quantise, Storage, is_part, load_manifest
from flm_torchrec.export.recommend import ExportRecommender
from flm_torchrec.export.vectors import decode
from flm_torchrec.export.write import ExportOptions, ExportSource, export
from flm_torchrec.files import sha256
from tests.evaluation.test_ranking import Alone
from tests.export.test_export import MadeUp
from tools.benchmarks import export as bench_export

OPTIONS = ExportOptions(user_block=32, item_block=32, part_rows=40, index="flat")


@pytest.fixture
def older(small: PreparedData, tmp_path: Path) -> ExportSource:
    """Exported to `tmp_path`/base."""
    source = ExportSource(small, MadeUp(small), np.ones(small.schema.items, bool), "v1")
    export(source, Alone(), tmp_path / "base", OPTIONS)
    return source


def newer(older: ExportSource, **changes: object) -> ExportSource:
    return replace(older, encoder=MadeUp(older.data, changed={3, 41, 148}), version="v2", **changes)  # type: ignore[arg-type]


def make_delta(source: ExportSource, folder: Path) -> Delta:
    delta = export_delta(source, Alone(), folder / "base", folder / "delta", OPTIONS)
    assert delta is not None and delta == load_delta(folder / "delta")
    return delta


def check_same(merged: Path, whole: Path) -> None:
    """Every file of the one is that of the other, and so is what the manifests say."""
    one, other = load_manifest(merged), load_manifest(whole)
    assert one == other
    assert all((merged / name).read_bytes() == (whole / name).read_bytes() for name in other.sha256)


def test_base_and_delta_are_the_whole_bit_for_bit(older: ExportSource, tmp_path: Path) -> None:
    known = np.ones(older.data.schema.items, bool)
    known[77] = False
    source = newer(older, item_known=known)
    delta = make_delta(source, tmp_path)
    assert delta.changed == {"items": 4, "users": 1} and delta.removed == {"items": 0, "users": 0}
    rows = pq.read_table(tmp_path / "delta" / "items.parquet")
    assert rows["item_id"].to_pylist() == [3, 41, 77, 148]
    assert not (tmp_path / "delta" / "users.parquet" / "part-00001.parquet").exists()
    apply_delta(tmp_path / "base", tmp_path / "delta", tmp_path / "merged")
    export(source, Alone(), tmp_path / "whole", OPTIONS)
    check_same(tmp_path / "merged", tmp_path / "whole")
    assert ExportRecommender(tmp_path / "merged").manifest.model_version == "v2"
    # And a delta on top of what was merged.
    assert export_delta(older, Alone(), tmp_path / "merged", tmp_path / "back", OPTIONS) is not None
    apply_delta(tmp_path / "merged", tmp_path / "back", tmp_path / "again")
    check_same(tmp_path / "again", tmp_path / "base")


@settings(max_examples=8)
@given(
    counts=st.tuples(st.integers(1, 130), st.integers(1, 130)), changed=st.sets(st.integers(0, 129)),
    renamed=st.sets(st.integers(0, 129)), storage=st.sampled_from(["parquet", "arrow"]),
)  # fmt: skip
def test_catalogues_that_grow_shrink_and_shift(
    tmp_path_factory: pytest.TempPathFactory, counts: tuple[int, int], changed: set[int], renamed: set[int],
    storage: Storage,
) -> None:  # fmt: skip
    folder = tmp_path_factory.mktemp("delta")
    options = replace(OPTIONS, storage=storage)
    sources = [catalogue_of(folder / f"data{n}", count, set(), set()) for n, count in enumerate(counts)]
    sources[1] = catalogue_of(folder / "data2", counts[1], changed, renamed)
    export(sources[0], Alone(), folder / "base", options)
    delta = export_delta(sources[1], Alone(), folder / "base", folder / "delta", options)
    export(sources[1], Alone(), folder / "whole", options)
    apply_delta(folder / "base", folder / "delta", folder / "merged")
    check_same(folder / "merged", folder / "whole")
    keys = [{f"{i}" for i in range(counts[0])}, {key_of(i, renamed) for i in range(counts[1])}]
    assert delta is not None and delta.removed["items"] == len(keys[0] - keys[1])
    gone = pq.read_table(folder / "delta" / "removed" / "items.parquet")["item_key"].to_pylist()
    assert set(gone) == keys[0] - keys[1]
    touched = {i for i in range(counts[1]) if i >= counts[0] or i in changed or i in renamed}
    assert delta.changed["items"] == len(touched)
    shutil.rmtree(folder)


def key_of(item: int, renamed: set[int]) -> str:
    return f"{item}{'-new' if item in renamed else ''}"


def catalogue_of(folder: Path, items: int, changed: set[int], renamed: set[int]) -> ExportSource:
    data = bench_export.made_up_data(folder, items, users=20)
    table = pq.read_table(folder / "items.parquet")
    keys = pa.array([key_of(i, renamed) for i in range(items)])
    pq.write_table(table.set_column(1, "item_key", keys), folder / "items.parquet")
    return ExportSource(data, Tilted(changed), np.ones(items, bool), "v")


class Tilted(bench_export.MadeUp):
    """The same vector for the same item in whatever block; of `changed` items one bit is another."""

    def __init__(self, changed: set[int]) -> None:
        super().__init__(4)
        self.changed = changed

    def _around(self, ids: np.ndarray, seed: int) -> torch.Tensor:
        vectors = self.centres[torch.from_numpy(ids)] + seed
        rows = np.isin(ids, list(self.changed)).nonzero()[0]
        vectors[rows, 0] = torch.nextafter(vectors[rows, 0], torch.tensor(torch.inf))
        return vectors


def test_files_beside_the_rows_go_along(older: ExportSource, tmp_path: Path) -> None:
    delta = make_delta(newer(older), tmp_path)
    folder = tmp_path / "delta"
    (folder / "tower").mkdir()
    (folder / "tower" / "tower.pt2").write_bytes(b"a package")
    record = json.loads((folder / "delta.json").read_text())
    record["sha256"]["tower/tower.pt2"] = "0" * 64
    (folder / "delta.json").write_text(json.dumps(record))
    with pytest.raises(RunError, match=r"tower\.pt2: changed"):
        apply_delta(tmp_path / "base", folder, tmp_path / "merged")
    record["sha256"]["tower/tower.pt2"] = sha256(folder / "tower" / "tower.pt2")
    (folder / "delta.json").write_text(json.dumps(record))
    manifest = apply_delta(tmp_path / "base", folder, tmp_path / "merged")
    assert (tmp_path / "merged" / "tower" / "tower.pt2").read_bytes() == b"a package"
    assert "tower/tower.pt2" in manifest.sha256 and delta.whole.rows_digest == manifest.rows_digest


class Drifting(MadeUp):
    """Vectors that all grow by a share, and item 7 and user 11 by ten times that."""

    def __init__(self, data: PreparedData, grown: float) -> None:
        super().__init__(data)
        rows = {"item": torch.full((data.schema.items, 1), 1 + grown), "user": torch.full((data.schema.users, 1), 1.0)}
        rows["user"] += grown
        rows["item"][7], rows["user"][11] = 1 + 10 * grown, 1 + 10 * grown
        self.item = self.item * rows["item"]
        self.user = {head: vectors * rows["user"] for head, vectors in self.user.items()}


@pytest.mark.parametrize("quantise", ["none", "int8"])
def test_what_hardly_moved_stays_behind_and_does_not_add_up(
    small: PreparedData, tmp_path: Path, quantise: Quantise
) -> None:
    """Each model is 0.4 % away from the one before; 1 % may be left out. So every third delta has all rows."""
    options = replace(OPTIONS, quantise=quantise, tolerance=0.01, index="none")
    items, users = small.schema.items, small.schema.users
    export(ExportSource(small, Drifting(small, 0), np.ones(items, bool), "v0"), Alone(), tmp_path / "0", options)
    sent = []
    for number in range(1, 6):
        known = np.ones(items, bool)
        known[20] = number != 2  # a row that differs otherwise is always sent
        model = Drifting(small, 0.004 * number)
        source = ExportSource(small, model, known, f"v{number}")
        base, delta, merged = tmp_path / f"{number - 1}", tmp_path / f"d{number}", tmp_path / f"{number}"
        made = export_delta(source, Alone(), base, delta, options)
        assert made is not None and made.whole.tolerance == 0.01
        manifest = apply_delta(base, delta, merged)
        assert (manifest.tolerance, manifest.model_version) == (0.01, f"v{number}")
        rows = decode(pq.read_table(merged / "items.parquet").sort_by("item_id")["embedding"])
        apart = np.linalg.norm(rows - model.item.numpy(), axis=1) / np.linalg.norm(model.item.numpy(), axis=1)
        assert apart.max() < (0.0101 if quantise == "none" else 0.03)
        sent.append((made.changed["items"], made.changed["users"]))
    assert sent == [(1, 1), (2, 1), (items, users), (1, 1), (1, 1)]
    whole = export_delta(source, Alone(), merged, tmp_path / "exact", replace(options, tolerance=0.0))
    assert (
        whole is not None and whole.whole.tolerance == 0 and whole.changed == {"items": items - 1, "users": users - 1}
    )


def test_only_what_fits_is_compared_and_applied(older: ExportSource, tmp_path: Path) -> None:
    def refused(message: str, source: ExportSource, options: ExportOptions = OPTIONS, base: str = "base") -> None:
        with pytest.raises(RunError, match=message) as told:
            export_delta(source, Alone(), tmp_path / base, tmp_path / "delta", options)
        assert "\n" not in str(told.value) and not (tmp_path / "delta").exists()

    wide = replace(older, encoder=MadeUp(older.data, dim=8))
    refused("dim is 16 there and 8 here", wide)
    refused("quantise is none there and int8 here", older, replace(OPTIONS, quantise="int8"))
    refused("storage is parquet there and arrow here", older, replace(OPTIONS, storage="arrow"))
    refused("manifest.json: not found", older, base="none")
    schema = older.data.schema
    fewer = replace(older.data, schema=replace(schema, features=tuple(f for f in schema.features if f.name != "brand")))
    refused("has other columns", replace(older, data=fewer))
    for name, content, message in (
        ("manifest.json", b"{", "not a manifest"),
        ("manifest.json", json.dumps({"format": 1}).encode(), "format 1, this version reads 2"),
        ("items.parquet/part-00000.parquet", b"PAR1", "changed since the export"),
    ):
        shutil.copytree(tmp_path / "base", tmp_path / "bad")
        (tmp_path / "bad" / name).write_bytes(content)
        refused(message, older, base="bad")
        shutil.rmtree(tmp_path / "bad")

    make_delta(newer(older), tmp_path)
    export(replace(older, version="v0", encoder=MadeUp(older.data, changed={9})), Alone(), tmp_path / "other", OPTIONS)
    with pytest.raises(RunError, match=r"changes an export of model v1, and .*other is another one"):
        apply_delta(tmp_path / "other", tmp_path / "delta", tmp_path / "merged")
    with pytest.raises(RunError, match=r"delta\.json: not found"):
        apply_delta(tmp_path / "base", tmp_path / "base", tmp_path / "merged")
    (tmp_path / "delta" / "delta.json").write_text("[]")
    with pytest.raises(RunError, match="not a delta"):
        apply_delta(tmp_path / "base", tmp_path / "delta", tmp_path / "merged")
    assert not (tmp_path / "merged").exists() and not (tmp_path / "merged.tmp").exists()


def test_delta_and_merged_export_have_one_writer_and_touch_no_neighbour(older: ExportSource, tmp_path: Path) -> None:
    for name in ("delta.tmp", "delta.whole", "merged.tmp", ".merged.old"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "mine").touch()
    with claim(tmp_path / "delta"), pytest.raises(InUse, match="delta: process"):
        make_delta(newer(older), tmp_path)
    make_delta(newer(older), tmp_path)
    with claim(tmp_path / "merged"), pytest.raises(InUse, match="merged: process"):
        apply_delta(tmp_path / "base", tmp_path / "delta", tmp_path / "merged")
    apply_delta(tmp_path / "base", tmp_path / "delta", tmp_path / "merged")
    with pytest.raises(RunError, match="exists; give another --output, or --overwrite"):
        apply_delta(tmp_path / "base", tmp_path / "delta", tmp_path / "merged", overwrite=False)
    apply_delta(tmp_path / "base", tmp_path / "delta", tmp_path / "merged")
    mine = {path.parent.name for path in tmp_path.glob("*/mine")}
    assert mine == {"delta.tmp", "delta.whole", "merged.tmp", ".merged.old"}
    assert {p.name for p in tmp_path.iterdir()} == {"base", "delta", "merged", *mine}


def test_is_part() -> None:
    assert is_part("items.parquet/part-00000.parquet") and is_part("users.arrow/part-00007.arrow")
    assert not is_part("items.faiss") and not is_part("removed/items.parquet")
