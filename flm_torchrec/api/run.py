"""A run: trained, evaluated, exported. `flm train` calls this file too."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flm_torchrec._versions import check_versions
from flm_torchrec.config import load_config, overrides_of
from flm_torchrec.errors import ConfigError
from flm_torchrec.files import path_of
from flm_torchrec.folders import CONFIG

if TYPE_CHECKING:
    from flm_torchrec.api.evaluation import Split
    from flm_torchrec.api.recommender import Recommender
    from flm_torchrec.config import Config
    from flm_torchrec.frames import Frame, FrameKind


def train(
    data: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    run: str | os.PathLike[str],
    /,
    *,
    config: str | os.PathLike[str] | None = None,
    preset: str | None = None,
    **sections: Mapping[str, Any],
) -> Run:
    """Pretrain a model on prepared data, and leave a run folder with config, metrics and the best checkpoint.

    Args:
        data: folder of prepared data, or what `prepare` returned; several are joined into one data set beside the run.
        run: folder to write.
        config: YAML file of settings; the sections override it.
        preset: "fast" or "best": other defaults, which the file and the sections override.
        sections: settings by section, such as `train={"epochs": 10}, model={"dim": 32}`; `flm train --help` lists all.

    Raises:
        FlmError: a setting, the data or the run folder is wrong.
        Interrupted: Ctrl-C; the state is saved, and `train={"existing": "resume"}` goes on.

    Example:
        >>> import flm_torchrec as flm
        >>> settings = {"train": {"max_steps": 4, "batch_size": 32}, "model": {"dim": 8}, "data": {"max_history": 5}}
        >>> run = flm.train("data/shop", "runs/shop", **settings)  # doctest: +ELLIPSIS
        shop: 40 users, 30 items, ...
        >>> run.path.name, run.config.model.dim
        ('shop', 8)
    """
    given: Sequence[Any] = [data] if isinstance(data, str | os.PathLike) or not isinstance(data, Sequence) else data
    folders = [str(path_of(folder, "data")) for folder in given]
    if not folders:
        raise ConfigError("data: names no folder; give what flm.prepare returned")
    path = [f"data.path={folders[0]}"] if len(folders) == 1 else []
    file = None if config is None else path_of(config, "config")
    pretrain_run(file, [*overrides_of(sections), *path, f"train.run={path_of(run, 'run')}"], folders, preset)
    return Run.load(run)


def pretrain_run(
    file: str | os.PathLike[str] | None,
    overrides: Sequence[str],
    folders: Sequence[str | Path] = (),
    preset: str | None = None,
) -> None:
    """Pretrain the run that a config file and overrides describe; collective.

    Args:
        folders: two or more are joined into `RUN-data` and take the place of `data.path`.
        preset: of PRESETS, other defaults.

    Raises:
        FlmError: a setting, the data or the run folder is wrong.
    """
    path = None if file is None else Path(file)
    config = load_config(path, overrides, preset)
    if preset is not None and file is None and config.train.warm_start:
        raise ConfigError(f"preset '{preset}': train.warm_start takes the settings of its run; leave one of them out")
    if len(folders) > 1:
        overrides = [*overrides, f"data.path={joined_for(config, folders)}"]
        config = load_config(path, overrides, preset)
    check_versions()  # an export alone needs no torchrec, so the import of the package does not ask for it
    # Imported here: PyTorch takes seconds, and a wrong option should be reported at once.
    from flm_torchrec.training.trainer import pretrain
    from flm_torchrec.training.warm_start import warm_config

    if config.train.warm_start and file is None:
        config = warm_config(Path(config.train.warm_start), overrides)
    pretrain(config)


def joined_for(config: Config, folders: Sequence[str | Path]) -> Path:
    """The joint data of a run, beside its folder; made once, and taken again if the folders have not changed.

    Raises:
        FlmError: the run would be refused, or the folders cannot be joined or have changed.
    """
    from flm_torchrec.prepare.joined import join_once
    from flm_torchrec.training.run_folder import resumes

    output = Path(f"{config.train.run.rstrip('/')}-data")
    if not output.exists():
        resumes(config, restarted=False)  # a run that is refused must not cost a join first
    join_once(folders, output, replace=config.train.existing == "replace")
    return output


@dataclass(frozen=True)
class Run:
    """A trained run, in its folder."""

    path: Path

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Run:
        """The run of a folder of `flm train`, `flm finetune` or `flm follow`.

        Raises:
            RunError: the folder is no run, or has no model yet.

        Example:
            >>> import flm_torchrec as flm
            >>> flm.Run.load("runs/shop").config.train.batch_size
            32
        """
        from flm_torchrec.training.identity import check_has_model

        folder = path_of(path, "path")
        check_has_model(folder)
        return cls(folder)

    @property
    def config(self) -> Config:
        """The settings that the run was made with."""
        return load_config(self.path / CONFIG)

    def evaluate(
        self,
        split: Split = "test",
        frame: FrameKind = "polars",
        by: Sequence[str] = (),
        windows: int = 0,
        sample: int = 0,
        **settings: Any,
    ) -> Frame:
        """Rank every item for the held-out event of each user, by each head, their fusion and the baselines.

        Args:
            split: "test", each user's last event, or "valid".
            frame: "polars", "pandas" or "arrow".
            by: segments too: "items" (head, tail, without training events), "users" (new, of few events, of many),
                "events" (kinds of the next event), "repeats" (items new to the user, and had before).
            windows: of a time split: cut the held-out period into so many windows, with predictions in each.
            sample: rank for so many users alone, the same in all runs of one split; 0: all. Baselines learn from all.
            settings: of section `eval`, such as `ks=[10]` or `baselines=[]`.

        Returns:
            A row for each segment and scorer: `segment` ("all" for all users), `scorer`, and a column for each metric.

        Raises:
            FlmError: a setting, the run or its data is wrong.

        Example:
            >>> import flm_torchrec as flm
            >>> table = flm.Run.load("runs/shop").evaluate(ks=[10], baselines=["popularity"])
            >>> table.columns  # doctest: +NORMALIZE_WHITESPACE
            ['segment', 'scorer', 'hr@10', 'ndcg@10', 'mrr', 'coverage@10', 'novelty@10', 'diversity@10',
             'popularity@10', 'gini@10']
            >>> table["scorer"].to_list()[:2]
            ['popularity', 'content']
        """
        import pyarrow as pa

        from flm_torchrec.api.evaluation import EvaluateOptions, evaluate_run, write_evaluation
        from flm_torchrec.evaluation.segments import BY
        from flm_torchrec.frames import check_kind, framed

        check_kind(frame)
        if split not in ("test", "valid"):
            raise ConfigError(f"split '{split}': choose test or valid")
        given = [by] if isinstance(by, str) else by
        if unknown := [one for one in given if one not in BY]:
            raise ConfigError(f"by '{unknown[0]}': choose from {', '.join(BY)}")
        overrides = overrides_of({"eval": settings})
        options = EvaluateOptions(split, by=given, windows=windows, drawn=sample, overrides=overrides)
        evaluation = evaluate_run(self.path, options).evaluation
        write_evaluation(self.path, evaluation)
        everyone = {name: {**metrics, **evaluation.lists[name]} for name, metrics in evaluation.table.items()}
        tables = {"all": everyone, **evaluation.segments}
        rows = [
            {"segment": segment, "scorer": scorer, **metrics}
            for segment, table in tables.items()
            for scorer, metrics in table.items()
        ]
        names = list(dict.fromkeys(name for row in rows for name in row))
        return framed(pa.table({name: [row.get(name) for row in rows] for name in names}), frame)

    def export(self, output: str | os.PathLike[str], *, overwrite: bool = False, **choices: Any) -> Recommender:
        """Write embeddings, an index and the user tower, and open them as a recommender.

        Args:
            output: folder to write.
            overwrite: replace an older export; anything else is never replaced.
            choices: `storage` ("parquet", "arrow"), `quantise` ("none", "fp16", "int8"), `index` ("flat", "hnsw",
                "ivfpq", "none"), `recall` (what the index must reach), `tower` ("int8", "fp32", "none").

        Raises:
            FlmError: a choice, the run, its data or the output is wrong.

        Example:
            >>> import flm_torchrec as flm
            >>> flm.Run.load("runs/shop").export("exports/shop", tower="none").users  # no histories without the tower
            40
        """
        from flm_torchrec.api.export import choices_of, export_run
        from flm_torchrec.api.recommender import Recommender

        export_run(self.path, path_of(output, "output"), choices_of(choices), overwrite=overwrite)
        return Recommender(output)
