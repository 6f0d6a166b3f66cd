"""Full states: the same bits at any number of ranks and under any sharding, damage found, nothing in them run."""

from __future__ import annotations

import json
import os
import pickle
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp

from flm_torchrec.data.dataset import PreparedData
from flm_torchrec.errors import RunError
from flm_torchrec.files import mend_inside, temporary
from flm_torchrec.training.checkpoint import storage
from tests.conftest import ROOT
from tests.processes import launch_ranks

JOB = str(ROOT / "tests" / "training" / "state_job.py")
STATE = "checkpoints/step-000000004"
# How each case is sharded at 1, 2, 4 and 1 ranks. Row-wise Adagrad keeps one number a row and column shard, so its
# state under column-wise sharding belongs to that cut alone; Adagrad itself has one a weight.
CASES = {
    "table": ("rowwise_adagrad:fp32", ["table_wise"] * 4),
    "row": ("rowwise_adagrad:fp32", ["row_wise"] * 4),
    "column": ("adagrad:fp32", ["column_wise"] * 4),
    "mixed": ("adagrad:fp32", ["table_wise", "column_wise", "row_wise", "table_wise"]),
    "half": ("rowwise_adagrad:fp16", ["row_wise"] * 4),
}


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint, whole, random states left out: those are of a rank, not of the model."""
    return {name: tensor for name, tensor in storage.read_all(folder).items() if not name.startswith("rng.")}


@pytest.fixture(scope="module")
def states(small: PreparedData, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The states of CASES as written at 1 rank, and, each read from the one before, at 2, 4 and 1."""
    folder = tmp_path_factory.mktemp("states")
    source = "-"
    for place, count in enumerate((1, 2, 4, 1)):
        target = folder / f"{place}-{count}"
        cases = [f"{name}:{shardings[place]}:{learns}" for name, (learns, shardings) in CASES.items()]
        launch_ranks(count, [JOB, str(small.path), source, str(target), *cases])
        source = str(target)
    return sorted(folder.iterdir())


@pytest.mark.parametrize("case", CASES)
def test_one_to_two_to_four_to_one_rank_is_the_same_state_bit_for_bit(states: list[Path], case: str) -> None:
    first, *others = [tensors(folder / case / STATE) for folder in states]
    assert {name.split(".")[0] for name in first} == {"model", "optimizer"}
    assert any(name.endswith("momentum1") and tensor.count_nonzero() for name, tensor in first.items())
    assert any(name.endswith("exp_avg_sq") for name in first)
    assert {t.dtype for n, t in first.items() if n.startswith("model.users.")} == {
        torch.half if case == "half" else torch.float32
    }
    for other in others:
        assert other.keys() == first.keys()
        assert all(torch.equal(other[name], tensor) for name, tensor in first.items())


def test_the_shardings_were_what_they_are_called(states: list[Path]) -> None:
    """More than one shard for a table where it is cut, one where it is not."""
    for case, expected in (("table", False), ("row", True), ("column", True)):
        shards = json.loads((states[1] / case / "shards.json").read_text())
        assert (shards["user_id"] > 1) == expected, (case, shards)


@pytest.fixture
def state(states: list[Path], tmp_path: Path) -> Path:
    """A copy of a whole state, to be damaged."""
    return Path(shutil.copytree(states[2] / "row" / STATE, tmp_path / "state"))


def test_any_changed_byte_is_found_wherever_it_is(state: Path) -> None:
    rng = random.Random(0)
    assert storage.damage(state) == []
    files = sorted(file for file in state.iterdir())
    assert {storage.SUMS, storage.META, ".metadata"} < {file.name for file in files}
    for file in files:
        whole = file.read_bytes()
        for _ in range(8):
            place = rng.randrange(len(whole))
            file.write_bytes(whole[:place] + bytes([whole[place] ^ (1 << rng.randrange(8))]) + whole[place + 1 :])
            assert storage.damage(state), (file.name, place)
        file.write_bytes(whole[: rng.randrange(len(whole))])
        assert storage.damage(state), file.name
        file.unlink()
        assert storage.damage(state), file.name
        file.write_bytes(whole)
    assert storage.damage(state) == []


