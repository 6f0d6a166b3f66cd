"""What `explain` and the map say, against the vectors they are made of."""

from __future__ import annotations

import shutil
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from flm_torchrec.errors import RunError
from flm_torchrec.export.item_map import flatten, method_of, place, read_map, write_map
from flm_torchrec.export.tower.reader import Represented, TowerQuery
from flm_torchrec.serve.explain import NEAREST, explain
from flm_torchrec.serve.loaded_export import LoadedExport, load_export
from flm_torchrec.serve.map import draw

ITEMS = np.array([3, 11, 40])


@pytest.fixture(scope="module")
def loaded(exported: Path) -> LoadedExport:
    return load_export(exported, 1)


@pytest.fixture(scope="module")
def asked(loaded: LoadedExport) -> TowerQuery:
    return TowerQuery(loaded.tower.known_history(5), 5)


@pytest.fixture(scope="module")
def found(loaded: LoadedExport, asked: TowerQuery) -> Represented:
    return loaded.represent([asked])[0]


def test_shares_add_up_to_the_fused_score(loaded: LoadedExport, asked: TowerQuery, found: Represented) -> None:
    uneven = replace(found, weights=np.array([0.2, 0.5, 1.0], np.float32))
    raw = uneven.weights @ found.heads[:-1]
    for one in (found, replace(uneven, heads=np.vstack([found.heads[:-1], raw / np.linalg.norm(raw)]))):
        reasons = explain(loaded, one, asked.history.item, ITEMS)
        scores = loaded.vectors(ITEMS) @ one.heads[-1]
        for reason, score in zip(reasons, scores, strict=True):
            assert [s["head"] for s in reason["shares"]] == ["content", "collaborative", "sequential"]
            assert sum(s["share"] for s in reason["shares"]) == pytest.approx(score, abs=1e-6)
            assert all(s["share"] == pytest.approx(s["weight"] * s["score"], abs=1e-6) for s in reason["shares"])


def test_no_shares_where_fusion_is_no_sum(loaded: LoadedExport, asked: TowerQuery, found: Represented) -> None:
    concat = replace(found, weights=np.zeros_like(found.weights))
    for reason in explain(loaded, concat, asked.history.item, ITEMS):
        assert all(s["share"] is None and s["weight"] is None for s in reason["shares"])


def test_the_nearest_of_the_history_that_the_tower_sees(
    loaded: LoadedExport, asked: TowerQuery, found: Represented
) -> None:
    shown = np.unique(asked.history.item[-loaded.tower.max_history :])
    vectors, items = loaded.vectors(shown), loaded.vectors(ITEMS)
    cosines = items @ vectors.T / np.outer(np.linalg.norm(items, axis=1), np.linalg.norm(vectors, axis=1))
    for reason, cosine in zip(explain(loaded, found, asked.history.item, ITEMS), cosines, strict=True):
        best = np.argsort(-cosine)[:NEAREST]
        assert [near["item"] for near in reason["history"]] == [loaded.key(int(shown[n])) for n in best]
        assert [near["similarity"] for near in reason["history"]] == pytest.approx(cosine[best].tolist(), abs=1e-5)


def test_attributes_in_common_are_counted(loaded: LoadedExport, asked: TowerQuery, found: Represented) -> None:
    shown = np.unique(asked.history.item[-loaded.tower.max_history :])
    told = explain(loaded, found, asked.history.item, shown[:2])  # of items of the history themselves
    for row, reason in zip(shown[:2], told, strict=True):
        for name, values in loaded.attributes(int(row)).items():
            counts = [sum(v in loaded.attributes(int(r))[name] for r in shown) for v in values]
            assert [(c["value"], c["items"]) for c in reason["in_common"].get(name, [])] == list(
                zip(values, counts, strict=True)
            )


def test_without_a_history_nothing_is_near(loaded: LoadedExport) -> None:
    (nobody,) = loaded.represent([TowerQuery()])
    for reason in explain(loaded, nobody, np.zeros(0, np.int64), ITEMS):
        assert reason["history"] == [] and reason["in_common"] == {}


def test_the_map_keeps_the_directions_of_most_variance() -> None:
    random = np.random.default_rng(0)
    turned = np.linalg.qr(random.normal(size=(8, 8)))[0]
    spread = np.array([9, 4, *[0.01] * 6])
    flat = random.normal(size=(500, 8)) * spread
    places, kept = flatten((flat @ turned).astype(np.float32) + 3)
    assert kept > 0.99 and np.abs(places).max() == pytest.approx(1)
    for found, planted in zip(places.T, flat.T[:2], strict=True):
        assert abs(np.corrcoef(found, planted)[0, 1]) > 0.99


