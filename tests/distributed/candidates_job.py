"""Run by test_candidates as several ranks: losses over the candidates of all, of a node's ranks, of a rank alone.

Arguments: ranks of a node, of which there are more than one in pretence; file for what rank 0 counted. Every rank makes
up the batches of all ranks, and compares its loss and gradients with those of one process that is written out.
"""

from __future__ import annotations

import json
import math
import os
import sys
from dataclasses import dataclass, fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from flm_torchrec.config.heads import HEADS
from flm_torchrec.config.schema import DistributedConfig, LossConfig
from flm_torchrec.distributed.candidates import CandidateRanks
from flm_torchrec.distributed.comm import Comm, process_group
from flm_torchrec.model.losses import SHORTEST, Loss, make_losses
from flm_torchrec.model.rows import share
from flm_torchrec.model.space import used_by_each

ITEMS, DIM, DOMAINS = 40, 8, 3
DRAWN = 21  # divides by no number of ranks here
MIXTURE = 0.7
Drawn = int | Literal["all"]


@dataclass
class Vectors:
    """What the tower gives; leaves of autograd."""

    items: Tensor
    ids: Tensor
    contents: Tensor
    query: Tensor
    left: Tensor

    @property
    def representations(self) -> dict[str, Tensor]:
        return {"content": self.query, "collaborative": self.query * 2, "sequential": self.query.flip(1)}

    @property
    def queries(self) -> dict[str, Tensor]:
        return {name: used_by_each(x)[name] for name, x in self.representations.items()}

    @property
    def left_out(self) -> Tensor:
        return used_by_each(self.left)["collaborative"]


def made(rank: int, kind: str, ranks: CandidateRanks, negatives: Drawn, weighted: bool) -> tuple[Any, Vectors]:
    """The batch of a rank, with its part of the negatives; the last rank has no sequences at all.

    Args:
        weighted: targets have weights, and some are not predicted.
    """
    noise = torch.Generator().manual_seed(100 + rank)
    last = rank == ranks.world_size - 1
    lengths = torch.tensor([0, 0] if last else [3 + rank, 2])
    targets = torch.randint(0, ITEMS, (int(lengths.sum()),), generator=noise)
    if negatives == "all":
        candidates = torch.arange(ITEMS)[rank % ranks.ranks :: ranks.ranks]
    else:
        drawn = torch.randint(0, ITEMS, (negatives,), generator=torch.Generator().manual_seed(5))
        own = drawn[rank % ranks.ranks :: ranks.ranks]
        candidates = torch.cat([torch.unique(targets), own]) if kind == "local" else torch.cat([targets, own]).unique()
    items = torch.unique(torch.cat([targets, candidates]))
    sampled = torch.log1p(-torch.rand(ITEMS, 2, generator=torch.Generator().manual_seed(6)) / 9)
    predicted = torch.rand(len(targets), generator=noise) > 0.3
    weight = 3 * torch.rand(len(targets), generator=noise) * predicted
    batch = SimpleNamespace(
        weight=weight if weighted else None, predicted=predicted if weighted else None,
        items=items, targets=torch.searchsorted(items, targets), candidates=torch.searchsorted(items, candidates),
        lengths=lengths, log_not_sampled=sampled[candidates], item_domain=items % DOMAINS,
    )  # fmt: skip
    places = [len(items), len(items), len(items), len(targets), len(targets)]
    shapes = zip(places, (2 * DIM, DIM, DIM, 2 * DIM, 2 * DIM), strict=True)
    # Short vectors: the softmax bounds probabilities at the least float32, the loss written out does not.
    vectors = Vectors(*((torch.randn(shape, generator=noise) / 4).requires_grad_() for shape in shapes))
    with torch.no_grad():
        vectors.ids[0] = 0.0  # an id that says nothing yet
    return batch, vectors


