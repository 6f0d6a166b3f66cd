"""The tools of a study: what they run, what they do not run again, what they refuse."""

from __future__ import annotations

import io
import json
import runpy
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from types import SimpleNamespace
from typing import TextIO

import numpy as np
import pytest
import yaml

from flm_torchrec import products
from flm_torchrec.cli import main
from flm_torchrec.config import load_config
from flm_torchrec.data.dataset import PreparedData
from flm_torchrec.export.tower.reader import TowerQuery
from tests.conftest import ROOT
from tests.processes import Forked, Peer, forked
from tools.benchmarks import memory
from tools.studies import ablate

QUICK = {"model.dim": 8, "model.layers": 1, "train.batch_size": 32, "train.max_steps": 3, "eval.ks": [10]}


def tool(name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    process = Forked([str(ROOT / "tools" / name), *arguments])
    out, err = process.communicate(timeout=240)
    return subprocess.CompletedProcess(arguments, process.poll() or 0, out, err)


def study(name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """A tool of tools/studies in this process. The commands that it starts are forked."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.setattr(sys, "argv", [name, *arguments])
        patch.setattr(subprocess, "run", _run_forked)
        try:
            runpy.run_path(str(ROOT / "tools" / "studies" / name), run_name="__main__")
        except SystemExit as ended:
            code = int(ended.code or 0)
    return subprocess.CompletedProcess(arguments, code, out.getvalue(), err.getvalue())


def _run_forked(
    command: list[str], stdout: TextIO | None = None, env: dict[str, str] | None = None, **streams: object
) -> subprocess.CompletedProcess[str]:
    """`subprocess.run` of a `python -m …`: both its streams into one file, or captured."""
    assert streams == ({"stderr": subprocess.STDOUT} if stdout else {"capture_output": True, "text": True})
    process = forked(command, **(env or {}))
    told = process.communicate(timeout=240)
    if stdout:
        stdout.writelines(told)
    return subprocess.CompletedProcess(command, process.poll() or 0, *told)


def write_study(file: Path, data: Path, **changes: object) -> None:
    config = file.with_name("config.yaml")
    config.write_text(yaml.safe_dump({"data": {"path": str(data)}}))
    alone = {"loss.collaborative": 0, "loss.sequential": 0, "train.select": "content/ndcg@10"}
    variants = {"all heads": {}, "content alone": alone}
    file.write_text(yaml.safe_dump({"config": str(config), "settings": {**QUICK, **changes}, "variants": variants}))


@pytest.mark.slow
def test_a_study_is_run_once_and_told_in_markdown(small: PreparedData, tmp_path: Path) -> None:
    file, runs = tmp_path / "study.yaml", tmp_path / "runs"
    write_study(file, small.path)
    command = [str(file), "--output", str(runs), "--seeds", "0", "1"]
    done = study("ablate.py", *command)
    assert done.returncode == 0, done.stderr
    rows = [[cell.strip() for cell in line.split("|")[1:4]] for line in done.stdout.splitlines()]
    assert ["all heads", "fused", "2"] in rows and ["content alone", "content", "2"] in rows
    assert not {("content alone", "sequential"), ("content alone", "fused")} & {tuple(row[:2]) for row in rows}
    assert [row[1] for row in rows].count("popularity") == 1
    assert " ± " in done.stdout

    checkpoints = {f: f.stat().st_mtime_ns for f in runs.rglob("meta.json")}
    (runs / "all-heads-1" / "evaluation-valid.json").unlink()
    again = study("ablate.py", *command)
    assert again.stdout == done.stdout
    assert {f: f.stat().st_mtime_ns for f in runs.rglob("meta.json")} == checkpoints

    ensemble = tool("studies/ensemble.py", str(runs / "all-heads-0"), str(runs / "all-heads-1"))
    assert ensemble.returncode == 0, ensemble.stderr
    alone = json.loads((runs / "all-heads-1" / "evaluation-valid.json").read_text())["table"]["fused"]
    rows = [line.split(" | ") for line in ensemble.stdout.splitlines()]
    assert [row[0] for row in rows[2:]] == [f"| {runs}/all-heads-0", f"| {runs}/all-heads-1", "| together"]
    assert rows[3][1:] == [f"{alone['hr@10']:.4f}", f"{alone['ndcg@10']:.4f} |"]

    timed = tool("benchmarks/eval.py", "--run", str(runs / "all-heads-0"), "--rounds", "1")
    assert timed.returncode == 0, timed.stderr
    assert "ranks and the best ten / matmul and top-k alone: " in timed.stdout

    write_study(file, small.path, **{"model.dropout": 0.4})
    refused = study("ablate.py", *command)
    assert refused.returncode == 2 and "other settings" in refused.stderr and len(refused.stderr.splitlines()) == 1


def test_a_row_of_some_seeds_alone_is_a_mean_over_these(monkeypatch: pytest.MonkeyPatch) -> None:
    """Validation may choose a mixture with one seed, which has a row for its one vector, and a sum with another."""
    tables = [{"fused": {"mrr": 0.1}}, {"fused": {"mrr": 0.3}, "fused, one vector": {"mrr": 0.2}}]
    monkeypatch.setattr(ablate, "result_of", lambda run, split: {"table": tables[run.seed]})
    runs = [ablate.StudyRun("all", seed, load_config(None, [])) for seed in (0, 1)]
    rows = ablate.table(runs, "test", ["mrr"]).splitlines()[2:]
    assert rows == ["| all | fused | 2 | 0.2000 ± 0.1414 |", "| all | fused, one vector | 1 | 0.2000 |"]


def test_a_baseline_has_one_row_for_all_variants(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ablate, "result_of", lambda run, split: {"table": {"content-kNN": {"mrr": 0.1}}})
    runs = [ablate.StudyRun(variant, 0, load_config(None, [])) for variant in ("one", "other")]
    assert ablate.table(runs, "test", ["mrr"]).splitlines()[2:] == ["|  | content-kNN |  | 0.1000 |"]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"model.dimm": 3}, "did you mean 'dim'"),
        ({"model.dim": 7}, "model.dim: must be a multiple of 4 from 4 to 65,536, not 7"),
        ({"without": "context"}, "'context' is no piece"),
    ],
)
def test_a_wrong_study_is_refused_before_anything_runs(
    small: PreparedData, tmp_path: Path, change: dict, told: str
) -> None:
    file = tmp_path / "study.yaml"
    write_study(file, small.path, **change)
    done = study("ablate.py", str(file), "--output", str(tmp_path / "runs"))
    assert done.returncode == 2 and told in done.stderr and not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_fine_tuning_is_studied_by_share(small: PreparedData, tmp_path: Path) -> None:
    source = tmp_path / "source"
    settings = [part for key, value in QUICK.items() for part in (f"--{key}", str(value))]
    split = ["--data.split", "cold-start", "--data.holdout", "0.3"]
    assert main(["train", "--data.path", str(small.path), "--train.run", str(source), *split, *settings]) == 0
    command = ["--source", str(source), "--output", str(tmp_path / "study"), "--shares", "0.3", "1"]
    options = ["--", "--finetune.cohort", "new", "--data.split", "leave-one-out"]
    done = study("finetune_study.py", *command, *options)
    assert done.returncode == 0, done.stderr
    rows = [line.split(" | ")[:2] for line in done.stdout.splitlines()[2:]]
    starts = ["pretrained, tuned", "pretrained, as it is", "from scratch"]
    assert rows == [[f"| {share}", start] for share in ("30%", "100%") for start in starts]
    assert (tmp_path / "study" / "study.svg").read_text().startswith("<?xml")
    assert study("finetune_study.py", *command, *options).stdout == done.stdout
    wrong = study("finetune_study.py", *command, "--metrics", "fused/ndgc@10", *options)
    assert wrong.returncode == 1 and "no 'fused/ndgc@10'" in wrong.stderr


@pytest.mark.slow
def test_transfer_is_studied_beside_the_same_from_scratch(domain_folders: list[Path], tmp_path: Path) -> None:
    settings = [f"--{key}={value}" for key, value in QUICK.items() if key != "train.max_steps"]
    output = tmp_path / "study"
    books, shop = map(str, domain_folders)
    command = ["--sources", books, "--target", shop, "--output", str(output), "--shared-users"]
    few = ["--shares", "0.3", "--steps", "2", "--pretrain", "--train.max_steps 2"]
    refused = study("transfer.py", *command, "--shares", "0.3", "1", "--steps", "2", "--", *settings)
    assert refused.returncode == 2 and "1 numbers for 2 shares" in refused.stderr and not output.exists()
    done = study("transfer.py", *command, *few, "--", *settings)
    assert done.returncode == 0, done.stderr
    rows = [line.split(" | ")[:4] for line in done.stdout.split("\n\n")[0].splitlines()[2:]]
    kinds = {"all": "fused", "warm": "fused", "cold user": "fused", "cold item": "content alone"}
    kinds |= {"shared user": "fused", "other user": "fused"}
    assert rows == [["| 30%", kind, row, "1"] for kind, row in kinds.items()]
    scratch = json.loads((output / "0.3-0/scratch/evaluation-test.json").read_text())
    assert f"{scratch['segments']['cold item']['content alone']['ndcg@10']:.4f}" in done.stdout
    near = scratch["segments"]["warm"]["content-kNN"]["ndcg@10"]
    assert next(line for line in done.stdout.splitlines() if "| warm |" in line).endswith(f"| {near:.4f} |")
    tables = [scratch["segments"][kind]["fused"] for kind in ("shared user", "other user")]
    assert min(t["hr@10"] for t in tables) <= scratch["table"]["fused"]["hr@10"] <= max(t["hr@10"] for t in tables)
    compared = [line.split(" | ")[2] for line in done.stdout.split("\n\n")[1].splitlines()[2:]]
    assert compared == ["all", "shared user", "other user"]
    assert (output / "transfer.svg").read_text().startswith("<?xml")
    # Nothing that is finished is done again.
    written = (output / "0.3-0/finetune.json").stat().st_mtime_ns
    assert study("transfer.py", *command, *few, "--", *settings).stdout == done.stdout
    assert (output / "0.3-0/finetune.json").stat().st_mtime_ns == written


@pytest.mark.slow
def test_training_is_timed_beside_plain_pytorch(
    small: PreparedData, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    few = ["--rounds", "1", "--steps", "1", "--threads", "1", "--dim", "8", "--length", "6", "--batch-size", "32"]
    few += ["--quality", "--limit", "0.001", "--validate-every", "2", "--roofline"]
    monkeypatch.setattr(sys, "argv", ["train.py", "--data", str(small.path), *few])
    benchmark = runpy.run_path(str(ROOT / "tools" / "benchmarks" / "train.py"))["main"]
    streams = {"Popen": Peer, "PIPE": subprocess.PIPE, "DEVNULL": subprocess.DEVNULL}
    monkeypatch.setitem(benchmark.__globals__, "subprocess", SimpleNamespace(**streams))
    benchmark()
    told = capsys.readouterr().out
    rows = [line.split(" | ")[0].replace("*", "") for line in told.splitlines()]
    rows = [row for row in rows if row.startswith(("| ours", "| plain"))]
    assert len(rows) == 15 and len(set(rows)) == 5  # speed, ratios and quality; three of ours and two of the others
    assert told.count("share of the roofline") == 3


def test_products_are_timed_where_native_code_makes_them() -> None:
    timed = tool("benchmarks/products.py", "--rounds", "1")
    if not isinstance(products._library(), str):
        assert timed.returncode == 0 and len(timed.stdout.splitlines()) == 5, timed.stderr
        assert all("by PyTorch" in line for line in timed.stdout.splitlines())
    else:
        assert timed.returncode == 1 and timed.stderr.startswith("PyTorch multiplies here: ")


@pytest.mark.slow
def test_memory_of_tables_is_counted(tmp_path: Path) -> None:
    counted = tool("benchmarks/tables.py", "--memory", "20000", "--dim", "8")
    assert counted.returncode == 0, counted.stderr
    found = json.loads(counted.stdout.splitlines()[-1])
    assert found["tables"] == 2 * 20000 * 8 * 4 and found["optimizer"] == 2 * 20000 * 4
    assert found["grew by"] > found["tables"] and found["activations"] > 0
    assert found["counted"] == sum(found.values()) - found["counted"] - found["grew by"]


@pytest.mark.parametrize(
    "file",
    sorted(file for file in (ROOT / "tools").rglob("*.py") if '__name__ == "__main__"' in file.read_text()),
    ids=lambda file: "-".join(file.relative_to(ROOT / "tools").with_suffix("").parts),
)
def test_every_tool_has_a_help(file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", [str(file), "--help"])
    monkeypatch.syspath_prepend(str(file.parent))
    monkeypatch.setenv("MPLBACKEND", "agg")
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(file), run_name="__main__")
    assert stop.value.code == 0 and len(capsys.readouterr().out) > 60


def test_commands_of_a_page_are_found_whole() -> None:
    checker = runpy.run_path(str(ROOT / "tools" / "check_readme.py"))
    heredoc = "mkdir x && python - <<'PY'\nprint(1)  \n# kept\nPY"
    page = f"```sh\n# a comment\nflm a \\\n    --b   # why\n{heredoc}\n\nflm c\n```\n"
    other = "text\n```text\nflm not a command\n```\n```sh\nlast\n```\n"
    found = [command for block in checker["fences"](page + other) for command in checker["commands"](block)]
    assert found == ["flm a \\\n    --b   # why", heredoc, "flm c", "last"]
    with pytest.raises(SystemExit, match="write ```sh"):
        list(checker["fences"]("```\nflm d\n```\n"))


def test_a_membership_test_ranks_events_and_compares_all_pairs(small: PreparedData) -> None:
    tool = runpy.run_path(str(ROOT / "tools" / "studies" / "membership.py"))
    assert tool["auc"](np.array([3.0, 2.0]), np.array([1.0, 2.0]))[0] == 0.875
    rng = np.random.default_rng(1)
    middle, low, high = tool["auc"](rng.normal(1, 1, 80), rng.normal(0, 1, 80))
    assert low < 0.76 < high and low < middle < high and high - low < 0.2  # 0.76 = P(N(1, 1) > N(0, 1))

    asked: list[TowerQuery] = []
    items = small.schema.items
    by_id = np.arange(items, 0, -1, dtype=np.float32)  # the lower the id, the better

    def represent(queries: list[TowerQuery]) -> list[TowerQuery]:
        asked.extend(queries)
        return queries

    loaded = SimpleNamespace(
        size=items,
        user_of={"u3": 3},
        tower=SimpleNamespace(max_history=4),
        vectors=lambda rows: rows,
        represent=represent,
        query=lambda found, head: SimpleNamespace(score=lambda vectors: by_id.copy()),
    )
    user = small.user_keys.index("u3")
    (score,) = tool["scores"](loaded, small, tool["Probe"](np.array([user]), "fused", True))
    events = small.item[small.offsets[user] : small.offsets[user + 1]].tolist()
    assert len(asked) == len(events) - 3 and {q.user for q in asked} == {3} and max(len(q.history) for q in asked) == 5
    ranks = [1 + len(set(range(events[e])) - set(events[:e])) for e in range(1, len(events) - 2)]
    assert score == pytest.approx(-np.log(ranks).mean())
    with pytest.raises(SystemExit, match="give at most"):
        tool["drawn"](small, 100, 1)


def test_memory_goes_on_where_it_was_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ran: list[str] = []

    def watch(command: list[str]) -> memory.Peak:
        if "export" in command and not ran.count("export"):
            ran.append("export")
            raise SystemExit("export: ended with 2")
        ran.append(command[3])
        return memory.Peak(2.0, 1.0, 3 << 20, 4 << 20)

    monkeypatch.setattr(memory, "watch", watch)
    options = ["--events", "30", "--users", "5", "--items", "4", "--folder", str(tmp_path)]
    options += ["--commands", "prepare", "export", "follow"]
    with pytest.raises(SystemExit, match="ended with 2"):
        memory.main(options)
    logs = (tmp_path / "30/logs/part-00000.parquet").stat()
    assert memory.main(options) == 0 and memory.main(options) == 0
    assert ran == ["prepare", "export", "export", "follow"]
    assert (tmp_path / "30/logs/part-00000.parquet").stat() == logs
    assert capsys.readouterr().out.splitlines()[-1] == "| 30 | 5 | 4 | follow | 2 | 1 | 3 | 4 |"
    assert memory.main([*options, "--memory", "3GiB", "--commands", "prepare"]) == 0 and ran[-1] == "prepare"
