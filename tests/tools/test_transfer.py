"""The transfer study's rows of users whom a source has."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from flm_torchrec.api.evaluation import Evaluated
from flm_torchrec.data.keys import TOMBSTONE
from flm_torchrec.data.splits import Examples
from flm_torchrec.evaluation.evaluate import Evaluation
from tools.studies import transfer


def write_users(folder: Path, keys: list[str]) -> str:
    folder.mkdir()
    (folder / "schema.yaml").touch()
    pq.write_table(pa.table({"user_id": range(len(keys)), "user_key": keys}), folder / "users.parquet")
    return str(folder)


def test_a_shared_user_has_a_key_of_some_source_and_was_not_forgotten(tmp_path: Path) -> None:
    target = write_users(tmp_path / "target", ["ann", "ben", f"{TOMBSTONE}2", "cid", "dan"])
    first = write_users(tmp_path / "first", ["dan", "eve", f"{TOMBSTONE}2"])
    second = write_users(tmp_path / "second", ["ben"])
    assert transfer.shared_users([first, second], target).tolist() == [False, True, False, False, True]
    assert transfer.shared_users([first], target).tolist() == [False, False, False, False, True]


def test_each_kind_of_user_has_the_metrics_of_its_own_examples() -> None:
    examples = Examples(user=np.array([0, 1, 2, 2]), end=np.arange(4))
    evaluation = Evaluation("test", 4, {}, {"warm": {}}, ranks={"fused": np.array([1, 3, 11, 2])})
    found = Evaluated(evaluation, examples, "", None, (10,), main=True)
    kinds = transfer.kinds_of(found, np.array([True, False, True]))
    assert {kind: chosen.tolist() for kind, chosen in kinds.items()} == {
        transfer.ALL: [True] * 4,
        transfer.SHARED: [True, False, True, True],
        transfer.OTHER: [False, True, False, False],
    }
    segments = transfer.with_kinds(found, kinds).segments
    assert list(segments) == ["warm", transfer.SHARED, transfer.OTHER]
    assert segments[transfer.SHARED]["fused"]["hr@10"] == pytest.approx(2 / 3)
    assert segments[transfer.SHARED]["fused"]["ndcg@10"] == pytest.approx((1 + 1 / np.log2(3)) / 3)
    assert segments[transfer.OTHER]["fused"]["ndcg@10"] == pytest.approx(1 / 2)


def test_a_kind_without_examples_has_no_row() -> None:
    found = Evaluated(Evaluation("test", 1, {}), Examples(np.array([1]), np.array([0])), "", None, (10,), main=True)
    assert list(transfer.kinds_of(found, np.array([True, False]))) == [transfer.ALL, transfer.OTHER]
    assert list(transfer.kinds_of(found, None)) == [transfer.ALL]


def test_sources_that_share_no_user_are_refused_where_shared_users_are_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source, target = write_users(tmp_path / "source", ["ann"]), write_users(tmp_path / "target", ["ben"])
    command = ["transfer.py", "--sources", source, "--target", target, "--output", str(tmp_path / "study")]
    monkeypatch.setattr("sys.argv", [*command, "--shared-users"])
    with pytest.raises(SystemExit) as ended:
        transfer.read_study()
    assert ended.value.code == 2 and f"no user of {target} is in a source" in capsys.readouterr().err
    monkeypatch.setattr("sys.argv", command)
    assert transfer.read_study()[0].shared is None
