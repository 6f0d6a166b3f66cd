"""`flm serve --workers 2`: a user's variant, the metrics, a canary and its roll-back are those of both workers."""

from __future__ import annotations

import http.client
import json
import re
import socket
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import faiss
import psutil
import pytest

from flm_torchrec.export.index import INDEX
from flm_torchrec.export.manifest import FILE
from flm_torchrec.files import sha256
from flm_torchrec.serve.split import Split
from tests.processes import Forked
from tests.serve.serving import ADMIN_KEY, AS_ADMIN, copy_export

USERS = [f"u{n}" for n in range(40)]
SPLIT = Split((0.6, 0.4), "spring")
SERVER = """
import sys
from pathlib import Path
from flm_torchrec.cli import main
from flm_torchrec.export.tower.reader import PackagedTower
from flm_torchrec.serve import loaded_export, swapping

tower = PackagedTower(Path(sys.argv[1]))  # all exports here have this one, and reading its programs takes seconds
loaded_export.PackagedTower = lambda *_: tower
swapping.sample_recall = lambda fresh: 1.0  # as where the sample of users does not show what is wrong
swapping.CHECK_SECONDS = 0.5
sys.exit(main(["serve", *sys.argv[2:]]))
"""


class TwoWorkers:
    """The server, and a connection to each of its workers."""

    def __init__(self, exports: Path, folder: Path) -> None:
        self.exports = exports
        script, keys = folder / "server.py", folder / "keys"
        script.write_text(SERVER)
        keys.write_text(f"admin {ADMIN_KEY}\n")
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        served = ["--export", str(exports / "one"), str(exports / "two"), "--split", "60/40", "--split-salt", "spring"]
        options = ["--workers", "2", "--port", str(self.port), "--keys", str(keys), "--events", str(folder / "events")]
        self.process = Forked([str(script), str(exports / "one"), *served, *options])
        until(lambda: "from 2 processes" in self.said() or self.process.returncode is not None)
        assert self.process.returncode is None, self.process.communicate()
        self.clients = self._one_of_each()

    def said(self) -> str:
        """Its standard output so far."""
        file = self.process._files[0]
        return file.read_text() if file.exists() else ""

    def _one_of_each(self) -> list[http.client.HTTPConnection]:
        found: dict[int, http.client.HTTPConnection] = {}
        workers = psutil.Process(self.process.pid).children()
        assert len(workers) == 2
        for _ in range(200):
            client = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
            client.request("GET", "/livez")
            client.getresponse().read()
            port = client.sock.getsockname()[1]
            for worker in workers:
                if any(one.raddr and one.raddr.port == port for one in worker.net_connections("tcp")):
                    found.setdefault(worker.pid, client)
            if len(found) == 2:
                break
        assert len(found) == 2, "all connections went to one worker"
        return list(found.values())

    def ask(self, worker: int, method: str, path: str, **body: Any) -> Any:
        client = self.clients[worker]
        client.request(method, path, json.dumps(body), {"Content-Type": "application/json", **AS_ADMIN})
        response = client.getresponse()
        answer = response.read()
        assert response.status == 200, answer
        return json.loads(answer) if response.headers["Content-Type"] == "application/json" else answer.decode()

    def models(self, worker: int) -> dict[str, tuple[str, str]]:
        """By user, the export and the model that a worker answers with."""
        requests = [{"user": user, "k": 2} for user in USERS]
        answers = self.ask(worker, "POST", "/v1/recommend/batch", requests=requests)["answers"]
        return {user: (a["export"], a["model_version"]) for user, a in zip(USERS, answers, strict=True)}

    def canaries(self) -> list[Any]:
        """The model of the canary of `one` at each worker."""
        shown = [self.ask(worker, "GET", "/health")["exports"][0]["canary"] for worker in (0, 1)]
        return [canary and canary["model_version"] for canary in shown]

    def counts(self, worker: int) -> dict[str, float]:
        """By export, the answers 200 of /v1/recommend."""
        labels = r'export="([^"]+)",route="/v1/recommend",status="200"'
        found = re.findall(rf"flm_export_requests_total\{{{labels}\}} (\S+)", self.ask(worker, "GET", "/metrics"))
        return {export: float(count) for export, count in found}

    def has_counted(self, worker: int, wanted: dict[str, float]) -> bool:
        return self.counts(worker) == wanted

    def swap(self, worker: int, export: str, **terms: Any) -> None:
        self.ask(worker, "POST", "/v1/swap", export=str(self.exports / export), replaces="one", **terms)


