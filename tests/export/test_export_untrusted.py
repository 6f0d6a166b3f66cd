"""An export that is not what its manifest says is refused in one line by all that read it; a server goes on."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fastapi.testclient import TestClient

from flm_torchrec.cli import main
from flm_torchrec.data.dataset import PreparedData
from flm_torchrec.export.delta import export_delta
from flm_torchrec.export.write import ExportOptions, export
from flm_torchrec.serve.app import ServerLimits, create_app
from flm_torchrec.serve.service import Service
from tests.evaluation.test_ranking import Alone
from tests.export.test_export import source_of
from tests.serve.serving import AS_ADMIN, KEYS

ITEMS = "items.parquet/part-00000.parquet"
USERS = "users.parquet/part-00000.parquet"
TOWER = "tower/tower.json"
Change = Callable[[Path], object]


def sign(folder: Path) -> None:
    """Digests that fit, so that only what the files hold can tell."""
    manifest = json.loads((folder / "manifest.json").read_text())
    for name in manifest["sha256"]:
        if (folder / name).is_file():
            manifest["sha256"][name] = hashlib.sha256((folder / name).read_bytes()).hexdigest()
    (folder / "manifest.json").write_text(json.dumps(manifest))


def said(file: str = "manifest.json", **changes: Any) -> Change:
    def change(folder: Path) -> None:
        (folder / file).write_text(json.dumps(json.loads((folder / file).read_text()) | changes))

    return change


def indexed(**changes: Any) -> Change:
    def change(folder: Path) -> None:
        index = json.loads((folder / "manifest.json").read_text())["index"]
        said(index=index | changes)(folder)

    return change


def column(name: str, make: Callable[[pa.Table], pa.Array], file: str = ITEMS) -> Change:
    def change(folder: Path) -> None:
        table = pq.read_table(folder / file)
        place = table.column_names.index(name)
        pq.write_table(table.set_column(place, name, make(table)), folder / file)

    return change


def vectors(width: int, value: float = 1.0) -> Callable[[pa.Table], pa.Array]:
    def make(table: pa.Table) -> pa.Array:
        numbers = np.full(len(table) * width, value, np.float32)
        return pa.FixedSizeListArray.from_arrays(pa.array(numbers), width)

    return make


def not_utf8(table: pa.Table) -> pa.Array:
    raw = pa.array([b"\xff\xfe"] * len(table), pa.binary())
    return pa.Array.from_buffers(pa.string(), len(raw), raw.buffers())


def other_index(dim: int, rows: int) -> Change:
    def change(folder: Path) -> None:
        index = faiss.IndexFlatIP(dim)
        index.add(np.ones((rows, dim), np.float32))
        faiss.write_index(index, str(folder / "items.faiss"))

    return change


def cut(file: str) -> Change:
    return lambda folder: (folder / file).write_bytes((folder / file).read_bytes()[:-100])


def fewer_rows(file: str) -> Change:
    def change(folder: Path) -> None:
        pq.write_table(pq.read_table(folder / file).slice(1), folder / file)

    return change


def unlisted(folder: Path) -> None:
    listed = json.loads((folder / "manifest.json").read_text())["sha256"]
    said(sha256={name: digest for name, digest in listed.items() if name != ITEMS})(folder)


LIES: dict[str, Change] = {
    "items as text": said(items="many"),
    "items 10^12": said(items=10**12),
    "items 10^30": said(items=10**30),
    "items -1": said(items=-1),
    "items true": said(items=True),
    "items one more": said(items=150),
    "users 10^9": said(users=10**9),
    "part_rows 0": said(part_rows=0),
    "part_rows 1": said(part_rows=1),
    "dim 10^15": said(dim=10**15),
    "dim 5": said(dim=5),
    "heads text": said(heads="fused"),
    "heads none": said(heads=[]),
    "heads other": said(heads=["fused", "best"]),
    "format text": said(format="3"),
    "format 99": said(format=99),
    "sha256 list": said(sha256=[]),
    "sha256 number": said(sha256={"a": 1}),
    "mixture of two": said(mixture={"scale": [1.0, 2.0], "bias": [0.0, 0.0]}),
    "mixture of four": said(mixture={"scale": [1.0] * 4, "bias": [0.0] * 3}),
    "mixture NaN": said(mixture={"scale": [1.0, 2.0, float("nan")], "bias": [0.0] * 3}),
    "mixture infinite": said(mixture={"scale": [1.0] * 3, "bias": [0.0, 0.0, float("-inf")]}),
    "mixture 10^300": said(mixture={"scale": [1.0, 1e300, 1.0], "bias": [0.0] * 3}),
    "mixture text": said(mixture={"scale": ["1", "1", "1"], "bias": [0.0] * 3}),
    "mixture without bias": said(mixture={"scale": [1.0] * 3}),
    "mixture list": said(mixture=[1.0, 2.0, 3.0]),
    "mixture more": said(mixture={"scale": [1.0] * 3, "bias": [0.0] * 3, "power": 2}),
    "mixture of missing heads": said(
        heads=["fused"],
        mixture={"scale": [1.0] * 3, "bias": [0.0] * 3},
        index=None,
    ),
    "storage": said(storage="orc"),
    "quantise": said(quantise="fp16"),
    "model list": said(model_version=["v"]),
    "unknown field": said(more=1),
    "index text": said(index="flat"),
    "index no recall": indexed(recall={}),
    "index NaN": indexed(recall={"fused": {"@10": float("nan")}}),
    "index kind": indexed(kind="hnsw"),
    "index rows": indexed(rows=10),
    "index effort": indexed(parameters={"nprobe": 3}),
    "index effort text": indexed(parameters={"efSearch": "x"}),
    "index deep": indexed(parameters={"a": {"b": 1}}),
    "index of other width": other_index(7, 149),
    "index of other count": other_index(4, 10),
    "index cut": cut("items.faiss"),
    "part cut": cut(ITEMS),
    "part short": fewer_rows(ITEMS),
    "users short": fewer_rows(USERS),
    "part unlisted": unlisted,
    "NaN": column("embedding", vectors(4, float("nan"))),
    "other width": column("embedding", vectors(9)),
    "width 0": column("embedding", lambda t: pa.array([1.0] * len(t))),
    "keys not UTF-8": column("item_key", not_utf8),
    "user keys not UTF-8": column("user_key", not_utf8, USERS),
    "keys of numbers": column("item_key", lambda t: t["item_id"]),
    "ids reversed": column("item_id", lambda t: t["item_id"][::-1]),
    "keys null": column("item_key", lambda t: pa.nulls(len(t), pa.string())),
    "seen beyond": column("seen", lambda t: pa.array([[10**6]] * len(t), pa.list_(pa.int32())), USERS),
    "heads infinite": column("fused", vectors(4, float("inf")), USERS),
}
NOT_READ = {
    "load": {
        "users short",
        "user keys not UTF-8",
        "seen beyond",
        "heads infinite",
        "index kind",
        "index rows",
        "index effort",
        "index of other width",
        "index of other count",
        "index cut",
        "users 10^9",
    },
    "recommend": {"ids reversed", "NaN", "other width", "width 0"},
    "apply-delta": {
        "index kind",
        "index rows",
        "index effort",
        "index of other width",
        "index of other count",
        "index cut",
    },
}
"""What a command does not look at: it answers as if that were not there."""


@pytest.fixture(scope="module")
def whole(small: PreparedData, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    export(source_of(small), Alone(), folder / "e", ExportOptions())
    export_delta(source_of(small, seed=1, version="v2"), Alone(), folder / "e", folder / "delta", ExportOptions())
    return folder


@pytest.mark.parametrize("lie", LIES)
def test_commands_refuse_in_one_line(whole: Path, tmp_path: Path, lie: str, capsys: pytest.CaptureFixture[str]) -> None:
    export_ = tmp_path / "e"
    shutil.copytree(whole / "e", export_)
    LIES[lie](export_)
    sign(export_) if lie not in ("sha256 list", "sha256 number") else None
    given = ["--export", str(export_)]
    commands = {
        "recommend": ["recommend", *given, "--user", "u1"],
        "load": ["load", *given, "--to", f"lancedb:{tmp_path / 'db'}"],
        "apply-delta": [
            "apply-delta",
            "--base",
            str(export_),
            "--delta",
            str(whole / "delta"),
            "--output",
            str(tmp_path / "o"),
        ],
    }
    for name, command in commands.items():
        capsys.readouterr()
        status = main(command)
        told = capsys.readouterr().err
        if lie not in NOT_READ[name] or status:
            assert status == 2 and told.startswith("error: ") and told.count("\n") == 1, (name, told)
        assert len(told) < 1000 and "Traceback" not in told


@pytest.mark.parametrize(
    "change",
    [
        said("delta.json", changed={"items": "x"}), said("delta.json", whole={"format": 3}),
        said("delta.json", removed={}),
        said("delta.json", sha256={"items.parquet/part-99999.parquet": "0" * 64}), said("delta.json", whole=[]),
        said("delta.json", base_rows=7), lambda folder: (folder / "delta.json").write_text("[" * 10**6),
        lambda folder: (folder / "delta.json").write_bytes(b"\xff{}"),
    ],
)  # fmt: skip
def test_a_false_delta_is_one_line(
    whole: Path, tmp_path: Path, change: Change, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(whole / "delta", tmp_path / "d")
    change(tmp_path / "d")
    capsys.readouterr()
    output = ["--output", str(tmp_path / "o")]
    assert main(["apply-delta", "--base", str(whole / "e"), "--delta", str(tmp_path / "d"), *output]) == 2
    assert main(["load", "--export", str(tmp_path / "d"), "--to", f"lancedb:{tmp_path / 'db'}"]) == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 2 and not (tmp_path / "o").exists()


def beyond(table: pa.Table) -> pa.Array:
    return pa.array([[10**6] * len(row) for row in table["item"]], table["item"].type)


def features_of(entity: str) -> Change:
    """Leaves out the features of the other."""

    def change(folder: Path) -> None:
        record = json.loads((folder / TOWER).read_text())
        record["features"] = [f for f in record["features"] if f["entity"] == entity]
        (folder / TOWER).write_text(json.dumps(record))

    return change


HISTORY = "tower/histories.parquet"
TOWER_LIES: dict[str, Change] = {
    "tower dim": said(TOWER, dim="16"),
    "tower space": said(TOWER, space=16),
    "tower space of the older kind": said(TOWER, space=None),
    "tower items": said(TOWER, items=10**15),
    "tower events": said(TOWER, events=[]),
    "tower gaps": said(TOWER, gaps=-1),
    "tower features": said(TOWER, features=[{"name": 1}]),
    "tower no features": said(TOWER, features=[]),
    "tower features of items alone": features_of("item"),
    "tower features of users alone": features_of("user"),
    "tower value": said(TOWER, value_mean=None),
    "tower history": said(TOWER, max_history=0),
    "tower text": lambda folder: (folder / TOWER).write_text("no"),
    "program cut": cut("tower/user.pt2"),
    "program other": lambda f: shutil.copy(f / "tower/item.pt2", f / "tower/user.pt2"),
    "histories other": lambda f: shutil.copy(f / ITEMS, f / "tower/histories.parquet"),
    "histories short": fewer_rows("tower/histories.parquet"),
    "histories beyond": column("item", beyond, HISTORY),
}


@pytest.fixture(scope="module")
def served(exported: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[TestClient, Path]:
    folder = tmp_path_factory.mktemp("served")
    shutil.copytree(exported, folder / "good")
    app = create_app(Service(folder / "good"), ServerLimits(keys=KEYS))
    return TestClient(app, raise_server_exceptions=False, headers=AS_ADMIN), folder


FEW = (
    "items as text",
    "items 10^12",
    "index of other count",
    "index cut",
    "part short",
    "NaN",
    "keys not UTF-8",
    "seen beyond",
)
SWAPPED = TOWER_LIES | {name: LIES[name] for name in FEW}


@pytest.mark.parametrize("lie", SWAPPED)
def test_a_swap_refuses_and_the_old_export_goes_on(served: tuple[TestClient, Path], lie: str) -> None:
    client, folder = served
    bad = folder / "bad"
    shutil.rmtree(bad, ignore_errors=True)
    shutil.copytree(folder / "good", bad)
    SWAPPED[lie](bad)
    sign(bad) if lie not in ("sha256 list", "sha256 number") else None
    response = client.post("/v1/swap", json={"export": str(bad)})
    assert response.status_code == 422, response.text
    assert "\n" not in response.json()["detail"] and len(response.json()["detail"]) <= 500
    assert client.get("/health").json()["model_version"] == "one"
    assert client.post("/v1/recommend", json={"user": "u1", "k": 3}).status_code == 200
