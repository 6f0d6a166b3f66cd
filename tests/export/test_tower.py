"""The packaged user tower gives the model's own vectors, at any size, and runs without the training stack."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from flm_torchrec.config import load_config
from flm_torchrec.config.heads import REPRESENTATIONS
from flm_torchrec.data.dataset import PreparedData, load_prepared
from flm_torchrec.data.history import Events
from flm_torchrec.data.splits import everyone
from flm_torchrec.errors import ConfigError, DataError, RunError
from flm_torchrec.export.tower import onnx
from flm_torchrec.export.tower.onnx import write_onnx
from flm_torchrec.export.tower.programs import UserInputs
from flm_torchrec.export.tower.reader import PackagedTower, TowerQuery
from flm_torchrec.export.tower.writer import Precision, write_tower
from flm_torchrec.prepare.options import PrepareOptions
from flm_torchrec.prepare.prepare import prepare
from flm_torchrec.prepare.sources import synthetic
from flm_torchrec.prepare.table_options import parse_tables
from flm_torchrec.training.gathered import GatheredModel
from flm_torchrec.training.job import Job, open_job
from tests.conftest import ROOT

NONE_ADDED = np.zeros((0, 16), np.float32)
MODELS = {
    "default": (),
    "transformer": ("model.layers=2", "model.block=transformer", "model.fusion=gated", "loss.fused=1"),
    "dot product": ("model.relative_bias=true", "model.similarity=dot", "model.fusion=concat", "loss.fused=1"),
}


ONE_AND_SLOW = ["default", *(pytest.param(name, marks=pytest.mark.slow) for name in MODELS if name != "default")]


@contextmanager
def made(data: PreparedData, *overrides: str) -> Iterator[Job]:
    """A model of one layer, unless an override says otherwise: most of the time is that of tracing layers."""
    fixed = ["model.dim=16", "model.layers=1", "data.max_history=7", "distributed.device=cpu"]
    config = load_config(None, [*fixed, *overrides])
    with open_job(config, data) as job:
        yield job


def package(job: Job, folder: Path, precision: Precision = "fp32") -> PackagedTower:
    folder.mkdir()
    write_tower(job.data, GatheredModel(job), True, precision, folder)
    return PackagedTower(folder)


def trained(job: Job, users: np.ndarray) -> np.ndarray:
    """What the model itself makes of the users, [n, heads, S]."""
    found = job.encoder(everyone(job.data)).users(users)
    return torch.stack([found[head] for head in REPRESENTATIONS], 1).numpy()


def packaged(tower: PackagedTower, users: np.ndarray) -> np.ndarray:
    found = tower.represent([TowerQuery(tower.known_history(int(u)), int(u)) for u in users], NONE_ADDED)
    return np.stack([f.heads for f in found])


@dataclass(frozen=True)
class Case:
    """A model's own vectors and its packages."""

    users: np.ndarray  # [users, heads, S]
    contents: np.ndarray  # [items, S]
    folder: Path
    exact: PackagedTower
    rounded: PackagedTower | None
    """int8; of the default model alone."""


@pytest.fixture(scope="module", params=ONE_AND_SLOW)
def case(request: pytest.FixtureRequest, small: PreparedData, tmp_path_factory: pytest.TempPathFactory) -> Case:
    folder = tmp_path_factory.mktemp("tower")
    with made(small, *MODELS[request.param]) as job:
        contents = job.encoder(everyone(small)).items(np.arange(small.schema.items), "content").numpy()
        users = trained(job, np.arange(small.schema.users))
        exact = package(job, folder / "fp32")
        rounded = package(job, folder / "int8", "int8") if request.param == "default" else None
    return Case(users, contents, folder, exact, rounded)


def test_known_users_are_as_the_model_has_them(case: Case) -> None:
    users, size = np.arange(len(case.users)), np.abs(case.users).max()
    np.testing.assert_allclose(packaged(case.exact, users), case.users, atol=1e-5 * size)
    one_by_one = np.concatenate([packaged(case.exact, users[i : i + 1]) for i in range(3)])
    np.testing.assert_allclose(one_by_one, case.users[:3], atol=1e-5 * size)