def test_sums_cut_short_at_the_end_of_any_line_are_found(state: Path) -> None:
    lines = (state / storage.SUMS).read_bytes().splitlines(keepends=True)
    assert len(lines) > 3
    for count in range(len(lines)):
        (state / storage.SUMS).write_bytes(b"".join(lines[:count]))
        assert storage.damage(state), count
    (state / storage.SUMS).write_bytes(b"".join(lines[1:]))
    assert storage.damage(state)


def test_ranks_share_the_reading_and_miss_nothing(state: Path) -> None:
    for file in state.iterdir():
        if file.name != storage.SUMS:
            file.write_bytes(file.read_bytes() + b"x")
    found = [storage.damage(state, rank, 3) for rank in range(3)]
    assert sorted(line for part in found for line in part) == sorted(storage.damage(state))
    assert len(storage.damage(state)) > 3
    assert all(len(part) < len(storage.damage(state)) for part in found)


class Evil:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.mark),)


def test_a_pickle_that_would_run_code_is_refused(state: Path, tmp_path: Path) -> None:
    (state / ".metadata").write_bytes(pickle.dumps(Evil(tmp_path / "mark")))
    with pytest.raises(RunError, match=r"asks for .*mkdir"):
        storage.stored(state)
    assert not (tmp_path / "mark").exists()


def test_a_pickle_cannot_change_a_class_for_the_whole_process(state: Path) -> None:
    """BUILD with a pair as state sets attributes on whatever is on the stack, here the class itself."""
    before = dcp.metadata.Metadata.__init__
    build = b"".join([
        pickle.PROTO + b"\x02", pickle.GLOBAL + b"torch.distributed.checkpoint.metadata\nMetadata\n",
        pickle.NONE, pickle.EMPTY_DICT, pickle.UNICODE + b"__init__\n", pickle.NONE, pickle.SETITEM, pickle.TUPLE2,
        pickle.BUILD, pickle.STOP,
    ])  # fmt: skip
    (state / ".metadata").write_bytes(build)
    with pytest.raises(RunError, match="sets a state on <class"):
        storage.stored(state)
    assert dcp.metadata.Metadata.__init__ is before
    (state / ".metadata").write_bytes(pickle.dumps(dcp.metadata.BytesStorageMetadata()))
    with pytest.raises(RunError, match="describes no tensors"):
        storage.stored(state)


class Got:
    """Is pickled as what `getattr` gives, as Python 3.11.0 to 3.11.3 pickle a member of an enumeration."""

    def __init__(self, kind: Any, name: str) -> None:
        self.asked = kind, name

    def __reduce__(self) -> tuple[Any, ...]:
        return getattr, self.asked


def test_metadata_may_name_an_enumeration_by_getattr_and_nothing_else(state: Path) -> None:
    enumeration = dcp.metadata._MEM_FORMAT_ENCODING
    metadata = dcp.FileSystemReader(state).read_metadata()
    entry: Any = next(iter(metadata.state_dict_metadata.values()))
    encoded = entry.properties.__getstate__()
    assert enumeration.TORCH_CONTIGUOUS_FORMAT in encoded
    older = tuple(Got(enumeration, e.name) if isinstance(e, enumeration) else e for e in encoded)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dcp.metadata.TensorProperties, "__getstate__", lambda self: older)
        written = pickle.dumps(metadata)
    assert b"getattr" in written
    (state / ".metadata").write_bytes(written)
    assert storage.stored(state)
    for kind, name in ((dcp.metadata.Metadata, "__init__"), (enumeration, "__class__")):
        (state / ".metadata").write_bytes(pickle.dumps(Got(kind, name)))
        with pytest.raises(RunError, match=f"asks for '{name}'"):
            storage.stored(state)


