"""The pieces of a run folder, each as a section of a page. A missing piece is reported and is no error."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from flm_torchrec.charts import Curves
from flm_torchrec.config import Config
from flm_torchrec.config.heads import HEADS
from flm_torchrec.documents import Unreadable, read_json
from flm_torchrec.pages import PageTable, Section

NUMBER = 4
"""Bytes of a float32 weight."""
UNITS = {"input_wait": "share of the time", "lr_factor": "part of the learning rate"}
"""By metric, what its axis counts where the name does not say it."""
PACKAGES = ("flm_torchrec", "torch", "torchrec", "fbgemm-gpu", "fbgemm-gpu-cpu", "pyarrow", "faiss-cpu")


class Missing(Exception):
    """A piece is missing or unreadable: why, and which command writes it."""


def sections_of(pieces: dict[str, Callable[[], Section]]) -> tuple[list[str], list[Section]]:
    """One line for each missing piece, and the sections of the other pieces."""
    missing, sections = [], []
    for name, piece in pieces.items():
        try:
            sections.append(piece())
        except Missing as error:
            missing.append(f"{name}: {error}")
        except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RecursionError) as error:
            missing.append(f"{name}: not as it is written ({type(error).__name__}: {error})")
    return missing, sections


def settings(config: Config) -> Section:
    """The settings that differ from the defaults."""
    default = Config().by_name()
    made = config.by_name().items()
    rows = [(name, plain(value), plain(default[name])) for name, value in made if value != default[name]]
    notes = () if rows else ("all settings are the defaults",)
    grid = PageTable("settings that differ from the defaults", ("setting", "here", "default"), rows)
    return Section("Configuration", notes, [grid] if rows else [])


def curves(run: Path) -> Section:
    """All metrics of metrics.jsonl over steps. Losses share a plot, and so do the heads by metric.

    Raises:
        Missing: there is no line of metrics.
    """
    file = run / "metrics.jsonl"
    series: dict[str, tuple[list[float], list[float]]] = {}
    broken = 0
    for line in _text(file, "'flm train' writes it").splitlines():
        try:
            record = json.loads(line)
            step = float(record.pop("step"))
            values = {name: float(value) for name, value in record.items() if name != "seconds"}
        except (ValueError, TypeError, KeyError, AttributeError):
            broken += 1
            continue
        for name, value in values.items():
            x, y = series.setdefault(name, ([], []))
            x.append(step)
            y.append(value)
    if not series:
        raise Missing(f"{file} has no line of metrics; let the training log once")
    plots: dict[str, dict[str, tuple[list[float], list[float]]]] = {}
    for name, points in series.items():
        title, line = _plot_and_line(name)
        plots.setdefault(title, {})[line] = points
    notes = [f"{broken} lines of metrics.jsonl are no records and left out"] if broken else []
    return Section("Curves", notes, [Curves(*_named(title), lines) for title, lines in plots.items()])


def ranked_for(found: Mapping[str, Any]) -> str:
    """What an evaluation ranked for how many users, and of how many these were drawn; older files have
    their number alone."""
    return str(found.get("ranked") or f"{int(found['users']):,} users, every item ranked")


def evaluations(run: Path) -> Section:
    """The tables of each evaluation-*.json: heads and baselines, over all examples and by segment.

    Raises:
        Missing: there is none, or one cannot be read.
    """
    files = sorted(run.glob("evaluation-*.json"))
    if not files:
        raise Missing(f"no evaluation-*.json; 'flm evaluate --run {run}' writes one")
    grids = []
    for file in files:
        content = record_of(file, f"'flm evaluate --run {run}' writes it")
        grids.append(_metrics(f"{content['split']}: {ranked_for(content)}", content["table"]))
        grids += [_metrics(f"of {content['split']}, '{label}'", t) for label, t in content.get("segments", {}).items()]
        if lists := content.get("lists"):
            grids.append(_metrics(f"what is recommended, {content['split']}", lists, best=False))
    return Section("Evaluation", parts=grids)


def best(run: Path) -> Section:
    """The best checkpoint: step, validation metrics, weights of the heads in the fusion, and the mixture if one scores.

    Raises:
        Missing: there is none.
    """
    content = record_of(run / "checkpoints/best/meta.json", "training has not come to its first validation, or failed")
    rows = [("step", f"{content['step']:,}")]
    rows += [(f"weight of {head}", f"{weight:.3g}") for head, weight in content.get("fusion", {}).items()]
    rows += [
        (f"{part} of {head} in the mixture", f"{value:.3g}")
        for part, values in content.get("mixture", {}).items()
        for head, value in zip(HEADS, values, strict=True)
    ]
    valid: dict[str, dict[str, float]] = {}
    for name, value in content.get("valid", {}).items():
        head, _, metric = name.rpartition("/")
        valid.setdefault(head, {})[metric] = value
    unweighted = "no fusion weights: model.fusion late and sum have them, where validation ranks items"
    notes = () if "fusion" in content else (unweighted,)
    grids = [PageTable("", ("", ""), rows), *([_metrics("validation", valid)] if valid else [])]
    return Section("Best checkpoint and fusion", notes, grids)


def plan(run: Path) -> Section:
    """The sharding plan: which rank has which rows, by table and by rank.

    Raises:
        Missing: there is none.
    """
    content = record_of(run / "plan.json", "'flm train' writes it")
    rows, held = [], dict.fromkeys(range(content["world_size"]), 0)
    for name, table in content["tables"].items():
        shards = table["shards"]
        bytes_ = [s["size"][0] * s["size"][1] * NUMBER for s in shards]
        for shard, size in zip(shards, bytes_, strict=True):
            held[shard["rank"]] = held.get(shard["rank"], 0) + size
        ends = [[o + n for o, n in zip(s["offset"], s["size"], strict=True)] for s in shards] or [[0, 0]]
        ranks = ", ".join(map(str, sorted({s["rank"] for s in shards})))
        shape = f"{max(e[0] for e in ends):,} × {max(e[1] for e in ends)}"
        rows.append((name, table["sharding_type"], table["kernel"], ranks, shape, _size(sum(bytes_))))
    header = ("table", "sharding", "kernel", "ranks", "rows × width", "float32 weights")
    by_rank = [(f"rank {rank}", _size(size)) for rank, size in held.items()]
    return Section(
        "Sharding plan", parts=[PageTable("", header, rows), PageTable("", ("", "float32 weights"), by_rank)]
    )


def data_report(folder: Path | str) -> Section:
    """report.json of the run's prepared data.

    Args:
        folder: of the prepared data, or why they are missing.

    Raises:
        Missing: there is no report.
    """
    if isinstance(folder, str):
        raise Missing(folder)
    content = record_of(folder / "report.json", "'flm prepare' writes it")
    dropped = content.pop("dropped", {})
    rows = [(_words(name), plain(value)) for name, value in content.items() if not isinstance(value, dict)]
    parts = [PageTable(str(folder), ("", ""), rows)]
    if dropped:
        lines = [(why, plain(d["rows"]), "; ".join(map(str, d["examples"][:2]))) for why, d in dropped.items()]
        parts.append(PageTable("rows dropped", ("why", "rows", "for example"), lines))
    parts += [_nested(_words(name), value) for name, value in content.items() if value and isinstance(value, dict)]
    return Section("Data", parts=parts)


def versions() -> Section:
    """Versions of the installed packages that matter for results."""
    rows = []
    for package in PACKAGES:
        try:
            rows.append((package, metadata.version(package)))
        except metadata.PackageNotFoundError:
            continue
    note = "Where this page was made; a run does not record those it was trained with."
    return Section("Versions", [note], [PageTable("", ("package", "version"), rows)])


def _plot_and_line(name: str) -> tuple[str, str]:
    """The plot of a metric, and its line there: valid/fused/ndcg@10 is the line 'fused' of the plot 'valid ndcg@10'."""
    first, _, rest = name.partition("/")
    head, _, metric = rest.partition("/")
    if metric:
        return f"{first} {metric}", head
    return (first, rest) if rest else (name, name)


def _named(title: str) -> tuple[str, str, str]:
    """Title of a plot, and the names of its axes."""
    first, _, metric = title.partition(" ")
    if first == "valid" and metric:
        return f"{metric} on validation", "training step", metric
    return _words(title), "training step", UNITS.get(title, _words(metric or first))


def _metrics(title: str, table: dict[str, dict[str, Any]], best: bool = True) -> PageTable:
    """A row for each scorer and a column for each metric, the largest number of each column in bold if `best`."""
    columns = list(dict.fromkeys(column for metrics in table.values() for column in metrics))
    rows = [(name, *(_number(metrics.get(column, "")) for column in columns)) for name, metrics in table.items()]
    strong = set()
    for n, column in enumerate(columns, 1):
        values = [metrics.get(column) for metrics in table.values()]
        most = max((value for value in values if isinstance(value, float)), default=None)
        strong |= {(row, n) for row, value in enumerate(values) if value == most and most is not None}
    return PageTable(title, ("", *columns), rows, strong if best and len(rows) > 1 else ())


def _nested(title: str, content: dict[str, Any]) -> PageTable:
    """A record as a table; a record of records with a row for each, and a column for each of their names."""
    inner = [value for value in content.values() if isinstance(value, dict)]
    if not inner or len(inner) < len(content):
        return PageTable(title, ("", ""), [(_words(name), plain(value)) for name, value in content.items()])
    columns = list(dict.fromkeys(name for value in inner for name in value))
    rows = [(_words(name), *(plain(value.get(c, "")) for c in columns)) for name, value in content.items()]
    return PageTable(title, ("", *map(_words, columns)), rows)


def plain(value: Any) -> str:
    """A value of a document or a setting as a reader writes it: no brackets, quotes or braces."""
    if value is None or isinstance(value, bool):
        return {None: "none", True: "yes", False: "no"}[value]
    if isinstance(value, dict):
        return "; ".join(f"{name}: {plain(one)}" for name, one in value.items()) or "none"
    if isinstance(value, list | tuple):
        return ", ".join(map(plain, value)) or "none"
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _words(name: str) -> str:
    return name.replace("_", " ")


def _number(value: Any) -> str:
    return f"{value:.4f}" if isinstance(value, float) else str(value)


def _size(amount: float) -> str:
    return f"{amount / 2**20:,.2f} MiB"


def _text(file: Path, otherwise: str) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise Missing(f"{file} is not there; {otherwise}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise Missing(f"{file} is not readable ({error})") from error


def record_of(file: Path, otherwise: str) -> dict[str, Any]:
    """A file of one JSON record.

    Args:
        otherwise: what writes the file.

    Raises:
        Missing: there is none, or it holds something else.
    """
    if not file.exists():
        raise Missing(f"{file} is not there; {otherwise}")
    try:
        found = read_json(file)
    except Unreadable as error:
        raise Missing(f"{file} is not readable ({error})") from error
    if not isinstance(found, dict):
        raise Missing(f"{file} holds no record")
    return found
