"""An export agrees with brute force, is whole or refused, and answers alone."""

from __future__ import annotations

import json
import resource
import shutil
import signal
from collections.abc import Collection
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

import flm_torchrec as flm
from flm_torchrec.cli.export import summary
from flm_torchrec.config.heads import HEADS, REPRESENTATIONS
from flm_torchrec.config.schema import EvalConfig
from flm_torchrec.data.dataset import PreparedData, load_prepared
from flm_torchrec.data.splits import Examples, split
from flm_torchrec.errors import RunError
from flm_torchrec.evaluation.evaluate import evaluate_heads
from flm_torchrec.evaluation.protocol import Of
from flm_torchrec.export.attributes import Keys, decoded
from flm_torchrec.export.index import STEPS, open_index, top
from flm_torchrec.export.manifest import IndexKind, Quantise, Storage, load_manifest
from flm_torchrec.export.parts import ExportRows
from flm_torchrec.export.quality import ValidationSet
from flm_torchrec.export.recommend import ExportRecommender
from flm_torchrec.export.vectors import decode, encode
from flm_torchrec.export.write import ExportOptions, ExportSource, check_output, export
from flm_torchrec.mixture import Mixture
from tests.conftest import ROOT
from tests.evaluation.test_ranking import Alone, RandomEncoder
from tools.benchmarks import export as bench_export


class MadeUp:
    """Distinct random vectors, so that no two scores are equal; those of `changed` items and of user 5 are others."""

    growth = 0
    mixture: Mixture | None = None

    def __init__(self, data: PreparedData, changed: Collection[int] = (), dim: int = 16) -> None:
        self.dim = dim
        g = torch.Generator().manual_seed(0)
        self.user = {h: torch.randn(data.schema.users, self.dim, generator=g) for h in REPRESENTATIONS}
        self.item = torch.randn(data.schema.items, self.dim, generator=g)
        self.item[list(changed)] += 0.25
        self.user["content"][5] += 1.0 if changed else 0.0

    def users(self, rows: np.ndarray) -> dict[str, torch.Tensor]:
        return {h: v[rows] for h, v in self.user.items()}

    def items(self, ids: np.ndarray, of: Of = "all") -> torch.Tensor:
        return self.views(ids)[of]

    def views(self, ids: np.ndarray) -> dict[Of, torch.Tensor]:
        return {"all": self.item[ids], "content": -self.item[ids], "id": self.item[ids] * 2}


def everyone_but_last(data: PreparedData) -> Examples:
    """For each user, to tell the last event by those before it."""
    return Examples(np.arange(data.schema.users), data.offsets[1:] - 1)


def source_of(data: PreparedData, seed: int = 0, version: str = "v1") -> ExportSource:
    known = np.arange(data.schema.items) % 3 > 0
    return ExportSource(data, RandomEncoder(data.schema.users, data.schema.items, seed), known, version)


@pytest.fixture
def exported(small: PreparedData, tmp_path: Path) -> Path:
    export(source_of(small), Alone(), tmp_path / "out", ExportOptions(user_block=32, item_block=32, part_rows=64))
    return tmp_path / "out"


def vectors(file: Path, column: str) -> np.ndarray:
    return np.stack(pq.read_table(file)[column].to_numpy())


@pytest.mark.parametrize("head", REPRESENTATIONS)
def test_recommendations_are_those_of_brute_force(exported: Path, small: PreparedData, head: str) -> None:
    items = vectors(exported / "items.parquet", "embedding")
    users = vectors(exported / "users.parquet", head)
    recommender = ExportRecommender(exported)
    for user in (0, 33, 119):
        scores = items @ users[user]
        scores[small.item[small.offsets[user] : small.offsets[user + 1]]] = -np.inf
        found = recommender.recommend(small.user_keys[user], 10, head)
        assert [r.score for r in found] == sorted(scores, reverse=True)[:10]
        assert all(scores[small.item_keys.index(r.item_key)] == r.score for r in found)
        assert all(r.title == small.titles[small.item_keys.index(r.item_key)] for r in found)


