"""Folders that are put in place: nothing of others is touched, modes and links stay, a kill is mended, one writes."""

from __future__ import annotations

import json
import os
import signal
import socket
import stat
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flm_torchrec import claim as claiming
from flm_torchrec.claim import InUse, claim
from flm_torchrec.errors import RunError
from flm_torchrec.files import (
    leftovers,
    mend,
    put_in_place,
    replacing,
    replacing_file,
    telling,
    temporary,
    write_text,
)
from tests.conftest import ROOT


def fill(folder: Path, text: str) -> None:
    (folder / "inner").mkdir()
    (folder / "inner" / "part").write_text(text)
    (folder / "top").write_text(text)


def replace(folder: Path, text: str) -> None:
    with claim(folder), replacing(folder) as fresh:
        fill(fresh, text)


def modes(folder: Path) -> dict[str, int]:
    return {str(p.relative_to(folder.parent)): stat.S_IMODE(p.stat().st_mode) for p in (folder, *folder.rglob("*"))}


NEIGHBOURS = (
    "z.tmp",
    "z.old",
    ".z.old",
    ".z.tmp",
    "z.whole",
    ".z.work-mine",
    ".z.flm-mine",
    ".z.flm-old-1",
    ".z.forgetting",
)


def test_neighbours_with_names_that_one_might_guess_are_left_alone(tmp_path: Path) -> None:
    for name in NEIGHBOURS:
        (tmp_path / name).mkdir()
        (tmp_path / name / "mine").write_text("mine")
    for text in ("one", "two"):
        replace(tmp_path / "z", text)
    write_text(tmp_path / "z.tmp" / "page", "text")
    assert (tmp_path / "z" / "inner" / "part").read_text() == "two"
    assert all((tmp_path / name / "mine").read_text() == "mine" for name in NEIGHBOURS)
    assert {p.name for p in tmp_path.iterdir()} == {"z", *NEIGHBOURS}


@pytest.mark.parametrize(("folder", "file"), [(0o700, 0o600), (0o750, 0o640), (0o2770, 0o660), (0o500, 0o400)])
def test_modes_stay_and_new_files_get_what_all_older_ones_allow(tmp_path: Path, folder: int, file: int) -> None:
    replace(tmp_path / "z", "one")
    for path in (*(tmp_path / "z").rglob("*"), tmp_path / "z"):
        path.chmod(folder if path.is_dir() else file)
    before = modes(tmp_path / "z")
    with claim(tmp_path / "z"), replacing(tmp_path / "z") as fresh:
        assert stat.S_IMODE(fresh.stat().st_mode) == 0o700  # nobody looks into it meanwhile
        fill(fresh, "two")
        (fresh / "more").mkdir()
        (fresh / "more" / "part").write_text("two")
    assert modes(tmp_path / "z") == {**before, "z/more": folder, "z/more/part": file}
    assert [p.name for p in tmp_path.iterdir()] == ["z"]


@given(st.lists(st.sampled_from([0o600, 0o640, 0o644, 0o664, 0o666]), min_size=1, max_size=4))
def test_no_file_is_more_open_than_the_one_it_replaces(
    tmp_path_factory: pytest.TempPathFactory, found: list[int]
) -> None:
    folder = tmp_path_factory.mktemp("modes") / "z"
    with replacing(folder) as fresh:
        for number, mode in enumerate(found):
            (fresh / str(number)).touch()
            (fresh / str(number)).chmod(mode)
    with replacing(folder) as fresh:
        for number in range(len(found) + 1):
            (fresh / str(number)).touch()
            (fresh / str(number)).chmod(0o666)
    after = [stat.S_IMODE((folder / str(number)).stat().st_mode) for number in range(len(found) + 1)]
    assert after[:-1] == found and all(after[-1] & ~mode == 0 for mode in found)


