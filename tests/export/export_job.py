"""Two ranks export to FOLDER/two, then try to where one rank has a vector that is no number."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

from flm_torchrec.config.schema import DistributedConfig
from flm_torchrec.data.dataset import load_prepared
from flm_torchrec.distributed.comm import process_group
from flm_torchrec.errors import RunError
from flm_torchrec.export.quality import ValidationSet
from flm_torchrec.export.write import ExportOptions, export
from tests.export.test_export import MadeUp, everyone_but_last, source_of


def main() -> None:
    data, folder = load_prepared(sys.argv[1]), Path(sys.argv[2])
    encoder = MadeUp(data)
    source = replace(source_of(data), encoder=encoder, validation=ValidationSet(encoder, everyone_but_last(data)))
    options = ExportOptions(quantise="int8", user_block=32, item_block=20, part_rows=30)
    with process_group(DistributedConfig(device="cpu")) as comm:
        manifest = export(source, comm, folder / "two", options)
        assert (manifest is None) == (comm.rank == 1)
        comm.barrier()
        try:  # as if each rank had a disk of its own
            export(source, comm, folder / f"none{comm.rank}" / "e", options)
        except RunError as error:
            sys.stdout.write(f"{comm.rank}: {str(error).rpartition('write ')[2]}\n")
        comm.barrier()
        encoder.item[data.schema.items - 1] = float("nan")
        try:
            export(replace(source, validation=None), comm, folder / "none", options)
        except RunError as error:
            told = [m for m in ("another rank could not write", "a vector has NaN") if m in str(error)]
            sys.stdout.write(f"{comm.rank}: {told[0]}\n")


if __name__ == "__main__":
    main()