def expected(
    made_by: list[tuple[Any, Vectors]], rank: int, near: list[int], pool: list[int], negatives: Drawn, joint: bool
) -> dict[str, Tensor]:
    """The losses of a rank, written out: targets of the ranks `near` and the drawn items of `pool` are candidates.

    Args:
        joint: only those of a target's own domain are, and a target counts more for the heads that are sure of it.
    """
    batch, own = made_by[rank]
    targets = sum(len(b.targets) for b, _ in made_by)
    total = targets if batch.weight is None else sum(b.weight.sum() for b, _ in made_by)
    weight = torch.ones(len(batch.targets)) if batch.weight is None else batch.weight
    had = torch.ones(len(batch.targets), dtype=torch.bool) if batch.predicted is None else batch.predicted
    in_batch = sum(len(made_by[r][0].targets) for r in near)
    known: dict[int, tuple[Tensor, Tensor]] = {}
    apart = near != pool and negatives != "all"
    own_targets = {r: len(torch.unique(b.targets)) if apart else 0 for r, (b, _) in enumerate(made_by)}
    parts = [(r, range(own_targets[r])) for r in near]
    parts += [(r, range(own_targets[r], len(made_by[r][0].candidates))) for r in pool]
    for r, places in parts:
        of, vectors = made_by[r]
        for place in places:
            at = of.candidates[place]
            known.setdefault(int(of.items[at]), (vectors.items[at], of.log_not_sampled[place]))
    ids = list(known)
    matrix = torch.stack([v for v, _ in known.values()])
    missing = torch.stack([p for _, p in known.values()])
    log_q = torch.zeros(len(ids))
    if negatives != "all":
        log_q = torch.log(-torch.expm1(in_batch * missing[:, 0] + negatives * missing[:, 1]))
    by_target: dict[str, Tensor] = {}
    sequence = torch.repeat_interleave(torch.arange(len(batch.lengths)), batch.lengths).tolist()
    wanted = [int(batch.items[t]) for t in batch.targets]
    queries = {**own.representations, "left_out": own.left}
    for name, whole in queries.items():
        half = slice(DIM, None) if name in ("collaborative", "left_out") else slice(0, DIM)
        query, seen = whole[:, half], matrix[:, half]
        losses = [query.sum() * 0] * len(wanted)
        for t, item in enumerate(wanted):
            others = [u for u in range(len(wanted)) if sequence[u] == sequence[t] and (name == "left_out" or u < t)]
            hidden = {wanted[u] for u in others if had[u]} - {item}
            hidden |= {i for i in ids if joint and i % DOMAINS != item % DOMAINS}
            true = torch.tensor([i == item for i in ids])
            scores = seen @ query[t] / 0.07 - torch.where(true, 0.0, log_q)  # a target is a candidate with certainty
            kept = torch.tensor([i not in hidden for i in ids])
            losses[t] = -F.log_softmax(scores[kept], 0)[[i for i in ids if i not in hidden].index(item)]
        by_target[name] = torch.stack(losses) if wanted else query.sum(1)
    if joint:
        sure = [by_target["left_out" if name == "collaborative" else name] for name in HEADS]
        shares = torch.softmax(-torch.stack(sure).detach(), 0)
        counts = dict(zip(HEADS, 1 - MIXTURE + MIXTURE * 3 * shares, strict=True))
        counts["left_out"] = counts["collaborative"]
        by_target = {name: losses * counts[name] for name, losses in by_target.items()}
    found = {name: (losses * weight).sum() / total for name, losses in by_target.items()}
    found["attribute"] = _contrast(made_by, rank, near, joint) * in_batch / targets
    return found


def _contrast(made_by: list[tuple[Any, Vectors]], rank: int, near: list[int], joint: bool) -> Tensor:
    pairs: dict[int, tuple[int, Tensor, Tensor]] = {}
    for r in near:
        batch, vectors = made_by[r]
        for at in torch.unique(batch.targets):
            one = vectors.ids[at]
            if bool(one.any()):
                both = F.normalize(one, dim=0, eps=SHORTEST), F.normalize(vectors.contents[at], dim=0)
                pairs.setdefault(int(batch.items[at]), (r, *both))
    if not pairs:
        return made_by[rank][1].items.sum() * 0
    ids = torch.stack([one for _, one, _ in pairs.values()])
    contents = torch.stack([one for _, _, one in pairs.values()])
    scores = math.exp(2.0) * ids @ contents.T
    domain = torch.tensor([item % DOMAINS for item in pairs])
    if joint:
        scores = scores.masked_fill(domain[:, None] != domain, -math.inf)
    mine = torch.tensor([r == rank for r, _, _ in pairs.values()])
    summed = F.log_softmax(scores, 1).diag()[mine].sum() + F.log_softmax(scores.T, 1).diag()[mine].sum()
    return -summed / (2 * len(pairs))


