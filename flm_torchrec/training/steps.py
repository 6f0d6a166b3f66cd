"""One training step: plain on a CPU, pipelined on a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.train_pipeline import TrainPipelineSparseDist

from flm_torchrec.data.batch import Batch
from flm_torchrec.distributed.lookups import as_long_on_each_rank, sums_over_ranks
from flm_torchrec.distributed.replicas import average_replicas
from flm_torchrec.model.pretrain import Outputs
from flm_torchrec.model.tables import look_up_in_turn
from flm_torchrec.training.guard import Guard
from flm_torchrec.training.kept_memory import keep_memory
from flm_torchrec.training.schedule import Schedule


class PlainSteps:
    """Forward, backward, update, one batch after the other."""

    def __init__(
        self,
        model: DistributedModelParallel,
        optimizer: Optimizer,
        schedule: Schedule,
        device: torch.device,
        guard: Guard,
    ) -> None:
        self.model = model
        self.optimizer = optimizer
        self.schedule = schedule
        self.device = device
        self.guard = guard
        if device.type == "cpu":
            keep_memory()

    def take(self, batches: Iterator[Batch], step: int) -> Outputs | None:
        """Learn from the next batch; None if the guard left it out.

        Args:
            step: number of the step, counted from 0.
        """
        self.schedule.set(step)
        self.optimizer.zero_grad()
        batch = next(batches).to(self.device)
        loss, outputs = self.model(batch)
        if not self.guard.passes(step + 1, batch, loss, outputs):
            return None
        loss.backward()
        self.optimizer.step()
        average_replicas(self.model)  # TorchRec's pipeline does this by itself
        return outputs

    def release(self) -> None:
        """Leave the model to others until the next step."""


class PipelinedSteps(TrainPipelineSparseDist[Batch, Outputs]):
    """The same steps, but while one batch is computed, the next is copied to the device and distributed."""

    def __init__(
        self,
        model: DistributedModelParallel,
        optimizer: Optimizer,
        schedule: Schedule,
        device: torch.device,
        guard: Guard,
    ) -> None:
        super().__init__(model, optimizer, device, execute_all_batches=True, custom_model_fwd=self._forward)
        self.schedule = schedule
        self.guard = guard
        self.number = 0
        self.learns = True
        self.tables = model.module
        self.look_up = self.tables.look_up
        self.summed = [name for name in ("item_features", "users") if any(map(sums_over_ranks, self._bags(name)))]

    def take(self, batches: Iterator[Batch], step: int) -> Outputs | None:
        """As `PlainSteps.take`."""
        self.schedule.set(step)
        self.number = step + 1
        self.tables.look_up = look_up_in_turn  # of what the pipeline has distributed
        outputs = self.progress(batches)
        return outputs if self.learns else None

    def release(self) -> None:
        """Leave the model to others until the next step. Attached modules would give them inputs of the next batch."""
        if self._model_attached:
            self.detach()
        self.tables.look_up = self.look_up

    def _bags(self, name: str) -> list[nn.Module]:
        """The modules that look up in the field `name` of a batch."""
        fixed, managed = getattr(self.tables, name), getattr(self.tables, f"managed_{name}")
        return [module for module in (fixed, managed) if module is not None]

    def _next_batch(self, dataloader_iter: Iterator[Batch]) -> Batch | None:
        batch = super()._next_batch(dataloader_iter)
        if batch is None or not self.summed:
            return batch
        padded = as_long_on_each_rank([getattr(batch, name) for name in self.summed], self.guard.comm)
        return replace(batch, **dict(zip(self.summed, padded, strict=True)))

    def _forward(self, batch: Batch | None) -> tuple[Tensor, Outputs]:
        loss, outputs = self._model(batch)
        assert batch is not None
        self.made = batch, outputs
        return loss, outputs

    def _backward(self, losses: Tensor) -> None:
        # The guard is asked here, not in forward: by now the input distribution of the next batch is under way.
        self.learns = self.guard.passes(self.number, self.made[0], losses, self.made[1])
        if self.learns:
            super()._backward(losses)

    def _optimizer_step(self) -> None:
        if self.learns:
            super()._optimizer_step()


STEPS: dict[str, type[PlainSteps] | type[PipelinedSteps]] = {"cpu": PlainSteps, "cuda": PipelinedSteps}
