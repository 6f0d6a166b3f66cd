"""Users whose events are left out: the result is that of logs without them, and does not say who they are."""

from __future__ import annotations

from pathlib import Path

import pytest

from flm_torchrec.prepare.hash_users import hash_keys
from tests.prepare.test_prepare_shards import contents, flm, report, rows

EVENTS = ["ann,x,1", "bob,x,2", "ann,y,3", "007,only-of-007,4", "7,y,5", "bob,z,6"]
SECRET = bytes(range(32))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    stay = [line for line in EVENTS if not line.startswith(("ann", "007"))]
    for name, lines in (("all", EVENTS), ("stay", stay)):
        (tmp_path / f"{name}.csv").write_text("\n".join(["user_id,item_id,timestamp", *lines, ""]))
    (tmp_path / "users.csv").write_text("user_id,city\nann,Ulm\nbob,Ulm\n007,Bonn\n7,Rome\n")
    (tmp_path / "key").write_bytes(SECRET)
    return tmp_path


def prepared(folder: Path, events: str, output: str, *options: object) -> int:
    described = ("--users", folder / "users.csv", "--user-features", "city:categorical")
    return flm("--source", "csv", "--input", folder / events, "--output", folder / output, *described, *options)


@pytest.mark.parametrize(("listed", "key"), [("plain", False), ("plain", True), ("hashed", True)])
def test_the_result_is_that_of_logs_without_the_users(folder: Path, listed: str, key: bool) -> None:
    who = ["ann", "007", "nobody"] if listed == "plain" else hash_keys(["ann", "007"], SECRET)
    (folder / "who.txt").write_text("\n".join(who))
    hashing = ("--hash-users", folder / "key") if key else ()
    assert prepared(folder, "all.csv", "some", "--exclude-users", folder / "who.txt", *hashing) == 0
    assert prepared(folder, "stay.csv", "expected", *hashing) == 0
    different = ("report.json", "schema.yaml")  # of the names of the files
    some, expected = (
        {n: b for n, b in contents(folder / f).items() if n not in different} for f in ("some", "expected")
    )
    assert some == expected
    told = report(folder / "some")
    assert told["dropped"] == {"user in --exclude-users": {"rows": 3, "examples": []}}
    assert told["rows_read"] == 6 == told["rows_kept"] + 3


def test_a_list_of_which_nobody_has_an_event_is_told(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "who.txt").write_text("Ann\n")
    assert prepared(folder, "all.csv", "all", "--exclude-users", folder / "who.txt") == 0
    assert "none of its 1 users has an event" in capsys.readouterr().err and len(rows(folder / "all")) == 6


def test_all_users_may_not_be_left_out(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "who.txt").write_text("ann\nbob\n007\n7\n")
    assert prepared(folder, "all.csv", "none", "--exclude-users", folder / "who.txt") == 2
    assert "none of 6 rows is left, most dropped: user in --exclude-users; that is what" in capsys.readouterr().err
    assert prepared(folder, "all.csv", "none", "--exclude-users", folder / "no.txt") == 2
    assert "no.txt: cannot be read" in capsys.readouterr().err and not (folder / "none").exists()
