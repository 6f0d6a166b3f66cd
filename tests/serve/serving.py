"""Exports that can be served, of models with the weights they begin with: nothing here depends on learning."""

from __future__ import annotations

import json
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from fastapi.testclient import TestClient

from flm_torchrec.config import load_config
from flm_torchrec.data.dataset import PreparedData
from flm_torchrec.data.splits import everyone
from flm_torchrec.export.manifest import FILE, IndexKind
from flm_torchrec.export.tower.reader import TowerQuery
from flm_torchrec.export.tower.writer import Precision, write_tower
from flm_torchrec.export.write import ExportOptions, ExportSource, export
from flm_torchrec.serve.access import read_keys
from flm_torchrec.serve.connections import ConnectionLimits, listening
from flm_torchrec.serve.server import Certificate, Tell, http_server
from flm_torchrec.serve.service import Service
from flm_torchrec.training.gathered import GatheredModel
from flm_torchrec.training.job import Job, open_job

ADMIN_KEY = "the-key-of-the-tests"
KEYS = read_keys(f"admin {ADMIN_KEY} tests", "tests")
AS_ADMIN = {"Authorization": f"Bearer {ADMIN_KEY}"}


def copy_export(export: Path, folder: Path) -> None:
    """A copy under another name, which is its model's version too: writing an export takes seconds."""
    shutil.copytree(export, folder)
    manifest = json.loads((folder / FILE).read_text())
    (folder / FILE).write_text(json.dumps({**manifest, "model_version": folder.name}))


def write_export(
    data: PreparedData,
    folder: Path,
    seed: int = 1,
    index: IndexKind = "flat",
    change: Callable[[Job], None] = lambda job: None,
    precision: Precision = "int8",
) -> None:
    """An export with a tower; its model's version is the folder's name. `change` may set its weights."""
    settings = ["model.dim=16", "model.layers=1", "data.max_history=7", "distributed.device=cpu", f"train.seed={seed}"]
    config = load_config(None, settings)
    with open_job(config, data) as job:
        change(job)
        encoder, model = job.encoder(everyone(data)), GatheredModel(job)
        source = ExportSource(
            data,
            encoder,
            encoder.assembler.stats.items > 0,
            folder.name,
            beside=lambda fresh: write_tower(data, model, True, precision, fresh),
        )
        export(source, job.comm, folder, ExportOptions(index=index))


def post(client: TestClient, path: str, **body: Any) -> dict[str, Any]:
    """The answer to a request that is not refused."""
    response = client.post(path, json=body)
    assert response.status_code == 200, response.text
    return response.json()


def known(service: Service, user: str) -> TowerQuery:
    """What the tower is asked for a known user."""
    row = service.loaded.user_of[user]
    return TowerQuery(service.loaded.tower.known_history(row), row)


@contextmanager
def running(app: FastAPI, tls: Certificate | None = None, most: int = 64) -> Iterator[int]:
    """The port on 127.0.0.1 of a server of the app, over HTTP or HTTPS, as `flm serve` runs it."""
    bound, ready = listening("127.0.0.1", 0), threading.Event()
    server = http_server(app, ConnectionLimits(most), tls, Tell(ready.set))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]})
    thread.start()
    assert ready.wait(60)
    try:
        yield bound.getsockname()[1]
    finally:  # else the thread would keep the process of the tests
        server.should_exit = True
        thread.join()


def certificate(folder: Path, name: str) -> Certificate:
    """A certificate of localhost that it signs itself, and its key."""
    made = Certificate(folder / f"{name}.pem", folder / f"{name}.key")
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    files = ["-keyout", str(made.key), "-out", str(made.certificate), "-days", "1", "-subj", "/CN=localhost"]
    subprocess.run([*command, *files, "-addext", "subjectAltName=DNS:localhost"], check=True, capture_output=True)
    return made
