"""Every setting of a run, typed, with its default, unit and meaning.

A field's `description` is its help on the command line; whatever can be derived is no setting.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated, Any, Literal, get_args

from pydantic import BeforeValidator, ConfigDict, Field, model_validator
from pydantic.dataclasses import dataclass

from flm_torchrec.config.heads import HEADS

STRICT = ConfigDict(extra="forbid", allow_inf_nan=False)

MOST_COUNT = 2**31 - 1
"""The maximum of a 32-bit index."""

Count = Annotated[int, Field(ge=1, le=MOST_COUNT)]
Number = Annotated[int, Field(ge=0, le=MOST_COUNT)]
Weight = Annotated[float, Field(ge=0, le=1e6)]
Rate = Annotated[float, Field(gt=0, le=1e6)]
LearningRate = Annotated[float, Field(ge=0, le=1e4)]
Share = Annotated[float, Field(ge=0, lt=1)]


def _several(value: Any) -> Any:
    """Split text at commas into a list, and put a single value into a list."""
    if isinstance(value, str) and value not in ("all", "none", "natural", "equal"):
        return [part.strip() for part in value.split(",") if part.strip()]
    return [value] if isinstance(value, int) and not isinstance(value, bool) else value


Several = BeforeValidator(_several)

Baseline = Literal["popularity", "item-kNN", "content-kNN", "Markov", "EASE-R", "random"]
BASELINES: tuple[Baseline, ...] = get_args(Baseline)
"""All that `eval.baselines` may have; its default has fewer."""


@dataclass(frozen=True, config=STRICT)
class DataConfig:
    """What to learn from."""

    path: Annotated[str, Field(description="folder of 'flm prepare'; 'flm train' joins several")] = "data/synthetic"
    split: Annotated[
        Literal["leave-one-out", "time", "cold-start"],
        Field(
            description="leave-one-out: a user's last event is test, the one before validation; time: by date;"
            " cold-start: some items and users are never learnt from"
        ),
    ] = "leave-one-out"
    holdout: Annotated[
        float,
        Field(
            gt=0,
            lt=0.5,
            description="time: share of the events in validation, and in test;"
            " cold-start: share of the items, and of the users, held out, half of it for validation",
        ),
    ] = 0.1
    features: Annotated[
        Literal["all", "none"] | tuple[str, ...],
        Several,
        Field(description="features of users and items to use: all, none (ids alone), or a list of names"),
    ] = "all"
    target_events: Annotated[
        Literal["all"] | tuple[str, ...],
        Several,
        Field(
            description="kinds of events to predict, in training and in evaluation; events of other kinds are history"
            " alone"
        ),
    ] = "all"
    values: Annotated[
        bool, Field(description="show the model the values (ratings) of past events; false: they will be labels later")
    ] = True
    domain_weights: Annotated[
        Literal["natural"] | tuple[str, ...],
        Several,
        Field(
            description="of joint data, how many sequences of each domain an epoch has: NAME=WEIGHT for each; natural:"
            " each sequence once"
        ),
    ] = "natural"
    max_history: Annotated[Count, Field(le=10**6, description="events of a user that the model sees at once")] = 50
    stream: Annotated[
        bool,
        Field(
            description="read interactions from disk while training, not all into memory; validation then loads"
            " train.eval_users users alone"
        ),
    ] = False


@dataclass(frozen=True, config=STRICT)
class ModelConfig:
    """The shape of the model."""

    # FBGEMM's kernels need a multiple of 4.
    dim: Annotated[int, Field(ge=4, le=2**16, multiple_of=4, description="width of the one feature space")] = 64
    layers: Annotated[int, Field(ge=0, le=1000, description="Transformer blocks of the sequential head")] = 2
    attention_heads: Annotated[Count, Field(le=2**16, description="attention heads of a block; divides dim")] = 2
    dropout: Annotated[Share, Field(description="share of activations dropped in training")] = 0.1
    embedding_dropout: Annotated[
        Share,
        Field(description="share dropped in training of the inputs of the sequential and the collaborative head"),
    ] = 0.5
    block: Annotated[
        Literal["transformer", "hstu"], Field(description="of the sequential head: softmax or pointwise attention")
    ] = "hstu"
    relative_bias: Annotated[
        bool, Field(description="bias of attention by distance in position and in time, where events have times")
    ] = True
    similarity: Annotated[
        Literal["dot", "cosine"], Field(description="of representation and item; cosine: all vectors have length 1")
    ] = "cosine"
    fusion: Annotated[
        Literal["late", "sum", "gated", "concat"],
        Field(
            description="how the three heads become one; chosen on validation after training: late: a weighted sum or a"
            " mixture, sum: a weighted sum; learned, set loss.fused: gated, concat"
        ),
    ] = "late"
    id_dropout: Annotated[
        Share,
        Field(description="share of item ids hidden in training, so that content carries unseen items"),
    ] = 0.1
    user_id_dropout: Annotated[
        float,
        Field(ge=0, le=1, description="share of user ids hidden in training; 1: users are their history alone"),
    ] = 0.9

    @model_validator(mode="after")
    def _check(self) -> ModelConfig:
        if self.dim % self.attention_heads:
            raise ValueError(
                f"model.dim {self.dim} is not a multiple of model.attention_heads {self.attention_heads};"
                " change one of them"
            )
        return self


@dataclass(frozen=True, config=STRICT)
class LossConfig:
    """L = content L_content + collaborative L_collaborative + sequential L_sequential (+ fused L_fused)."""

    content: Annotated[Weight, Field(description="weight of the content head's loss")] = 1.0
    collaborative: Annotated[Weight, Field(description="weight of the collaborative head's loss")] = 1.0
    sequential: Annotated[Weight, Field(description="weight of the sequential head's loss")] = 1.0
    fused: Annotated[Weight, Field(description="weight of the loss of h itself, which reaches fusion and heads")] = 0.0
    left_out: Annotated[
        Weight,
        Field(
            description="weight beside the collaborative loss of predicting each event from all others of its window"
        ),
    ] = 1.0
    mixture: Annotated[
        float,
        Field(
            ge=0,
            le=1,
            description="what part of a target's weight goes to the heads that are sure of it, as in a mixture of the"
            " heads: for data where each event has one cause; 0: a target counts 1 for every head",
        ),
    ] = 0.0
    seen: Annotated[
        Literal["hidden", "negatives"],
        Field(
            description="the items that a user has had before: no negatives, as ranking leaves them out; or negatives"
        ),
    ] = "hidden"
    attribute: Annotated[Weight, Field(description="weight of the contrast between an item's id and its content")] = 0.1
    event_weights: Annotated[
        Literal["equal"] | tuple[str, ...],
        Several,
        Field(description="what a target counts, by its kind of event: KIND=WEIGHT; kinds that are not named count 1"),
    ] = "equal"
    negatives: Annotated[
        Number | Literal["all"],
        Field(description="items drawn per global batch beside the in-batch ones; 'all': full softmax"),
    ] = 2048
    candidates: Annotated[
        Literal["global", "node", "local"],
        Field(
            description="whose in-batch targets a softmax runs over, beside the drawn items: of all ranks, of a node's"
            " ranks, or of the rank alone, so that work and bytes of a step do not grow with the ranks"
        ),
    ] = "global"
    domains: Annotated[
        Literal["own", "all"],
        Field(description="of joint data, the items that a target is told from: of its own domain, or of all"),
    ] = "own"
    negative_power: Annotated[
        float, Field(ge=0, le=1, description="negatives are drawn with probability ~ popularity ** this")
    ] = 0.5
    precision: Annotated[
        Literal["fp32", "tf32", "bf16"],
        Field(
            description="of the products of the softmax, the bulk of a step's work; tf32: of all products of float32,"
            " inputs rounded to 10 bits, on a GPU alone; bf16 has its other products in tf32 on a GPU, and those of"
            " layers in bf16 on a CPU with avx512_bf16"
        ),
    ] = "fp32"
    temperature: Annotated[
        float, Field(ge=1e-4, le=1e4, description="start of the learned temperature of each softmax")
    ] = 0.07

    @model_validator(mode="after")
    def _check(self) -> LossConfig:
        if not any(getattr(self, head) for head in HEADS):
            raise ValueError(f"loss: the weights of all heads are 0; set one of {', '.join(HEADS)}")
        return self


@dataclass(frozen=True, config=STRICT)
class DistributedConfig:
    """Where tables and work go."""

    device: Annotated[
        Literal["auto", "cpu", "cuda"], Field(description="auto: cuda where a GPU is found, else cpu")
    ] = "auto"
    sharding: Annotated[
        Literal["auto", "table_wise", "row_wise", "column_wise"],
        Field(description="auto: the planner chooses for each table"),
    ] = "auto"
    plan: Annotated[
        str, Field(description="plan.json of a run or of 'flm plan' to shard by, as it is; empty: the planner plans")
    ] = ""
    constraints: Annotated[
        str,
        Field(
            description="YAML file of what the planner may do with single tables: TABLE: {sharding_types: [...],"
            " compute_kernels: [...], min_partition: N, pooling_factors: [...]}"
        ),
    ] = ""
    dense: Annotated[
        Literal["ddp", "fsdp"],
        Field(description="dense part on every rank: ddp: all of it; fsdp: a slice of its weights and optimizer state"),
    ] = "ddp"
    collectives: Annotated[
        Literal["fp32", "bf16"],
        Field(
            description="what ranks send vectors and gradients as, of tables, losses and the dense part; bf16: half the"
            " bytes, each number rounded to 8 bits; for a slow network"
        ),
    ] = "fp32"
    replicas: Annotated[
        Count,
        Field(
            description="groups of ranks that each hold all tables, and average them after every step (2D parallelism);"
            " divides the ranks; 1: all ranks are one group"
        ),
    ] = 1
    threads: Annotated[
        int, Field(ge=0, le=4096, description="CPU threads per rank; 0: OMP_NUM_THREADS, or cores / local ranks")
    ] = 0
    memory_gib: Annotated[
        float, Field(ge=0, le=1e6, description="memory the planner may fill per rank, in GiB; 0: what the device has")
    ] = 0.0
    timeout: Annotated[
        float, Field(gt=0, le=30 * 86400, description="seconds before a collective that hangs ends the job")
    ] = 600.0


@dataclass(frozen=True, config=STRICT)
class TrainConfig:
    """How to learn."""

    run: Annotated[str, Field(description="run folder: config, plan, metrics, log, curves, checkpoint")] = (
        "runs/default"
    )
    existing: Annotated[
        Literal["refuse", "replace", "resume"],
        Field(
            description="what to do with a run folder that exists; resume: from its newest complete checkpoint, as a"
            " job that its launcher restarts always does"
        ),
    ] = "refuse"
    warm_start: Annotated[
        str,
        Field(
            description="run to go on from with data.path: its rows move by key, with weights and optimizer state; its"
            " settings are kept unless given; empty: new weights"
        ),
    ] = ""
    seed: Annotated[int, Field(ge=0, lt=2**62, description="of weights, shuffling, dropout and negatives")] = 0
    batch_size: Annotated[Count, Field(description="sequences per step, over all ranks together")] = 256
    epochs: Annotated[Count, Field(description="passes over the training events, at most")] = 30
    max_steps: Annotated[Number, Field(description="steps at most; 0: no such limit")] = 0
    dense_lr: Annotated[Rate, Field(le=1e4, description="AdamW learning rate of the dense part")] = 1e-3
    weight_decay: Annotated[Weight, Field(description="AdamW weight decay of the dense part's matrices")] = 0.01
    sparse_optimizer: Annotated[
        Literal["rowwise_adagrad", "adagrad", "adam"],
        Field(description="optimizer of the tables, fused into backward; adam needs a GPU"),
    ] = "rowwise_adagrad"
    sparse_precision: Annotated[
        Literal["fp32", "fp16"],
        Field(
            description="of the tables' weights; fp16: half the memory, each update rounded up or down by chance"
            " (stochastic rounding); needs a GPU"
        ),
    ] = "fp32"
    sparse_lr: Annotated[LearningRate, Field(description="learning rate of the tables; 0: they stay as they are")] = 0.4
    warmup_steps: Annotated[
        Number, Field(description="steps of linear warm-up, at most a tenth of all; then cosine decay")
    ] = 100
    clip: Annotated[float, Field(gt=0, le=1e12, description="largest norm of the dense gradient")] = 1.0
    eval_every: Annotated[Number, Field(description="steps between validations; 0: once an epoch")] = 0
    eval_users: Annotated[Number, Field(description="users of a validation, drawn once; 0: all")] = 0
    patience: Annotated[
        Number, Field(description="validations without gain before stopping early; 0: never stop early")
    ] = 5
    select: Annotated[str, Field(description="validation metric that chooses the best checkpoint")] = "fused/ndcg@10"
    log_every: Annotated[Count, Field(description="steps between lines of metrics.jsonl")] = 10
    trackers: Annotated[
        tuple[Literal["tensorboard", "mlflow", "wandb"], ...],
        Several,
        Field(
            description="where config and metrics are shown; mlflow and wandb (Weights & Biases) are told by their own"
            " environment variables where; []: nowhere, metrics.jsonl has all"
        ),
    ] = ("tensorboard",)
    checkpoint_every: Annotated[
        Number, Field(description="steps between checkpoints to resume from; 0: only when training ends")
    ] = 100
    profile: Annotated[
        Number,
        Field(le=1000, description="trace so many steps, from the sixth on, into RUN/profile-RANK.json; 0: none"),
    ] = 0
    non_finite: Annotated[
        Literal["stop", "skip"],
        Field(description="a loss of NaN or infinity; skip: leave the batch out, ten in a row stop the run"),
    ] = "stop"


@dataclass(frozen=True, config=STRICT)
class EvalConfig:
    """How to measure."""

    ks: Annotated[
        tuple[Count, ...],
        Several,
        Field(min_length=1, max_length=100, description="cut-offs K of HR@K and NDCG@K"),
    ] = (5, 10, 20)
    user_block: Annotated[Count, Field(description="users scored at once")] = 512
    item_block: Annotated[Count, Field(description="items scored at once")] = 16384
    baselines: Annotated[
        tuple[Baseline, ...],
        Several,
        Field(
            description="what 'flm evaluate' ranks beside the heads; []: nothing; random: only where items are held"
            " out; EASE-R: only up to ease_items; content-kNN: by features alone, nothing is learnt"
        ),
    ] = ("popularity", "item-kNN", "Markov", "EASE-R", "random")
    neighbours: Annotated[Count, Field(description="item-kNN baseline: neighbours kept per item")] = 100
    ease_items: Annotated[
        Number, Field(description="EASE-R baseline: largest catalogue it is fitted to (8 items^2 bytes); 0: never")
    ] = 15_000


@dataclass(frozen=True, config=STRICT)
class FinetuneConfig:
    """What a pretrained run is fine-tuned for ('flm finetune')."""

    source: Annotated[str, Field(description="run folder of the pretraining; empty: this run is a pretraining")] = ""
    start: Annotated[
        Literal["pretrained", "scratch"], Field(description="first weights: the source's, or new ones as a control")
    ] = "pretrained"
    task: Annotated[
        Literal["next-item", "label"],
        Field(description="next-item: as in pretraining; label: tell finetune.labels of each event"),
    ] = "next-item"
    labels: Annotated[
        tuple[str, ...],
        Several,
        Field(
            min_length=1,
            description="label: what to tell of an event, a head each: value (is it at least the threshold), or a kind"
            " of events (is it of that kind); NAME=WEIGHT weighs the loss of one",
        ),
    ] = ("value",)
    threshold: Annotated[
        float, Field(ge=-1e30, le=1e30, description="least value of a positive event of the label value")
    ] = 4.0
    cohort: Annotated[
        Literal["all", "new"], Field(description="users to learn from and predict for; new: those the source never saw")
    ] = "all"
    share: Annotated[
        float, Field(gt=0, le=1, description="share to learn from: of users (next-item), of labelled events (label)")
    ] = 1.0
    tower: Annotated[
        Literal["frozen", "partial", "full"],
        Field(
            description="what learns of the dense part; frozen: what is new and the fusion; partial: also the heads and"
            " the last block; full: all"
        ),
    ] = "full"
    sparse_lr: Annotated[LearningRate, Field(description="learning rate of the source's tables; 0: they stay")] = 0.02


@dataclass(frozen=True, config=STRICT)
class Config:
    """One run."""

    data: DataConfig = Field(default_factory=DataConfig)
    model: ModelConfig = Field(default_factory=ModelConfig)
    loss: LossConfig = Field(default_factory=LossConfig)
    distributed: DistributedConfig = Field(default_factory=DistributedConfig)
    train: TrainConfig = Field(default_factory=TrainConfig)
    eval: EvalConfig = Field(default_factory=EvalConfig)
    finetune: FinetuneConfig = Field(default_factory=FinetuneConfig)

    @model_validator(mode="after")
    def _check(self) -> Config:
        if self.data.stream and not self.train.eval_users:
            raise ValueError("data.stream: validation must not load every user; set train.eval_users, such as 10000")
        if self.data.stream and self.data.domain_weights != "natural":
            raise ValueError("data.domain_weights: sequences are chosen among all in memory; set data.stream=false")
        return self

    def by_name(self) -> dict[str, Any]:
        """Every setting by `section.field`."""
        return {f"{part}.{name}": value for part, content in asdict(self).items() for name, value in content.items()}
