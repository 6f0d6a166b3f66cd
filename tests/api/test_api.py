"""The Python API: its examples run, tables of every library go in and out, and what is wrong is one line."""

from __future__ import annotations

import contextlib
import doctest
import inspect
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import flm_torchrec as flm
from flm_torchrec.api import data as data_module
from flm_torchrec.api import recommender as recommender_module
from flm_torchrec.api import run as run_module
from flm_torchrec.cli import main
from flm_torchrec.data.dataset import PreparedData
from flm_torchrec.errors import FlmError
from flm_torchrec.serve.messages import Event, Recommend, Similar
from flm_torchrec.serve.service import Service

EXAMPLES = [
    (data_module, "prepare"),
    (run_module, "train"),
    (run_module, "Run.load"),
    (run_module, "Run.evaluate"),
    (run_module, "Run.export"),
    (recommender_module, "Recommender"),
    (recommender_module, "Recommender.recommend"),
    (recommender_module, "Recommender.recommend_to"),
    (recommender_module, "Recommender.similar_items"),
    (recommender_module, "Recommender.hops"),
    (recommender_module, "Recommender.embeddings"),
]
MAKERS = ("prepare", "train", "Run.export")
"""Examples that make the data, the run and the export of the others."""


@pytest.fixture(scope="module")
def run_example(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[int, str]]:
    """By name of an example: the number of its statements, and what went wrong. Each is run once, in one folder."""
    shop = tmp_path_factory.mktemp("shop")
    done: dict[str, tuple[int, str]] = {}
    finder = doctest.DocTestFinder()
    tests = {t.name.removeprefix(f"{m.__name__}."): t for m in {m for m, _ in EXAMPLES} for t in finder.find(m)}

    def run(name: str) -> tuple[int, str]:
        if name not in done:
            told: list[str] = []
            with contextlib.chdir(shop):
                done[name] = doctest.DocTestRunner().run(tests[name], out=told.append).attempted, "".join(told)
        return done[name]

    return run


@pytest.mark.parametrize("name", [name for _, name in EXAMPLES])
def test_an_example_is_what_it_says(run_example: Callable[[str], tuple[int, str]], name: str) -> None:
    for maker in MAKERS[: MAKERS.index(name) if name in MAKERS else None]:
        run_example(maker)
    statements, wrong = run_example(name)
    assert statements and not wrong, wrong


def test_every_public_function_has_an_example() -> None:
    listed = {f"{module.__name__}.{name}" for module, name in EXAMPLES}
    for name in flm.__all__:
        found = getattr(flm, name)
        if name in ("prepare", "train"):
            assert f"{found.function_in}.{name}" in listed
            assert next(iter(inspect.signature(found).parameters)) in ("events", "data")
            continue
        methods = [n for n, f in vars(found).items() if callable(f) or isinstance(f, classmethod)]
        missing = [n for n in methods if not n.startswith("_") and f"{found.__module__}.{name}.{n}" not in listed]
        assert missing == []


def test_importing_the_package_imports_nothing_heavy() -> None:
    heavy = ("torch", "polars", "pyarrow", "faiss", "pydantic", "numpy")
    code = f"import sys, flm_torchrec as flm; dir(flm); print([m for m in {heavy!r} if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "[]\n"


def rows(start: str = "u") -> dict[str, list[Any]]:
    pairs = [(u, n) for u in range(12) for n in range(5)]
    return {
        "who": [f"{start}{u}" for u, _ in pairs],
        "what": [(u * 3 + n) % 10 for u, n in pairs],
        "when": [1_700_000_000 + 60 * n for _, n in pairs],
    }


COLUMNS = {"user": "who", "item": "what", "timestamp": "when"}


def tables(given: dict[str, list[Any]]) -> dict[str, Any]:
    made: dict[str, Any] = {"polars": pl.DataFrame(given), "arrow": pa.table(given)}
    try:
        import pandas
    except ModuleNotFoundError:
        return made
    return made | {"pandas": pandas.DataFrame(given)}


