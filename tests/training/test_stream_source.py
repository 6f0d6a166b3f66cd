"""Sources of new events: every row is given once, however files grow, change, move and come again."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flm_torchrec.errors import DataError
from flm_torchrec.training.follow import sources as stream_source
from flm_torchrec.training.follow.sources import Folder


class Follower:
    """Takes all that is new, and starts again from its saved position each time."""

    def __init__(self, folder: Path, position: dict[str, Any] | None = None) -> None:
        self.folder = folder
        self.position = position or {}
        self.told: list[str] = []

    def take(self) -> list[Any]:
        source = Folder(self.folder)
        self.position = source.resume(json.loads(json.dumps(self.position)))
        found: list[Any] = []
        while (chunk := source.after(self.position)) is not None:
            found += [int(row["n"]) for _, row in chunk.rows]
            self.position = chunk.position
        self.told = source.messages
        return found


def lines(*numbers: int) -> str:
    return "".join(json.dumps({"n": n}) + "\n" for n in numbers)


@pytest.fixture
def incoming(tmp_path: Path) -> Path:
    folder = tmp_path / "incoming"
    folder.mkdir()
    return folder


@given(
    st.lists(st.tuples(st.sampled_from("abc"), st.integers(1, 4), st.booleans(), st.booleans()), max_size=12),
    st.integers(1, 30),
)
@settings(max_examples=60)
def test_of_files_that_grow_anywhere_every_row_is_taken_once(
    writes: list[tuple[str, int, bool, bool]], cut: int
) -> None:
    """Rows are appended in pieces that end within a row, and the follower looks in between, or not."""
    with tempfile.TemporaryDirectory() as place:
        follower, written, pending, taken = Follower(Path(place)), 0, dict.fromkeys("abc", ""), []
        for name, rows, partly, look in writes:
            text = pending[name] + lines(*range(written, written + rows))
            written += rows
            kept = len(text) - (cut % len(text) if partly else 0)
            with (Path(place) / f"{name}.jsonl").open("a") as file:
                file.write(text[:kept])
            pending[name] = text[kept:]
            if look:
                taken += follower.take()
        for name, text in pending.items():
            with (Path(place) / f"{name}.jsonl").open("a") as file:
                file.write(text)
        taken += follower.take()
        assert sorted(taken) == list(range(written))
        assert follower.take() == []


def test_the_rows_of_a_file_that_grew_are_numbered_on(incoming: Path) -> None:
    (incoming / "day.jsonl").write_text(lines(1, 2))
    source = Folder(incoming)
    first = source.after({})
    assert first is not None and source.after(first.position) is None
    assert [where for where, _ in first.rows] == ["day.jsonl: row 1", "day.jsonl: row 2"]
    again = source.after({})
    assert again is not None and again.rows == first.rows  # the same after the same position
    with (incoming / "day.jsonl").open("a") as file:
        file.write(lines(3) + '{"n": 4')
    more = source.after(first.position)
    assert more is not None and more.rows == [("day.jsonl: row 3", {"n": 3})]
    assert any("its end is not there yet" in line for line in source.messages)


def test_blank_lines_are_no_rows_but_count_in_the_numbers_of_rows(incoming: Path) -> None:
    (incoming / "day.jsonl").write_text("\n" + lines(1) + " \r\n")
    source = Folder(incoming)
    first = source.after({})
    assert first is not None and first.rows == [("day.jsonl: row 2", {"n": 1})]
    with (incoming / "day.jsonl").open("a") as file:
        file.write("\n\n")
    blank = source.after(first.position)
    assert blank is not None and blank.rows == [] and source.after(blank.position) is None
    with (incoming / "day.jsonl").open("a") as file:
        file.write(lines(2) + "{no\n")
    more = source.after(blank.position)
    assert more is not None and more.rows == [("day.jsonl: row 6", {"n": 2}), ("day.jsonl: row 7", None)]


@pytest.mark.parametrize(
    "content", [lines(1, 9, 3), lines(1, 2), lines(9), ""], ids=["a row changed", "cut off", "replaced", "emptied"]
)
def test_a_file_that_is_not_what_it_was_is_refused(incoming: Path, content: str) -> None:
    file = incoming / "day.jsonl"
    file.write_text(lines(1, 2, 3))
    follower = Follower(incoming)
    assert follower.take() == [1, 2, 3]
    file.write_text(content)
    os.utime(file, ns=(1, 1))
    for _ in range(2):
        with pytest.raises(DataError, match=r"day\.jsonl: is not what it was when its rows were learnt from"):
            follower.take()
    file.write_text(lines(1, 2, 3, 4))
    assert follower.take() == [4]


def test_a_parquet_file_that_was_written_anew_is_refused(incoming: Path) -> None:
    pq.write_table(pa.table({"n": [1, 2]}), incoming / "day.parquet")
    follower = Follower(incoming)
    assert follower.take() == [1, 2]
    os.utime(incoming / "day.parquet")
    assert follower.take() == []
    pq.write_table(pa.table({"n": [1, 3]}), incoming / "day.parquet")
    with pytest.raises(DataError, match=r"day\.parquet: is not what it was"):
        follower.take()


def test_a_parquet_file_of_which_no_more_than_the_first_mark_is_there_is_waited_for(incoming: Path) -> None:
    pq.write_table(pa.table({"n": [1, 2]}), incoming / "whole.parquet")
    content = (incoming / "whole.parquet").read_bytes()
    (incoming / "whole.parquet").unlink()
    follower = Follower(incoming)
    for size in (0, 3, 4, 5, 11, len(content) - 1):
        (incoming / "day.parquet").write_bytes(content[:size])
        assert follower.take() == []
    assert "day.parquet: its end is not there yet" in follower.told[0]
    (incoming / "day.parquet").write_bytes(content)
    assert follower.take() == [1, 2]


def test_the_same_content_under_another_name_is_skipped_and_told(incoming: Path) -> None:
    (incoming / "b.jsonl").write_text(lines(1, 2))
    pq.write_table(pa.table({"n": [3]}), incoming / "c.parquet")
    follower = Follower(incoming)
    assert follower.take() == [1, 2, 3]
    (incoming / "a.jsonl").write_text(lines(1, 2))
    (incoming / "d.parquet").write_bytes((incoming / "c.parquet").read_bytes())
    assert follower.take() == []
    assert [line.split(";")[0] for line in follower.told] == [
        "a.jsonl: has the content of b.jsonl, so it is not learnt from again",
        "d.parquet: has the content of c.parquet, so it is not learnt from again",
    ]
    assert follower.take() == [] and follower.told == []
    with (incoming / "a.jsonl").open("a") as file:
        file.write(lines(5))
    assert follower.take() == [5]


def test_a_file_that_was_renamed_and_grew_goes_on_but_a_common_beginning_is_none(incoming: Path) -> None:
    (incoming / "app.jsonl").write_text(lines(1, 2))
    follower = Follower(incoming)
    assert follower.take() == [1, 2]
    (incoming / "other.jsonl").write_text(lines(1, 2, 3))  # a file of its own, that happens to begin so
    assert follower.take() == [1, 2, 3]
    (incoming / "app.jsonl").rename(incoming / "app-monday.jsonl")
    with (incoming / "app-monday.jsonl").open("a") as file:
        file.write(lines(4))
    assert follower.take() == [4] and "begins with the 2 rows of app.jsonl" in follower.told[0]


def test_files_that_went_are_known_when_they_come_again_but_not_for_ever(
    incoming: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream_source, "REMEMBERED", 2)
    follower = Follower(incoming)
    for n in range(4):
        (incoming / f"{n}.jsonl").write_text(lines(n))
    assert follower.take() == [0, 1, 2, 3]
    for n in range(4):
        (incoming / f"{n}.jsonl").rename(incoming.parent / f"{n}.jsonl")
    (incoming / "new.jsonl").write_text(lines(9))
    assert follower.take() == [9] and sorted(follower.position["files"]) == ["2.jsonl", "3.jsonl", "new.jsonl"]
    (incoming / "again.jsonl").write_text(lines(3))
    assert follower.take() == []


def test_what_is_no_file_is_told_and_never_ends_the_follower(incoming: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (incoming / "spark.parquet").mkdir()
    pq.write_table(pa.table({"n": [1]}), incoming / "spark.parquet/part-0.parquet")
    (incoming / "gone.jsonl").symlink_to("nowhere")
    (incoming / "gone.parquet").symlink_to("nowhere")
    (incoming / "round.jsonl").symlink_to("round.jsonl")
    os.mkfifo(incoming / "pipe.jsonl")
    (incoming / "vanishes.jsonl").write_text(lines(2))
    (incoming / "whole.jsonl").write_text(lines(3))
    read = Path.read_bytes

    def vanishing(file: Path) -> bytes:
        if file.name == "vanishes.jsonl":
            raise FileNotFoundError(2, "No such file or directory", str(file))
        return read(file)

    monkeypatch.setattr(Path, "read_bytes", vanishing)
    follower = Follower(incoming)
    assert follower.take() == [3]
    told = "\n".join(follower.told)
    for line in ("spark.parquet: is a folder", "gone.jsonl: is a link that leads nowhere", "pipe.jsonl: is no file",
                 "gone.parquet: is a link", "round.jsonl: not readable"):  # fmt: skip
        assert told.count(line) == 1
    monkeypatch.undo()
    assert follower.take() == [2]  # it was there after all
    (incoming / "gone.jsonl").unlink()
    (incoming / "gone.jsonl").write_text(lines(4))
    assert follower.take() == [4]
    incoming.rename(incoming.parent / "away")
    with pytest.raises(DataError, match="put the folder back"):
        Folder(incoming).after(follower.position)


def test_files_with_other_endings_are_told_once(incoming: Path) -> None:
    for name in ("day.csv", "day.jsonl.gz", ".hidden.csv", "_SUCCESS"):
        (incoming / name).write_text(lines(1))
    (incoming / "date=2030-01-01").mkdir()
    (incoming / "day.jsonl").write_text(lines(2))
    follower = Follower(incoming)
    assert follower.take() == [2] and follower.told == [
        f"date=2030-01-01: is a folder, left alone; put the files in it into {incoming}",
        "day.csv: left alone; only files that end in .parquet or .jsonl are read",
        "day.jsonl.gz: left alone; only files that end in .parquet or .jsonl are read",
    ]


def test_another_source_is_refused_and_a_moved_folder_is_not(incoming: Path, tmp_path: Path) -> None:
    (incoming / "day.jsonl").write_text(lines(1))
    follower = Follower(incoming)
    assert follower.take() == [1]
    other = tmp_path / "other"
    other.mkdir()
    (other / "day.jsonl").write_text(lines(2))
    with pytest.raises(DataError, match=f"is folder {other}, but --output began with folder {incoming}"):
        Follower(other, follower.position).take()
    with pytest.raises(DataError, match="began with a Kafka topic"):
        Follower(other, {"topic": "events", "cluster": "c", "offsets": {"0": 3}}).take()
    with pytest.raises(DataError, match="began with a Kafka topic"):
        Follower(other, {"0": 3}).take()  # as an older version wrote it
    incoming.rename(tmp_path / "moved")
    moved = Follower(tmp_path / "moved", follower.position)
    assert moved.take() == [] and "is not there any more" in moved.told[0]


def test_a_position_by_names_alone_counts_what_is_there_as_taken(incoming: Path) -> None:
    (incoming / "old.jsonl").write_text(lines(1, 2))
    (incoming / "new.jsonl").write_text(lines(3))
    follower = Follower(incoming, {"files": ["gone.jsonl", "old.jsonl"]})
    assert follower.take() == [3] and "known by name alone" in follower.told[0]
    with (incoming / "old.jsonl").open("a") as file:
        file.write(lines(4))
    assert follower.take() == [4]


@pytest.mark.parametrize("gone", [False, True], ids=["the first is there", "the first was moved away"])
@given(st.lists(st.integers(0, 9), min_size=2, max_size=6), st.data())
@settings(max_examples=25)
def test_a_file_that_is_copied_again_while_the_follower_looks_is_not_taken_twice(
    gone: bool, numbers: list[int], data: st.DataObject
) -> None:
    """The copy stops anywhere within a line; where the first file is there, at the end of a line too."""
    content = lines(*numbers)
    cuts = sorted(data.draw(st.lists(st.integers(1, len(content) - 1), min_size=1, max_size=4)))
    with tempfile.TemporaryDirectory() as place:
        follower = Follower(Path(place))
        (Path(place) / "day.jsonl").write_text(content)
        assert follower.take() == numbers
        if gone:
            (Path(place) / "day.jsonl").unlink()
        for cut in cuts:
            if not (gone and content[cut - 1] == "\n"):
                (Path(place) / "copy.jsonl").write_text(content[:cut])
                assert follower.take() == []
        (Path(place) / "copy.jsonl").write_text(content)
        assert follower.take() == [] and "copy.jsonl: has the content of day.jsonl" in "".join(follower.told)


def test_a_new_file_with_the_first_line_of_another_is_taken_once_it_differs(incoming: Path) -> None:
    (incoming / "a.jsonl").write_text(lines(1, 2, 3))
    follower = Follower(incoming)
    assert follower.take() == [1, 2, 3]
    (incoming / "b.jsonl").write_text(lines(1))
    assert follower.take() == [] and "b.jsonl: begins as a.jsonl does" in follower.told[0]
    (incoming / "b.jsonl").write_text(lines(1, 5))
    assert follower.take() == [1, 5]  # a file of its own
    (incoming / "a.jsonl").unlink()
    (incoming / "c.jsonl").write_text(lines(1, 7))
    assert follower.take() == [1, 7]
