"""What `explain` and the map say, against the vectors they are made of."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from flm_torchrec.export.tower.reader import Represented, TowerQuery
from flm_torchrec.serve.explain import NEAREST, explain
from flm_torchrec.serve.loaded_export import LoadedExport, load_export
from flm_torchrec.serve.map import draw, flatten

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


def test_a_large_catalogue_is_sampled(loaded: LoadedExport, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flm_torchrec.serve.map.MOST_ITEMS", 40)
    drawn = draw(loaded)
    assert len(set(drawn["items"])) == 40 and drawn["of"] == len(loaded.catalogue)
    assert drawn == draw(loaded)
