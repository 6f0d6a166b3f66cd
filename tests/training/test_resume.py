"""Runs that are stopped, killed, hung or fed NaN, and what becomes of them."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections import namedtuple
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import timedelta
from itertools import islice
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

from flm_torchrec.claim import InUse, claim
from flm_torchrec.cli import main
from flm_torchrec.config import load_config
from flm_torchrec.data.batch import Batch
from flm_torchrec.data.dataset import PreparedData, load_prepared
from flm_torchrec.data.loader import Sharing, TrainLoader
from flm_torchrec.data.negatives import Negatives
from flm_torchrec.data.splits import split
from flm_torchrec.data.windows import windows
from flm_torchrec.distributed.comm import Comm, process_group
from flm_torchrec.distributed.join import fresh_store, join
from flm_torchrec.errors import Interrupted, RunError
from flm_torchrec.training.checkpoint import manager as checkpoint
from flm_torchrec.training.checkpoint import storage
from flm_torchrec.training.encoder import ModelEncoder
from flm_torchrec.training.guard import Guard, NonFinite, as_arrays, from_arrays
from flm_torchrec.training.job import open_job
from flm_torchrec.training.run_folder import check_run_folder, open_run_folder
from flm_torchrec.training.schedule import Schedule
from flm_torchrec.training.steps import STEPS as KINDS_OF_STEPS
from flm_torchrec.training.trainer import pretrain
from tests.conftest import NO_DROPOUT
from tests.processes import TORCHRUN, Forked, launch_ranks, start_ranks
from tests.training.test_checkpoint import tensors
from tools.faults.replay import replay

STEPS = 40
OF_TIME = ("seconds", "samples_per_second", "input_wait")
TRAIN = [
    "train", "--distributed.threads", "1", "--model.dim", "16", "--model.layers", "1", "--train.batch_size", "32",
    "--data.max_history", "8", "--train.max_steps", str(STEPS), "--train.checkpoint_every", "5",
    "--train.eval_every", "20", "--train.eval_users", "20", "--train.log_every", "5",
]  # fmt: skip


def overrides(data: PreparedData, run: Path, *more: str) -> list[str]:
    options = [a.removeprefix("--") for a in TRAIN[1:]]
    pairs = [f"{key}={value}" for key, value in zip(options[::2], options[1::2], strict=True)]
    return [*pairs, f"data.path={data.path}", f"train.run={run}", *more]


def metrics(run: Path) -> list[dict[str, float]]:
    """Lines of metrics.jsonl without what time does to them."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in OF_TIME} for line in lines]


def newest(run: Path) -> Path:
    return max((run / "checkpoints").glob("step-*[0-9]"))


def same(one: Path, other: Path) -> bool:
    first, second = tensors(one), tensors(other)
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def wait_for(found: object, process: Forked, seconds: float = 120) -> None:
    """Until `found()` is true; fails if the process ends before."""
    until = time.monotonic() + seconds
    while not found():  # type: ignore[operator]
        assert process.poll() is None and time.monotonic() < until, "ended or too slow"
        time.sleep(0.02)