def test_onnx_gives_the_vectors_of_the_program_at_any_size(case: Case) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    name = "fp32" if case.rounded is None else "int8"
    tower = case.exact if case.rounded is None else case.rounded
    folder = case.folder / name / "tower"
    assert write_onnx(folder) == ["user.onnx"]
    session = onnxruntime.InferenceSession(str(folder / "user.onnx"), providers=["CPUExecutionProvider"])
    assert [one.name for one in session.get_inputs()] == list(UserInputs._fields[:-1])  # there is no context
    assert [one.name for one in session.get_outputs()] == ["representations", "weights"]
    rng = np.random.default_rng(0)
    for batch, length, added in ((1, 1, 1), (5, tower.max_history, 2), (2, 3, 4)):
        given = {
            "items": rng.integers(0, tower.items + added, (batch, length)),
            "event": rng.integers(0, 2, (batch, length)),
            "gap": rng.integers(0, 5, (batch, length)),
            "value": rng.normal(size=(batch, length)).astype(np.float32),
            "time": rng.integers(0, 10**6, (batch, length)).cumsum(1),
            "lengths": rng.integers(0, length + 1, batch),
            "added": rng.normal(size=(added, tower.dim)).astype(np.float32),
            "user": rng.integers(-1, len(case.users), batch),
            "profile": rng.normal(size=(batch, tower.dim)).astype(np.float32),
            "given": rng.random(batch) < 0.5,
        }
        wanted = tower.user(*(torch.from_numpy(array) for array in given.values()))
        for one, other in zip(session.run(None, given), wanted, strict=True):
            np.testing.assert_allclose(one, other.numpy(), atol=2e-5 * max(1.0, float(other.abs().max())))


