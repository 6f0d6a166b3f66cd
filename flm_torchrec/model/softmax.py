"""Sampled softmax with logQ correction, never holding a [T, C] matrix."""

from __future__ import annotations

import torch
from torch import Tensor

CHUNK_ELEMENTS = 2**20
"""Logits held at once, 4 MiB in fp32: near a CPU's cache, small on a GPU."""


def inclusion_log_probability(log_absent: Tensor, in_batch: Tensor | int, drawn: int) -> Tensor:
    """[C]: log-probability that an item is among the candidates of a step.

    It is a candidate unless none of `in_batch` targets and none of `drawn` negatives is it:
    pi = 1 - (1 - p)^in_batch (1 - q)^drawn, with `log_absent` = [log(1 - p), log(1 - q)], [C, 2].
    """
    absent = in_batch * log_absent[:, 0] + drawn * log_absent[:, 1]
    return torch.log(-torch.expm1(absent).clamp(max=-1e-12))


def sampled_softmax(query: Tensor, items: Tensor, target: Tensor, log_q: Tensor, scale: Tensor) -> Tensor:
    """Sum over T queries of -log softmax(scale * query . items)[target], Z estimated from the candidates.

    Each candidate but the target stands for 1 / pi items like it: its logit is lowered by log_q = log pi. The
    target is there with certainty, so its own is not (Bengio & Senecal 2008; Yi et al., RecSys 2019; and for
    the positive, Khrylchenko et al., "Correcting the LogQ Correction", RecSys 2025). As candidates are
    different items and the target is one of them, no accidental hit is counted as a negative.

    Args:
        query: [T, D].
        items: [C, D] vectors of the candidates.
        target: [T] index of each query's true item among the candidates.
        log_q: [C] log-probability of each candidate to be one; +inf takes it out (padding, a repeated item).
            All zero for a full softmax.
        scale: [] inverse temperature.

    Returns:
        [] the summed loss; its gradient is exact for query, items and scale.
    """
    return _SampledSoftmax.apply(query, items, target, log_q, scale)


class _SampledSoftmax(torch.autograd.Function):
    """Gradients are made beside the loss, chunk by chunk of queries: one pass over the logits, none kept."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx, query: Tensor, items: Tensor, target: Tensor, log_q: Tensor, scale: Tensor
    ) -> Tensor:
        loss = query.new_zeros(())
        query_grad, items_grad = torch.empty_like(query), torch.zeros_like(items)
        chunk = max(1, CHUNK_ELEMENTS // max(1, len(items)))
        buffer = query.new_empty(min(chunk, len(query)), len(items))
        scaled, corrections = query * scale, -log_q
        for at in range(0, len(query), chunk):
            part, own = scaled[at : at + chunk], target[at : at + chunk, None]
            shares = torch.addmm(corrections, part, items.T, out=buffer[: len(part)])  # logits, [t, C]
            truth = shares.gather(1, own).add_(log_q[own])
            shares.scatter_(1, own, truth)
            largest = shares.amax(1, keepdim=True)
            total = shares.sub_(largest).exp_().sum(1, keepdim=True)
            loss += (total.log() + largest - truth).sum()
            # softmax = shares / total; dividing the narrow factors instead saves a pass over [t, C].
            query_grad[at : at + chunk] = shares @ items / total - items[own[:, 0]]
            items_grad.addmm_(shares.T, part / total)
        items_grad.index_add_(0, target, scaled, alpha=-1.0)
        scale_grad = (query_grad * query).sum()
        ctx.save_for_backward(query_grad.mul_(scale), items_grad, scale_grad)
        return loss

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        query_grad, items_grad, scale_grad = ctx.saved_tensors
        return query_grad * grad, items_grad * grad, None, None, scale_grad * grad
