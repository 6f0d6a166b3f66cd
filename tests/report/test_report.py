"""The page of a run: every piece that is there, a line for each that is not, and nothing that is not text."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from flm_torchrec.cli import main
from flm_torchrec.config import load_config, to_yaml
from flm_torchrec.config.schema import BASELINES, EvalConfig
from flm_torchrec.data.dataset import fingerprint_of
from flm_torchrec.data.schema import Schema


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run folder of every piece, and beside it data and an export, by hand: names that would be markup among them."""
    folder, data, export = (tmp_path / name for name in ("run", "data", "export"))
    for each in (folder / "checkpoints/best", data / "interactions", export):
        each.mkdir(parents=True)
    config = load_config(None, [f"data.path={data}", f"train.run={folder}", "model.dim=32"])
    (folder / "config.yaml").write_text(to_yaml(config))
    losses = {"loss/content": 3.0, "loss/sequential": 2.0, "lr_factor": 1}
    lines = [{"step": n, "seconds": 1.0, **losses} for n in (1, 2)]
    lines.append({"step": 2, "seconds": 2.0, "valid/fused/ndcg@10": 0.1, "valid/content/ndcg@10": 0.2})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 3, "lo')
    table = {"popularity": {"hr@10": 0.125}, "fused": {"hr@10": 0.25, "mrr": 0.0625}}
    record = {"split": "test", "users": 7, "examples": "7a", "table": table, "segments": {"<b>cold</b>": table}}
    (folder / "evaluation-test.json").write_text(json.dumps(record))
    shards = [{"rank": r, "offset": [r * 512, 0], "size": [512, 32]} for r in (0, 1)]
    tables = {"item_id": {"module": "item_id", "sharding_type": "row_wise", "kernel": "fused", "shards": shards}}
    (folder / "plan.json").write_text(json.dumps({"world_size": 2, "tables": tables}))
    meta = {
        "step": 2,
        "valid": {"fused/ndcg@10": 0.1},
        "fusion": {"content": 0.75},
        "mixture": {"scale": [7.5, 3.0, 2.0], "bias": [0.0, -1.25, 0.0]},
    }
    (folder / "checkpoints/best/meta.json").write_text(json.dumps(meta))
    dropped = {"no user": {"rows": 4, "examples": ["a"]}}
    (data / "report.json").write_text(json.dumps({"rows_kept": 9, "dropped": dropped}))
    pq.write_table(pa.table({"item_id": [0, 0, 0, 1, 1, 2]}), data / "interactions/part-00000.parquet")
    pq.write_table(pa.table({"item_key": [f"k{i}" for i in range(30)]}), data / "items.parquet")
    pq.write_table(pa.table({"user_key": ["a"]}), data / "users.parquet")
    Schema("hand", "csv", users=1, items=30, interactions=6).save(data / "schema.yaml")
    (folder / "vocabulary").mkdir()
    (folder / "vocabulary/fingerprint").write_text(fingerprint_of(data))
    return folder


def write_export(export: Path, vectors: pa.Array) -> None:
    count = len(vectors)
    columns = {"item_id": range(count), "item_key": [f"k{i}" for i in range(count)],
               "title": [f"Film <i>{i}</i> $x$" for i in range(count)], "embedding": vectors}  # fmt: skip
    pq.write_table(pa.table(columns), export / "items.parquet")


def made(run: Path, *options: str) -> str:
    assert main(["report", str(run), *options]) == 0
    page = run / "report.html"
    return page.read_text()


def test_the_page_holds_every_piece(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    vectors = np.random.default_rng(0).normal(size=(30, 4)).astype(np.float32)
    vectors[1] = 2 * vectors[0]
    export = run.parent / "export"
    write_export(export, pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), 4))
    page = made(run, "--export", str(export))
    assert "missing" not in capsys.readouterr().out
    for told in ("model.dim", "0.1250", "0.0625", "row_wise", "0.75", "bias of collaborative in the mixture",
                 "-1.25", "0.06 MiB", "1,024 × 32", "rank 1", "no user",
                 "torchrec", "1 lines of metrics.jsonl are no records"):  # fmt: skip
        assert told in page, told
    assert page.count("<svg") == 3  # losses, rate, validation
    assert "Film &lt;i&gt;1&lt;/i&gt; $x$ 1.00" in page  # nearest to item 0, by cosine
    assert "<b>cold" not in page and "<i>" not in page and "<script" not in page
    assert "http" not in page.replace("http://www.w3.org/", "")


