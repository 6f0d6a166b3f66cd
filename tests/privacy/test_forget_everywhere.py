"""Forgetting in one command: data, exports, vector databases and running servers, and a record that shows changes."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import uvicorn
from fastapi.testclient import TestClient
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flm_torchrec.api.recommender import Recommender
from flm_torchrec.cli import main
from flm_torchrec.client import Client, ServiceError
from flm_torchrec.data.dataset import PreparedData, fingerprint_of
from flm_torchrec.data.feature_values import FeatureValues, codes_of
from flm_torchrec.data.keys import are_tombstones
from flm_torchrec.errors import RunError
from flm_torchrec.export.forget import forget_in_export
from flm_torchrec.export.manifest import load_manifest
from flm_torchrec.export.parts import ExportRows
from flm_torchrec.export.stores.load import opened
from flm_torchrec.export.tower.reader import PackagedTower
from flm_torchrec.export.vectors import decode
from flm_torchrec.files import temporary
from flm_torchrec.privacy import places
from flm_torchrec.privacy.forget_in_data import forget_rows
from flm_torchrec.privacy.record import Record, RecordKey, read_record, unfinished
from flm_torchrec.serve.app import ServerLimits, create_app
from flm_torchrec.serve.connections import listening
from flm_torchrec.serve.event_store import EventStore
from flm_torchrec.serve.loaded_export import LoadedExport, load_export
from flm_torchrec.serve.service import Service, ServiceOptions
from flm_torchrec.serve.split import Split
from flm_torchrec.serve.variants import Variants
from tests.privacy.test_forget import holders
from tests.serve.serving import ADMIN_KEY, AS_ADMIN, KEYS, copy_export, running

GONE, STAYS = "u17", "u18"
STORES = {"qdrant": "qdrant_client", "lancedb": "lancedb"}


class Killed(BaseException):
    """As if the process had been killed."""


def kill(*_: object, **__: object) -> None:
    raise Killed


@pytest.fixture
def folder(small: PreparedData, exported: Path, tmp_path: Path) -> Path:
    """Data, an export of them, and the keys of a server and of a record."""
    shutil.copytree(small.path, tmp_path / "data")
    shutil.copytree(exported, tmp_path / "exports/one")
    (tmp_path / "admin").write_text(ADMIN_KEY + "\n")
    (tmp_path / "secret").write_bytes(b"s" * 32)
    return tmp_path


@pytest.fixture
def server(folder: Path) -> Iterator[str]:
    """The address of a server of the export, with live events in a file."""
    service = Service(folder / "exports/one", EventStore(folder / "events"))
    bound = listening("127.0.0.1", 0)
    app = create_app(service, ServerLimits(keys=KEYS))
    running = uvicorn.Server(uvicorn.Config(app, log_level="error"))
    thread = threading.Thread(target=running.run, kwargs={"sockets": [bound]})
    thread.start()
    yield f"http://127.0.0.1:{bound.getsockname()[1]}"
    running.should_exit = True
    thread.join()


def command(folder: Path, *more: str) -> list[str]:
    return ["forget", "--data", str(folder / "data"), "--user", GONE, *more]


def recorded(folder: Path) -> list[str]:
    return ["--record", str(folder / "record"), "--record-key", str(folder / "secret")]


def loaded_stores(folder: Path) -> list[str]:
    """Options of the databases that are installed, with the users of the export in them."""
    options = []
    for kind, client in STORES.items():
        pytest.importorskip(client, reason=f"install flm_torchrec[{kind}]")
        to = f"{kind}:{folder / kind}"
        assert main(["load", "--export", str(folder / "exports/one"), "--entity", "users", "--to", to]) == 0
        options += ["--store", to]
    return options


def in_store(to: str, keys: list[str]) -> list[str]:
    with opened(to, "users", "users") as store:
        return sorted(store.find(keys))


def test_one_command_reaches_all_and_others_are_as_before(
    folder: Path, server: str, capsys: pytest.CaptureFixture[str]
) -> None:
    client, stores = Client(server, ADMIN_KEY), loaded_stores(folder)
    for user in (GONE, "onlylive"):
        client.add_event(user, "i3")
    # Of another export it would be taken for an event that this one has.
    client.add_event(STAYS, "i3", timestamp=client.events(STAYS)[-1]["timestamp"])
    assert client.recommend(user=GONE, k=3).items and holders(folder, GONE)
    before = client.recommend(user=STAYS, k=20)
    capsys.readouterr()
    place = ["--server", server, "--server-key", str(folder / "admin"), "--export", str(folder / "exports/one")]
    who = ["--user", "onlylive"]

    assert main(command(folder, *who, *stores, *place, *recorded(folder))) == 0

    told = capsys.readouterr().out
    assert GONE not in told and "data: 1 users" in told and "exports/one: 1 users forgotten" in told
    assert told.count("#users: 1 users taken out") == 2 and f"{server}: 2 users and their 2 live events" in told
    assert holders(folder, GONE) == [] and b"onlylive" not in (folder / "events").read_bytes()
    for user in (GONE, "onlylive"):
        for ask in (lambda user=user: client.recommend(user=user), lambda user=user: client.events(user)):
            with pytest.raises(ServiceError, match=f"user '{user}': not known") as unknown:
                ask()
            assert unknown.value.status == 404
    after = client.recommend(user=STAYS, k=20)
    assert after == before and client.health()["generation"] == 2
    for kind in STORES:
        assert in_store(f"{kind}:{folder / kind}", [GONE, STAYS, "u19"]) == [STAYS, "u19"]

    key = RecordKey(b"s" * 32)
    lines = read_record(folder / "record", key)
    assert [line["act"] for line in lines] == ["begin", *["removed"] * 5, "end"] and unfinished(lines) == set()
    assert {line["kind"] for line in lines[1:-1]} == {"data", "export", "store", "server"}
    assert lines[0]["users"] == sorted(map(key.pseudonym, (GONE, "onlylive"))) == lines[-1]["users"]
    assert lines[1]["counts"]["users"] == 1 and lines[1]["counts"]["events"] > 1
    verify = ["forget", "--verify", str(folder / "record"), "--record-key", str(folder / "secret")]
    assert main([*verify, "--user", GONE]) == 0
    told = capsys.readouterr().out
    assert "7 lines, none altered" in told and lines[-1]["signature"] in told and f"{GONE}: end 20" in told
    assert main([*verify, "--user", STAYS]) == 2 and STAYS in capsys.readouterr().err


def test_an_export_keeps_all_others_bit_for_bit(folder: Path) -> None:
    one = folder / "exports/one"
    manifest = load_manifest(one)
    users, items = (ExportRows(one, manifest, e).table() for e in ("users", "items"))
    tower = json.loads((one / "tower/tower.json").read_text())
    (interests,) = [f for f in tower["features"] if f["name"] == "interests"]
    row = users["user_key"].to_pylist().index(GONE)

    assert forget_in_export(one, [GONE, "nobody"], {"interests": {3: "forgotten-3"}}) == 1

    cleaned = load_manifest(one)
    assert cleaned.cleaned_of == (manifest.rows_digest,) and cleaned.rows_digest != manifest.rows_digest
    now = ExportRows(one, cleaned, "users").table()
    others = np.arange(len(users)) != row
    assert now.filter(others).equals(users.filter(others)) and ExportRows(one, cleaned, "items").table().equals(items)
    assert now["user_key"][row].as_py() == f"forgotten-{row}" and now["seen"][row].as_py() == []
    assert not decode(now["fused"])[row].any() and decode(users["fused"])[row].any()
    features = {f["name"]: f for f in json.loads((one / "tower/tower.json").read_text())["features"]}
    assert features["interests"]["values"] == [*interests["values"][:3], "forgotten-3", *interests["values"][4:]]
    program = torch.export.load(one / "tower/user.pt2").state_dict
    for name in ("tables.user_id.scale", "tables.profile.codes"):
        assert not program[name][row].any() and program[name][others].any()
    words = torch.export.load(one / "tower/profile.pt2").state_dict["table.scale"]
    assert [bool(scale.any()) for scale in words[:6]] == [True, True, True, False, True, True]
    assert forget_in_export(one, [GONE], {}) == 0 and load_manifest(one) == cleaned


def test_the_row_of_a_forgotten_user_answers_nobody(
    folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one = folder / "exports/one"
    load_once(one, monkeypatch)
    everybody = ExportRows(one, load_manifest(one), "users").table(["user_key"])["user_key"].to_pylist()
    gone = [everybody.index(GONE), 0, len(everybody) - 1]
    forget_in_export(one, [everybody[row] for row in gone], {})
    named, left = [f"forgotten-{row}" for row in gone], [key for n, key in enumerate(everybody) if n not in gone]

    loaded = load_export(one, 1)
    assert list(loaded.user_of) == left and len(loaded.user_of) == len(left)
    assert not any(name in loaded.user_of for name in named) and loaded.user_of[STAYS] == everybody.index(STAYS)
    service = Service(one, options=ServiceOptions(similar_users=True))
    with TestClient(create_app(service, ServerLimits(keys=KEYS)), headers=AS_ADMIN) as client:
        for name in named:
            for path in ("/v1/recommend", "/v1/users/similar"):
                refused = client.post(path, json={"user": name})
                assert refused.status_code == 404 and "not known" in refused.json()["detail"]
            assert client.get("/v1/events", params={"user": name}).status_code == 404
        assert client.get("/v1/users", params={"query": "forgotten"}).json() == []
        alike = client.post("/v1/users/similar", json={"user": STAYS, "k": 1000}).json()["users"]
        assert sorted(user["user"] for user in alike) == sorted(set(left) - {STAYS})

    recommender = Recommender(one, frame="arrow")
    assert recommender.embeddings("users")["user"].to_pylist() == left
    written = tmp_path / "all.parquet"
    assert main(["recommend", "--export", str(one), "--all", "-k", "1", "--output", str(written)]) == 0
    assert pq.read_table(written)["user"].to_pylist() == left
    capsys.readouterr()
    for name in named:
        assert main(["recommend", "--export", str(one), "--user", name]) == 2
        assert f"user '{name}': not in" in capsys.readouterr().err


def test_only_the_mark_of_the_row_itself_is_one() -> None:
    keys, rows = ["a", "forgotten-1", "forgotten-1", "forgotten-3x", "forgotten-", "forgotten-05"], range(6)
    assert are_tombstones(pa.array(keys), pa.array(rows)).to_pylist() == [False, True, False, False, False, False]


def test_the_tower_as_onnx_forgets_too(folder: Path) -> None:
    """To the new file the user is like one that it does not know."""
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    one = folder / "exports/one"
    keys = ExportRows(one, load_manifest(one), "users").table(["user_key"])["user_key"].to_pylist()
    (one / "tower/user.onnx").write_bytes(b"as it was")
    assert forget_in_export(one, [GONE], {}) == 1
    assert "tower/user.onnx" in load_manifest(one).sha256
    session = onnxruntime.InferenceSession(str(one / "tower/user.onnx"), providers=["CPUExecutionProvider"])
    kinds: dict[str, Any] = {"tensor(int64)": np.int64, "tensor(float)": np.float32, "tensor(bool)": np.bool_}
    dim = session.get_inputs()[6].shape[1]
    shapes: dict[str, tuple[int, ...]] = {"added": (1, dim), "profile": (3, dim)}
    shapes |= {name: (3,) for name in ("lengths", "user", "given")}
    given: dict[str, np.ndarray] = {
        i.name: np.ones(shapes.get(i.name, (3, 1)), kinds[i.type]) for i in session.get_inputs()
    }
    given["user"] = np.array([keys.index(GONE), -1, keys.index(STAYS)])
    gone, nobody, stays = session.run(["representations"], given)[0]
    np.testing.assert_allclose(gone, nobody, atol=1e-6)
    assert np.abs(stays - nobody).max() > 1e-4


def test_a_kill_anywhere_is_mended_by_the_same_command(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = command(folder, *loaded_stores(folder), "--export", str(folder / "exports/one"), *recorded(folder))
    points = [
        (places, "forget_in_export"),  # between data and export
        (shutil, "copytree"),  # within the new copy of the export
        (places.StorePlace, "forget"),  # between export and databases
    ]
    for target, name in points:
        with monkeypatch.context() as patch:
            patch.setattr(target, name, kill)
            with pytest.raises(Killed):
                main(whole)
    add = Record.add
    with monkeypatch.context() as patch:  # after all is done, before that is recorded
        patch.setattr(Record, "add", lambda self, act, **more: kill() if act == "end" else add(self, act, **more))
        with pytest.raises(Killed):
            main(whole)
    shutil.copytree(folder / "exports/one", temporary(folder / "exports/one", "new"))
    with (folder / "record").open("a") as record:
        record.write('{"n": 99, "act": "re')  # a line that was not completed
    assert unfinished([json.loads(line) for line in (folder / "record").read_text().splitlines()[:-1]])
    assert main(whole) == 0
    lines = read_record(folder / "record", RecordKey(b"s" * 32))
    assert unfinished(lines) == set() and [line["act"] for line in lines].count("begin") == 5
    assert {line["kind"] for line in lines if line["act"] == "removed"} == {"data", "export", "store"}
    assert holders(folder, GONE) == [] and not list(folder.glob("**/.*flm-*"))
    capsys.readouterr()
    assert main(whole) == 2 and "nearest" in capsys.readouterr().err  # nobody knows her any more


def load_once(export: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have all exports loaded with the tower of one: reading its programs takes seconds."""
    tower = PackagedTower(export)
    monkeypatch.setattr("flm_torchrec.serve.loaded_export.PackagedTower", lambda *_: tower)