def test_what_is_written_is_what_was_encoded(exported: Path, small: PreparedData) -> None:
    encoder = RandomEncoder(small.schema.users, small.schema.items)
    np.testing.assert_array_equal(vectors(exported / "items.parquet", "embedding"), encoder.item.numpy())
    np.testing.assert_array_equal(vectors(exported / "items.parquet", "content"), encoder.item.numpy() / 2)
    for head in REPRESENTATIONS:
        np.testing.assert_array_equal(vectors(exported / "users.parquet", head), encoder.user[head].numpy())
    assert pq.read_table(exported / "users.parquet")["user_key"].to_pylist() == small.user_keys
    manifest = json.loads((exported / "manifest.json").read_text())
    assert (manifest["users"], manifest["items"], manifest["dim"]) == (120, small.schema.items, 4)


def test_seen_items_come_back_on_request_and_k_may_exceed_the_catalogue(exported: Path, small: PreparedData) -> None:
    recommender = ExportRecommender(exported)
    seen = len(set(small.item[: small.offsets[1]].tolist()))
    assert len(recommender.recommend("u0", 9999)) == small.schema.items - seen
    assert len(recommender.recommend("u0", 9999, include_seen=True)) == small.schema.items


def test_buckets_of_numbers_are_named_by_their_range(tmp_path: Path) -> None:
    prices = [None, 4.0, 5.0, 7.5, 9.0]
    items = pl.DataFrame({"item_id": range(5), "price": prices})
    events = pl.DataFrame({"user_id": ["u"] * 5, "item_id": range(5), "timestamp": range(5)})
    given: dict[str, Any] = {"items": items, "item_features": {"price": "quantile"}, "quantiles": 4}
    flm.prepare(events, tmp_path / "data", **given)
    shown = Keys(load_prepared(tmp_path / "data"), "item").rows(0, 5)["attr_price"].to_pylist()
    assert shown == [[], ["below 5"], ["5 to below 7.5"], ["7.5 to below 9"], ["9 or more"]]


def test_cold_items_and_attributes_are_told(exported: Path, small: PreparedData) -> None:
    items = pq.read_table(exported / "items.parquet").to_pydict()
    assert items["item_id"] == list(range(small.schema.items))
    assert items["item_key"] == small.item_keys and items["title"] == small.titles
    assert items["known"] == [i % 3 > 0 for i in items["item_id"]]
    genres = pq.read_table(small.path / "vocab" / "item_genre.parquet")["value"].to_pylist()
    codes = small.items.sparse["genre"]
    assert items["attr_genre"] == [[genres[c] for c in codes.row(i)] for i in items["item_id"]]
    users = pq.read_table(exported / "users.parquet").to_pydict()
    assert users["seen"] == [small.item[a:b].tolist() for a, b in pairwise(small.offsets)]
    for part in (exported / "items.parquet").iterdir():
        assert pq.read_schema(part).metadata[b"model_version"] == b"v1"


CODES = st.lists(st.integers(0, 3), max_size=3)


@given(codes=st.lists(st.none() | CODES, max_size=20), cut=st.integers(0, 20))
def test_codes_become_their_values(codes: list[list[int] | None], cut: int) -> None:
    values = pa.array(["a", "b", "c", "d"])
    column = pa.array(codes, pa.list_(pa.int32())).slice(cut)
    assert decoded(column, values).to_pylist() == [["abcd"[i] for i in c or ()] for c in codes[cut:]]
    first = [c[0] if c else None for c in codes]
    column = pa.array(first, pa.int32()).slice(cut)
    assert decoded(column, values).to_pylist() == [[] if c is None else ["abcd"[c]] for c in first[cut:]]


NUMBERS = arrays(np.float32, st.tuples(st.integers(1, 9), st.integers(1, 20)), elements=st.floats(-100, 100, width=32))


@given(rows=NUMBERS)
def test_vectors_come_back_as_near_as_their_format_allows(rows: np.ndarray) -> None:
    np.testing.assert_array_equal(decode(encode(rows, "none")), rows)
    np.testing.assert_array_equal(decode(encode(rows, "fp16")), rows.astype(np.float16).astype(np.float32))
    spread = np.ptp(rows, axis=1, keepdims=True)
    assert (np.abs(decode(encode(rows, "int8")) - rows) <= spread / 255 * 0.51 + 1e-4).all()
    column = pa.chunked_array([encode(rows, "int8").slice(0, 1), encode(rows, "int8").slice(1)])
    np.testing.assert_array_equal(decode(column), decode(encode(rows, "int8")))