def test_neighbours_are_the_same_in_every_format_of_an_export(run: Path) -> None:
    vectors = np.round(np.random.default_rng(1).uniform(-1, 1, (12, 8)), 2).astype(np.float32)
    bias, scale = vectors.min(1, keepdims=True), np.ptp(vectors, axis=1)[:, None] / 255
    codes = np.round((vectors - bias) / scale).astype(np.uint8)
    tail = np.concatenate([scale, bias], 1).astype(np.float32).view(np.uint8)
    export = run.parent / "export"
    found = []
    for stored in (vectors, vectors.astype(np.float16), np.concatenate([codes, tail], 1)):
        write_export(export, pa.FixedSizeListArray.from_arrays(pa.array(stored.ravel()), stored.shape[1]))
        page = made(run, "--export", str(export))
        found.append(page[page.index("Nearest items") : page.index("<h2>Data")])
    near = vectors[0] @ vectors.T / np.linalg.norm(vectors, axis=1) / np.linalg.norm(vectors[0])
    best = np.argsort(-near)[1:6]
    row = found[0][found[0].index("(k0)") :].split("</tr>")[0]
    assert [int(cell.split("&lt;i&gt;")[1].split("&")[0]) for cell in re.split("<td[^>]*>", row)[2:]] == best.tolist()
    assert found[0] == found[1]

    def titles(part: str) -> list[str]:
        return [cell.rsplit(" ", 1)[0] for cell in re.split("<t[hd]", part)]

    assert titles(found[0]) == titles(found[2])


@pytest.mark.parametrize(
    ("piece", "content"),
    [
        ("metrics.jsonl", None), ("metrics.jsonl", ""), ("metrics.jsonl", "[]\n{}\n"), ("evaluation-test.json", None),
        ("evaluation-test.json", "{"), ("evaluation-test.json", "[]"), ("plan.json", '{"world_size": 2}'),
        ("plan.json", None), ("checkpoints/best/meta.json", None), ("checkpoints/best/meta.json", "{}"),
        ("../data/report.json", None), ("../data/report.json", "\xff"),
    ],
)  # fmt: skip
def test_a_piece_that_is_missing_or_broken_is_named(
    run: Path, capsys: pytest.CaptureFixture[str], piece: str, content: str | None
) -> None:
    if content is None:
        (run / piece).unlink()
    else:
        (run / piece).write_text(content, encoding="latin-1")
    page = made(run)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("missing: ")]
    assert len(lines) == 2 and "nearest items" in lines[-1] + lines[0]
    assert page.count("missing: ") == 2