@pytest.fixture(scope="module")
def undisturbed(small: PreparedData, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("undisturbed") / "run"
    pretrain(load_config(None, overrides(small, run)))
    return run


def start_flm(count: int, options: list[str]) -> list[Forked]:
    """`flm` as so many ranks with no launcher, so that each can be told, and asked, for itself."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    return start_ranks(count, ["-m", "flm_torchrec", *options], MASTER_ADDR="127.0.0.1", MASTER_PORT=port)


def test_a_process_alone_keeps_its_hook_of_exceptions() -> None:
    """A notebook that has trained shows later errors as any other."""
    before = sys.excepthook
    join("gloo", timedelta(seconds=10))
    dist.destroy_process_group()
    assert sys.excepthook is before


def test_sigterm_saves_and_the_run_goes_on_to_the_same_end(
    small: PreparedData, tmp_path: Path, undisturbed: Path
) -> None:
    run = tmp_path / "run"
    options = [*TRAIN, "--data.path", str(small.path), "--train.run", str(run)]
    process = Forked(["-m", "flm_torchrec", *options, "--train.checkpoint_every", "0"])
    wait_for(lambda: (run / "metrics.jsonl").is_file() and len((run / "metrics.jsonl").read_text()) > 0, process)
    process.send_signal(signal.SIGTERM)
    _, told = process.communicate(timeout=60)
    assert process.returncode == 75 and "go on with --train.existing resume" in told
    stopped = storage.read_meta(newest(run))["step"]
    assert 5 <= stopped < STEPS
    with pytest.raises(RunError, match=r"--train\.existing replace to start anew, resume to go on"):
        pretrain(load_config(None, overrides(small, run)))
    pretrain(load_config(None, overrides(small, run, "train.existing=resume")))
    assert f"resuming after step {stopped}" in (run / "train.log").read_text()
    assert same(newest(run), newest(undisturbed)) and same(run / checkpoint.BEST, undisturbed / checkpoint.BEST)
    # Lines of steps that a stop cut in two average the rest alone; those after are the same to the last digit.
    assert metrics(run)[-3:] == metrics(undisturbed)[-3:]
    assert len({line["step"] for line in metrics(run)}) == len({line["step"] for line in metrics(undisturbed)})


@pytest.mark.parametrize(("number", "step"), [(signal.SIGINT, 20), (signal.SIGTERM, 20), (signal.SIGINT, STEPS)])
def test_a_stop_within_a_validation_saves_and_it_comes_first_when_the_run_goes_on(
    small: PreparedData, tmp_path: Path, undisturbed: Path, monkeypatch: pytest.MonkeyPatch, number: int, step: int
) -> None:
    """Left at the next block, not at its end; the same end as the run undisturbed.

    A validation encodes its one block twice: for the heads' best items, and to rank.
    """
    run = tmp_path / "run"
    users, asked, blocks = ModelEncoder.users, 2 * step // 20, [0]

    def users_and_signal(self: ModelEncoder, rows: np.ndarray) -> dict[str, torch.Tensor]:
        blocks[0] += 1
        if blocks[0] == asked:
            os.kill(os.getpid(), number)
        return users(self, rows)

    monkeypatch.setattr(ModelEncoder, "users", users_and_signal)
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with pytest.raises(Interrupted, match=rf"at step {step} of {STEPS}, all saved"):
        pretrain(load_config(None, overrides(small, run)))
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before
    meta = storage.read_meta(newest(run))
    assert meta["step"] == step and meta["due"] and blocks[0] == asked
    assert [line["step"] for line in metrics(run) if "valid/" in str(line)] == [20][: asked // 2 - 1]
    monkeypatch.undo()
    pretrain(load_config(None, overrides(small, run, "train.existing=resume")))
    assert same(newest(run), newest(undisturbed)) and same(run / checkpoint.BEST, undisturbed / checkpoint.BEST)
    assert metrics(run) == metrics(undisturbed) and not storage.read_meta(newest(run))["due"]


def test_a_second_ctrl_c_ends_at_once_but_not_the_one_that_a_launcher_hands_on(tmp_path: Path) -> None:
    with process_group(load_config(None, []).distributed) as comm, Guard(comm, "stop", tmp_path) as guard:
        ended: list[int] = []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(os, "_exit", ended.append)
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
            assert guard.asked and not ended
            guard.since -= 2.0
            os.kill(os.getpid(), signal.SIGTERM)
            assert not ended
            os.kill(os.getpid(), signal.SIGINT)
            assert ended == [130]


def test_sigterm_to_one_rank_stops_all_and_another_number_of_ranks_goes_on(small: PreparedData, tmp_path: Path) -> None:
    """Without dropout, which each rank draws for itself, the end is that of one rank, but for the order of sums."""
    options = [*TRAIN, *NO_DROPOUT, "--data.path", str(small.path), "--train.run"]
    run = tmp_path / "run"
    processes = start_flm(2, [*options, str(run)])
    wait_for(lambda: (run / "metrics.jsonl").is_file() and len((run / "metrics.jsonl").read_text()) > 0, processes[0])
    processes[1].send_signal(signal.SIGTERM)
    told = [process.communicate(timeout=60)[1] for process in processes]
    assert [process.returncode for process in processes] == [75, 75], told
    assert main([*options, str(run), "--train.existing", "resume"]) == 0
    assert "resuming after step" in (run / "train.log").read_text()
    assert main([*options, str(tmp_path / "whole")]) == 0
    last, expected = metrics(run)[-2], metrics(tmp_path / "whole")[-2]
    assert last["step"] == STEPS and last == pytest.approx(expected, rel=1e-4)


def test_a_job_started_anew_knows_its_own_run_from_another(small: PreparedData, tmp_path: Path) -> None:
    """What its launcher keeps tells it; a folder that was there before is refused or replaced as ever."""
    config = load_config(None, overrides(small, tmp_path / "run", "train.max_steps=5"))
    pretrain(config)

    def goes_on(launch: dist.Store | None, existing: str, path: Path = tmp_path / "run") -> bool:
        comm = Comm(0, 1, 1, torch.device("cpu"), launch=launch)
        train = replace(config.train, existing=existing, run=str(path))  # type: ignore[arg-type]
        return check_run_folder(replace(config, train=train), comm)

    fresh, own = dist.HashStore(), dist.HashStore()
    with open_run_folder(replace(config, train=replace(config.train, existing="resume")),
                         small, Comm(0, 1, 1, torch.device("cpu"), launch=own), 5):  # fmt: skip
        pass
    assert goes_on(own, "refuse") and goes_on(own, "replace") and goes_on(own, "resume")
    assert not goes_on(fresh, "replace") and not goes_on(None, "replace")
    with pytest.raises(RunError, match="exists; give another"):
        goes_on(fresh, "refuse")
    assert not goes_on(own, "refuse", tmp_path / "elsewhere")


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_agree_on_a_part_of_the_store_that_none_before_them_used(world_size: int) -> None:
    store = dist.HashStore()
    names = []
    for _ in range(3):  # each time over what the attempt before has left
        with ThreadPoolExecutor(world_size) as pool:
            ranks = [
                pool.submit(fresh_store, store, rank, world_size, timedelta(seconds=20)) for rank in range(world_size)
            ]
            for rank, found in enumerate(ranks):
                found.result().set("rank", str(rank))
            assert {found.result().get("rank") for found in ranks} == {str(world_size - 1).encode()}
            names.append(ranks[0].result())
            assert not any(names[-1].check([key]) for key in ("old",))
            names[-1].set("old", "")
    with pytest.raises(RunError, match="rank 1 did not come"):
        fresh_store(dist.HashStore(), 0, 2, timedelta(seconds=0.2))


def test_a_killed_rank_is_started_anew_and_nothing_is_lost_or_repeated(small: PreparedData, tmp_path: Path) -> None:
    """SIGKILL to one of two ranks under torchrun's --max_restarts; weights as in a run of two that nothing befell."""
    runs = [tmp_path / name for name in ("calm", "killed")]
    calm, killed = (
        ["-m", "flm_torchrec", "--", *TRAIN, "--data.path", str(small.path), "--train.run", str(run)] for run in runs
    )
    launch_ranks(2, calm)
    process = Forked([TORCHRUN, "--standalone", "--nproc_per_node", "2", "--max_restarts", "2", *killed])
    wait_for(lambda: any((runs[1] / "checkpoints").glob("step-*5")), process)
    children = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
    os.kill(int(children[-1]), signal.SIGKILL)
    _, told = process.communicate(timeout=240)
    assert process.returncode == 0, told[-3000:]
    log = (runs[1] / "train.log").read_text()
    assert "resuming after step" in log and log.count("events to learn from") == 2
    assert same(newest(runs[0]), newest(runs[1])) and metrics(runs[0]) == metrics(runs[1])


def test_a_hung_rank_is_named(small: PreparedData, tmp_path: Path) -> None:
    options = [*TRAIN, "--data.path", str(small.path), "--train.run", str(tmp_path / "run"), "--train.max_steps", "0"]
    processes = start_flm(3, [*options, "--train.epochs", "100000", "--distributed.timeout", "6"])
    try:
        file = tmp_path / "run" / "metrics.jsonl"
        wait_for(lambda: file.is_file() and len(file.read_text()) > 0, processes[0])
        processes[2].send_signal(signal.SIGSTOP)
        _, told = processes[0].communicate(timeout=60)
    finally:
        for process in processes:
            process.kill()
            process.communicate()
    assert processes[0].returncode == 2
    assert "rank 2 of 3 does not answer" in told and "--train.existing resume" in told


def test_a_damaged_state_is_told_and_the_one_before_it_used(small: PreparedData, tmp_path: Path) -> None:
    run = tmp_path / "run"
    pretrain(load_config(None, overrides(small, run)))
    last = newest(run)
    file = next(last.glob("*.distcp"))
    file.write_bytes(file.read_bytes()[:-100])
    before = tensors(run / checkpoint.BEST)
    pretrain(load_config(None, overrides(small, run, "train.existing=resume")))
    log = (run / "train.log").read_text()
    assert f"not used: {last}: {file.name} has changed since it was written" in log
    assert f"resuming after step {STEPS - 5}" in log
    assert storage.damage(last) == [] and storage.damage(last.with_name(f"damaged-{last.name}"))
    after = tensors(run / checkpoint.BEST)
    assert all(torch.equal(before[name], after[name]) for name in before)
    best = next((run / checkpoint.BEST).glob("*.distcp"))
    best.write_bytes(best.read_bytes()[:-1])
    pretrain(load_config(None, overrides(small, run, "train.existing=resume")))
    assert f"not used: {run / checkpoint.BEST}: {best.name} has changed" in (run / "train.log").read_text()
    assert storage.damage(run / checkpoint.BEST) == []
    for folder in (run / "checkpoints").glob("step-*"):
        (folder / storage.SUMS).unlink()
    with pytest.raises(RunError, match="and no older one is whole"):
        pretrain(load_config(None, overrides(small, run, "train.existing=resume")))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["train.dense_lr=0.5"], r"was made with train.dense_lr 0.001, not 0.5"),
        (["train.batch_size=31"], r"was made with train.batch_size 32, not 31"),
        (["data.max_history=7"], r"was made with data.max_history 8, not 7"),
    ],
)
def test_resuming_as_another_run_is_refused(
    small: PreparedData, undisturbed: Path, changes: list[str], message: str
) -> None:
    before = (undisturbed / "config.yaml").read_text()
    with pytest.raises(RunError, match=message):
        pretrain(load_config(None, [*overrides(small, undisturbed, "train.existing=resume"), *changes]))
    assert (undisturbed / "config.yaml").read_text() == before


