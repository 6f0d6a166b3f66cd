"""A command that is given another kind of folder than it wants says what the folder is, and writes nothing there."""

from pathlib import Path

import pytest

from flm_torchrec.api.hub import pull
from flm_torchrec.data.schema import Schema
from flm_torchrec.errors import FlmError
from flm_torchrec.export.manifest import read_manifest
from flm_torchrec.export.write import check_output
from flm_torchrec.training.identity import check_is_run

FILES = {
    "run": ["config.yaml"],
    "data": ["schema.yaml", "interactions"],
    "export": ["manifest.json", "map.parquet"],
    "pushed": ["config.yaml", "manifest.json"],
}


@pytest.fixture
def folders(tmp_path: Path) -> Path:
    for name, files in FILES.items():
        for file in files:
            (tmp_path / name / file).mkdir(parents=True)
    return tmp_path


def test_the_kind_of_a_wrong_folder_is_told(folders: Path) -> None:
    with pytest.raises(FlmError, match="run: is a run, not prepared data; give a folder of 'flm prepare --output'"):
        Schema.load(folders / "run/schema.yaml")
    with pytest.raises(FlmError, match="data: is prepared data, not an export; give a folder of 'flm export --output'"):
        read_manifest(folders / "data")
    for name, kind in (("run", "a run"), ("data", "prepared data"), ("export", "an export")):
        with pytest.raises(
            FlmError, match=f"{name}: is {kind}, not a folder of 'flm push'; make one with 'flm push RUN"
        ):
            pull(folders / name, folders / "new")
    with pytest.raises(FlmError, match="no run folder: it is an export; give a folder of"):
        check_is_run(folders / "export")
    with pytest.raises(FlmError, match="a folder of 'flm push', not a run; make a run of it with 'flm pull"):
        check_is_run(folders / "pushed")


@pytest.mark.parametrize("within", ["data", "export"])
def test_an_export_goes_into_no_folder_that_is_replaced_whole(folders: Path, within: str) -> None:
    with pytest.raises(FlmError, match=f"sub: lies in .*{within}, .*give another --output"):
        check_output(folders / within / "deeper" / "sub", overwrite=True)
    check_output(folders / "run" / "export", overwrite=False)