def test_the_map_colours_items_by_a_value_they_have(loaded: LoadedExport) -> None:
    drawn = draw(loaded)
    assert drawn["of"] == len(drawn["items"]) == len(drawn["x"]) == len(drawn["y"])
    for name, feature in drawn["features"].items():
        for key, code in zip(drawn["items"], feature["codes"], strict=True):
            values = loaded.attributes(loaded.row(key) or 0)[name]
            assert feature["values"][code] in values if code >= 0 else not set(values) & set(feature["values"])


def test_a_large_catalogue_is_sampled(
    loaded: LoadedExport, exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flm_torchrec.export.item_map.MOST_ITEMS", 40)
    older = replace(loaded, item_map=None)
    drawn = draw(older)
    assert len(set(drawn["items"])) == 40 and drawn["of"] == len(loaded.catalogue)
    assert drawn == draw(older)
    shutil.copytree(exported, tmp_path / "export")
    write_map(tmp_path / "export", loaded.manifest, "pca")
    assert drawn == draw(replace(loaded, item_map=read_map(tmp_path / "export", loaded.manifest)))


def test_an_export_holds_the_map_that_an_older_one_lacks(loaded: LoadedExport) -> None:
    assert loaded.item_map is not None and loaded.item_map.method == "pca"
    drawn = draw(loaded)
    assert drawn["method"] == "pca" and 0 < drawn["variance"] < 1
    assert drawn == draw(replace(loaded, item_map=None))


@pytest.mark.parametrize("fault", ["row", "order", "far", "nan", "method", "column", "empty"])
def test_a_map_of_another_export_is_refused(loaded: LoadedExport, tmp_path: Path, fault: str) -> None:
    count = len(loaded.catalogue)
    rows = {"row": [0, count], "order": [1, 0], "empty": []}.get(fault, [0, 1])
    x = {"far": [0.0, 1.5], "nan": [0.0, np.nan], "empty": []}.get(fault, [0.0, 0.5])
    columns = {"item_id": pa.array(rows, pa.int64()), "x": pa.array(x, pa.float32()), "y": pa.array(x, pa.float32())}
    if fault == "column":
        del columns["y"]
    told = {"method": "none" if fault == "method" else "pca", "variance": "0.5"}
    pq.write_table(pa.table(columns).replace_schema_metadata(told), tmp_path / "map.parquet")
    with pytest.raises(RunError, match=r"map\.parquet.*export again") as refused:
        read_map(tmp_path, loaded.manifest)
    assert "\n" not in str(refused.value)
    assert read_map(tmp_path, replace(loaded.manifest, sha256={})) is None  # of an older version


def clusters() -> np.ndarray:
    """[90, 8] three groups of directions, one after another."""
    random = np.random.default_rng(0)
    return (np.repeat(10 * np.eye(3, 8), 30, 0) + random.normal(size=(90, 8))).astype(np.float32)


def test_umap_keeps_groups_apart() -> None:
    pytest.importorskip("umap", reason="no UMAP: pip install umap-learn")
    drawn = place(np.arange(90), clusters(), "umap")
    assert drawn.method == "umap" and drawn.variance is None
    assert np.abs(drawn.positions).max() == pytest.approx(1)
    away = np.linalg.norm(drawn.positions[:, None] - drawn.positions[None], axis=2)
    nearest = np.argsort(away, 1)[:, 1:6]
    assert (nearest // 30 == np.arange(90)[:, None] // 30).mean() > 0.95
    assert np.array_equal(drawn.positions, place(np.arange(90), clusters(), "umap").positions)


class ReducerOfTests:
    """Stands for `umap.UMAP`: the first two numbers of each vector, or none."""

    positions = staticmethod(lambda vectors: vectors[:, :2])

    def __init__(self, **settings: object) -> None:
        assert settings["random_state"] == 0

    def fit_transform(self, vectors: np.ndarray) -> np.ndarray:
        return self.positions(vectors)


def test_umap_is_used_where_it_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert method_of(None) == "pca"
    with pytest.raises(RunError, match="umap-learn"):
        method_of("umap")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    assert method_of(None) == "umap" and method_of("pca") == "pca"
    monkeypatch.setitem(sys.modules, "umap", SimpleNamespace(UMAP=ReducerOfTests))
    assert place(np.arange(15), clusters()[:15], "umap").method == "pca"  # too few neighbours
    drawn = place(np.arange(90), clusters(), "umap")
    assert drawn.method == "umap" and drawn.positions.min() == -drawn.positions.max() == -1
    monkeypatch.setattr(ReducerOfTests, "positions", staticmethod(lambda vectors: np.full((len(vectors), 2), np.nan)))
    with pytest.raises(RunError, match="--map pca"):
        place(np.arange(90), clusters(), "umap")


def test_vectors_of_one_number_have_a_map() -> None:
    drawn = place(np.arange(3), np.array([[1.0], [2.0], [4.0]], np.float32), "pca")
    assert drawn.positions[:, 1].tolist() == [0, 0, 0] and drawn.variance == pytest.approx(1)
