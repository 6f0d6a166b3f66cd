"""Packed files are read to their end or refused, whatever packed them."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import zipfile
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pytest

from flm_torchrec.cli import main
from flm_torchrec.data.dataset import load_prepared

LINES = b"user_id,item_id,timestamp\n" + b"".join(b"u%d,i%d,%d\n" % (n, n * n % 97, n) for n in range(2000))


def zipped(*files: bytes) -> bytes:
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.mkdir("logs")
        for number, plain in enumerate(files):
            archive.writestr(f"logs/{number}.csv", plain)
    return made.getvalue()


PACK: dict[str, Callable[[bytes], bytes]] = {
    "gz": gzip.compress,
    "bz2": bz2.compress,
    "xz": lzma.compress,
    "zst": lambda plain: bytes(pa.Codec("zstd").compress(plain)),
    "zip": zipped,
}


def flm(file: Path, out: Path) -> int:
    return main(["prepare", "--source", "csv", "--input", str(file), "--output", str(out)])


@pytest.mark.parametrize("ending", PACK)
def test_all_of_a_packed_file_is_read(tmp_path: Path, ending: str) -> None:
    file = tmp_path / f"a.csv.{ending.upper()}"
    file.write_bytes(PACK[ending](LINES))
    assert flm(file, tmp_path / "out") == 0
    assert load_prepared(tmp_path / "out").schema.interactions == 2000


@pytest.mark.parametrize("harm", ["cut in the middle", "cut at the end", "not packed"])
@pytest.mark.parametrize("ending", PACK)
def test_a_file_that_cannot_be_unpacked_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], ending: str, harm: str
) -> None:
    packed = PACK[ending](LINES)
    harmed = {"cut in the middle": packed[: len(packed) // 2], "cut at the end": packed[:-3], "not packed": LINES}
    file = tmp_path / f"a.csv.{ending}"
    file.write_bytes(harmed[harm])
    assert flm(file, tmp_path / "out") == 2
    assert f"{file}: cannot be read to its end" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_frames_one_after_another_are_all_read(tmp_path: Path) -> None:
    file = tmp_path / "a.csv.zst"
    file.write_bytes(PACK["zst"](LINES) + PACK["zst"](b"bob,x,1\n"))
    assert flm(file, tmp_path / "out") == 0
    assert load_prepared(tmp_path / "out").schema.interactions == 2001


@pytest.mark.parametrize("files", [(), (LINES, LINES)])
def test_an_archive_must_hold_one_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], files: tuple[bytes, ...]
) -> None:
    file = tmp_path / "a.csv.zip"
    file.write_bytes(zipped(*files))
    assert flm(file, tmp_path / "out") == 2
    assert f"{file}: holds {len(files)} files" in capsys.readouterr().err