def test_code_where_a_tensor_should_be_is_refused(state: Path, tmp_path: Path) -> None:
    """The metadata may be harmless and call an entry bytes, which DCP would unpickle."""
    metadata = dcp.FileSystemReader(state).read_metadata()
    name = "model.dense.attribute_scale"
    metadata.state_dict_metadata[name] = dcp.metadata.BytesStorageMetadata()
    index = next(i for i in metadata.storage_data if i.fqn == name)
    info = metadata.storage_data.pop(index)
    metadata.storage_data[dcp.metadata.MetadataIndex(name)] = info
    (state / ".metadata").write_bytes(pickle.dumps(metadata))
    payload = pickle.dumps(Evil(tmp_path / "mark"))
    file = state / info.relative_path
    whole = bytearray(file.read_bytes())
    whole[info.offset : info.offset + len(payload)] = payload
    file.write_bytes(bytes(whole))
    with pytest.raises(RunError, match="does not fit"):
        storage.read(state, {"model": {"dense.attribute_scale": torch.zeros(())}}, None)
    assert not (tmp_path / "mark").exists()


def test_metadata_cannot_point_out_of_the_folder(state: Path) -> None:
    metadata = dcp.FileSystemReader(state).read_metadata()
    next(iter(metadata.storage_data.values())).relative_path = "../../elsewhere"
    (state / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(RunError, match="outside the folder"):
        storage.stored(state)


def test_a_save_that_fails_leaves_what_was_there(state: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(RunError, match="No space left on device"):
        storage.write(state, {"a": torch.ones(3)}, {"step": 9}, None)
    assert storage.damage(state) == [] and storage.read_meta(state)["step"] == 4
    assert [file.name for file in state.parent.iterdir()] == ["state"]


def test_an_interruption_between_the_two_renames_is_mended(state: Path) -> None:
    state.rename(temporary(state, "old"))
    temporary(state.with_name("other"), "new").mkdir()
    mend_inside(state.parent)
    assert storage.damage(state) == [] and [file.name for file in state.parent.iterdir()] == ["state"]


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    """A small state of one process."""
    storage.write(tmp_path / "plain", {"a": torch.ones(10, 4), "b": torch.zeros(3)}, {"step": 1}, None)
    return tmp_path / "plain"


def test_files_that_others_leave_do_not_damn_a_checkpoint(plain: Path) -> None:
    for name in (".nfs0000000012345", ".DS_Store", "Thumbs.db"):
        (plain / name).write_bytes(b"x")
    assert storage.damage(plain) == []
    (plain / "more.distcp").write_bytes(b"x")
    assert storage.damage(plain)
    (plain / "more.distcp").unlink()
    (plain / ".metadata").unlink()  # hidden too, and one of its own
    assert storage.damage(plain)


def wide(depth: int) -> object:
    """Tuples of the same tuple: few bytes, and 10 ** depth steps to hash."""
    found: object = ()
    for _ in range(depth):
        found = (found,) * 10
    return found


def test_metadata_that_would_take_hours_or_gigabytes_is_refused(plain: Path) -> None:
    index = dcp.metadata.MetadataIndex
    nested = b"(" * 2000 + b"t" * 2000 + b"."
    inside = index("a")
    for _ in range(8):
        inside = index((inside,) * 9)  # type: ignore[arg-type]
    for content in (
        pickle.dumps(wide(12)),
        pickle.dumps([index(wide(9))]),  # type: ignore[arg-type]
        pickle.dumps([inside]),
        pickle.PROTO + b"\x02" + nested,
        pickle.PROTO + b"\x05" + pickle.BYTEARRAY8 + (2**40).to_bytes(8, "little") + b".",
        pickle.PROTO + b"\x04" + pickle.BINUNICODE8 + (2**60).to_bytes(8, "little") + b".",
        b"\x80\x04" + b"N0" * 2**23 + b"N.",
    ):
        (plain / ".metadata").write_bytes(content)
        with pytest.raises(RunError, match="no readable checkpoint"):
            storage.stored(plain)


def test_a_tensor_larger_than_the_shards_is_refused(plain: Path) -> None:
    whole = pickle.loads((plain / ".metadata").read_bytes())
    entry = next(iter(whole.state_dict_metadata.values()))
    for size in (torch.Size([2**40, 64]), torch.Size([10**7])):
        entry.size = size
        (plain / ".metadata").write_bytes(pickle.dumps(whole))
        with pytest.raises(RunError, match="tells of tensors of"):
            storage.read_all(plain)
