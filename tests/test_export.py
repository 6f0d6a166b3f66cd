"""An export agrees with brute force, is whole or refused, and answers alone."""

from __future__ import annotations

import json
import shutil
from collections.abc import Collection
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from flm_torchrec.data.prepared import PreparedData
from flm_torchrec.errors import RunError
from flm_torchrec.evaluation.protocol import HEADS, Of
from flm_torchrec.export.recommend import Recommender
from flm_torchrec.export.write import Options, Source, check_output, export
from tests.test_ranking import Alone, RandomEncoder


class MadeUp:
    """Distinct random vectors, so that no two scores are equal; those of `changed` items and of user 5 are others."""

    dim = 16

    def __init__(self, data: PreparedData, changed: Collection[int] = ()) -> None:
        g = torch.Generator().manual_seed(0)
        self.user = {h: torch.randn(data.schema.users, self.dim, generator=g) for h in HEADS}
        self.item = torch.randn(data.schema.items, self.dim, generator=g)
        self.item[list(changed)] += 0.25
        self.user["content"][5] += 1.0 if changed else 0.0

    def users(self, rows: np.ndarray) -> dict[str, torch.Tensor]:
        return {h: v[rows] for h, v in self.user.items()}

    def items(self, ids: np.ndarray, of: Of = "all") -> torch.Tensor:
        return self.views(ids)[of]

    def views(self, ids: np.ndarray) -> dict[Of, torch.Tensor]:
        return {"all": self.item[ids], "content": -self.item[ids], "id": self.item[ids] * 2}


def source_of(data: PreparedData, seed: int = 0, version: str = "v1") -> Source:
    known = np.arange(data.schema.items) % 3 > 0
    return Source(data, RandomEncoder(data.schema.users, data.schema.items, seed), known, version)


@pytest.fixture
def exported(small: PreparedData, tmp_path: Path) -> Path:
    export(source_of(small), Alone(), tmp_path / "out", Options(user_block=32, item_block=32, part_rows=64))
    return tmp_path / "out"


def vectors(file: Path, column: str) -> np.ndarray:
    return np.stack(pq.read_table(file)[column].to_numpy())


@pytest.mark.parametrize("head", HEADS)
def test_recommendations_are_those_of_brute_force(exported: Path, small: PreparedData, head: str) -> None:
    items = vectors(exported / "items.parquet", "embedding")
    users = vectors(exported / "users.parquet", head)
    recommender = Recommender(exported)
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
    for head in HEADS:
        np.testing.assert_array_equal(vectors(exported / "users.parquet", head), encoder.user[head].numpy())
    assert pq.read_table(exported / "users.parquet")["user_key"].to_pylist() == small.user_keys
    manifest = json.loads((exported / "manifest.json").read_text())
    assert (manifest["users"], manifest["items"], manifest["dim"]) == (120, small.schema.items, 4)


def test_seen_items_come_back_on_request_and_k_may_exceed_the_catalogue(exported: Path, small: PreparedData) -> None:
    recommender = Recommender(exported)
    seen = len(set(small.item[: small.offsets[1]].tolist()))
    assert len(recommender.recommend("u0", 9999)) == small.schema.items - seen
    assert len(recommender.recommend("u0", 9999, include_seen=True)) == small.schema.items


def test_an_hnsw_index_says_its_recall(small: PreparedData, tmp_path: Path) -> None:
    manifest = export(source_of(small), Alone(), tmp_path / "out", Options(index="hnsw"))
    assert manifest is not None and manifest.index is not None
    assert all(0.5 < r <= 1.0 for recall in manifest.index.recall.values() for r in recall.values())


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
        Recommender(exported).recommend(*arguments)


def test_a_changed_or_missing_file_is_named(exported: Path, tmp_path: Path) -> None:
    for name in ("items.parquet/part-00001.parquet", "users.parquet/part-00000.parquet", "items.faiss"):
        broken = tmp_path / f"broken-{name.replace('/', '-')}"
        shutil.copytree(exported, broken)
        data = bytearray((broken / name).read_bytes())
        data[len(data) // 2] ^= 1
        (broken / name).write_bytes(data)
        with pytest.raises(RunError, match=f"{name}: changed"):
            Recommender(broken)
        (broken / name).unlink()
        with pytest.raises(RunError, match=f"{name}: not found"):
            Recommender(broken)
    with pytest.raises(RunError, match=r"manifest\.json: not found"):
        Recommender(tmp_path / "none")


def test_only_an_older_export_is_replaced(exported: Path, tmp_path: Path) -> None:
    with pytest.raises(RunError, match="--overwrite"):
        check_output(exported, overwrite=False)
    check_output(exported, overwrite=True)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").touch()
    with pytest.raises(RunError, match="is no export"):
        check_output(tmp_path / "mine", overwrite=True)