def test_every_library_prepares_what_a_file_does(tmp_path: Path) -> None:
    """Events and items, byte by byte."""
    described: dict[str, list[Any]] = {
        "what": list(range(10)),
        "brand": [f"b{i % 3}" for i in range(10)],
        "price": [i / 2 for i in range(10)],
    }
    pl.DataFrame(rows()).write_parquet(tmp_path / "events.parquet")
    pl.DataFrame(described).write_csv(tmp_path / "items.csv")
    options: Any = {
        "columns": COLUMNS,
        "item_key": "what",
        "item_features": {"brand": "categorical", "price": "numeric"},
    }

    def files(folder: Path) -> dict[str, bytes]:
        named = {f.relative_to(folder).as_posix(): f.read_bytes() for f in folder.rglob("*") if f.is_file()}
        return {name: content for name, content in named.items() if name.endswith(".parquet")}

    wanted = flm.prepare(tmp_path / "events.parquet", tmp_path / "f", items=tmp_path / "items.csv", **options)
    assert wanted.report["users"] == 12 and files(Path(wanted))
    for kind, events in tables(rows()).items():
        items = tables(described)[kind]
        made = flm.prepare(events, tmp_path / kind, items=items, **options)
        assert files(Path(made)) == files(Path(wanted)), kind
        assert made.report["rows_kept"] == wanted.report["rows_kept"]
    with pytest.raises(FlmError, match="--overwrite to replace it"):
        flm.prepare(pl.DataFrame(rows()), tmp_path / "polars", **options)


def test_ids_that_are_missing_are_dropped_and_told(tmp_path: Path) -> None:
    events = rows()
    events["what"][3], events["who"][7], events["when"][9] = None, None, None
    made = flm.prepare(pl.DataFrame(events), tmp_path / "out", columns=COLUMNS)
    assert made.report["rows_kept"] == 57
    assert any("events: row 4" in reason["examples"][0] for reason in made.report["dropped"].values())


