"""An export in each vector database: what is searched there is what brute force finds.

The databases are real, but for OpenSearch, whose REST API has a stand-in.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from flm_torchrec.data.dataset import PreparedData
from flm_torchrec.errors import RunError
from flm_torchrec.export.delta import export_delta
from flm_torchrec.export.manifest import load_manifest
from flm_torchrec.export.parts import ExportRows
from flm_torchrec.export.stores.forget import UserCollection
from flm_torchrec.export.stores.load import STORES, Chosen, load, opened
from flm_torchrec.export.stores.protocol import StoreRows
from flm_torchrec.export.vectors import decode
from flm_torchrec.export.write import ExportOptions, ExportSource, export
from tests.evaluation.test_ranking import Alone
from tests.export.opensearch_stand_in import OpenSearchStandIn
from tests.export.test_export import MadeUp

REFUSED = r"no connection \(Connection refused\); start the server, or mend the address"
EMPTY = {"title": "", "attributes": {}, "model_version": ""}
OPTIONS = ExportOptions(quantise="fp16", part_rows=64)
CLIENTS = {
    "qdrant": "qdrant_client",
    "milvus": "pymilvus",
    "lancedb": "lancedb",
    "postgresql": "psycopg",
    "opensearch": "opensearchpy",
}


@pytest.fixture
def opensearch() -> Iterator[OpenSearchStandIn]:
    with OpenSearchStandIn() as server:
        yield server
        assert server.refused == []


@pytest.fixture(params=list(STORES))
def to(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    pytest.importorskip(CLIENTS[request.param], reason=f"install flm_torchrec[{STORES[request.param][0]}]")
    if request.param == "postgresql":
        return request.getfixturevalue("postgresql")
    if request.param == "opensearch":
        return request.getfixturevalue("opensearch").to
    return f"{request.param}:{tmp_path / 'store.db'}"


@pytest.fixture
def source(small: PreparedData) -> ExportSource:
    return ExportSource(small, MadeUp(small), np.ones(small.schema.items, bool), "v1")


def check(folder: Path, to: str, items: pa.Table) -> None:
    """The ten best of some users are those of brute force over the export."""
    vectors, keys = decode(items["embedding"]), items["item_key"].to_pylist()
    users = ExportRows(folder, load_manifest(folder), "users").table(["fused", "sequential"])
    with opened(to, "items") as store:
        store.create(vectors.shape[1])
        assert store.count() == len(keys)
        for head in users.column_names:
            for query in decode(users[head])[:5]:
                scores = vectors @ query
                best = np.argsort(-scores)[:10]
                found = store.search(query, 10)
                assert [key for key, _ in found] == [keys[i] for i in best]
                np.testing.assert_allclose([score for _, score in found], scores[best], rtol=1e-4, atol=1e-5)


def test_search_finds_what_brute_force_does_and_loading_twice_is_as_once(
    to: str, source: ExportSource, tmp_path: Path
) -> None:
    export(source, Alone(), tmp_path / "e", OPTIONS)
    items = ExportRows(tmp_path / "e", load_manifest(tmp_path / "e"), "items").table()
    for _ in range(2):
        loaded = load(tmp_path / "e", to, "items")
        assert (loaded.upserted, loaded.deleted, loaded.total) == (len(items), 0, len(items))
    check(tmp_path / "e", to, items)

    # A delta leads to the collection that the whole newer export would.
    newer = replace(source, encoder=MadeUp(source.data, changed={0, 70, 148}), version="v2")
    assert export_delta(newer, Alone(), tmp_path / "e", tmp_path / "d", OPTIONS) is not None
    export(newer, Alone(), tmp_path / "e2", OPTIONS)
    assert load(tmp_path / "d", to, "items").upserted == 3
    check(tmp_path / "e2", to, ExportRows(tmp_path / "e2", load_manifest(tmp_path / "e2"), "items").table())

    with opened(to, "items") as store:
        store.create(source.encoder.dim)
        store.delete(items["item_key"].to_pylist()[:7])
        hostile = ["it's", 'a "b"', "c\\", "d\ne", "); DROP TABLE items; --"]
        apart = np.eye(5, source.encoder.dim, dtype=np.float32)
        store.upsert(StoreRows(hostile, apart * 99, [EMPTY] * 5))
        assert [store.search(vector, 1)[0][0] for vector in apart] == hostile
        assert sorted(store.find([*hostile, "nobody's key"])) == sorted(hostile)
        store.delete([*hostile, "nobody's key"])
        assert store.count() == len(items) - 7
        store.purge()
        assert store.find(hostile) == [] and store.count() == len(items) - 7
        with pytest.raises(RunError, match="holds other vectors"):
            store.create(source.encoder.dim + 1)


def test_users_are_loaded_and_taken_out_by_key(to: str, source: ExportSource, tmp_path: Path) -> None:
    export(source, Alone(), tmp_path / "e", OPTIONS)
    users = ExportRows(tmp_path / "e", load_manifest(tmp_path / "e"), "users").table()
    keys, place = users["user_key"].to_pylist(), UserCollection.of(f"{to}#people")
    for chosen in (Chosen("users"), Chosen("users", "content")):
        assert load(tmp_path / "e", to, "people", chosen).total == len(keys)
    with opened(to, "people", "users") as store:
        assert store.find([keys[3]]) == [keys[3]]  # opened by `find`, without `create`
        assert store.search(decode(users["content"])[3], 1)[0][0] in keys
    assert place.find([*keys[:3], "nobody"]) == set(keys[:3])
    assert [place.forget([*keys[:3], "nobody"]) for _ in range(2)] == [3, 0]
    assert place.find(keys) == set(keys[3:])
    for other, message in (("none", "not found"), ("things", "has no user_key")):
        load(tmp_path / "e", to, "things")
        with pytest.raises(RunError, match=f"collection '{other}': {message}"):
            UserCollection(to, other).find(keys)
    with pytest.raises(RunError, match="collection 'people'"):
        load(tmp_path / "e", to, "people")  # items
    with pytest.raises(RunError, match="--vectors embedding: users have fused"):
        load(tmp_path / "e", to, "people", Chosen("users", "embedding"))


@pytest.mark.parametrize(
    ("to", "collection", "message"),
    [
        ("qdrnt:x", "items", "did you mean 'qdrant'"),
        ("qdrant", "items", "wants KIND:PLACE, .*; give the place, such as qdrant:"),
        ("qdrant:{d}/q", "my items", "letters, digits and underscores"),
        ("qdrant:{d}/file/q", "items", "file"),
        ("milvus:{d}/folder", "items", "a file that ends in .db"),
        ("lancedb:{d}/file/l", "items", "lancedb"),
        ("opensearch:127.0.0.1:9200", "items", "the address of a server"),
        ("opensearch:http://u:secret@127.0.0.1:1", "items", rf"@127.0.0.1:1: {REFUSED}$"),
        ("opensearch:https://none.invalid:1", "items", r"none.invalid:1: no connection \([A-Z][^<>]*\); start"),
        ("qdrant:http://secret@127.0.0.1:1", "items", rf"127.0.0.1:1: {REFUSED}$"),
        ("opensearch:http://u:secret@127.0.0.1:1", "Items", "lower case"),
        (
            "postgresql://nobody:secret@127.0.0.1:1/none",
            "items",
            "127.0.0.1:1/none: no connection .*refused.*; start the",
        ),
    ],
)
def test_a_wrong_place_is_one_line(
    source: ExportSource, tmp_path: Path, to: str, collection: str, message: str
) -> None:
    kind = to.partition(":")[0]
    pytest.importorskip(CLIENTS.get(kind, "numpy"))
    (tmp_path / "file").touch()
    export(source, Alone(), tmp_path / "e", OPTIONS)
    with pytest.raises(RunError, match=message) as told:
        load(tmp_path / "e", to.format(d=tmp_path), collection)
    assert "\n" not in str(told.value) and "secret" not in str(told.value)


def test_the_option_that_names_a_store_is_told() -> None:
    with pytest.raises(RunError, match=r"^--store 'qdrnt:x': wants KIND:PLACE"):
        UserCollection.of("qdrnt:x").find(["u1"])


def test_what_opensearch_refuses_is_one_line(opensearch: OpenSearchStandIn) -> None:
    pytest.importorskip("opensearchpy", reason="install flm_torchrec[opensearch]")
    rows = StoreRows(["a", "k" * 513], np.ones((2, 4), np.float32), [EMPTY] * 2)
    with opened(opensearch.to, "items") as store:
        store.create(4)
        with pytest.raises(RunError, match="longer than 512 bytes"):
            store.upsert(rows)
        assert store.find(["k" * 513]) == [] and store.count() == 0
        opensearch.full = True
        with pytest.raises(RunError, match=r"'a' is refused \(disk usage exceeded") as told:
            store.upsert(StoreRows(["a"], rows.vectors[:1], [EMPTY]))
        assert "\n" not in str(told.value)
    opensearch.indices["plain"] = {"settings": {}, "mappings": {"properties": {"item_key": {"type": "keyword"}}}}
    with opened(opensearch.to, "plain") as store, pytest.raises(RunError, match="holds other vectors"):
        store.create(4)


def test_an_alias_of_an_index_can_be_loaded(opensearch: OpenSearchStandIn) -> None:
    pytest.importorskip("opensearchpy", reason="install flm_torchrec[opensearch]")
    with opened(opensearch.to, "items_v1") as store:
        store.create(4)
    opensearch.aliases["live"] = ["items_v1"]
    with opened(opensearch.to, "live") as store:
        store.create(4)
        store.upsert(StoreRows(["a"], np.ones((1, 4), np.float32), [EMPTY]))
        assert store.count() == 1 and set(opensearch.indices) == {"items_v1"}
    opensearch.aliases["live"] = ["items_v1", "items_v1_copy"]
    opensearch.indices["items_v1_copy"] = opensearch.indices["items_v1"]
    with opened(opensearch.to, "live") as store, pytest.raises(RunError, match="alias of several"):
        store.create(4)


def test_a_missing_client_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    for kind, (module, _) in STORES.items():
        monkeypatch.delitem(__import__("sys").modules, f"flm_torchrec.export.stores.{module}", raising=False)
        monkeypatch.setitem(__import__("sys").modules, CLIENTS[kind], None)
        with pytest.raises(RunError, match=rf"pip install 'flm_torchrec\[{module}\]'"), opened(f"{kind}:x", "items"):
            pass


@pytest.mark.parametrize(
    "answer",
    [(502, "<html><body>\nBad Gateway</body></html>"), (404, "<html>\nnone</html>"), "Hi", {}, ["a"], {"a": 1}],
)
def test_a_server_that_is_no_opensearch_is_told_in_one_line(answer: Any) -> None:
    client = pytest.importorskip("opensearchpy", reason="install flm_torchrec[opensearch]")
    from flm_torchrec.export.stores.opensearch import OpenSearchIndex

    def get_mapping(index: str) -> Any:
        if isinstance(answer, tuple):
            status, body = answer
            raise (client.NotFoundError if status == 404 else client.TransportError)(status, "text", body)
        return answer

    store = OpenSearchIndex("http://127.0.0.1:1", "items", "item_id")
    stranger: Any = SimpleNamespace(indices=SimpleNamespace(get_mapping=get_mapping))
    store.client = stranger
    with pytest.raises(ValueError, match="does not answer as OpenSearch does; check host and port") as told:
        store.create(8)
    assert "\n" not in str(told.value)


@pytest.fixture
def stranger() -> Iterator[Any]:
    """A server that gives the same answer to everything: `status` and `body`."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(server.status)
            self.send_header("Content-Length", str(len(server.body)))
            self.end_headers()
            self.wfile.write(server.body)

        def log_message(self, *_: object) -> None:
            pass

    server: Any = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.mark.filterwarnings("ignore:Failed to obtain server version")
