"""Several processes behind one port: a killed one comes back, all stop together, and a swap reaches all."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flm_torchrec.cli import main
from flm_torchrec.serve.key_rows import KeyRows
from flm_torchrec.serve.workers import Batches

SERVER = """
import os, socket, sys, threading
from flm_torchrec.serve.supervisor import Supervisor

bound = socket.create_server(("127.0.0.1", 0))

def work(link, swapped):
    if sys.argv[1] == "broken":
        raise ValueError("no export")
    served = [swapped.get("e")]
    link.follow(lambda fresh: served.__setitem__(0, fresh["e"]))
    link.tell({"ready": True})
    while True:
        made, _ = bound.accept()
        asked = made.recv(100).decode()
        if asked.startswith("swap "):
            served[0] = asked[5:]
            link.tell({"swapped": {"e": asked[5:]}})
        if asked == "leave":
            link.tell({"stopping": True})
            threading.Event().wait()
        if asked == "crash":
            os._exit(7)
        made.sendall(f"{os.getpid()} {served[0]}".encode())
        made.close()

def fail(error):
    sys.stdout.write(f"failed: {error}\\n")  # at once: the other worker may be stopped meanwhile
    return 2

sys.exit(Supervisor(work, fail, lambda: print(bound.getsockname()[1], flush=True)).run(2))
"""


@pytest.fixture
def server() -> Iterator[tuple[subprocess.Popen[str], int]]:
    process = subprocess.Popen([sys.executable, "-c", SERVER, "sound"], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    yield process, int(process.stdout.readline())
    process.kill()
    process.wait()


def ask(port: int, text: str = "who") -> tuple[int, str]:
    """The worker that answers, and the export that it serves."""
    with socket.create_connection(("127.0.0.1", port), timeout=60) as made:
        made.sendall(text.encode())
        pid, _, export = made.makefile().read().partition(" ")
    return int(pid or 0), export


def until(found: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not found():
        assert time.monotonic() < end, "did not come within a minute"
        time.sleep(0.02)


def workers(process: subprocess.Popen[str]) -> set[int]:
    with open(f"/proc/{process.pid}/task/{process.pid}/children") as children:
        return set(map(int, children.read().split()))


def runs(pid: int) -> bool:
    with suppress(OSError), open(f"/proc/{pid}/stat") as status:
        return status.read().rpartition(")")[2].split()[0] != "Z"
    return False


@pytest.mark.parametrize("how", ["kill", "crash"])
def test_a_worker_that_dies_comes_back(server: tuple[subprocess.Popen[str], int], how: str) -> None:
    process, port = server
    before = workers(process)
    assert len(before) == 2
    victim = ask(port, "crash")[0] or next(iter(before)) if how == "crash" else next(iter(before))
    if how == "kill":
        os.kill(victim, signal.SIGKILL)
    until(lambda: len(workers(process)) == 2 and workers(process) != before)
    assert all(ask(port)[0] in workers(process) for _ in range(20))


def test_another_worker_is_started_while_one_still_answers_what_it_has(
    server: tuple[subprocess.Popen[str], int],
) -> None:
    process, port = server
    before = workers(process)
    with socket.create_connection(("127.0.0.1", port)) as made:
        made.sendall(b"leave")
        until(lambda: len(workers(process)) == 3)
        assert before < workers(process)
        until(lambda: len({ask(port)[0] for _ in range(20)}) == 2)
        pids = workers(process)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0 and not any(runs(pid) for pid in pids)


def test_a_swap_reaches_all_and_those_that_come_later(server: tuple[subprocess.Popen[str], int]) -> None:
    process, port = server
    assert ask(port, "swap exports/two")[1] == "exports/two" and ask(port)[0]
    until(lambda: all(ask(port)[1] == "exports/two" for _ in range(20)))
    killed = workers(process)
    for pid in killed:
        os.kill(pid, signal.SIGKILL)
    # one that has not ended yet may still accept a connection
    until(lambda: len(workers(process)) == 2 and not workers(process) & killed)
    assert {ask(port)[1] for _ in range(20)} == {"exports/two"}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_all_end_together_with_0(server: tuple[subprocess.Popen[str], int], number: int) -> None:
    process, _ = server
    pids = workers(process)
    process.send_signal(number)
    assert process.wait(60) == 0 and not any(runs(pid) for pid in pids)


def test_workers_end_with_a_supervisor_that_is_killed(server: tuple[subprocess.Popen[str], int]) -> None:
    process, port = server
    pids = workers(process)
    process.kill()
    process.wait()
    until(lambda: not any(runs(pid) for pid in pids))
    with pytest.raises(OSError):
        ask(port)


def test_what_cannot_begin_is_not_tried_again() -> None:
    done = subprocess.run([sys.executable, "-c", SERVER, "broken"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and set(done.stdout.splitlines()) == {"failed: no export"}


def test_workers_need_a_store_that_they_share(tmp_path: object, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "--export", str(tmp_path), "--workers", "2", "--events", "none"]) == 2
    assert "give --events FILE" in capsys.readouterr().err


@given(st.lists(st.text(), unique=True, max_size=50), st.text())
def test_keys_are_found_as_in_a_dict(keys: list[str], other: str) -> None:
    keys = [key for key in keys if key.isascii() or not any("\ud800" <= c <= "\udfff" for c in key)]
    rows, known = KeyRows(pa.array(keys, pa.string())), {key: row for row, key in enumerate(keys)}
    assert dict(rows) == known and list(rows) == keys and len(rows) == len(keys)
    for key in (other, "", "\ud800"):
        assert rows.get(key) == known.get(key) and (key in rows) == (key in known)


def test_keys_take_few_bytes() -> None:
    keys = pa.array([f"user{n}" for n in range(200_000)])
    rows = KeyRows(keys)
    assert rows.hashed.nbytes / len(keys) == 8
    assert [rows[f"user{n}"] for n in (0, 65_535, 65_536, 199_999)] == [0, 65_535, 65_536, 199_999]


def test_a_request_right_after_a_batch_is_answered() -> None:
    async def ask_in_turn() -> list[dict[str, object]]:
        batches: Batches[int] = Batches(pool, lambda asked: [{"n": n} for n in asked], 1)
        return [await asyncio.wait_for(batches.answer(n), 30) for n in range(5)]

    with ThreadPoolExecutor(1) as pool:
        assert asyncio.run(ask_in_turn()) == [{"n": n} for n in range(5)]
