"""Shards of an index that are built apart give the index of one piece, and what does not fit is refused."""

from __future__ import annotations

import shutil
from pathlib import Path

import faiss
import numpy as np
import pytest

from flm_torchrec.api.index_shards import build_shard, merge_index, train_index
from flm_torchrec.errors import RunError
from flm_torchrec.export import index, shards
from flm_torchrec.export.index import open_index
from flm_torchrec.export.manifest import load_manifest
from flm_torchrec.export.shards import IndexShards, map_codes
from flm_torchrec.export.write import ExportOptions, ExportSource, export
from tests.evaluation.test_ranking import Alone
from tools.benchmarks.export import MadeUp, made_up_data

ITEMS, DIM, SHARDS = 3000, 8, 3


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An export without an index, and beside it a folder with all shards of one that is cheap to train."""
    folder = tmp_path_factory.mktemp("shards")
    data = made_up_data(folder / "data", ITEMS, users=40)
    source = ExportSource(data, MadeUp(DIM), np.ones(ITEMS, bool), "v1")
    export(source, Alone(), folder / "export", ExportOptions(index="none", part_rows=256))
    with pytest.MonkeyPatch.context() as patched:
        for name, value in (("LISTS", 16), ("BITS", 4), ("LEAST_ROWS", 39 << 4)):
            patched.setattr(shards, name, value)
        patched.setattr(index, "LEAST_ROWS", 39 << 4)
        train_index(folder / "export", folder / "work", SHARDS)
    for shard in (2, 0, 1):
        build_shard(folder / "export", folder / "work", shard)
    return folder


@pytest.fixture
def copied(work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(index, "LEAST_ROWS", 39 << 4)
    return Path(shutil.copytree(work, tmp_path / "copied"))


def test_merged_shards_are_the_index_of_one_piece(copied: Path) -> None:
    manifest = load_manifest(copied / "export")
    items = index.ExportRows(copied / "export", manifest, "items")
    merged = IndexShards(items, copied / "work").merge()
    one = faiss.read_index(str(copied / "work" / shards.TRAINED))
    for vectors in items.vectors("embedding"):
        one.add(vectors)
    assert merged.ntotal == ITEMS and np.array_equal(faiss.serialize_index(merged), faiss.serialize_index(one))

    report = merge_index(copied / "export", copied / "work")
    shutil.rmtree(copied / "work")
    manifest = load_manifest(copied / "export")
    assert manifest.index == report and report.asked == report.kind == "ivfpq" and report.least >= 0.99
    found = open_index(copied / "export", manifest)
    assert found is not None
    queries = np.concatenate(list(items.vectors("embedding")))[:20]
    faiss.ParameterSpace().set_index_parameter(one, "nprobe", report.parameters["nprobe"])
    one.k_factor = report.parameters["k_factor_rf"]  # type: ignore[attr-defined]
    assert np.array_equal(found.index.search(queries, 10)[1], one.search(queries, 10)[1])
    with pytest.raises(RunError, match="has an index already"):
        merge_index(copied / "export", copied / "work")


def other(width: int = DIM, metric: int = faiss.METRIC_INNER_PRODUCT, rows: int = 1000) -> faiss.Index:
    """An index of the same kind, of other vectors."""
    made = faiss.index_factory(width, "OPQ2,IVF16,PQ2x4,Refine(SQfp16)", metric)
    vectors = np.random.default_rng(1).standard_normal((rows, width)).astype(np.float32)
    made.train(vectors)
    made.add(vectors)
    return made


def flat() -> faiss.Index:
    """No index of shards."""
    return faiss.IndexFlatIP(DIM)


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (None, r"shard-00001\.faiss: not found; build shard 1$"),
        (lambda: other(width=16), r"16 numbers by inner product, and the trained index 8 numbers by inner product"),
        (lambda: other(metric=faiss.METRIC_L2), "8 numbers by distance, and the trained index 8 numbers by inner"),
        (other, "is of another training; build shard 1 again"),
        (flat, "holds IndexFlatIP, and no shard; build shard 1 again"),
    ],
)
def test_a_shard_that_does_not_fit_is_refused(copied: Path, make, told: str) -> None:  # type: ignore[no-untyped-def]
    file = copied / "work" / "shard-00001.faiss"
    file.unlink()
    if make is not None:
        faiss.write_index(make(), str(file))
    with pytest.raises(RunError, match=told) as error:
        merge_index(copied / "export", copied / "work")
    assert "\n" not in str(error.value)
    assert load_manifest(copied / "export").index is None


def test_a_shard_of_other_rows_or_cut_off_is_refused(copied: Path) -> None:
    file = copied / "work" / "shard-00001.faiss"
    whole = file.read_bytes()
    shutil.copy(copied / "work" / shards.TRAINED, file)
    with pytest.raises(RunError, match=r"has 0 vectors, not 1024; build shard 1 again"):
        merge_index(copied / "export", copied / "work")
    file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(RunError, match=r"faiss cannot read it \(.+\); build shard 1 again"):
        merge_index(copied / "export", copied / "work")


def test_shards_of_another_export_or_number_are_refused(copied: Path) -> None:
    with pytest.raises(RunError, match="there are 3, counted from 0"):
        build_shard(copied / "export", copied / "work", SHARDS)
    with pytest.raises(RunError, match="shards: 13 of 12 parts"):
        train_index(copied / "export", copied / "more", 13)
    with pytest.raises(RunError, match=r"nothing/shards\.json: not found; train the index first"):
        build_shard(copied / "export", copied / "nothing", 0)
    data = made_up_data(copied / "more", ITEMS, users=41)
    source = ExportSource(data, MadeUp(DIM), np.ones(ITEMS, bool), "v2")
    export(source, Alone(), copied / "second", ExportOptions(index="none", part_rows=256))
    with pytest.raises(RunError, match="is of other rows than this export"):
        build_shard(copied / "second", copied / "work", 0)


def test_a_flat_index_over_a_mapped_file_has_the_bytes_of_one_in_memory(tmp_path: Path) -> None:
    vectors = np.random.default_rng(0).standard_normal((50, DIM)).astype(np.float32)
    vectors.tofile(tmp_path / "vectors")
    mapped, held = faiss.IndexFlatIP(DIM), faiss.IndexFlatIP(DIM)
    rows = map_codes(mapped, tmp_path / "vectors", 50)
    held.add(vectors)
    assert not mapped.codes.is_owned and len(rows) == vectors.nbytes  # type: ignore[attr-defined]
    assert np.array_equal(faiss.serialize_index(mapped), faiss.serialize_index(held))
