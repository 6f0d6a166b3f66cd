"""A sharded model on its data, and the one way to open it: load the data, join the ranks, build the model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path

from flm_torchrec.config import Config
from flm_torchrec.data.collate import Assembler
from flm_torchrec.data.dataset import PreparedData
from flm_torchrec.data.splits import Examples
from flm_torchrec.data.train_stats import TrainStats
from flm_torchrec.distributed.comm import Comm, process_group
from flm_torchrec.distributed.shard import make_optimizer
from flm_torchrec.training.build import build, check_device, set_precision
from flm_torchrec.training.encoder import ModelEncoder
from flm_torchrec.training.identity import of_one_domain
from flm_torchrec.training.loaders import make_loader
from flm_torchrec.training.lookup_counts import lookups_of
from flm_torchrec.training.loop import total_steps
from flm_torchrec.training.run_events import RunEvents, events_of, load_data
from flm_torchrec.training.same_inputs import check_same_inputs


@dataclass(frozen=True)
class JobInputs:
    """What a model is built from and trained on."""

    config: Config
    data: PreparedData
    events: RunEvents
    comm: Comm

    @classmethod
    def of(cls, config: Config, data: PreparedData, comm: Comm) -> JobInputs:
        """With the events that the config chooses of the data.

        Raises:
            FlmError: the split leaves nothing, or the source of a fine-tuning is no run.
        """
        return cls(config, data, events_of(config, data), comm)


@contextmanager
def open_inputs(
    config: Config,
    data: PreparedData | None = None,
    run: Path | None = None,
    options: Mapping[str, str] | None = None,
) -> Iterator[JobInputs]:
    """Load the data, join the ranks, and check that all of them were given the same; collective.

    Args:
        data: instead of the data that the config names.
        run: finished run that all ranks read.
        options: options of the command, which all ranks must have been given alike.

    Raises:
        ConfigError: the ranks were not given the same.
        FlmError: the data are not there, or leave nothing to learn from.
    """
    data = load_data(config) if data is None else data
    events = events_of(config, data)
    with process_group(config.distributed) as comm:
        check_same_inputs(comm, config, data, run, options)
        yield JobInputs(config, data, events, comm)


@contextmanager
def open_job(config: Config, data: PreparedData | None = None) -> Iterator[Job]:
    """The job that a config describes, with new weights; see `open_inputs`. Collective.

    Example::

        with open_job(load_config(None, ["data.path=data/synthetic"])) as job:
            loss, outputs = job.model(next(job.loader.epoch(0)))
    """
    with open_inputs(config, data) as inputs:
        yield Job(inputs)


class Job:
    """A sharded model on its data, of pretraining or of fine-tuning, with new weights until others are loaded.

    Collective.

    Args:
        learns: False: it is only read, so this device need not have what its settings ask for in training.
    """

    def __init__(self, inputs: JobInputs, learns: bool = True) -> None:
        self.config, self.data, self.events, self.comm = inputs.config, inputs.data, inputs.events, inputs.comm
        if learns:
            check_device(self.config, self.comm.device)
        set_precision(self.config, self.comm.device)
        self.loaded: str | None = None
        """Which weights of another run the model has, in words."""
        self.loader = make_loader(self.data, self.events, self.config, self.comm)
        self.loader.check_ranks()
        count_lookups = partial(lookups_of, self.loader)
        tuning, train = self.config.finetune, self.config.train
        tunes = bool(tuning.source) and tuning.start != "scratch"
        if tunes and self.same_tables:
            train = replace(train, sparse_lr=tuning.sparse_lr)
        if not learns and train.sparse_optimizer == "adam":
            train = replace(train, sparse_optimizer="adagrad")  # FBGEMM has a kernel of it on every device
        config = replace(self.config, train=train)
        self.model, self.plan = build(self.data.schema, config, self.comm, count_lookups, freeze=tunes)
        self.optimizer = make_optimizer(self.model, train)

    @cached_property
    def same_tables(self) -> bool:
        """Whether keys mean what they mean in the fine-tuning's source, so that its rows of users and items move."""
        return of_one_domain(Path(self.config.finetune.source), self.data)

    @property
    def total_steps(self) -> int:
        """Steps of the whole training."""
        return total_steps(self.config.train, len(self.loader))

    @cached_property
    def train_stats(self) -> TrainStats:
        """What the events that the model has learned from say of ids and values."""
        if self.events.labels is None:
            return self.loader.assembler.stats
        return self.events.stats(self.data, values=True)

    @cached_property
    def encoding(self) -> Assembler:
        """Builds batches to encode; their items have the sketches of the training batches."""
        return Assembler(self.data, self.data.no_events, self.train_stats, sketches=self.loader.assembler.sketches)

    def encoder(self, examples: Examples) -> ModelEncoder:
        """The model as an encoder of the examples' users and of items."""
        return ModelEncoder(self.model, self.encoding, examples, self.comm, self.config)