def mistaken(export: Path) -> None:
    """Replace the index by one that finds the items with the lowest scores, and has the scores right."""
    right = faiss.read_index(str(export / INDEX))
    vectors = right.reconstruct_n(0, right.ntotal)
    wrong = faiss.IndexFlatIP(right.d)
    wrong.add(-vectors)
    faiss.write_index(faiss.IndexRefine(wrong, right), str(export / INDEX))
    manifest = json.loads((export / FILE).read_text())
    manifest["index"] |= {"kind": "ivfpq", "parameters": {"k_factor_rf": 1}}
    manifest["sha256"][INDEX] = sha256(export / INDEX)
    (export / FILE).write_text(json.dumps(manifest))


def until(found: Callable[[], bool]) -> None:
    end = time.monotonic() + 120
    while not found():
        assert time.monotonic() < end, "did not come within two minutes"
        time.sleep(0.05)


@pytest.fixture(scope="module")
def server(exported: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TwoWorkers]:
    folder = tmp_path_factory.mktemp("two-workers")
    for name in ("one", "two", "fresh", "wrong"):
        copy_export(exported, folder / "exports" / name)
    mistaken(folder / "exports" / "wrong")
    running = TwoWorkers(folder / "exports", folder)
    yield running
    running.process.send_signal(15)
    running.process.communicate(60)


def test_a_user_gets_one_variant_at_both_and_counts_are_apart_and_of_both(server: TwoWorkers) -> None:
    wanted = {user: (("one", "two")[SPLIT.of(user)],) * 2 for user in USERS}
    assert {export for export, _ in wanted.values()} == {"one", "two"}
    assert server.models(0) == server.models(1) == wanted
    before = server.counts(0)
    asked = {"one": 0, "two": 0}
    for number, user in enumerate(USERS[:15]):
        answer = server.ask(number % 3 % 2, "POST", "/v1/recommend", user=user, k=1)
        asked[answer["export"]] += 1
    after = {name: before.get(name, 0) + count for name, count in asked.items()}
    assert all(asked.values())
    for worker in (0, 1):  # an answer is counted after it has been sent
        until(partial(server.has_counted, worker, after))


def test_a_canary_is_that_of_both_and_ends_at_both(server: TwoWorkers) -> None:
    before = server.models(0)
    server.swap(0, "fresh", canary=0.5, minutes=10)
    until(lambda: server.canaries() == ["fresh", "fresh"])
    found = server.models(0)
    assert server.models(1) == found and [export for export, _ in found.values()] == [e for e, _ in before.values()]
    tried = [user for user in USERS if found[user] == ("one", "fresh")]
    assert 0 < len(tried) < sum(export == "one" for export, _ in found.values())
    server.ask(1, "POST", "/v1/recommend", user=tried[0], k=1)
    until(lambda: server.counts(0).get("one+canary") == 1)
    server.swap(1, "one")
    until(lambda: server.canaries() == [None, None])
    assert server.models(0) == server.models(1) == before


def test_a_canary_whose_recall_falls_at_one_worker_is_rolled_back_at_both(server: TwoWorkers) -> None:
    before = server.models(1)
    server.swap(0, "wrong", canary=0.5, minutes=10)
    until(lambda: server.canaries() == ["wrong", "wrong"])  # nobody has asked it, so nothing is measured
    assert ("one", "wrong") in server.models(1).values()
    until(lambda: server.canaries() == [None, None])
    assert "wrong: rolled back: recall@100 has fallen to 0." in server.said()
    assert server.models(0) == server.models(1) == before