@pytest.mark.parametrize("rows", [np.array([[1.0, np.nan]], np.float32), np.array([[1e5, 0.0]], np.float32)])
def test_numbers_that_a_format_cannot_hold_are_refused(rows: np.ndarray) -> None:
    with pytest.raises(RunError, match="NaN, infinity or a number too large"):
        encode(rows, "fp16")


@pytest.mark.parametrize("quantise", ["none", "fp16", "int8"])
@pytest.mark.parametrize("storage", ["parquet", "arrow"])
def test_every_format_gives_the_recommendations_of_what_it_holds(
    small: PreparedData, tmp_path: Path, storage: Storage, quantise: Quantise
) -> None:
    options = ExportOptions(storage, quantise, "none", user_block=32, item_block=32, part_rows=64)
    source = replace(source_of(small), encoder=MadeUp(small))
    export(source, Alone(), tmp_path / "out", options)
    manifest = load_manifest(tmp_path / "out")
    items = ExportRows(tmp_path / "out", manifest, "items").table(["embedding"])
    users = ExportRows(tmp_path / "out", manifest, "users").table(["fused"])
    scores = decode(items["embedding"]) @ decode(users["fused"])[7]
    best = np.argsort(-scores)[:10]
    found = ExportRecommender(tmp_path / "out").recommend("u7", 10, include_seen=True)
    assert [r.item_key for r in found] == [small.item_keys[i] for i in best]
    np.testing.assert_allclose([r.score for r in found], scores[best], rtol=1e-5)


def test_what_quantising_costs_is_what_evaluation_finds(small: PreparedData, tmp_path: Path) -> None:
    """On the same users, by the code that ranks in evaluation, with vectors stored and read back."""

    class Stored(MadeUp):
        def users(self, rows: np.ndarray) -> dict[str, torch.Tensor]:
            return {h: torch.tensor(decode(encode(v.numpy(), "int8"))) for h, v in super().users(rows).items()}

        def views(self, ids: np.ndarray) -> dict[Of, torch.Tensor]:
            return {of: torch.tensor(decode(encode(v.numpy(), "int8"))) for of, v in super().views(ids).items()}

    valid = split(small, "leave-one-out", 0.1).valid
    config = EvalConfig(user_block=32, item_block=32)
    before = evaluate_heads(small, valid, MadeUp(small), Alone(), config)
    after = evaluate_heads(small, valid, Stored(small), Alone(), config)
    source = replace(source_of(small), encoder=MadeUp(small), validation=ValidationSet(MadeUp(small), valid))
    options = ExportOptions(quantise="int8", user_block=32, item_block=32, part_rows=64)
    manifest = export(source, Alone(), tmp_path / "out", options)
    assert manifest is not None and list(manifest.quality) == list(REPRESENTATIONS)
    for head, found in manifest.quality.items():
        assert found["before"] == pytest.approx(before[f"{head}/ndcg@10"])
        assert found["after"] == pytest.approx(after[f"{head}/ndcg@10"])
        assert found["change"] == pytest.approx(found["after"] / found["before"] - 1)


@pytest.mark.parametrize(("index", "quantise"), [("flat", "none"), ("none", "none"), ("none", "int8")])
def test_a_mixture_is_that_of_brute_force(
    small: PreparedData, tmp_path: Path, index: IndexKind, quantise: Quantise
) -> None:
    encoder = MadeUp(small)
    encoder.mixture = Mixture((1.5, 2.0, 1.0), (-3.0, 0.25, 1.0))
    options = ExportOptions(quantise=quantise, index=index, user_block=32, item_block=32, part_rows=64)
    export(replace(source_of(small), encoder=encoder), Alone(), tmp_path / "out", options)
    manifest = load_manifest(tmp_path / "out")
    assert manifest.mixture == encoder.mixture
    items = decode(ExportRows(tmp_path / "out", manifest, "items").table(["embedding"])["embedding"])
    users = ExportRows(tmp_path / "out", manifest, "users").table(list(HEADS))
    recommender = ExportRecommender(tmp_path / "out")
    for user in (0, 33, 119):
        by_head = np.stack([items.astype(np.float64) @ decode(users[head])[user] for head in HEADS])
        parts = by_head * [[1.5], [2.0], [1.0]] + [[-3.0], [0.25], [1.0]]
        scores = np.log(np.exp(parts - parts.max()).sum(0)) + parts.max()
        seen = np.unique(small.item[small.offsets[user] : small.offsets[user + 1]])
        key = small.user_keys[user]
        for k, left_out in ((7, seen), (7, seen[:0]), (9999, seen)):
            want = np.argsort(-scores)
            want = want[~np.isin(want, left_out)][:k]
            found = recommender.recommend(key, k, include_seen=not len(left_out))
            assert [r.item_key for r in found] == [small.item_keys[i] for i in want]
            np.testing.assert_allclose([r.score for r in found], scores[want], rtol=1e-5, atol=1e-5)
        alone = recommender.recommend(key, 5, "content", include_seen=True)
        assert [r.item_key for r in alone] == [small.item_keys[i] for i in np.argsort(-by_head[0])[:5]]


