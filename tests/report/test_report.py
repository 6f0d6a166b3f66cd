"""The page of a run: every piece that is there, a line for each that is not, and nothing that is not text."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from flm_torchrec.cli import main
from flm_torchrec.config import load_config, to_yaml
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
    record = {"split": "test", "users": 7, "table": table, "segments": {"<b>cold</b>": table}}
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
    assert [int(cell.split("&lt;i&gt;")[1].split("&")[0]) for cell in row.split("<td>")[2:]] == best.tolist()
    assert found[0] == found[1]

    def titles(part: str) -> list[str]:
        return [cell.rsplit(" ", 1)[0] for cell in part.split("<td>")]

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
