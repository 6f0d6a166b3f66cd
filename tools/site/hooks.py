"""Hooks of `mkdocs build`: pages from outside docs/, pages generated from the code, and links between all of them.

The sources stay where their readers look for them: README.md and others at the top of the repository, examples beside
their scripts, tutorials as notebooks. The site shows them all.
"""

from __future__ import annotations

import argparse
import json
import posixpath
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

from flm_torchrec.cli.main import _parser
from tools.site.http_api import cell, document, http_page

ROOT = Path(__file__).resolve().parents[2]
ELSEWHERE = {
    "readme.md": "README.md",
    "contributing.md": "CONTRIBUTING.md",
    "changelog.md": "CHANGELOG.md",
    "security.md": "SECURITY.md",
    "examples.md": "examples/README.md",
}
"""Pages of the site, and their sources outside docs/."""
NOTEBOOKS = {f"tutorials/{path.stem}.md": f"notebooks/{path.name}" for path in (ROOT / "notebooks").glob("*.ipynb")}
LINK = re.compile(r"(?<!!)\[((?:[^\[\]]|\[[^\]]*\])*)\]\((?!https?:|#)([^)#\s]+)(#[^)\s]*)?\)")
FENCE = re.compile(r"(^```.*?^```$)", re.MULTILINE | re.DOTALL)
HEADER = "| option | meaning |\n|---|---|"
MOST_LINES = 30
"""Of an output of a notebook that are shown."""


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are not in docs/."""
    _, commands = _parser()
    contents = {page: (ROOT / source).read_text() for page, source in ELSEWHERE.items()}
    contents |= {page: notebook_page(json.loads((ROOT / source).read_text())) for page, source in NOTEBOOKS.items()}
    contents |= {"commands.md": commands_page(commands), "settings.md": settings_page(commands.choices["train"])}
    contents["http-api.md"] = http_page(document())
    for page, content in contents.items():
        files.append(File.generated(config, page, content=content))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Let links lead to pages of the site. A link to another file of the repository becomes its text."""
    here = page.file.src_uri
    source = sources().get(here, f"docs/{here}")

    def linked(found: re.Match[str]) -> str:
        text, target, anchor = found[1], found[2], found[3] or ""
        path = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
        to = pages().get(path, path.removeprefix("docs/") if path.startswith("docs/") else "")
        if to:
            return f"[{text}]({posixpath.relpath(to, posixpath.dirname(here) or '.')}{anchor})"
        return text if (ROOT / path).exists() else found[0]  # mkdocs refuses what leads nowhere

    parts = FENCE.split(markdown)
    return "".join(part if part.startswith("```") else LINK.sub(linked, part) for part in parts)


def sources() -> dict[str, str]:
    """By page of the site, its source, for those outside docs/."""
    return {**ELSEWHERE, **NOTEBOOKS}


def pages() -> dict[str, str]:
    """By path in the repository, the page of the site."""
    return {source: page for page, source in sources().items()}


def notebook_page(notebook: dict[str, Any]) -> str:
    """A notebook as Markdown: its texts, its code and what the code has printed."""
    return "\n\n".join(part for cell in notebook["cells"] for part in _cell(cell))


def _cell(cell: dict[str, Any]) -> Iterator[str]:
    text = "".join(cell["source"])
    if cell["cell_type"] == "markdown":
        yield text
        return
    yield f"```python\n{text}\n```"
    for output in cell["outputs"]:
        printed = "".join(output.get("text") or output.get("data", {}).get("text/plain", "")).rstrip()
        if printed:
            shown = printed.splitlines()
            more = ["…"] if len(shown) > MOST_LINES else []
            yield "\n".join(["```text", *shown[:MOST_LINES], *more, "```"])


def commands_page(commands: argparse._SubParsersAction) -> str:
    """Every command with its options. Settings such as `--train.epochs` have a page of their own."""
    parts = [
        "# Commands",
        "Written from the parsers of `flm`; `flm COMMAND --help` prints the same. `flm --version` prints the versions.",
    ]
    for name, parser in commands.choices.items():
        parts += [f"## flm {name}", parser.description or ""]
        takes_settings = any("." in action.dest for action in parser._actions)
        if takes_settings:
            parts.append("It also takes settings as `--section.field VALUE`: see [Settings](settings.md).")
        for group in parser._action_groups:
            actions = [action for action in group._group_actions if "." not in action.dest and action.dest != "help"]
            if actions:
                title = group.title or ""
                parts += [*([] if title in ("options", "positional arguments") else [f"**{title}**"])]
                parts.append(table(parser, actions))
    return "\n\n".join(parts)


def settings_page(train: argparse.ArgumentParser) -> str:
    """Every setting of a training, by section."""
    parts = [
        "# Settings",
        "A setting is `section.field` in a file for `--config`, `--section.field VALUE` on the command line, and"
        " `flm.train(…, section={'field': value})` in Python. This page is written from the code.",
    ]
    for group in train._action_groups:
        actions = [action for action in group._group_actions if "." in action.dest]
        if actions:
            parts += [f"## {group.title}", *([group.description] if group.description else []), table(train, actions)]
    return "\n\n".join(parts)


def table(parser: argparse.ArgumentParser, actions: Iterable[argparse.Action]) -> str:
    """Options as a Markdown table."""
    return "\n".join([HEADER, *(f"| {_written(action)} | {_help(parser, action)} |" for action in actions)])


def _written(action: argparse.Action) -> str:
    """The option as it is typed, with what stands for its value."""
    name = ", ".join(action.option_strings)
    if action.nargs == 0:
        return f"`{name}`"
    choices = "{" + ",".join(map(str, action.choices)) + "}" if action.choices else ""
    value = action.metavar if isinstance(action.metavar, str) else choices or action.dest.upper()
    return f"`{name} {value}`".replace("` ", "`").replace("|", "\\|")


def _help(parser: argparse.ArgumentParser, action: argparse.Action) -> str:
    return cell(parser._get_formatter()._expand_help(action) if action.help else "")