class Counted(CandidateRanks):
    """Counts what it exchanges: bytes that come in, and collectives."""

    bytes, calls = 0, 0

    def gather_flat(self, values: Tensor) -> Tensor:
        found = super().gather_flat(values)
        self.bytes, self.calls = self.bytes + found.nbytes, self.calls + 1
        return found

    def scatter_sum(self, values: Tensor) -> Tensor:
        self.bytes, self.calls = self.bytes + values.nbytes, self.calls + 1
        return super().scatter_sum(values)

    def all_gather(self, numbers: Tensor) -> Tensor:
        found = super().all_gather(numbers)
        self.bytes, self.calls = self.bytes + found.nbytes, self.calls + 1
        return found


def compare(comm: Comm, kind: str, negatives: Drawn, joint: bool) -> Counted:
    """Loss by loss and gradient by gradient; of joint data, the targets have weights too."""
    config = LossConfig(negatives=negatives, attribute=0.5, mixture=MIXTURE if joint else 0.0)
    ranks = Counted(comm, kind)  # type: ignore[arg-type]
    ranks.check()
    losses: tuple[Loss, ...] = make_losses(config, described=True, gather=ranks, joint=joint)
    batch, vectors = made(comm.rank, kind, ranks, negatives, joint)
    parts = share([loss.rows(batch, vectors) for loss in losses], batch.targets, ranks, batch.weight)  # type: ignore[arg-type]
    weighted, told = zip(*(loss(batch, vectors, p) for loss, p in zip(losses, parts, strict=True)), strict=True)  # type: ignore[arg-type]
    sum(weighted).backward()  # type: ignore[union-attr]

    made_by = [made(rank, kind, ranks, negatives, joint) for rank in range(comm.world_size)]
    everyone = list(range(comm.world_size))

    def reference(rank: int) -> dict[str, Tensor]:
        node = [r for r in everyone if r // comm.local_world_size == rank // comm.local_world_size]
        near, pool = {"global": (everyone, everyone), "node": (node, node), "local": ([rank], everyone)}[kind]
        return expected(made_by, rank, near, pool, negatives, joint)

    for name, value in reference(comm.rank).items():
        torch.testing.assert_close(
            {**told[0], **told[1]}[name], value.detach(), rtol=1e-4, atol=1e-5, msg=f"{kind} {name}"
        )
    weight = {"attribute": config.attribute}
    sum(weight.get(n, 1.0) * v for rank in everyone for n, v in reference(rank).items()).backward()  # type: ignore[union-attr]
    for field in fields(Vectors):
        mine, wanted = getattr(vectors, field.name).grad, getattr(made_by[comm.rank][1], field.name).grad
        nothing = torch.zeros_like(getattr(vectors, field.name))
        torch.testing.assert_close(
            nothing if mine is None else mine, nothing if wanted is None else wanted, rtol=1e-3, atol=1e-5,
            msg=f"{kind}, gradient of {field.name}",
        )  # fmt: skip
    return ranks


def main(local: int, output: Path) -> None:
    os.environ["LOCAL_WORLD_SIZE"] = str(local)
    counted = {}
    with process_group(DistributedConfig(device="cpu", threads=1)) as comm:
        cases: list[tuple[str, Drawn]] = [("global", DRAWN), ("node", DRAWN), ("local", DRAWN), ("local", 24)]
        for kind, negatives in [*cases, ("local", "all")]:
            compare(comm, kind, negatives, joint=True)
            ranks = compare(comm, kind, negatives, joint=False)
            counted[f"{kind} {negatives}"] = {"bytes": ranks.bytes, "calls": ranks.calls}
        if comm.main:
            output.write_text(json.dumps(counted))


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
