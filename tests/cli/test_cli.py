"""The main job end to end by its commands, and what they say when something is wrong."""

from __future__ import annotations

import dataclasses
import io
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from flm_torchrec.cli import inspect as inspect_command
from flm_torchrec.cli import main
from flm_torchrec.cli import prepare as data_command
from flm_torchrec.cli import serve as serve_command
from flm_torchrec.cli.recommend import _table
from flm_torchrec.config import load_config
from flm_torchrec.config.heads import HEADS, REPRESENTATIONS
from flm_torchrec.config.load import sections
from flm_torchrec.data.dataset import PreparedData
from flm_torchrec.terminal import PlainConsole
from flm_torchrec.train import script_arguments

TRAIN = ["train", "--data.path", "{data}", "--train.run", "{d}/r"]
TINY = ["--model.dim", "16", "--model.layers", "1", "--train.batch_size", "32", "--data.max_history", "8"]
TINY += ["--train.eval_every", "5"]


@pytest.fixture(scope="module")
def finished(small: PreparedData, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of ten steps."""
    run = tmp_path_factory.mktemp("runs") / "tiny"
    options = ["--data.path", str(small.path), "--train.run", str(run), "--train.max_steps", "10"]
    assert main(["train", *options, *TINY, "--train.log_every", "2"]) == 0
    return run


def test_a_run_folder_holds_what_it_should(finished: Path) -> None:
    assert load_config(finished / "config.yaml").train.max_steps == 10
    tables = json.loads((finished / "plan.json").read_text())["tables"]
    assert {"item_id", "item_source", "item_target", "item_context"} <= set(tables)
    assert {"user_id", "item_genre", "user_interests", "event", "gap"} <= set(tables)
    lines = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss/sequential"] for line in lines if "loss/sequential" in line]
    assert len(losses) == 5 and losses[-1] < losses[0]
    assert [line["step"] for line in lines if "valid/fused/ndcg@10" in line] == [5, 10]
    assert "step 10/10" in (finished / "train.log").read_text()
    assert list((finished / "tensorboard").iterdir())
    assert json.loads((finished / "checkpoints" / "best" / "meta.json").read_text())["step"] in (5, 10)


def test_the_job_from_run_to_recommendations(
    finished: Path, small: PreparedData, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["evaluate", "--run", str(finished)]) == 0
    table = json.loads((finished / "evaluation-test.json").read_text())["table"]
    chosen = json.loads((finished / "checkpoints" / "best" / "meta.json").read_text())
    heads = ["content", "collaborative", "sequential", "fused", *(["fused, one vector"] if "mixture" in chosen else [])]
    assert list(table) == ["popularity", "item-kNN", "Markov", "EASE-R", *heads]
    assert main(["export", "--run", str(finished), "--output", str(tmp_path / "e")]) == 0
    capsys.readouterr()
    assert main(["recommend", "--export", str(tmp_path / "e"), "--user", "u3", "-k", "4", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    items = np.stack(pq.read_table(tmp_path / "e" / "items.parquet")["embedding"].to_numpy())
    users = pq.read_table(tmp_path / "e" / "users.parquet")
    user = small.user_keys.index("u3")
    by_head = {name: items @ users[name][user].as_py() for name in REPRESENTATIONS}
    mixture = json.loads((tmp_path / "e" / "manifest.json").read_text())["mixture"]
    scores = by_head["fused"]
    if mixture is not None:
        parts = zip(mixture["scale"], mixture["bias"], HEADS, strict=True)
        scores = np.logaddexp.reduce([scale * by_head[name] + bias for scale, bias, name in parts])
    scores[small.item[small.offsets[user] : small.offsets[user + 1]]] = -np.inf
    assert [f["item"] for f in found] == [small.item_keys[i] for i in np.argsort(-scores)[:4]]
    np.testing.assert_allclose([f["score"] for f in found], np.sort(scores)[::-1][:4], rtol=1e-5)


def test_an_export_is_kept_up_to_date_and_loaded(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def out(*arguments: object) -> str:
        assert main([str(a) for a in arguments]) == 0
        return capsys.readouterr().out

    old, new, delta, whole = (tmp_path / name for name in ("old", "new", "delta", "whole"))
    told = out("export", "--run", finished, "--output", old, "--quantise", "int8", "--index", "hnsw")
    assert "hnsw index" in told and "int8 changes NDCG@10 of validation by" in told and told.count("map by ") == 1
    assert "0 of 120 users new or changed, 0 gone" in out(
        "export", "--run", finished, "--output", delta, "--since", old
    )
    same = ["--since", str(old), "--overwrite"]
    assert main(["export", "--run", str(finished), "--output", str(old), *same]) == 2
    assert "is what the delta is to be applied to" in capsys.readouterr().err
    assert "hnsw index" in out("apply-delta", "--base", old, "--delta", delta, "--output", new)
    assert (new / "map.parquet").read_bytes() == (old / "map.parquet").read_bytes()
    assert "arrow" not in out("export", "--run", finished, "--output", whole, "--format", "arrow", "--index", "none")
    assert (whole / "items.arrow" / "part-00000.arrow").is_file() and not (whole / "items.faiss").exists()
    answers = [json.loads(out("recommend", "--export", e, "--user", "u3", "--json")) for e in (old, new, whole)]
    assert [a["item"] for a in answers[0]] == [a["item"] for a in answers[1]]
    assert len(answers[2]) == 10
    pytest.importorskip("lancedb")
    assert out("load", "--export", new, "--to", f"lancedb:{tmp_path / 'l'}").endswith("0 taken out, 149 there now\n")


def test_one_user_can_be_evaluated(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for again in ([], ["--user", "u5"]):  # named twice it counts once
        assert main(["evaluate", "--run", str(finished), "--user", "u5", *again]) == 0
        shown = capsys.readouterr().out
        assert "fused" in shown and "test: 1 users" in shown


def test_rows_are_compared_with_a_row_and_with_another_run(
    finished: Path, small: PreparedData, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    evaluate = ["evaluate", "--run", str(finished), "--eval.baselines", "[popularity]", "--against"]
    assert main([*evaluate, "popularity", "--by", "users"]) == 0
    shown = capsys.readouterr().out
    assert "less popularity, 95 %" in shown and "less popularity, of these, 'users of more than" in shown
    told = json.loads((finished / "evaluation-test.json").read_text())
    parts = told["comparison"]["segments"]
    for label, part in parts.items():
        by_segment, row = told["segments"][label], part["rows"]["fused"]["hr@10"]
        assert row["mean"] == pytest.approx(by_segment["fused"]["hr@10"] - by_segment["popularity"]["hr@10"])
    by_user = [part["users"] for label, part in parts.items() if label.startswith("users of")]
    assert len(by_user) == 2 and min(by_user) >= 20 and sum(by_user) <= told["users"]
    fused = told["comparison"]["rows"]["fused"]["ndcg@10"]
    assert fused["mean"] == pytest.approx(told["table"]["fused"]["ndcg@10"] - told["table"]["popularity"]["ndcg@10"])
    assert fused["low"] < fused["mean"] < fused["high"] and "popularity" not in told["comparison"]["rows"]

    other = tmp_path / "other"
    options = ["--data.path", str(small.path), "--train.run", str(other), "--train.max_steps", "3"]
    assert main(["train", *options, *TINY]) == 0
    assert main([*evaluate, str(other), "--markdown"]) == 0
    assert "| less " in capsys.readouterr().out
    mine = json.loads((finished / "evaluation-test.json").read_text())
    assert main(["evaluate", "--run", str(other), "--eval.baselines", "[]"]) == 0
    theirs = json.loads((other / "evaluation-test.json").read_text())["table"]
    rows = mine["comparison"]["rows"]
    assert "popularity" not in rows and {"fused", *HEADS} <= set(rows)
    for name, row in rows.items():
        assert row["hr@10"]["mean"] == pytest.approx(mine["table"][name]["hr@10"] - theirs[name]["hr@10"])

    for name in ("EASE-R", "content-kNN"):
        assert main([*evaluate, name]) == 2
        assert "this table has no such row; its rows are popularity, content" in capsys.readouterr().err
    meta = other / "checkpoints" / "best" / "meta.json"
    meta.write_text(json.dumps({**json.loads(meta.read_text()), "data": "0" * 64}))
    assert main([*evaluate, str(other)]) == 2
    assert "was trained on other data" in capsys.readouterr().err


def test_the_oracle_is_shown_beside_every_users_last_event_alone(
    finished: Path, small: PreparedData, capsys: pytest.CaptureFixture[str]
) -> None:
    oracle = json.loads((small.path / "report.json").read_text())["oracle"]
    assert small.segment is not None
    segments = set(small.segment[small.offsets[1:] - 1])
    fast = ["evaluate", "--run", str(finished), "--eval.baselines", "[]"]
    assert main(fast) == 0
    shown = capsys.readouterr().out
    assert shown.count("oracle of the mixture") == 1 + len(segments)
    assert f"{oracle['all']['ndcg@10']:.4f}" in shown.split("of these")[0]
    assert main([*fast, "--markdown"]) == 0
    first = capsys.readouterr().out.split("\n\n")[0]
    assert f"{oracle['all']['hr@10']:.4f}" in first.split("| oracle of the mixture |")[1]
    for others in (["--split", "valid"], ["--user", "u5"]):
        assert main([*fast, *others]) == 0
        assert "oracle" not in capsys.readouterr().out


def test_a_time_split_is_trained_and_evaluated(small: PreparedData, tmp_path: Path) -> None:
    options = ["--data.path", str(small.path), "--train.run", str(tmp_path / "r"), "--train.max_steps", "3"]
    assert main(["train", *options, *TINY, "--data.split", "time", "--data.holdout", "0.2"]) == 0
    assert main(["evaluate", "--run", str(tmp_path / "r")]) == 0
    assert json.loads((tmp_path / "r" / "evaluation-test.json").read_text())["users"] < 120


def test_early_stopping_keeps_the_best(small: PreparedData, tmp_path: Path) -> None:
    options = ["--data.path", str(small.path), "--train.run", str(tmp_path / "r"), "--train.epochs", "50"]
    fast = ["--train.dense_lr", "0.1", "--train.sparse_lr", "5", "--train.patience", "1", "--train.warmup_steps", "0"]
    assert main(["train", *options, *TINY, "--train.eval_every", "4", *fast]) == 0
    log = (tmp_path / "r" / "train.log").read_text()
    assert "stopping early" in log
    steps = [int(line.split("step ")[1].split("/")[0]) for line in log.splitlines() if "best so far" in line]
    assert json.loads((tmp_path / "r" / "checkpoints" / "best" / "meta.json").read_text())["step"] == steps[-1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "--data.path", "{d}/none"], "none/schema.yaml: not found"),
        (["train", "--config", "{d}/none.yaml"], "none.yaml: No such file"),
        (["train", "--train.batchsize", "3"], "did you mean '--train.batch_size'"),
        (["train", "--train.batch_size", "many"], "train.batch_size"),
        (["train", "--data.path", "{data}", "--train.run", "{run}"], "--train.existing replace"),
        (["train", "--data.path", "{data}", "--train.run", "{d}", "--train.existing", "replace"], "is no run folder"),
        (["train", "--data.path", "{data}", "--train.run", "{d}/r", "--train.sparse_optimizer", "adam"], "CPU kernel"),
        (["train", "--data.path", "{data}", "--train.run", "{d}/r", "--distributed.device", "cuda"], "sees no GPU"),
        (["train", "--data.path", "{data}", "--train.run", "{d}/r", "--train.select", "loss"], "no validation metric"),
        ([*TRAIN, "--distributed.memory_gib", "1e-5"], "the dense part does not fit"),
        ([*TRAIN, "--distributed.memory_gib", "0.004"], "the tables do not fit"),
        (["train", "--data.path", "{broken}", "--train.run", "{d}/r"], "not a readable Parquet file"),
        (["evaluate", "--run", "{d}/none"], "no config.yaml"),
        (["evaluate", "--run", "{run}", "--user", "nobody"], "--user 'nobody': not in users.parquet"),
        (["evaluate", "--run", "{run}", "--against", "sequentail"], "neither a run folder nor a row"),
        (["export", "--run", "{d}/none", "--output", "{d}/e"], "no config.yaml"),
        (["export", "--run", "{run}", "--output", "{d}"], "is no export"),
        (["export", "--run", "{run}", "--output", "{d}/e", "--since", "{d}/none"], "manifest.json: not found"),
        (["export", "--run", "{run}", "--output", "{d}/e", "--tolerance", "0.1"], "--tolerance 0.1: give a number"),
        (["export", "--run", "{run}", "--output", "{d}/e", "--index", "ivfpq"], "trains on 9984 items at least"),
        (["export", "--run", "{run}", "--output", "{d}/e", "--quantise", "int4"], "invalid choice: 'int4'"),
        (["apply-delta", "--base", "{d}/none", "--delta", "{d}/none", "--output", "{d}/e"], "manifest.json: not found"),
        (["load", "--export", "{d}/none", "--to", "qdrant:{d}/q"], "manifest.json: not found"),
        (["recommend", "--export", "{d}/none", "--user", "u0"], "manifest.json: not found"),
        (["evalute"], "invalid choice: 'evalute'"),
        (["recommend", "--export", "{d}"], "--user"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_told_in_one_line_and_nothing_is_left(
    finished: Path, small: PreparedData, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    arguments: list[str], message: str,
) -> None:  # fmt: skip
    (tmp_path / "file").touch()
    broken = tmp_path / "broken"
    shutil.copytree(small.path, broken)
    (broken / "interactions" / "part-00000.parquet").write_bytes(b"PAR1 and then nothing")
    names = {"d": tmp_path, "run": finished, "data": small.path, "broken": broken}
    filled = [a.format(**names) for a in arguments]
    try:
        code = main(filled)
    except SystemExit as stop:
        code = stop.code  # type: ignore[assignment]
    error = capsys.readouterr().err
    assert code == 2
    assert error.startswith("error: ") and error.count("\n") == 1 and message in error, error
    assert {p.name for p in tmp_path.iterdir()} == {"file", "broken"}


@pytest.mark.parametrize("command", ["", "prepare", "train", "evaluate", "export", "apply-delta", "load", "recommend"])
def test_help_is_there_at_every_level(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main([*command.split(), "--help"])
    assert stop.value.code == 0
    assert len(capsys.readouterr().out) > 300


def test_every_setting_says_its_default(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    out = capsys.readouterr().out
    kinds = {section: kind for section, kind in sections().items() if section != "finetune"}
    settings = [f"--{section}.{f.name}" for section, kind in kinds.items() for f in dataclasses.fields(kind)]
    assert all(f"{setting} VALUE" in out for setting in settings)
    assert "".join(out.split()).count("(default:") == len(settings)
    assert sum(len(dataclasses.fields(kind)) for kind in sections().values()) <= 83


def test_finetune_says_the_defaults_that_it_uses(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["finetune", "--help"])
    told = " ".join(capsys.readouterr().out.split())
    of = dict(re.findall(r"--([a-z_.]+) VALUE (?:(?! VALUE ).)*?\(default: (.*?)\)", told))
    assert of["train.epochs"] == of["model.dim"] == of["data.path"] == of["loss.negatives"] == "that of the source"
    assert (of["train.run"], of["train.existing"], of["finetune.share"]) == ("none; must be given", "refuse", "1.0")
    assert of["train.select"] == "that of the source; label/auc for labels"


@pytest.mark.parametrize("command", [
    ["prepare", "--source", "synthetic", "--output", "{d}/data"], ["inspect", "{d}/data"],
    ["report", "{d}/r"], ["plan", "--hardware", "h100"],
    ["recommend", "--export", "{d}/e", "--user", "u1"], ["serve", "--export", "{d}/e"],
    ["forget", "--data", "{d}/data", "--user", "u1"],
])  # fmt: skip
def test_what_is_one_process_refuses_to_be_several(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], command: list[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main([part.format(d=tmp_path) for part in command]) == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1 and f"flm {command[0]}: runs as one process" in told and "without torchrun" in told
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("given", "taken"),
    [
        (["flm_torchrec/train.py", "--", "--config", "x"], ["--config", "x"]),
        (["flm_torchrec/train.py", "--config", "x"], ["--config", "x"]),
        (["--config", "x"], ["--config", "x"]),
        ([], []),
    ],
)
def test_the_script_drops_what_a_launcher_adds(given: list[str], taken: list[str]) -> None:
    assert script_arguments(given) == taken


@pytest.mark.parametrize("command", ["prepare", "serve", "inspect"])
def test_ctrl_c_is_one_line(command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = {
        "prepare": ["prepare", "--source", "synthetic", "--output", "x"],
        "serve": ["serve", "--export", "x"],
        "inspect": ["inspect", "x"],
    }[command]

    def interrupted(args: object) -> None:
        raise KeyboardInterrupt

    module, name = {
        "prepare": (data_command, "run"), "serve": (serve_command, "run"), "inspect": (inspect_command, "run"),
    }[command]  # fmt: skip
    monkeypatch.setattr(module, name, interrupted)
    assert main(arguments) == 130
    error = capsys.readouterr().err
    assert error.startswith("error: interrupted") and error.count("\n") == 1


def test_a_printed_key_is_never_cut() -> None:
    text, key = io.StringIO(), "k" * 90
    table = _table("from item i", "", "item", "title", "score", "path")
    table.add_row("1", key, "a title of several words", "0.123", f"i → {key}")
    PlainConsole(file=text, width=80).print(table)
    assert text.getvalue().count("k") == 180 and "0.123" in text.getvalue()