WRONG_TABLES: dict[str, tuple[Callable[[], Any], dict[str, Any], str]] = {
    "column": (lambda: pl.DataFrame(rows()), {}, "events: no column 'user_id'"),
    "role": (lambda: pl.DataFrame(rows()), {"columns": {"usr": "who", "item": "what"}}, "no role 'usr'"),
    "no item": (lambda: pl.DataFrame(rows()), {"columns": {"user": "who"}}, "--columns: name the column of the item"),
    "type": (lambda: pl.DataFrame({"a": [[1]], "b": [2]}), {"columns": {"user": "a", "item": "b"}}, "an id is one"),
    "option": (lambda: pl.DataFrame(rows()), {"columns": COLUMNS, "dedupe": "exact"}, "did you mean 'dedup'?"),
    "value": (lambda: pl.DataFrame(rows()), {"columns": COLUMNS, "k_core": -1}, "--k-core -1: must be at least 0"),
    "number": (lambda: pl.DataFrame(rows()), {"columns": {"user": 0, "item": "what"}},
        "--columns user=0: must be a text ROLE="),
    "key": (lambda: pl.DataFrame(rows()), {"columns": {7: "who", "item": "what"}},
        "--columns 7: must be a text ROLE="),
    "kinds": (lambda: pl.DataFrame(rows()), {"columns": COLUMNS, "item_features": ["b"]},
        "--item-features ['b']: must be"),
    "rows": (lambda: pl.DataFrame(rows()), {"columns": COLUMNS, "tables": {"item_id": 3}},
        "--tables item_id=3: must be a text NAME="),
    "k": (lambda: pl.DataFrame(rows()), {"columns": COLUMNS, "k_core": [1]}, "--k-core [1]: must be a whole number"),
    "empty": (lambda: pl.DataFrame(rows()).clear(), {"columns": COLUMNS}, "events: has no rows"),
    "lazy": (lambda: pl.DataFrame(rows()).lazy(), {"columns": COLUMNS}, "events: is a LazyFrame; collect it first"),
    "no table": (lambda: 3, {"columns": COLUMNS}, "events: is a int; give a table"),
    "no path": (lambda: "nowhere.csv", {"columns": COLUMNS}, "nowhere.csv: not found"),
    "nothing": (lambda: None, {}, "--source '' is not known"),
    "objects": (lambda: pl.DataFrame({"who": pl.Series([object()], dtype=pl.Object), "what": ["i"]}),
        {"columns": {"user": "who", "item": "what"}}, "events: column 'who' has objects of Python"),
    "name of two lines": (lambda: pl.DataFrame({"w\nho": ["u"]}), {"columns": COLUMNS}, r"It has: w\nho"),
    "huge": (lambda: pytest.importorskip("pandas").DataFrame({"user_id": [2**70], "item_id": ["i"]}), {},
        "give integers over 64 bits as text"),
    "feature": (
        lambda: pl.DataFrame(rows()),
        {"columns": COLUMNS, "items": pl.DataFrame({"what": [1, 1], "b": ["x", "y"]}), "item_key": "what"}
        | {"item_features": {"b": "categorical"}},
        "items: key '1' occurs more than once",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG_TABLES)
def test_a_wrong_table_is_one_line_and_leaves_nothing(tmp_path: Path, name: str) -> None:
    make, options, told = WRONG_TABLES[name]
    with pytest.raises(FlmError) as error:
        flm.prepare(make(), tmp_path / "out", **options)
    assert told in str(error.value) and "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())


def test_a_file_named_json_is_read_as_json_lines(tmp_path: Path) -> None:
    columns = {"user": "user_id", "item": "item_id"}
    (tmp_path / "log.json").write_text("".join(f'{{"user_id": {n % 9}, "item_id": {n % 7}}}\n' for n in range(60)))
    assert flm.prepare(tmp_path / "log.json", tmp_path / "out", columns=columns).report["rows_kept"] == 60
    (tmp_path / "list.json").write_text('[{"user_id": 1, "item_id": 2}]')
    with pytest.raises(FlmError, match=r"malformed: not a JSON object.* jsonl has an object a line"):
        flm.prepare(tmp_path / "list.json", tmp_path / "list", columns=columns)


def test_columns_of_one_name_are_refused(tmp_path: Path) -> None:
    pandas = pytest.importorskip("pandas")
    for names in (["who", "what", "what"], [1, 2, 1]):
        with pytest.raises(FlmError) as error:
            flm.prepare(pandas.DataFrame(rows()).set_axis(names, axis=1), tmp_path / "out", columns=COLUMNS)
        assert str(error.value) == f"events: two columns are named '{names[2]}'; rename one"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("sections", "told"),
    [
        ({"train": {"epoch": 3}}, "unknown key 'train.epoch'; did you mean 'epochs'"),
        ({"trian": {"epochs": 3}}, "unknown section 'trian'; did you mean 'train'"),
        ({"train": {"epochs": 0}}, "train.epochs: must be"),
        ({"train": 3}, "train: give a mapping such as"),
        ({"model": {"dim": object()}}, "model.dim: "),
        ({"config": 3}, "config: is a int; give a path"),
        ({}, "schema.yaml: not found"),
    ],
)
def test_a_wrong_setting_is_one_line(tmp_path: Path, sections: dict[str, Any], told: str) -> None:
    with pytest.raises(FlmError) as error:
        flm.train(tmp_path / "none", tmp_path / "run", **sections)
    assert told in str(error.value) and "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())


NO_PATH: Any = 3
WRONG_PATHS: dict[str, Callable[[], Any]] = {
    "output": lambda: flm.prepare(pl.DataFrame(rows()), NO_PATH, columns=COLUMNS),
    "path": lambda: flm.Run.load(NO_PATH),
    "run": lambda: flm.train("data", NO_PATH),
    "data": lambda: flm.train(NO_PATH, "run"),
    "export": lambda: flm.Recommender(NO_PATH),
}


@pytest.mark.parametrize("name", WRONG_PATHS)
def test_what_is_no_path_is_told(name: str) -> None:
    with pytest.raises(FlmError, match=f"^{name}: is a int; give a path$"):
        WRONG_PATHS[name]()


@pytest.fixture(scope="module")
def service(exported: Path, tmp_path_factory: pytest.TempPathFactory) -> Service:
    """Of an export whose fusion is a mixture."""
    folder = tmp_path_factory.mktemp("served") / "one"
    shutil.copytree(exported, folder)
    record = json.loads((folder / "manifest.json").read_text())
    record["mixture"] = {"scale": [9.0, 14.0, 11.0], "bias": [0.5, -1.0, 0.0]}
    (folder / "manifest.json").write_text(json.dumps(record))
    return Service(folder)


@pytest.fixture(scope="module")
def recommender(service: Service) -> flm.Recommender:
    """Of the export that the service serves."""
    made = flm.Recommender(service.export)
    made.tower = service.loaded.tower  # it takes seconds to load
    return made


