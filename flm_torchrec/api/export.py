"""The export of a run: `flm export` and `Run.export` call this file."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import ConfigDict, ValidationError
from pydantic.dataclasses import dataclass

from flm_torchrec._versions import check_versions
from flm_torchrec.config import first_problem
from flm_torchrec.errors import ConfigError, RunError
from flm_torchrec.export.manifest import RECALL, IndexKind, Manifest, MapMethod, Quantise, Storage, read_manifest
from flm_torchrec.folders import SCHEMA

if TYPE_CHECKING:
    from flm_torchrec.export.delta import Delta
    from flm_torchrec.export.write import ExportSource
    from flm_torchrec.training.restore import Restored

Tower = Literal["int8", "fp32", "none"]


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class ExportChoices:
    """How a run is exported; None: as in the export that a delta is made from, or the default."""

    storage: Storage | None = None
    quantise: Quantise | None = None
    index: IndexKind | None = None
    recall: float | None = None
    tower: Tower = "int8"
    """How the packaged user tower stores the rows of its tables; none: it is not packaged."""
    onnx: bool = False
    """Write the packaged user tower as ONNX too."""
    item_map: MapMethod | None = None
    """How the map of the web page is drawn; None: by UMAP where umap-learn is installed, and by PCA elsewhere."""
    compile: bool = False
    """Compile the packaged user tower for this machine, into the user's cache."""
    since: Path | None = None
    """Older export: write only the rows that differ from it."""
    tolerance: float = 0.0
    """Of a delta: vectors that moved by at most this part of their length count as equal; 0: every bit counts."""

    def check(self, output: Path) -> Manifest | None:
        """The manifest of the older export, if there is one.

        Raises:
            RunError: choices contradict each other.
        """
        older = read_manifest(self.since) if self.since else None
        if self.onnx and self.tower == "none":
            raise RunError("--onnx: is made of the packaged tower; leave out --tower none")
        if self.compile and (self.tower == "none" or self.since):
            raise RunError("--compile: compiles the tower of a complete export; leave out --tower none and --since")
        if older is not None and self.since is not None and output.resolve() == self.since.resolve():
            raise RunError(f"{output}: is what the delta is to be applied to; give another --output")
        if older is not None and self.index:
            raise RunError(
                "--index: a delta has none; 'flm apply-delta' makes one of the kind that the older export has"
            )
        if self.recall is not None and (older is not None or not 0 < self.recall <= 1):
            raise RunError(f"--recall {self.recall}: give a number above 0 and up to 1, and not with --since")
        if not 0 <= self.tolerance < 1 or (self.tolerance and older is None):
            raise RunError(f"--tolerance {self.tolerance}: give a number from 0 to below 1, and only with --since")
        return older


def choices_of(given: Mapping[str, Any]) -> ExportChoices:
    """Checked choices.

    Raises:
        ConfigError: there is no such choice, or it makes a delta, from which nothing can be recommended.
    """
    if "since" in given:
        raise ConfigError("export: 'since' writes a delta; make it with 'flm export --since'")
    try:
        return ExportChoices(**given)
    except ValidationError as error:
        raise ConfigError(f"export: {first_problem(error)}") from error


def export_run(
    run: str | os.PathLike[str],
    output: Path,
    choices: ExportChoices,
    overwrite: bool = False,
    overrides: Sequence[str] = (),
    options: Mapping[str, str] | None = None,
) -> Manifest | Delta | None:
    """Export the best model of a run, complete or as a delta; collective. None on ranks other than 0.

    Args:
        overrides: of the run's settings.
        options: of the command, which all ranks must have been given alike.

    Raises:
        FlmError: a choice, the run, its data or the output is wrong.
    """
    check_versions()
    # Imported here: PyTorch takes seconds, and a wrong option should be reported at once.
    from flm_torchrec.export.delta import export_delta
    from flm_torchrec.export.item_map import method_of
    from flm_torchrec.export.tower.compiled import compile_tower
    from flm_torchrec.export.tower.onnx import check_onnx
    from flm_torchrec.export.write import ExportOptions, check_output, export
    from flm_torchrec.training.restore import restore

    if choices.onnx:
        check_onnx()
    item_map = method_of(choices.item_map)
    check_output(output, overwrite)
    older = choices.check(output)
    _check_sizes(Path(run), choices)
    with restore(Path(run), overrides, options=options) as restored:
        job, source = restored.job, _source(restored, choices.tower, choices.onnx)
        how = ExportOptions(
            storage=choices.storage or (older.storage if older else "parquet"),
            quantise=choices.quantise or (older.quantise if older else "none"),
            index=choices.index or "flat",
            recall=RECALL if choices.recall is None else choices.recall,
            user_block=job.config.eval.user_block,
            item_block=job.config.eval.item_block,
            item_map=item_map,
            tolerance=choices.tolerance,
        )
        if choices.since is not None:
            return export_delta(source, job.comm, choices.since, output, how, overwrite)
        manifest = export(source, job.comm, output, how, overwrite)
    if choices.compile and manifest is not None:
        print(compile_tower(output), flush=True)
    return manifest


def _check_sizes(run: Path, choices: ExportChoices) -> None:
    """Raise RunError where a run has too few or too many items, or too many rows for the memory, to be exported so."""
    from flm_torchrec.data.schema import Schema
    from flm_torchrec.data.sketch import kept_bytes
    from flm_torchrec.export.tower.writer import check_memory
    from flm_torchrec.export.write import check_items
    from flm_torchrec.model.space import width
    from flm_torchrec.training.identity import VOCABULARY, check_has_model, read_config

    check_has_model(run)
    schema = Schema.load(run / VOCABULARY / SCHEMA)
    dim = read_config(run).model.dim
    index = "none" if choices.since else choices.index or "flat"
    check_items(index, schema.items, width(dim), kept_bytes(schema.items, dim))
    if choices.tower != "none":
        check_memory(schema, dim, choices.tower)


def _source(restored: Restored, tower: Tower, onnx: bool) -> ExportSource:
    from flm_torchrec.data.splits import everyone
    from flm_torchrec.export.quality import ValidationSet
    from flm_torchrec.export.tower.layout import FOLDER
    from flm_torchrec.export.tower.onnx import write_onnx
    from flm_torchrec.export.tower.writer import write_tower
    from flm_torchrec.export.write import ExportSource
    from flm_torchrec.training.gathered import GatheredModel, items_with_rows

    job, valid = restored.job, restored.job.events.splits.valid
    encoder = job.encoder(everyone(job.data))
    validation = ValidationSet(job.encoder(valid), valid)
    source = ExportSource(job.data, encoder, items_with_rows(job), restored.version, validation)
    if tower == "none":
        return source
    model, main = GatheredModel(job), job.comm.rank == 0

    def beside(folder: Path) -> None:
        write_tower(job.data, model, main, tower, folder)
        if onnx and main:
            write_onnx(folder / FOLDER)

    return replace(source, beside=beside)