def test_a_server_that_is_no_qdrant_is_told_in_one_line(stranger: Any) -> None:
    pytest.importorskip("qdrant_client", reason="install flm_torchrec[qdrant]")

    address = f"qdrant:http://127.0.0.1:{stranger.server_port}"

    def told() -> str:
        with pytest.raises(RunError) as error, opened(address, "items", option="--store") as store:
            store.find(["i1"])
        assert "\n" not in str(error.value)
        return str(error.value)

    no_handler = b'{"error": "no handler found for uri [/collections/items/exists]", "status": 400}'
    for stranger.status, stranger.body in (
        (200, b"{}"), (200, b"[]"), (200, b"<html>\nHi</html>"), (404, b"<html>\nnone</html>"), (400, no_handler),
    ):  # fmt: skip
        assert told() == f"--store {address}: the server does not answer as Qdrant does; check host and port"
    stranger.status, stranger.body = 500, b'{"status": {"error": "disk full"}, "time": 0}'
    assert told() == f"--store {address}: Unexpected Response: 500 (Internal Server Error)"
    stranger.status, stranger.body = 401, b"Must provide an API key or an Authorization bearer token"
    assert told() == f"--store {address}: Unexpected Response: 401 (Unauthorized)"


def test_postgresql_is_waited_for_a_while_unless_the_user_says_how_long(monkeypatch: pytest.MonkeyPatch) -> None:
    psycopg = pytest.importorskip("psycopg", reason="install flm_torchrec[pgvector]")
    pytest.importorskip("pgvector", reason="install flm_torchrec[pgvector]")
    from flm_torchrec.export.stores.pgvector import PgVector

    waits = []

    def connect(location: str) -> None:
        waits.append(int(psycopg.conninfo.conninfo_to_dict(location)["connect_timeout"]))
        raise psycopg.OperationalError("refused")

    monkeypatch.setattr(psycopg, "connect", connect)
    monkeypatch.delenv("PGCONNECT_TIMEOUT", raising=False)
    for _ in range(2):
        for asked in "", "?connect_timeout=3":
            with pytest.raises(ConnectionError, match="refused"):
                PgVector(f"postgresql://127.0.0.1:1/none{asked}", "items", "item_id")
        monkeypatch.setenv("PGCONNECT_TIMEOUT", "7")
    assert waits == [10, 3, 7, 3]