def found_by(service: Service, **request: Any) -> list[tuple[str, Any]]:
    (answer,) = service.recommend([Recommend(**request)])
    assert isinstance(answer, dict), answer
    return [(item["item"], pytest.approx(item["score"], abs=1e-4)) for item in answer["items"]]


def of_user(table: pl.DataFrame, user: str) -> list[tuple[str, float]]:
    return table.filter(pl.col("user") == user).select("item", "score").rows()


@pytest.mark.parametrize("head", ["fused", "sequential"])
def test_histories_are_answered_as_the_server_does(service: Service, recommender: flm.Recommender, head: str) -> None:
    """In order of time, whatever the order of the rows, and with filters; users are named as one likes."""
    keys = service.loaded.catalogue.keys.to_pylist()
    genre = service.loaded.catalogue.attributes["genre"].top(2)
    picked = {"ann": [3, 50, 7], "bob": [9], "7": [20, 21, 22, 23, 24, 25, 26, 27, 28]}
    events = [(u, keys[i], 1_700_000_000 + 900 * n) for u, items in picked.items() for n, i in enumerate(items)]
    table = pl.DataFrame(events, schema=["user", "item", "timestamp"], orient="row")
    mixed = recommender.recommend(table.reverse(), 5, head=head, filter={"genre": genre})
    assert mixed["user"].unique(maintain_order=True).to_list() == ["7", "bob", "ann"]
    for user in picked:
        history = [Event(item=item, timestamp=at) for u, item, at in events if u == user]
        assert of_user(mixed, user) == found_by(service, history=history, k=5, head=head, filter={"genre": genre})
    plain = recommender.recommend(table.drop("timestamp"), 5, head=head, include_seen=True)
    ann = [Event(item=keys[i]) for i in picked["ann"]]
    assert of_user(plain, "ann") == found_by(service, history=ann, k=5, head=head, exclude_seen=False)


def test_known_users_are_those_of_the_command_and_near_the_servers(
    service: Service, recommender: flm.Recommender, capsys: pytest.CaptureFixture[str]
) -> None:
    """The server computes vectors with its int8 tower; the export has them as trained."""
    table = recommender.recommend(["u9", "u2", "u9"], 6)
    assert table["user"].to_list() == ["u9"] * 6 + ["u2"] * 6 and table["rank"].to_list() == [*range(1, 7)] * 2
    capsys.readouterr()
    for user in ("u9", "u2"):
        assert main(["recommend", "--export", str(service.export), "--user", user, "-k", "6", "--json"]) == 0
        told = json.loads(capsys.readouterr().out)
        assert [(r["item"], r["score"]) for r in told] == of_user(table, user)
        served = dict(found_by(service, user=user, k=149))
        assert all(score == pytest.approx(served[item].expected, abs=0.1) for item, score in of_user(table, user))


def test_similar_items_are_those_of_the_server(service: Service, recommender: flm.Recommender) -> None:
    keys = service.loaded.catalogue.keys.to_pylist()
    genre = service.loaded.catalogue.attributes["genre"].top(1)
    for wanted in ({}, {"genre": genre}):
        table = recommender.similar_items([keys[5], keys[0]], 4, filter=wanted)
        assert table.columns == ["item", "rank", "similar", "title", "score"] and table["item"][0] == keys[5]
        for key in (keys[5], keys[0]):
            near = service.similar(Similar(item=key, k=4, filter=wanted))["items"]
            mine = table.filter(pl.col("item") == key)
            assert mine["similar"].to_list() == [item["item"] for item in near]
            np.testing.assert_allclose(mine["score"].to_list(), [item["score"] for item in near], atol=1e-5)


def test_tables_come_out_as_asked(service: Service, small: PreparedData) -> None:
    vectors = np.stack(pq.read_table(service.export / "items.parquet")["embedding"].to_numpy())
    two: Any = np.int64(2)  # as a number of pandas is
    for kind, like in tables({"user": ["u3", "u1"]}).items():
        recommender = flm.Recommender(service.export, frame=kind)  # type: ignore[arg-type]
        found = recommender.recommend(like, two)
        assert type(found) is type(like)
        assert list(found["user"].to_pylist() if kind == "arrow" else found["user"]) == ["u3", "u3", "u1", "u1"]
        embeddings = recommender.embeddings("items")
        assert type(embeddings) is type(like) and len(embeddings) == len(small.item_keys)
        column = embeddings["embedding"].to_pylist() if kind == "arrow" else list(embeddings["embedding"])
        np.testing.assert_array_equal(np.array([list(row) for row in column], np.float32), vectors)