def test_a_link_stays_one_however_often_what_it_leads_to_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "z").symlink_to(tmp_path / "disk" / "real")
    for text in ("one", "two", "three"):
        replace(tmp_path / "z", text)
        assert (tmp_path / "z").is_symlink() and (tmp_path / "disk" / "real" / "top").read_text() == text
    (tmp_path / "page").symlink_to(Path("disk") / "page.html")
    for text in ("one", "two"):
        write_text(tmp_path / "page", text)
        assert (tmp_path / "page").is_symlink() and (tmp_path / "disk" / "page.html").read_text() == text
    assert {p.name for p in tmp_path.rglob("*")} == {"disk", "z", "page", "real", "page.html", "inner", "part", "top"}


def test_a_device_is_written_to_and_not_replaced(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    read: list[str] = []
    reader = threading.Thread(target=lambda: read.append((tmp_path / "pipe").read_text()))
    reader.start()
    write_text(tmp_path / "pipe", "text")
    reader.join(20)
    assert read == ["text"] and stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)


@pytest.mark.parametrize("moment", ["before the first rename", "between the renames", "after the second rename"])
def test_a_kill_at_any_moment_leaves_the_old_or_the_new_after_mending(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    class Killed(BaseException):
        pass

    def kill(*_: object) -> None:
        raise Killed

    replace(tmp_path / "z", "old")
    (tmp_path / ".z.old").mkdir()
    rename, calls = Path.rename, []

    def killed_rename(path: Path, target: Path) -> Path:
        calls.append(path)
        if len(calls) == (1 if moment == "before the first rename" else 2):
            raise Killed
        return rename(path, target)

    with monkeypatch.context() as patch:
        patch.setattr("flm_torchrec.files.remove", kill)  # a killed process clears nothing away
        if moment != "after the second rename":
            patch.setattr(Path, "rename", killed_rename)
        with pytest.raises(Killed):
            replace(tmp_path / "z", "new")
    assert leftovers(tmp_path)
    with claim(tmp_path / "z"):
        assert (tmp_path / "z" / "top").read_text() == ("new" if moment == "after the second rename" else "old")
    assert {p.name for p in tmp_path.iterdir()} == {"z", ".z.old"}


def test_only_leftovers_of_the_folder_itself_are_mended(tmp_path: Path) -> None:
    for name in ("z", "zz", "z.2", ".z"):
        temporary(tmp_path / name, "old").mkdir()
    mend(tmp_path / "z")
    assert (tmp_path / "z").is_dir() and len(leftovers(tmp_path)) == 3
    assert not leftovers(tmp_path, "z") and len(leftovers(tmp_path, "zz")) == 1


def test_what_fails_leaves_what_was_there_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    replace(tmp_path / "z", "old")
    write_text(tmp_path / "page", "old")

    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(RunError, match=rf"^{tmp_path / 'z'}: No space left on device; mend"), telling(tmp_path / "z"):
        replace(tmp_path / "z", "new")
    with pytest.raises(RunError, match=rf"^{tmp_path / 'page'}: No space left on device"), telling(tmp_path / "page"):
        write_text(tmp_path / "page", "new")
    assert (tmp_path / "z" / "top").read_text() == (tmp_path / "page").read_text() == "old"
    assert {p.name for p in tmp_path.iterdir()} == {"z", "page"}


def test_all_is_on_the_disk_before_the_older_one_goes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    replace(tmp_path / "z", "old")
    synced: set[int] = set()
    fsync, rename = os.fsync, Path.rename

    def recording(handle: int) -> None:
        synced.add(os.fstat(handle).st_ino)
        fsync(handle)

    monkeypatch.setattr(os, "fsync", recording)

    def checked(path: Path, target: Path) -> Path:
        fresh = [p for p in leftovers(tmp_path) if ".flm-new-" in p.name]
        assert {p.stat().st_ino for p in (*fresh, *fresh[0].rglob("*"))} <= synced
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", checked)
    with claim(tmp_path / "z"), replacing(tmp_path / "z") as fresh:
        fill(fresh, "new")
    assert tmp_path.stat().st_ino in synced


def test_a_file_in_the_way_is_never_replaced_by_a_folder(tmp_path: Path) -> None:
    (tmp_path / "z").write_text("mine")
    with pytest.raises(NotADirectoryError), replacing(tmp_path / "z"):
        pass
    (tmp_path / "made").mkdir()
    with pytest.raises(NotADirectoryError):
        put_in_place(tmp_path / "made", tmp_path / "z")
    assert (tmp_path / "z").read_text() == "mine"


def test_a_circle_of_links_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to(tmp_path / "b")
    (tmp_path / "b").symlink_to(tmp_path / "a")
    with pytest.raises(RunError, match="symbolic links"), claim(tmp_path / "a"):
        pass


def test_a_file_keeps_its_mode_and_is_not_open_meanwhile(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("old")
    file.chmod(0o640)
    with replacing_file(file) as fresh:
        assert stat.S_IMODE(fresh.stat().st_mode) == 0o600
        fresh.write_text("new")
    assert stat.S_IMODE(file.stat().st_mode) == 0o640 and file.read_text() == "new"
    assert [p.name for p in tmp_path.iterdir()] == ["keys"]


HOLD = """
import sys
from pathlib import Path
from flm_torchrec.claim import claim
with claim(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.readline()
"""


def hold(folder: Path) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    return process


@pytest.mark.parametrize("through", ["itself", "a link", "another spelling"])
def test_the_second_is_refused_with_host_and_process_until_the_first_is_dead(tmp_path: Path, through: str) -> None:
    (tmp_path / "z").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "z")
    given = {"itself": tmp_path / "z", "a link": tmp_path / "link", "another spelling": tmp_path / "z" / ".." / "z"}
    left = temporary(tmp_path / "z", "new")
    holder = hold(tmp_path / "z")
    left.mkdir()  # what the holder is at work on
    with pytest.raises(InUse) as told, claim(given[through], "give another --train.run"):
        pass
    message = str(told.value)
    assert f"process {holder.pid} on '{socket.gethostname()}' is writing it" in message and left.is_dir()
    assert message.endswith("give another --train.run") and "\n" not in message
    holder.send_signal(signal.SIGKILL)
    holder.communicate()
    with claim(given[through]):
        assert not left.exists()
    assert {p.name for p in tmp_path.iterdir()} == {"z", "link"}


def test_neighbours_and_what_is_inside_are_claimed_apart(tmp_path: Path) -> None:
    with ExitStack() as held:
        for folder in ("z", "zz", "z/inner"):
            held.enter_context(claim(tmp_path / folder))
        with pytest.raises(InUse), claim(tmp_path / "zz"):
            pass
    with claim(tmp_path / "zz"):
        pass


def test_a_lock_that_its_holder_removes_meanwhile_is_not_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between opening the file and locking it: a lock on a removed file would keep nobody out."""
    try_lock: Callable[[int, Path, str], None] = claiming._try_lock
    removed: list[Path] = []

    def late(handle: int, folder: Path, instead: str) -> None:
        if not removed:
            removed.append(tmp_path / ".z.flm-lock")
            removed[0].unlink()
        try_lock(handle, folder, instead)

    monkeypatch.setattr(claiming, "_try_lock", late)
    with claim(tmp_path / "z"):
        assert json.loads(removed[0].read_text())["pid"] == os.getpid()


@pytest.mark.parametrize("content", ["my notes", "{}", "[1, 2]", '{"host": "a"}'])
def test_a_file_of_the_user_in_the_place_of_the_lock_is_left_alone(tmp_path: Path, content: str) -> None:
    (tmp_path / ".z.flm-lock").write_text(content)
    with pytest.raises(RunError, match="is no lock of flm"), claim(tmp_path / "z"):
        pass
    assert (tmp_path / ".z.flm-lock").read_text() == content


def test_a_disk_without_locks_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(*_: object) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(claiming.fcntl, "flock", none)
    with pytest.raises(RunError, match=r"has no locks \(Function not implemented\)"), claim(tmp_path / "z"):
        pass
