"""This project's trainer for tools/benchmarks/train.py, which starts it. With a second argument N it takes N steps."""

from __future__ import annotations

import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torchrec.distributed.types import LazyAwaitable
from torchrec.sparse.jagged_tensor import JaggedTensor, KeyedTensor

from flm_torchrec import products
from flm_torchrec.config import load_config
from flm_torchrec.data.batch import Batch
from flm_torchrec.data.prefetch import Prefetch
from flm_torchrec.evaluation.evaluate import evaluate_heads
from flm_torchrec.model import fused_softmax, linear, pointwise_attention, token_passes
from flm_torchrec.training.guard import Guard
from flm_torchrec.training.job import Job, open_job
from flm_torchrec.training.schedule import Schedule
from flm_torchrec.training.steps import STEPS
from tools.benchmarks.train_peer import serve, specification

TIMED = ("input", "forward", "backward", "optimizer")
COPY_BYTES = 2**28
NATIVE = (fused_softmax, linear, pointwise_attention, token_passes, products)
"""Modules that call native code in a step."""
PRODUCTS = {"mm": 0, "addmm": 1, "addmm_": 1, "bmm": 0}
"""Operators that multiply matrices, and the index of the first of the two factors."""


class Ours:
    """This project's trainer; see `train_peer.Trainer`."""

    def __init__(self, job: Job) -> None:
        self.config, self.comm, self.job = job.config, job.comm, job
        schedule = Schedule(self.job.optimizer, self.config.train.warmup_steps, self.job.total_steps)
        guard = Guard(job.comm, "stop", Path("/nonexistent"))
        self.taken = STEPS[job.comm.device.type](job.model, job.optimizer, schedule, job.comm.device, guard)
        self.seen: list[Batch] = []
        self.batches = self._watched(iter(Prefetch(self.job.loader.after(0))))
        self.step = 0
        valid = self.job.events.splits.valid
        self.valid, self.encode = valid, self.job.encoder(valid)

    def _watched(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        for batch in batches:
            self.seen = [batch]
            yield batch

    def steps(self, count: int) -> tuple[int, int]:
        """Run training steps; the number of sequences and of targets."""
        self.job.model.train()
        sequences = targets = 0
        for _ in range(count):
            outputs = self.taken.take(self.batches, self.step)
            assert outputs is not None
            self.step += 1
            sequences, targets = sequences + outputs.sequences, targets + len(self.seen[0].targets)
        return sequences, targets

    def validate(self) -> float:
        """NDCG@10 of the sequential head on validation."""
        metrics = evaluate_heads(self.job.data, self.valid, self.encode, self.comm, self.config.eval)
        return metrics["sequential/ndcg@10"]

    def stages(self, count: int) -> dict[str, float]:
        """Milliseconds of each stage of a step, mean of `count` steps. All-to-all includes waiting for other ranks."""
        self.job.model.train()
        spent: defaultdict[str, float] = defaultdict(float)
        model, batches = self.job.model.module, self.batches
        look_up = model.look_up

        def timed_look_up(*asked: Any) -> Any:
            began = time.perf_counter()
            found = look_up(*asked)
            spent["sparse forward"] += time.perf_counter() - began
            return found

        model.look_up = timed_look_up
        hooks = _timed(model.dense.tower, "tower", spent)
        hooks += _timed(model.dense, "dense", spent)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            for _ in range(count):
                marks = [time.perf_counter()]
                batch = next(batches)
                marks.append(time.perf_counter())
                self.job.optimizer.zero_grad()
                loss, _ = self.job.model(batch)
                marks.append(time.perf_counter())
                loss.backward()
                marks.append(time.perf_counter())
                self.job.optimizer.step()
                marks.append(time.perf_counter())
                for name, (begin, end) in zip(TIMED, pairwise(marks), strict=True):
                    spent[name] += end - begin
        model.look_up = look_up
        for hook in hooks:
            hook.remove()
        sent = sum(e.cpu_time_total for e in profile.key_averages() if e.key.startswith(("gloo:", "nccl:"))) / 1e6
        loss_seconds = spent.pop("dense") - spent["tower"]
        other = spent.pop("forward") - spent["sparse forward"] - spent["tower"] - loss_seconds
        spent |= {"loss and its gradients": loss_seconds, "other": other, "all-to-all (inside the others)": sent}
        return {name: 1e3 * seconds / count for name, seconds in spent.items()}

    def dense_step(self) -> Callable[[], None]:
        """A function that runs forward and backward of everything after the look-ups, always on the same batch."""
        self.job.model.train()
        dense, kept = self.job.model.module.dense, []
        hook = dense.register_forward_pre_hook(lambda module, given: kept.append(given))
        self.steps(1)
        hook.remove()
        batch, *embeddings = kept[0]
        leaves = [_leaf(part) for part in embeddings]

        def step() -> None:
            loss, _ = dense(batch, *leaves)
            loss.backward()

        return step

    def roofline(self, count: int) -> dict[str, float]:
        """Time of the dense part, beside the times that PyTorch's matrix products and memory traffic need at least.

        Native code is in neither; its time stands by itself, by file.
        """
        step = self.dense_step()
        step()
        with Counted() as counted:
            step()
        measured, multiplied, copies = [], [], []
        native: list[dict[str, float]] = []
        for _ in range(count):  # interleaved
            with timed_native() as seconds:
                measured.append(_seconds(step))
            native.append(seconds)
            multiplied.append(sum(n * _product_seconds(*key) for key, n in counted.products.items()))
            copies.append(counted.bytes / _copy_rate())
        flops = sum(n * _flops(shapes) for (_, shapes, _), n in counted.products.items())
        return {
            "dense ms": 1e3 * _median(measured),
            "native code ms": 1e3 * _median([sum(times.values()) for times in native]),
            **{f"native {name} ms": 1e3 * _median([times[name] for times in native]) for name in native[0]},
            "products ms": 1e3 * _median(multiplied),
            "GFLOP": flops / 1e9,
            "GFLOP/s of the products alone": flops / 1e9 / max(_median(multiplied), 1e-9),
            "traffic GB": counted.bytes / 1e9,
            "traffic at copy rate ms": 1e3 * _median(copies),
            "copy GB/s": counted.bytes / 1e9 / _median(copies),
        }


@contextmanager
def timed_native() -> Iterator[dict[str, float]]:
    """Seconds in native code, by the name of the module that calls it; they are added up while the context lasts."""
    seconds: dict[str, float] = {}
    with ExitStack() as stack:
        for module in NATIVE:
            name, found = module.__name__.rpartition(".")[2], module._library()
            seconds[name] = 0.0
            if not isinstance(found, str):
                library = _TimedLibrary(found, seconds, name)
                stack.enter_context(mock.patch.object(module, "_library", lambda library=library: library))
        yield seconds


class _TimedLibrary:
    def __init__(self, library: Any, seconds: dict[str, float], name: str) -> None:
        self._found, self._seconds, self._name = library, seconds, name

    def __getattr__(self, name: str) -> Callable[..., Any]:
        function = getattr(self._found, name)

        def timed(*given: Any) -> Any:
            began = time.perf_counter()
            result = function(*given)
            self._seconds[self._name] += time.perf_counter() - began
            return result

        return timed


class Counted(TorchDispatchMode):
    """Counts matrix products by shape and precision, and the bytes that all other operators read and write."""

    def __init__(self) -> None:
        super().__init__()
        self.products: defaultdict[tuple[str, tuple[Any, ...], torch.dtype], int] = defaultdict(int)
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name in PRODUCTS:
            a, b = args[PRODUCTS[name] : PRODUCTS[name] + 2]
            # The strides decide which kernel runs.
            shapes = tuple((tuple(x.shape), tuple(x.stride())) for x in (a, b))
            self.products["bmm" if name == "bmm" else "mm", shapes, a.dtype] += 1
        elif not func.is_view and "empty" not in name:  # what native code will fill, too
            self.bytes += sum(x.nbytes for x in tree_leaves((args, kwargs, out)) if isinstance(x, Tensor))
        return out


def _flops(shapes: tuple[Any, ...]) -> int:
    (a, _), (b, _) = shapes
    return 2 * torch.Size(a).numel() * b[-1]


def _product_seconds(name: str, shapes: tuple[Any, ...], dtype: torch.dtype) -> float:
    """Time of one product of these shapes alone, the best of three."""
    a, b = (_filled(size, stride, dtype) for size, stride in shapes)
    out = torch.empty(*a.shape[:-1], b.shape[-1], dtype=dtype)
    product = torch.bmm if name == "bmm" else torch.mm
    return min(_seconds(lambda: product(a, b, out=out)) for _ in range(3))


def _filled(size: tuple[int, ...], stride: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Random numbers; elements may share memory, as those of an expanded tensor do."""
    last = sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    return torch.rand(1 + last).to(dtype).as_strided(size, stride)


def _copy_rate() -> float:
    """Bytes that a large copy reads and writes per second."""
    source = torch.ones(COPY_BYTES // 4)
    target = torch.empty_like(source)
    return 2 * COPY_BYTES / min(_seconds(lambda: target.copy_(source)) for _ in range(3))


def _seconds(action: Callable[[], object]) -> float:
    before = time.perf_counter()
    action()
    return time.perf_counter() - before


def _median(values: list[float]) -> float:
    return float(torch.tensor(values, dtype=torch.float64).median())


def _timed(module: torch.nn.Module, name: str, spent: defaultdict[str, float]) -> list[Any]:
    def before(*_: Any) -> None:
        spent[name] -= time.perf_counter()

    def after(*_: Any) -> None:
        spent[name] += time.perf_counter()

    return [module.register_forward_pre_hook(before), module.register_forward_hook(after)]


def _leaf(embeddings: Any) -> Any:
    """The same rows as leaves of the graph: detached from the tables, with their own gradient."""
    if isinstance(embeddings, LazyAwaitable):
        embeddings = embeddings.wait()
    if isinstance(embeddings, list):
        return [_leaf(part) for part in embeddings]
    if isinstance(embeddings, KeyedTensor):
        return KeyedTensor(
            embeddings.keys(), embeddings.length_per_key(), embeddings.values().detach().requires_grad_()
        )
    values = {key: part.values().detach().requires_grad_() for key, part in embeddings.items()}
    return {key: JaggedTensor(rows, lengths=torch.ones(len(rows), dtype=torch.int64)) for key, rows in values.items()}


def main() -> None:
    """Answer requests, or take the steps of the second argument on all ranks and print their speed."""
    spec = specification()
    config = load_config(Path(spec["config"]) if spec["config"] else None, spec["settings"])
    with open_job(config) as job:
        comm, trainer = job.comm, Ours(job)
        if len(sys.argv) == 2:
            serve(trainer)
            return
        trainer.steps(3)
        comm.barrier()
        before = time.perf_counter()
        sequences, _ = trainer.steps(int(sys.argv[2]))
        seconds = time.perf_counter() - before
        total = int(comm.all_reduce_sum(torch.tensor(sequences)))
        stages = trainer.stages(int(sys.argv[2]))
        if comm.main:
            print(f"{total / seconds:.1f}", stages)


if __name__ == "__main__":
    main()