def test_resuming_on_other_data_is_refused(small: PreparedData, undisturbed: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(small.path, tmp_path / "other"))
    part = next((other / "interactions").glob("*.parquet"))
    part.write_bytes(part.read_bytes())
    assert _fingerprint(other) == small.fingerprint
    table = pq.read_table(part)
    changed = table["item_id"].to_numpy().copy()
    changed[0] = (changed[0] + 1) % small.schema.items
    pq.write_table(table.set_column(table.schema.get_field_index("item_id"), "item_id", [changed]), part)
    assert _fingerprint(other) != small.fingerprint
    with pytest.raises(RunError, match=r"made with other data than data\.path holds now"):
        pretrain(load_config(None, [*overrides(small, undisturbed, "train.existing=resume"), f"data.path={other}"]))


def _fingerprint(path: Path) -> str:
    return load_prepared(path).fingerprint


def test_what_the_rows_stand_for_is_kept_with_the_run(small: PreparedData, undisturbed: Path) -> None:
    kept = undisturbed / "vocabulary"
    assert pq.read_table(kept / "items.parquet")["item_key"].to_pylist() == small.item_keys
    assert pq.read_table(kept / "users.parquet")["user_key"].to_pylist() == small.user_keys
    assert {f.name for f in (kept / "vocab").iterdir()} == {f.name for f in (small.path / "vocab").iterdir()}


