"""The documentation as a site: it builds without a warning, leaves nothing public out, loads nothing from elsewhere."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

import flm_torchrec as flm
from flm_torchrec import client, errors
from flm_torchrec.cli.main import _parser
from flm_torchrec.config.load import sections
from flm_torchrec.serve import messages
from flm_torchrec.serve.access import role_of
from tests.conftest import ROOT
from tests.test_docs import names
from tools.site.http_api import anchor, document, schemas

pytest.importorskip("mkdocstrings", reason="no mkdocs: make docs")
pytest.importorskip("material", reason="no mkdocs-material: make docs")

from mkdocs.commands.build import build
from mkdocs.config import load_config
from mkdocs.exceptions import Abort


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built as `make docs` does; a warning is an error."""
    folder = tmp_path_factory.mktemp("site")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        build(load_config(str(ROOT / "mkdocs.yml"), site_dir=str(folder)))
    return folder


def public(prefix: str, item: type) -> Iterator[str]:
    """The full name of a class and of each public method that it defines."""
    yield prefix
    for name, member in vars(item).items():
        if not name.startswith("_") and (inspect.isfunction(member) or isinstance(member, property | classmethod)):
            yield f"{prefix}.{name}"


def api() -> Iterator[str]:
    """Every public function, class and method of the Python API."""
    places = {"prepare": "flm_torchrec.api.data", "train": "flm_torchrec.api.run"}
    for name in flm.__all__:
        item = getattr(flm, name)
        if inspect.isclass(item):
            yield from public(f"{item.__module__}.{name}", item)
        else:
            yield f"{places[name]}.{name}"
    for module in (errors, client):
        for name, item in vars(module).items():
            if inspect.isclass(item) and item.__module__ == module.__name__ and not name.startswith("_"):
                yield from public(f"{module.__name__}.{name}", item)


def test_everything_public_is_in_the_reference(site: Path) -> None:
    there = set(re.findall(r'id="(flm_torchrec\.[\w.]+)"', (site / "api" / "index.html").read_text()))
    wanted = set(api())
    assert {"flm_torchrec.api.run.Run.evaluate", "flm_torchrec.client.Client.swap"} <= wanted
    assert wanted - there == set()


def test_examples_of_docstrings_are_shown_as_code(site: Path) -> None:
    page = (site / "api" / "index.html").read_text()
    assert page.count('gp">&gt;&gt;&gt;') >= 10 and "<blockquote>" not in page


def test_every_command_and_setting_is_in_the_reference(site: Path) -> None:
    commands = (site / "commands" / "index.html").read_text()
    for name, parser in _parser()[1].choices.items():
        assert f'id="flm-{name}"' in commands
        options = {option for action in parser._actions for option in action.option_strings if "." not in option}
        assert [option for option in options - {"-h", "--help"} if option not in commands] == []
    settings = (site / "settings" / "index.html").read_text()
    wanted = [
        f"--{name}.{field}" for name, section in sections().items() if name != "finetune" for field in names(section)
    ]
    assert [setting for setting in wanted if setting not in settings] == []


def test_every_route_and_model_is_in_the_reference(site: Path) -> None:
    """The routes of the app, the messages that they take, and the errors that they announce."""
    page = (site / "http-api" / "index.html").read_text()
    described = document()
    operations = [(p, m, o) for p, methods in described["paths"].items() for m, o in methods.items()]
    assert {p for p, _, _ in operations} >= {"/v1/recommend", "/v1/swap", "/metrics"} and len(operations) >= 17
    for path, method, operation in operations:
        begin = page.index(f'id="{anchor(f"{method} {path}")}"')
        section = page[begin : page.index("<h2", begin + 1)]
        assert f"Key: {role_of(method.upper(), path) or 'none'}." in section, path
        wanted = [one["name"] for one in operation.get("parameters", ())]
        for schema in schemas(operation):
            wanted += schema.get("properties", ())
        assert [name for name in wanted if f"<code>{name}</code>" not in section] == [], path
        statuses = set(operation["responses"]) - {"200"}
        assert set(re.findall(r"<td>(\d{3})</td>", section)) == statuses, path
    models = {name: one for name, one in vars(messages).items() if inspect.isclass(one) and issubclass(one, BaseModel)}
    bodies = [s["title"] for _, _, operation in operations for s in schemas(operation) if "title" in s]
    left_out = set(models) - set(bodies) - {"BaseModel", "Message", "Whom", "Answered"}
    assert [name for name in left_out if f'id="{anchor(name)}"' not in page] == []
    shown = page[page.index(f'id="{anchor("Event")}"') :]
    assert all(f"<code>{field}</code>" in shown for field in messages.Event.model_fields)


def test_the_site_loads_nothing_from_elsewhere(site: Path) -> None:
    for page in site.rglob("*.html"):
        tags = re.findall(r"<(?:script|link|img|iframe)\b[^>]*>", page.read_text())
        assert [tag for tag in tags if re.search(r'(?:src|href)="(?:https?:)?//', tag)] == [], page


@pytest.mark.parametrize("link", ["none.md", "index.md#nowhere", "../NONE.md"])
def test_a_dead_link_ends_the_build(tmp_path: Path, link: str) -> None:
    docs = tmp_path / "docs"
    docs.mkdir()
    (docs / "index.md").write_text(f"# Home\n\n[a page]({link})\n")
    changed: dict[str, Any] = {
        "docs_dir": str(docs),
        "site_dir": str(tmp_path / "site"),
        "plugins": [],
        "nav": None,
        "theme": "mkdocs",
    }
    config = load_config(str(ROOT / "mkdocs.yml"), **changed)
    with pytest.raises(Abort):
        build(config)