@pytest.mark.parametrize(
    ("kind", "weak", "strong"),
    [
        ("hnsw", {"efSearch": 1}, {"efSearch": 256}),
        pytest.param(
            *("ivfpq", {"nprobe": 1, "k_factor_rf": 1}, {"nprobe": 256, "k_factor_rf": 32}), marks=pytest.mark.slow
        ),
    ],
)
def test_an_index_searches_as_hard_as_its_recall_takes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: IndexKind, weak: dict[str, int], strong: dict[str, int]
) -> None:
    data, encoder = bench_export.made_up_data(tmp_path / "data", 10_000), bench_export.MadeUp(8)
    monkeypatch.setitem(STEPS, kind, (weak, strong, {name: 10**4 for name in weak}))
    source = ExportSource(data, encoder, np.ones(10_000, bool), "v1")
    manifest = export(source, Alone(), tmp_path / "out", ExportOptions(index=kind, user_block=500, part_rows=4096))
    assert manifest is not None and manifest.index is not None
    assert strong.items() <= manifest.index.parameters.items()
    assert all(r >= 0.99 for recall in manifest.index.recall.values() for r in recall.values())
    # As it is read back, for users that it was not measured by.
    index = open_index(tmp_path / "out", load_manifest(tmp_path / "out"))
    queries = decode(ExportRows(tmp_path / "out", manifest, "users").table(["fused"])["fused"])[1:200:7]
    scores = queries @ decode(ExportRows(tmp_path / "out", manifest, "items").table(["embedding"])["embedding"]).T
    assert index is not None
    _, found = index.search(queries, 100)
    best = np.argsort(-scores, 1)[:, :100]
    assert np.mean([np.isin(b, f).mean() for b, f in zip(best, found, strict=True)]) > 0.98


class Tied(bench_export.MadeUp):
    """25 items of vectors of their own; all others have one of `shared` vectors, many items each."""

    def __init__(self, dim: int, items: int, shared: int) -> None:
        super().__init__(dim)
        rng = np.random.default_rng(1)
        own, few = (rng.standard_normal((n, dim)).astype(np.float32) for n in (25, shared))
        self.vectors = np.concatenate([own, few[np.arange(items - 25) % shared] * np.float32(0.1)])

    def views(self, ids: np.ndarray) -> dict[Of, torch.Tensor]:
        vectors = torch.from_numpy(self.vectors[ids])
        return {"all": vectors, "content": vectors, "id": vectors}


@pytest.mark.parametrize(
    ("kind", "quantise", "shared", "found"),
    [
        ("hnsw", "none", 1, "hnsw"),
        ("hnsw", "int8", 3, "hnsw"),
        ("none", "none", 2, "none"),
        ("ivfpq", "none", 40, "flat"),
    ],
)
def test_many_equal_vectors_hide_nothing(
    tmp_path: Path, kind: IndexKind, quantise: Quantise, shared: int, found: str
) -> None:
    """The best items come back, of equal scores the first items, whatever the index."""
    items = 10_000 if kind == "ivfpq" else 3000
    data, encoder = bench_export.made_up_data(tmp_path / "data", items), Tied(8, items, shared)
    source = ExportSource(data, encoder, np.ones(items, bool), "v1")
    manifest = export(source, Alone(), tmp_path / "out", ExportOptions(index=kind, quantise=quantise, part_rows=1024))
    assert manifest is not None and (manifest.index is None or manifest.index.least == 1.0)
    assert found == (manifest.index.kind if manifest.index else "none")
    assert manifest.index is None or (manifest.index.rows, manifest.index.asked) == (25 + shared, kind)
    vectors = np.concatenate(list(ExportRows(tmp_path / "out", manifest, "items").vectors("embedding"))).astype(
        np.float64
    )
    users = ExportRows(tmp_path / "out", manifest, "users").table(["user_key", "fused"]).slice(0, 40)
    recommender = ExportRecommender(tmp_path / "out")
    for user, query in list(zip(users["user_key"].to_pylist(), decode(users["fused"]), strict=True))[::8]:
        order = np.lexsort((np.arange(items), -(vectors @ query.astype(np.float64)).round(5)))
        got = recommender.recommend(user, 60, include_seen=True)
        assert [r.item_key for r in got] == [data.item_keys[i] for i in order[:60]]