PANDA: Any = "panda"
HISTORY = {"user": ["a", "a"], "item": ["i1", "i2"]}
WRONG_QUESTIONS: dict[str, tuple[Callable[[Any], Any], str]] = {
    "user": (lambda r: r.recommend(["u1", "uu"]), "user 'uu': not in"),
    "one text": (lambda r: r.recommend("u1"), "users: is a str; give a list of ids"),
    "number": (lambda r: r.recommend(3), "users: is a int; give a list"),
    "none": (lambda r: r.recommend([]), "users: has no ids"),
    "null": (lambda r: r.recommend(["u1", None]), "users: row 2 has no id"),
    "NaN": (lambda r: r.recommend(np.array([1.0, np.nan])), "users: row 2 has no id"),
    "types": (lambda r: r.recommend(["u1", 2]), "users: ids of several types"),
    "k 0": (lambda r: r.recommend(["u1"], 0), "-k 0: ask for at least 1"),
    "k text": (lambda r: r.recommend(["u1"], "5"), "-k 5: ask for at least 1 item, as a whole number"),
    "k large": (lambda r: r.recommend(["u1"], 10**6), "-k 1000000: the export has 149 items"),
    "head": (lambda r: r.recommend(["u1"], head="x"), "--head 'x': choose one of"),
    "filter": (lambda r: r.recommend(["u1"], filter={"gnre": ["war"]}), "did you mean 'genre'?"),
    "filter text": (lambda r: r.recommend(["u1"], filter={"genre": "war"}), "filter.genre: give a list"),
    "filter list": (lambda r: r.recommend(["u1"], filter=["war"]), "filter: give lists of values by feature"),
    "no column": (lambda r: r.recommend(pl.DataFrame({"users": ["u1"]})), "users: no column 'user'"),
    "item": (lambda r: r.recommend(pl.DataFrame({**HISTORY, "item": ["i1", "ii"]})), "histories: no item 'ii'"),
    "no item": (
        lambda r: r.recommend(pl.DataFrame({"user": ["u1"], "item_id": ["i1"]})),
        "users: has a column 'item_id' and none 'item'",
    ),
    "no user": (lambda r: r.recommend(pl.DataFrame({"item": ["i1"]})), "histories: no column 'user'"),
    "event": (lambda r: r.recommend(pl.DataFrame({**HISTORY, "event": ["vew", None]})), "no kind of event 'vew'"),
    "extra": (lambda r: r.recommend(pl.DataFrame({**HISTORY, "time": [1, 2]})), "column 'time' is not known"),
    "infinite": (lambda r: r.recommend(pl.DataFrame({**HISTORY, "value": [1.0, np.inf]})), "row 2 has a value that is"),
    "dict": (lambda r: r.recommend({"user": ["u1"]}), "users: is a dict; give a list"),
    "object": (lambda r: r.recommend([object()]), "users: column 'user' is Object"),
    "null item": (lambda r: r.recommend(pl.DataFrame({**HISTORY, "item": ["i1", None]})), "row 2 has no item"),
    "similar": (lambda r: r.similar_items(["none"]), "items: no item 'none'"),
    "vector 3": (lambda r: r.embeddings("users", 3), "no vector '3'; known: "),
    "vector": (lambda r: r.embeddings("users", "contnt"), "did you mean 'content'?"),
    "of": (lambda r: r.embeddings("user"), "embeddings 'user': choose items or users"),
    "option": (lambda r: r.recommend_to("x.parquet", kk=3), "recommend_to: no option 'kk'"),
    "frame": (lambda r: flm.Recommender(r.export.folder, PANDA), "frame 'panda': did you mean 'pandas'?"),
    "export": (lambda r: flm.Recommender("none"), "manifest.json: not found"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG_QUESTIONS)
def test_a_wrong_question_is_one_line(recommender: flm.Recommender, name: str) -> None:
    ask, told = WRONG_QUESTIONS[name]
    with pytest.raises(FlmError) as error:
        ask(recommender)
    assert told in str(error.value) and "\n" not in str(error.value)