def test_of_several_exports_and_a_canary_none_knows_the_user(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    load_once(folder / "exports/one", monkeypatch)
    for name in ("two", "three"):
        copy_export(folder / "exports/one", folder / "exports" / name)
    store = EventStore(folder / "events")
    services = [Service(folder / "exports" / name, store) for name in ("one", "two")]
    served = Variants(services, Split((0.5, 0.5)))
    app = create_app(served, ServerLimits(keys=KEYS))
    folders = [str(folder / "exports" / name) for name in ("one", "two", "three")]
    with running(app) as port:
        url = f"http://127.0.0.1:{port}"
        client = Client(url, ADMIN_KEY, timeout=120)
        client.swap(folders[2], canary=0.5, minutes=10, replaces="two")
        client.add_event(GONE, "i3")
        at = ["--server", url, "--server-key", str(folder / "admin")]
        named = [f"--export={export}" for export in folders]
        for missing in named:
            assert main(command(folder, *at, *(one for one in named if one != missing))) == 2
            missing_folder = missing.removeprefix("--export=")
            assert f"serves {missing_folder}, which has the users; name it" in capsys.readouterr().err
        assert all(GONE in loaded.user_of for loaded in loaded_by(services))

        assert main(command(folder, *at, *named)) == 0

        told = capsys.readouterr().out
        assert f"{url}: 1 users and their 1 live events forgotten; serves {folders[0]}, {folders[1]} anew" in told
        assert f"no longer tries {folders[2]} as a canary" in told and "rolled back: users of it are forgotten" in told
        assert holders(folder, GONE) == [] and store.counts([GONE]) == {}
        assert [str(loaded.folder) for loaded in loaded_by(services)] == folders[:2]
        assert all(GONE not in loaded.user_of and STAYS in loaded.user_of for loaded in loaded_by(services))
        for unit in {"a", "b", "c", "d", "e"}:
            with pytest.raises(ServiceError, match="not known"):
                client.recommend(user=GONE, split_by=unit)


def loaded_by(services: list[Service]) -> list[LoadedExport]:
    canaries = [service.canary.fresh for service in services if service.canary is not None]
    return [*(service.loaded for service in services), *canaries]


def test_what_cannot_be_reached_is_told_before_anything_changes(
    folder: Path, server: str, capsys: pytest.CaptureFixture[str]
) -> None:
    one, data = folder / "exports/one", folder / "data"
    kept = fingerprint_of(data), (one / "manifest.json").read_bytes()
    (folder / "wrong").write_text("not-the-key-of-the-tests")
    (folder / "short").write_bytes(b"s" * 31)
    (folder / "other").write_bytes(b"t" * 32)
    assert main(["forget", "--data", str(data), "--user", "u1", *recorded(folder)]) == 0
    kept = fingerprint_of(data), kept[1]
    written = (folder / "record").read_text()
    admin, at = ["--server-key", str(folder / "admin")], ["--server", server]
    capsys.readouterr()

    def refused(*more: str, says: str) -> None:
        assert main(command(folder, "--export", str(one), *more)) == 2
        error = capsys.readouterr().err
        assert says in error and error.count("\n") == 1, error
        assert (fingerprint_of(data), (one / "manifest.json").read_bytes()) == kept

    refused("--server", "http://127.0.0.1:1", *admin, says="http://127.0.0.1:1: ")
    refused("--server", "http://127.0.0.1:1", says="--server-key FILE")
    refused("--server", "ftp://x", *admin, says="wants http://HOST:PORT")
    refused(*at, "--server-key", str(folder / "wrong"), says="give an admin key")
    refused(*at, "--server-key", str(folder / "none"), says="--server-key must name a text file")
    refused("--store", f"lancedb:{folder / 'none'}", says="none not found")
    refused("--store", "redis:x", says="KIND one of")
    refused("--record", str(folder / "record"), says="--record-key: give the FILE")
    refused("--record", str(folder / "record"), "--record-key", str(folder / "short"), says="31 bytes")
    refused("--record", str(folder / "record"), "--record-key", str(folder / "other"), says="signed with another key")
    (folder / "record").write_text(written.replace('"users": 1', '"users": 2'))
    refused(*recorded(folder), says="line 1: was altered")
    (folder / "record").write_text(written)
    assert main([*command(folder), *at, *admin]) == 2
    assert f"serves {one}, which has the users; name it with --export too" in capsys.readouterr().err
    refused("--user", "u1777", *at, *admin, says="nearest: u")
    assert main(["forget", "--user", GONE]) == 2 and "--data DIR" in capsys.readouterr().err


def test_a_store_without_users_is_one_line(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for kind, client in STORES.items():
        pytest.importorskip(client, reason=f"install flm_torchrec[{kind}]")
        to = f"{kind}:{folder / kind}"
        assert main(["load", "--export", str(folder / "exports/one"), "--to", to]) == 0
        for place, says in ((to, "'users': not found"), (f"{to}#items", "has no user_key")):
            assert main(command(folder, "--store", place)) == 2
            error = capsys.readouterr().err
            assert says in error and error.count("\n") == 1, error
    assert holders(folder / "data", GONE)


@settings(max_examples=20, suppress_health_check=list(HealthCheck))
@given(data=st.data(), texts=st.lists(st.text(max_size=8), min_size=1, max_size=5))
def test_every_change_of_a_record_is_found(data: st.DataObject, texts: list[str], tmp_path: Path) -> None:
    file, key = tmp_path / "record", RecordKey(b"k" * 32)
    file.unlink(missing_ok=True)
    for text in texts:  # each by a process of its own
        with Record.opened(file, key) as record:
            record.add("removed", place=text)
    written = file.read_text().splitlines(keepends=True)
    assert [line["place"] for line in read_record(file, key)] == texts
    number = data.draw(st.integers(0, len(written) - 1))
    changed = list(written)
    how = data.draw(st.sampled_from(["byte", "remove", "repeat"]))
    if how == "byte":
        at = data.draw(st.integers(0, len(written[number]) - 2))
        letter = data.draw(st.sampled_from([c for c in 'a0"}' if c != written[number][at]]))
        changed[number] = written[number][:at] + letter + written[number][at + 1 :]
    elif how == "remove":
        if number == len(written) - 1:
            return  # the last line: only its signature, noted elsewhere, shows that it is missing
        del changed[number]
    else:
        changed.insert(number, written[number])
    file.write_text("".join(changed))
    first = number + 2 if how == "repeat" else number + 1
    with pytest.raises(RunError, match=rf"record: line {first}: (was altered|does not follow)"):
        read_record(file, key)


def test_the_bucket_of_a_forgotten_user_stays_a_number(tmp_path: Path) -> None:
    """A bucket that only she was in becomes empty: its numbers fall into the one before."""
    (tmp_path / "events.csv").write_text("user_id,item_id\n" + "".join(f"{u},{i}\n" for u in "abcd" for i in range(5)))
    (tmp_path / "users.csv").write_text("user_id,income\na,100\nb,200\nc,300\nd,400\n")
    made = [
        "prepare", "--source", "csv", "--input", str(tmp_path / "events.csv"), "--output", str(tmp_path / "data"),
        "--columns", "user=user_id,item=item_id", "--users", str(tmp_path / "users.csv"),
        "--user-features", "income:quantile",
    ]  # fmt: skip
    assert main(made) == 0
    vocabulary = tmp_path / "data/vocab/user_income.parquet"
    edges = pq.read_table(vocabulary)["value"].to_pylist()
    assert edges == ["-inf", "200.0", "300.0", "400.0"]
    for gone, codes in (("d", [0, 1, 2, 2]), ("b", [0, 0, 2, 2])):
        forget_rows(tmp_path / "data", [gone])
        values = pq.read_table(vocabulary)["value"].to_pylist()
        feature = FeatureValues("income", "user", "quantile", values=tuple(values))
        assert [next(codes_of(feature, number, [])) for number in (100, 200, 300, 400)] == codes
    assert "200.0" not in values and "400.0" not in values