def test_an_index_below_the_promise_is_replaced_by_a_flat_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data, encoder = bench_export.made_up_data(tmp_path / "data", 10_000), bench_export.MadeUp(8)
    monkeypatch.setitem(STEPS, "hnsw", ({"efSearch": 1},))
    source = ExportSource(data, encoder, np.ones(10_000, bool), "v1")
    for promised, kind in ((0.999, "flat"), (0.05, "hnsw")):
        options = ExportOptions(index="hnsw", recall=promised, user_block=500)
        manifest = export(source, Alone(), tmp_path / str(promised), options)
        assert manifest is not None and manifest.index is not None
        assert (manifest.index.kind, manifest.index.asked, manifest.index.promised) == (kind, "hnsw", promised)
        assert manifest.index.least >= promised
        assert ("did not reach the promised 0.999" in summary(manifest)) == (kind == "flat")


def test_an_older_graph_is_not_gone_by(small: PreparedData, tmp_path: Path) -> None:
    """Format 2 indexed equal vectors many times over; its rows are read, and all are scored."""
    out = tmp_path / "out"
    export(source_of(small), Alone(), out, ExportOptions(index="hnsw"))
    before = ExportRecommender(out).recommend("u3", 20)
    record = json.loads((out / "manifest.json").read_text())
    index = {k: v for k, v in record["index"].items() if k not in ("rows", "promised", "asked")}
    (out / "manifest.json").write_text(json.dumps(record | {"format": 2, "index": index}))
    recommender = ExportRecommender(out)
    assert recommender.index is None and recommender.recommend("u3", 20) == before


@given(st.lists(st.integers(0, 6), min_size=1, max_size=40), st.integers(1, 45))
def test_top_is_a_stable_sort(scores: list[int], k: int) -> None:
    ids = np.arange(len(scores))[::-1].copy()
    best, found = top(np.array(scores, np.float32), ids, k)
    want = sorted(zip(scores, ids.tolist(), strict=True), key=lambda pair: (-pair[0], pair[1]))[:k]
    assert list(zip(best.tolist(), found.tolist(), strict=True)) == want


def test_too_few_items_to_train_an_index_are_told_before_any_work(small: PreparedData, tmp_path: Path) -> None:
    with pytest.raises(RunError, match="trains on 9984 items at least, not 149"):
        export(source_of(small), Alone(), tmp_path / "out", ExportOptions(index="ivfpq"))
    assert not list(tmp_path.iterdir())


def test_two_ranks_write_the_bytes_of_one(small: PreparedData, tmp_path: Path, ranks) -> None:  # type: ignore[no-untyped-def]
    source = replace(
        source_of(small), encoder=MadeUp(small), validation=ValidationSet(MadeUp(small), everyone_but_last(small))
    )
    options = ExportOptions(quantise="int8", user_block=32, item_block=20, part_rows=30)
    alone = export(source, Alone(), tmp_path / "one", options)
    out = ranks(2, [str(ROOT / "tests" / "export" / "export_job.py"), str(small.path), str(tmp_path)])
    both = load_manifest(tmp_path / "two")
    assert alone is not None and both.rows_digest == alone.rows_digest and both.quality == alone.quality
    # A rank that cannot write its part stops them all; a part that is on another disk is missed.
    told = ["0: another rank could not write", "0: to one disk that they share", "1: a vector has NaN"]
    assert sorted(out.splitlines()) == told
    assert {p.name for p in tmp_path.iterdir()} == {"one", "two", "none0", "none1"}
    assert not list((tmp_path / "none0").iterdir())