def test_what_is_no_run_is_told_in_a_line(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run / "config.yaml").rename(tmp_path / "config.yaml")
    for folder in (run, tmp_path / "none"):
        assert main(["report", str(folder)]) == 2
        assert "no run folder" in capsys.readouterr().err
    assert main(["report", str(tmp_path), "--output", str(tmp_path / "no/page.html")]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    (tmp_path / "config.yaml").write_text("data: [")
    assert main(["report", str(tmp_path)]) == 2
    assert not (tmp_path / "report.html").exists()


def test_an_export_that_cannot_be_read_is_named(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    export = run.parent / "export"
    made(run, "--export", str(export))
    assert "no items.parquet" in capsys.readouterr().out
    (export / "items.parquet").write_bytes(b"PAR1")
    made(run, "--export", str(export))
    assert "not readable" in capsys.readouterr().out


def test_a_full_disk_or_a_folder_that_cannot_be_written_is_one_line(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (run / "report.html").write_text("older")
    full_disk(monkeypatch)
    assert main(["report", str(run)]) == 2
    assert f"error: {run / 'report.html'}: No space left on device; mend that, or give another --output\n" in (
        capsys.readouterr().err
    )
    assert (run / "report.html").read_text() == "older"
    assert not [p for p in run.iterdir() if p.name.startswith(".")]
    monkeypatch.undo()
    assert main(["report", str(run), "--output", "/proc/page.html"]) == 2
    assert "error: /proc/page.html: " in capsys.readouterr().err


def full_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)


def with_seed(run: Path, seed: int, fused: float, **also: str) -> Path:
    """A copy of a run's settings and evaluation, with another seed and another result of the fused head."""
    other = run.parent / f"seed{seed}"
    (other / "vocabulary").mkdir(parents=True)
    changed = [f"train.seed={seed}", f"train.run={other}", *(f"{name}={value}" for name, value in also.items())]
    (other / "config.yaml").write_text(to_yaml(load_config(run / "config.yaml", changed)))
    record = json.loads((run / "evaluation-test.json").read_text())
    record["table"]["fused"]["hr@10"] = fused
    (other / "evaluation-test.json").write_text(json.dumps(record))
    (other / "vocabulary/fingerprint").write_text((run / "vocabulary/fingerprint").read_text())
    return other


def figures(page: str) -> list[str]:
    """Text of the large numbers, in order."""
    found = re.findall(r"<dt>(.*?)</dt><dd><bdi>(.*?)</bdi></dd><dd>(.*?)</dd>", page)
    return [text for figure in found for text in figure]


def test_the_headline_is_the_best_head_beside_the_best_baseline(run: Path) -> None:
    record = json.loads((run / "evaluation-test.json").read_text())
    record["table"] |= {"Markov": {"hr@10": 0.2}, "content": {"hr@10": 0.1}, "oracle": {"hr@10": 0.9}}
    (run / "evaluation-test.json").write_text(json.dumps(record))
    page = made(run)
    one = "HR@10, test, one seed"
    assert figures(page) == ["best head: fused", "0.2500", one, "best baseline: Markov", "0.2000", one,
                             "difference", "+25.0%", "of fused from Markov"]  # fmt: skip
    assert page.index("best head") < page.index("missing: ") < page.index("Evaluation</h2>")
    assert "<b>0.9000</b>" in page


@pytest.mark.parametrize("name", BASELINES)
def test_the_headline_knows_every_baseline(run: Path, name: str) -> None:
    record = json.loads((run / "evaluation-test.json").read_text())
    record["table"] = {"fused": {"hr@10": 0.25}, name: {"hr@10": 0.5}}
    (run / "evaluation-test.json").write_text(json.dumps(record))
    page = made(run)
    assert f"best baseline: {name}" in page and "-50.0%" in page and "No baseline was ranked" not in page


def test_the_headline_says_who_was_drawn_and_which_default_baselines_it_lacks(run: Path) -> None:
    page = made(run)
    assert "test: 7 users, every item ranked." in page
    assert "Of the default baselines, not ranked: item-kNN, Markov, EASE-R." in page
    record = json.loads((run / "evaluation-test.json").read_text())
    record["ranked"] = "9 of 120 users, drawn once, every item ranked"
    record["table"] |= {name: {"hr@10": 0.1} for name in EvalConfig().baselines if name != "random"}
    (run / "evaluation-test.json").write_text(json.dumps(record))
    page = made(run)
    assert "test: 9 of 120 users, drawn once, every item ranked" in page and "not ranked:" not in page


def test_several_seeds_give_means_and_deviations(run: Path) -> None:
    others = [with_seed(run, 1, 0.35), with_seed(run, 2, 0.15)]
    shown = figures(made(run, "--seeds", *map(str, others)))
    assert shown[1:3] == ["0.2500 ± 0.1000", "HR@10, test, mean and deviation of 3 seeds"]
    assert shown[4] == "0.1250" and shown[7] == "+100.0%"  # the baseline is the same in all


@pytest.mark.parametrize(
    ("fault", "told"),
    [
        ("folder", "no run folder"),
        ("settings", "also differs"),
        ("seed", "the same seed"),
        ("evaluation", "is not there"),
        ("rows", "other rows"),
        ("users", "ranked other users or events"),
        ("older", "ranked other users or events"),
        ("data", "other data"),
    ],
)
def test_a_run_that_is_no_other_seed_is_refused(
    run: Path, fault: str, told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    other = with_seed(run, 0 if fault == "seed" else 3, 0.1, **({"model.dim": "16"} if fault == "settings" else {}))
    if fault == "evaluation":
        (other / "evaluation-test.json").unlink()
    if fault == "rows":
        (other / "evaluation-test.json").write_text(json.dumps({"table": {"fused": {"mrr": 0.5}}}))
    if fault in ("users", "older"):
        for folder in [run, other] if fault == "older" else [other]:
            record = json.loads((folder / "evaluation-test.json").read_text())
            record |= {"examples": "7b" if fault == "users" else ""}
            (folder / "evaluation-test.json").write_text(json.dumps(record))
    if fault == "data":
        (other / "vocabulary/fingerprint").write_text("x")
    assert main(["report", str(run), "--seeds", str(other / "none" if fault == "folder" else other)]) == 2
    said = capsys.readouterr().err
    assert told in said and "--seeds" in said and said.count("\n") == 1
    assert not (run / "report.html").exists()


def test_the_validation_of_the_best_checkpoint_is_a_table_of_heads_and_metrics(run: Path) -> None:
    heads, metrics = ("content", "collaborative", "sequential", "fused"), ("hr@5", "hr@10", "mrr")
    valid = {f"{head}/{metric}": 0.01 * (h + 4 * m) for h, head in enumerate(heads) for m, metric in enumerate(metrics)}
    meta = json.loads((run / "checkpoints/best/meta.json").read_text())
    (run / "checkpoints/best/meta.json").write_text(json.dumps({**meta, "valid": valid}))
    page = made(run)
    table = page[page.index("<caption>validation") :].split("</table>")[0]
    assert re.findall(r'<th scope="col"[^>]*>(.*?)</th>', table) == ["", *metrics]
    rows = [re.findall(r"<td>(?:<b>)?([\d.]+)", row) for row in table.split("<tr>")[2:]]
    assert rows == [[f"{0.01 * (h + 4 * m):.4f}" for m in range(3)] for h in range(4)]


def test_records_of_the_data_are_shown_as_tables_not_as_json(run: Path) -> None:
    nested = {"warnings": ["a", "b"], "options": {"k_core": 0, "min_value": None, "tables": {}, "keep": True},
              "oracle": {"all": {"hr@10": 0.5}, "content": {"ndcg@10": 0.25}}, "dropped": {}}  # fmt: skip
    (run.parent / "data/report.json").write_text(json.dumps(nested))
    page = made(run)
    data = page[page.index("<h2>Data") : page.index("<h2>Versions")]
    text = re.sub("<[^>]+>", "|", data)
    assert not re.search(r"[{}\[\]]|&quot;|None|True", text)
    for told in ("a, b", "k core", "none", "yes", "hr@10", "0.25"):
        assert told in text, told