def test_too_little_room_is_told_before_the_first_step(
    small: PreparedData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda _: usage(10**6, 10**6, 1000))
    with pytest.raises(RunError, match=r"checkpoints need up to .* GiB, 0.00 GiB are free; make room"):
        pretrain(load_config(None, overrides(small, tmp_path / "run")))
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == ""


def test_a_full_disk_while_training_keeps_what_is_saved(
    small: PreparedData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The saves of steps 10 and 40 fail: training goes on after the first, and ends with an error after the last."""
    write = storage.write

    def fail(folder: Path, *rest: object) -> None:
        if folder.name in ("step-000000010", f"step-{STEPS:09d}"):
            raise RunError(f"{folder}: checkpoint not written (No space left on device); kept")
        write(folder, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(storage, "write", fail)
    with pytest.raises(RunError, match="No space left on device"):
        pretrain(load_config(None, overrides(small, tmp_path / "run")))
    assert "step-000000010: checkpoint not written" in (tmp_path / "run" / "train.log").read_text()
    assert not list((tmp_path / "run" / "checkpoints").glob("*.tmp"))
    assert newest(tmp_path / "run").name == f"step-{STEPS - 5:09d}" and storage.damage(newest(tmp_path / "run")) == []


def test_a_run_folder_that_cannot_be_written_is_refused(small: PreparedData, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(RunError, match="is a file; give another --train"):
        pretrain(load_config(None, overrides(small, tmp_path / "file")))
    with pytest.raises(RunError, match=r"Not a directory; mend that, or give another --train\.run"):
        pretrain(load_config(None, overrides(small, tmp_path / "file" / "run")))
    with pytest.raises(RunError, match=r"mend that, or give another --train\.run"):
        pretrain(load_config(None, overrides(small, Path("/proc/run"))))


@pytest.mark.parametrize("existing", ["refuse", "replace", "resume"])
def test_a_run_that_another_job_writes_is_refused(
    small: PreparedData, undisturbed: Path, tmp_path: Path, existing: str
) -> None:
    run = Path(shutil.copytree(undisturbed, tmp_path / "run"))
    before = {file: file.read_bytes() for file in run.rglob("*") if file.is_file()}
    holder = rf"run: process {os.getpid()} on '{socket.gethostname()}' is writing it"
    with claim(run), pytest.raises(InUse, match=holder + r"; wait until that ends, or give another --train\.run"):
        pretrain(load_config(None, overrides(small, run, f"train.existing={existing}")))
    assert {file: file.read_bytes() for file in run.rglob("*") if file.is_file()} == before


def test_a_requeued_job_is_refused_beside_a_live_one_and_goes_on_once_that_is_dead(
    small: PreparedData, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The first of two ranks is killed, the second stays for a while: nothing of it keeps the folder."""
    run = tmp_path / "run"
    options = [*TRAIN, "--data.path", str(small.path), "--train.run", str(run), "--train.existing", "resume"]
    processes = start_flm(2, [*options, "--train.max_steps", "0", "--train.epochs", "100000"])
    try:
        wait_for(lambda: any((run / "checkpoints").glob("step-*5")), processes[0])
        assert main(options) == 2
        assert f"process {processes[0].pid} on '{socket.gethostname()}'" in capsys.readouterr().err
        assert processes[0].poll() is None and processes[1].poll() is None
    finally:
        processes[0].kill()
        processes[0].communicate()
        processes[1].kill()
        processes[1].communicate()
    assert main([*options, "--train.max_steps", "0", "--train.epochs", "1"]) == 2  # other settings: it is read again
    assert "was made with" in capsys.readouterr().err


def test_a_full_disk_at_the_start_names_the_run(
    small: PreparedData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each thing that a run begins with: its folder, its log and metrics, its plan."""

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    record = "flm_torchrec.training.logger"
    places = {
        "pyarrow.parquet.write_table": full,
        f"{record}.LogFile._open": lambda _: Path("/dev/full").open("a"),  # noqa: SIM115
        f"{record}.write_text": full,
    }
    for number, (place, found) in enumerate(places.items()):
        run = tmp_path / str(number)
        with monkeypatch.context() as patch:
            patch.setattr(place, found)
            with pytest.raises(RunError, match=rf"^{run}: No space left on device; mend that, or ") as told:
                pretrain(load_config(None, overrides(small, run)))
        assert "\n" not in str(told.value)
        assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []


def test_what_people_put_beside_a_run_and_its_states_is_left_alone(small: PreparedData, tmp_path: Path) -> None:
    run = tmp_path / "run"
    mine = [tmp_path / "run.tmp", tmp_path / "run.old", *(run / "checkpoints" / n for n in ("best.old", "step-backup9",
            "step-000000005.tmp", "damaged-mine"))]  # fmt: skip
    for folder in mine[:2]:
        folder.mkdir()
    pretrain(load_config(None, overrides(small, run)))
    file = next(newest(run).glob("*.distcp"))
    for folder in mine[2:]:
        folder.mkdir()
    file.write_bytes(file.read_bytes()[:-1])
    for path in [run, *run.rglob("*")]:
        path.chmod(0o700 if path.is_dir() else 0o600)
    pretrain(load_config(None, overrides(small, run, "train.existing=resume")))
    assert all(folder.is_dir() for folder in mine)
    best = [run, run / checkpoint.BEST, *(run / checkpoint.BEST).iterdir(), run / "config.yaml", run / "metrics.jsonl"]
    assert all(path.stat().st_mode & 0o077 == 0 for path in best)


def poisoned(loader, bad: int):  # type: ignore[no-untyped-def]
    for number, batch in enumerate(loader.after(0)):
        if number == bad:
            batch.value = torch.full_like(batch.value, float("nan"))
        yield batch


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_a_batch_whose_loss_is_no_number_is_left_out_or_ends_the_run(
    small: PreparedData, tmp_path: Path, kind: str
) -> None:
    """In plain steps and in those of the pipeline that GPUs take."""
    config = load_config(None, ["model.dim=16", "train.batch_size=32", "distributed.threads=1"])
    with open_job(config, small) as job:
        job.model.train()
        state: list[list[torch.Tensor]] = []

        def run(policy: str, bad: int) -> list[bool]:
            guard = Guard(job.comm, policy, tmp_path / policy)
            schedule = Schedule(job.optimizer, 2, 8)
            steps = KINDS_OF_STEPS[kind](job.model, job.optimizer, schedule, job.comm.device, guard)
            batches, found = islice(poisoned(job.loader, bad), 3), []
            for step in range(3):
                found.append(steps.take(batches, step) is not None)
                state.append([t.clone() for t in job.model.parameters()])
            steps.release()
            return found

        assert run("skip", 1) == [True, False, True]
        assert all(torch.equal(a, b) for a, b in zip(state[0], state[1], strict=True))
        assert not all(torch.equal(a, b) for a, b in zip(state[1], state[2], strict=True))
        assert all(bool(t.isfinite().all()) for t in state[2])
        with pytest.raises(NonFinite, match=r"step 2: the .*sequential.* loss of rank 0 is not a number"):
            run("stop", 1)
    with np.load(tmp_path / "stop" / "step-000000002-rank-0.npz", allow_pickle=False) as arrays:
        batch = from_arrays(arrays)
    assert bool(batch.value.isnan().all())
    assert_same_batch(batch, next(islice(poisoned(job.loader, 1), 1, 2)))


def assert_same_batch(found: Batch, expected: Batch) -> None:
    one, other = as_arrays(found), as_arrays(expected)
    assert one.keys() == other.keys()
    for name, values in one.items():
        np.testing.assert_array_equal(values, other[name])


def test_ten_bad_losses_in_a_row_end_the_run_under_either_policy(small: PreparedData, tmp_path: Path) -> None:
    run = tmp_path / "run"
    decay = ["train.dense_lr=1e4", "train.weight_decay=1e6"]  # each step multiplies the weights by about -1e10
    explode = [*decay, "train.sparse_lr=1e4", "train.warmup_steps=0", "train.eval_every=1000"]
    with pytest.raises(NonFinite, match="for 10 steps in a row"):
        pretrain(load_config(None, [*overrides(small, run, "train.non_finite=skip"), *explode]))
    with pytest.raises(NonFinite, match=r"batch and state before it are in .*non-finite"):
        pretrain(load_config(None, [*overrides(small, run, "train.existing=replace"), *explode]))
    assert list((run / "non-finite").glob("*.npz")) and list((run / "non-finite").glob("step-*/SHA256SUMS"))
    assert not list((run / "checkpoints").glob("step-*"))
    told = replay(next((run / "non-finite").glob("*.npz")))
    assert told[0].startswith("state after step") and any(line.startswith("loss sequential = ") for line in told)
    with pytest.raises(RunError, match=r"not RUN/non-finite/step-"):
        replay(run / "config.yaml")


@settings(max_examples=30)
@given(steps=st.integers(0, 60), batch_size=st.integers(1, 40), before=st.integers(1, 3), after=st.integers(1, 3))
def test_what_is_learnt_from_does_not_depend_on_where_or_on_how_many_ranks_a_run_resumed(
    small: PreparedData, steps: int, batch_size: int, before: int, after: int
) -> None:
    """Sequences of the steps before a stop, at some ranks, and after it, at others: those of one run, each once."""
    spans = windows(small, split(small, "leave-one-out", 0.1), 5)

    def taken(first: int, last: int, ranks: int) -> list[list[tuple[int, int, int]]]:
        """By step: user, start and end of each sequence that is not there to fill up ranks, in any order."""
        found: list[list[tuple[int, int, int]]] = [[] for _ in range(first, last)]
        for rank in range(ranks):
            sharing = Sharing(batch_size, 7, rank, ranks)
            loader = TrainLoader(spans, Recorder(), Negatives(np.ones(3), 0, 1.0), sharing)  # type: ignore[arg-type]
            for step, rows in zip(found, loader.after(first), strict=False):
                step += [row for row in rows if row[1] != row[2]]  # type: ignore[union-attr]
        return [sorted(step) for step in found]

    end = steps + 2 * -(-len(spans) // batch_size)
    whole = taken(0, end, 1)
    assert taken(0, steps, before) + taken(steps, end, after) == whole
    epoch = -(-len(spans) // batch_size)
    rows = sorted(row for step in whole[:epoch] for row in step)
    assert rows == sorted(zip(spans.user.tolist(), spans.start.tolist(), spans.end.tolist(), strict=True))


class Recorder:
    """In place of the assembler: what it was asked for."""

    def training(self, user: np.ndarray, start: np.ndarray, end: np.ndarray, drawn: object) -> object:
        return list(zip(user.tolist(), start.tolist(), end.tolist(), strict=True))


def test_managed_tables_resume_with_the_ids_that_they_hold(tmp_path: Path) -> None:
    """At a multiple of the steps between which they take in ids: till then they count, and counts are not saved."""
    data, runs = tmp_path / "data", [tmp_path / "whole", tmp_path / "resumed"]
    recipe = ["--synthetic-users", "100", "--synthetic-items", "160"]
    tables = ["--tables", "user_id=zch:40,item_id=zch:60"]
    assert main(["prepare", "--source", "synthetic", *recipe, *tables, "--output", str(data)]) == 0
    options = [*TRAIN, "--data.path", str(data), "--train.checkpoint_every", "10", "--train.run"]
    for run in runs:
        assert main([*options, str(run)]) == 0
    shutil.rmtree(newest(runs[1]))
    assert main([*options, str(runs[1]), "--train.existing", "resume"]) == 0
    assert "resuming after step 30" in (runs[1] / "train.log").read_text()
    assert same(newest(runs[0]), newest(runs[1]))