def test_a_full_disk_is_one_line_and_leaves_the_older_export(exported: Path, small: PreparedData) -> None:
    before = {f: f.read_bytes() for f in exported.rglob("*") if f.is_file()}
    size = sum(len(b) for b in before.values())
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    previous = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        for limit in (100, size // 20):  # in the parts, and in the index
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
            with pytest.raises(RunError, match="give another --output") as told:
                export(source_of(small), Alone(), exported, ExportOptions(part_rows=64))
            assert "\n" not in str(told.value)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, previous)
    assert {f: f.read_bytes() for f in exported.parent.rglob("*") if f.is_file()} == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("nobody", 3), "user 'nobody': not in"),
        (("u0", 0), "-k 0: ask for at least 1"),
        (("u0", 3, "fusd"), "--head 'fusd': choose one of"),
    ],
)
def test_a_wrong_question_is_one_line(exported: Path, arguments: tuple, message: str) -> None:  # type: ignore[type-arg]
    with pytest.raises(RunError, match=message):
        ExportRecommender(exported).recommend(*arguments)


def test_a_changed_or_missing_file_is_named(exported: Path, tmp_path: Path) -> None:
    for name in ("items.parquet/part-00001.parquet", "users.parquet/part-00000.parquet", "items.faiss"):
        broken = tmp_path / f"broken-{name.replace('/', '-')}"
        shutil.copytree(exported, broken)
        data = bytearray((broken / name).read_bytes())
        data[len(data) // 2] ^= 1
        (broken / name).write_bytes(data)
        with pytest.raises(RunError, match=f"{name}: changed"):
            ExportRecommender(broken)
        (broken / name).unlink()
        with pytest.raises(RunError, match=f"{name}: not found"):
            ExportRecommender(broken)
    with pytest.raises(RunError, match=r"manifest\.json: not found"):
        ExportRecommender(tmp_path / "none")


def test_only_an_older_export_is_replaced(exported: Path, tmp_path: Path) -> None:
    with pytest.raises(RunError, match="--overwrite"):
        check_output(exported, overwrite=False)
    check_output(exported, overwrite=True)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").touch()
    with pytest.raises(RunError, match="is no export"):
        check_output(tmp_path / "mine", overwrite=True)


def test_a_second_export_into_one_output_is_refused_and_the_first_is_whole(small: PreparedData, tmp_path: Path) -> None:
    told: list[str] = []

    def begin_another(_: Path) -> None:
        with pytest.raises(RunError, match=r"out: process \d+ on '.+' is writing it; wait") as error:
            export(source_of(small, seed=1, version="v2"), Alone(), tmp_path / "out", ExportOptions())
        told.append(str(error.value))

    export(replace(source_of(small), beside=begin_another), Alone(), tmp_path / "out", ExportOptions(part_rows=64))
    assert len(told) == 1 and "\n" not in told[0]
    export(source_of(small), Alone(), tmp_path / "calm", ExportOptions(part_rows=64))
    assert load_manifest(tmp_path / "out") == load_manifest(tmp_path / "calm")
    assert {p.name for p in tmp_path.iterdir()} == {"out", "calm"}


def test_an_export_made_while_this_one_waited_is_not_replaced_unasked(exported: Path, small: PreparedData) -> None:
    before = load_manifest(exported)
    with pytest.raises(RunError, match="exists; give another --output, or --overwrite"):
        export(source_of(small, version="v2"), Alone(), exported, ExportOptions(), overwrite=False)
    assert load_manifest(exported) == before


def test_an_export_replaces_what_a_link_leads_to_and_touches_no_neighbour(exported: Path, small: PreparedData) -> None:
    neighbours = [exported.with_name(name) for name in ("out.tmp", ".out.old", "out.whole", "link.tmp", ".link.old")]
    for folder in neighbours:
        folder.mkdir()
        (folder / "mine").touch()
    exported.chmod(0o700)
    link = exported.with_name("link")
    link.symlink_to(exported)
    for version in ("v2", "v3"):
        export(source_of(small, version=version), Alone(), link, ExportOptions(part_rows=64))
        assert link.is_symlink() and load_manifest(exported).model_version == version
    assert exported.stat().st_mode & 0o777 == 0o700 and all((folder / "mine").is_file() for folder in neighbours)
    assert {p.name for p in exported.parent.iterdir()} == {"out", "link", *(folder.name for folder in neighbours)}