@pytest.mark.parametrize("case", ["default"], indirect=True)
def test_what_onnx_cannot_hold_or_write_is_one_line(
    case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("onnxscript")
    (tmp_path / "user.pt2").write_bytes((case.folder / "fp32" / "tower" / "user.pt2").read_bytes())

    def refuse(*_: object, **__: object) -> None:
        raise torch.onnx.errors.OnnxExporterError("no operator\nfor it")

    monkeypatch.setattr(torch.onnx, "export", refuse)
    with pytest.raises(RunError, match=r"user.onnx: ONNX does not hold the tower \(.*; export without --onnx"):
        write_onnx(tmp_path)
    assert not (tmp_path / "user.onnx").exists()
    monkeypatch.setattr(onnx, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="onnx is not installed; run: pip install onnx, or export without --onnx"):
        write_onnx(tmp_path)


@pytest.mark.parametrize("case", ["default"], indirect=True)
def test_int8_rows_move_a_vector_by_less_than_five_percent(case: Case) -> None:
    assert case.rounded is not None
    found = packaged(case.rounded, np.arange(len(case.users)))
    moved = np.linalg.norm(found - case.users, axis=2) / np.linalg.norm(case.users, axis=2)
    assert 0 < moved.max() < 0.05


def test_h_is_the_sum_of_the_heads_by_the_weights_told(case: Case) -> None:
    (found,) = case.exact.represent([TowerQuery(case.exact.known_history(3), 3)], NONE_ADDED)
    mixed = found.weights @ found.heads[:3]
    if case.exact.fusion == "concat":
        assert not found.weights.any()
    else:
        np.testing.assert_allclose(found.heads[3], mixed / np.linalg.norm(mixed), atol=1e-6)


def test_items_of_features_alone_are_as_the_model_has_them(case: Case, small: PreparedData) -> None:
    for row in (0, 17, small.schema.items - 1):
        content, left_out = case.exact.content("item", features_of(small, case.exact, row))
        assert left_out == []
        scored = case.exact.scored(content[None])[0]
        np.testing.assert_allclose(scored, case.contents[row], atol=1e-5 * np.abs(case.contents).max())


def features_of(data: PreparedData, tower: PackagedTower, row: int) -> dict[str, object]:
    """An item's features as people give them."""
    named = {f.name: f for f in tower.features}
    price = float(data.items.dense[row, 0]) * named["price"].deviation + named["price"].mean
    values = {name: named[name].values[data.items.sparse[name].row(row)[0]] for name in ("genre", "brand")}
    return {"title": data.titles[row], "price": price, **values}


def history(*items: int) -> Events:
    n = len(items)
    return Events(np.array(items), np.arange(n) * 60, np.zeros(n, np.int64), np.ones(n, np.float32))


def test_a_cold_user_has_features_or_nothing(case: Case) -> None:
    profile, _ = case.exact.content("user", {"spending": 3.0})
    nobody, somebody = case.exact.represent([TowerQuery(), TowerQuery(profile=profile)], NONE_ADDED)
    assert np.isfinite(nobody.heads).all()
    assert np.abs(nobody.heads - somebody.heads).max() > 1e-3


def test_padding_changes_nothing(case: Case) -> None:
    long = case.exact.known_history(0)
    assert len(long) == case.exact.max_history + 1
    short = long.take(slice(2))
    (alone,) = case.exact.represent([TowerQuery(short)], NONE_ADDED)
    _, beside = case.exact.represent([TowerQuery(long), TowerQuery(short)], NONE_ADDED)
    np.testing.assert_allclose(beside.heads, alone.heads, atol=1e-6 * np.abs(alone.heads).max())


def test_shards_of_two_ranks_are_put_together(
    small: PreparedData, tmp_path: Path, ranks: Callable[[int, list[str]], str]
) -> None:
    how = ("distributed.sharding=row_wise", "distributed.dense=fsdp")
    told = ranks(2, [str(ROOT / "tests" / "export" / "tower_job.py"), str(small.path), str(tmp_path), *how])
    assert float(told.partition("moved ")[2].split()[0]) < 1e-5


def test_without_features_there_are_ids_alone(small: PreparedData, tmp_path: Path) -> None:
    bare = replace(
        small,
        schema=replace(small.schema, features=()),
        items=replace(small.items, sparse={}, dense=small.items.dense[:, :0]),
        users=replace(small.users, sparse={}, dense=small.users.dense[:, :0]),
    )
    users = np.arange(30)
    with made(bare) as job:
        want = trained(job, users)
        tower = package(job, tmp_path / "out")
    np.testing.assert_allclose(packaged(tower, users), want, atol=1e-5)
    with pytest.raises(DataError, match="items have no features"):
        tower.content("item", {"genre": "war"})


def test_an_added_item_in_a_history_is_its_content(small: PreparedData, tmp_path: Path) -> None:
    """A catalogue item whose id is hidden, and the same item added by its content, are one to the tower."""
    with made(small) as job:
        job.train_stats.items[5] = 0
        tower = package(job, tmp_path / "out")
    content, _ = tower.content("item", features_of(small, tower, 5))
    added = np.stack([-content, content])
    second = small.schema.items + 1
    by_row, by_content = tower.represent([TowerQuery(history(1, 5, 2)), TowerQuery(history(1, second, 2))], added)
    np.testing.assert_allclose(by_content.heads, by_row.heads, atol=1e-5)


def test_hashed_and_managed_rows_are_packaged_too_and_so_are_two_layers(tmp_path: Path) -> None:
    recipe = synthetic.Recipe(users=60, items=100, events=8, seed=3)
    tables = parse_tables("user_id=zch:40,item_id=hash:30,brand=hash:7,genre=zch:9")
    prepare(synthetic.read(recipe), tmp_path / "data", PrepareOptions(tables=tables))
    users = np.arange(60)
    with made(load_prepared(tmp_path / "data"), "model.layers=2") as job:
        want = trained(job, users)
        np.testing.assert_allclose(packaged(package(job, tmp_path / "out"), users), want, atol=1e-5)


@pytest.mark.parametrize("case", ["default"], indirect=True)
@pytest.mark.parametrize(
    ("features", "message"),
    [
        ({"genr": "war"}, "no item feature 'genr'; did you mean 'genre'"),
        ({"genre": 1.5}, "features.genre: takes one text, not 1.5"),
        ({"genre": ["war"]}, "features.genre: takes one text"),
        ({"title": 3}, "features.title: a text, not 3"),
        ({"price": "cheap"}, "features.price: takes one number, not 'cheap'"),
        ({"price": 1e300}, "features.price: a number is too large"),
        ({"price": 10**400}, "features.price: a number is too large"),
    ],
)
def test_features_that_do_not_fit_are_named(features: dict, message: str, case: Case) -> None:  # type: ignore[type-arg]
    with pytest.raises(DataError, match=message):
        case.exact.content("item", features)


@pytest.mark.parametrize("case", ["default"], indirect=True)
def test_a_value_that_training_did_not_see_is_left_out_and_told(case: Case) -> None:
    content, left_out = case.exact.content("item", {"genre": "opera"})
    assert left_out == ["features.genre: 'opera' was not in training"]
    np.testing.assert_array_equal(content, case.exact.content("item", {})[0])


@pytest.mark.parametrize("case", ["default"], indirect=True)
def test_it_runs_without_model_training_and_torchrec(case: Case) -> None:
    program = f"""
import sys
from pathlib import Path
import numpy as np
from flm_torchrec.export.tower.reader import TowerQuery, PackagedTower
import flm_torchrec.serve.app
tower = PackagedTower(Path({str(case.folder / "int8")!r}))
print(tower.represent([TowerQuery(tower.known_history(1), 1)], np.zeros((0, 16), np.float32))[0].heads.shape)
loaded = ["torchrec", "fbgemm_gpu", *("flm_torchrec." + name for name in ("model", "training", "distributed"))]
print([name for name in loaded if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["(4, 32)", "[]"]


@pytest.mark.parametrize("case", ["default"], indirect=True)
def test_an_export_without_a_tower_or_with_a_broken_one_is_refused(case: Case, tmp_path: Path) -> None:
    with pytest.raises(RunError, match="export --tower int8"):
        PackagedTower(tmp_path)
    (tmp_path / "tower").mkdir()
    for file in (case.folder / "int8" / "tower").iterdir():
        (tmp_path / "tower" / file.name).write_bytes(file.read_bytes()[: 100 if file.name == "user.pt2" else None])
    with pytest.raises(RunError, match="cannot be read"):
        PackagedTower(tmp_path)


def test_a_model_that_sees_one_event_is_packaged_too(small: PreparedData, tmp_path: Path) -> None:
    users = np.arange(9)
    with made(small, "data.max_history=1") as job:
        exact = package(job, tmp_path / "tower")
        np.testing.assert_allclose(packaged(exact, users), trained(job, users), atol=2e-5)
