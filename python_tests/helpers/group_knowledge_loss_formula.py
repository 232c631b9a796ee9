"""The formula of `group_knowledge_loss` in float64 (docs/guide/algorithm.md), row by row, apart from the package."""

from __future__ import annotations

import math
import os

import torch
import torch.nn.functional as F
from torch import Tensor

from gkt_fast.ops import registry

DEFAULTS = {
    "ema": 0.5,
    "temperature": 1.0,
    "normalize_logits": False,
    "eps": 1e-7,
    "ce_weight": 1.0,
    "kd_weight": 1.0,
    "subnet_ce_weight": 0.0,
    "ignore_index": -100,
    "label_smoothing": 0.0,
    "distill_ignored": True,
}


def as_rows(tensor: Tensor, class_dim: int) -> Tensor:
    """(..., B, C, *spatial) -> (..., rows, C)."""
    leading, classes = tensor.shape[: class_dim - 1], tensor.shape[class_dim]
    rows = math.prod(tensor.shape[class_dim - 1 :]) // classes  # -1 is ambiguous without subnets
    return tensor.movedim(class_dim, -1).reshape(*leading, rows, classes)


def expected(
    logits: Tensor, targets: Tensor, groups: int, full_logits: Tensor | None = None, **options: object
) -> tuple[Tensor, Tensor, Tensor] | tuple[Tensor, Tensor, Tensor, Tensor]:
    """Loss, terms and gradient, all in float64; with `full_logits` its gradient too."""
    o = DEFAULTS | options
    leaf = logits.detach().double().requires_grad_()
    full = (leaf[0] if full_logits is None else full_logits).detach().double().requires_grad_()
    z = [as_rows(full, 1), *as_rows(leaf if full_logits is not None else leaf[1:], 2)]
    rows, classes = z[0].shape
    smoothing, temperature = o["label_smoothing"], o["temperature"]
    if targets.is_floating_point():
        wanted = as_rows(targets.double(), 1)
        counted = torch.ones(rows, dtype=torch.bool)
    else:
        counted = targets.reshape(-1) != o["ignore_index"]
        wanted = F.one_hot(targets.reshape(-1).where(counted, 0), classes).double()
    wanted = (1 - smoothing) * wanted + smoothing / classes

    def cross_entropy(x: Tensor) -> Tensor:
        log_probability = x - x.logsumexp(1, keepdim=True)
        own, counts = wanted[: len(x)], counted[: len(x)]
        # 0 log 0 = 0 for the classes that a one-hot target leaves out; probabilities are taken as they are.
        left_out = (own == 0) & (not targets.is_floating_point())
        return torch.where(left_out, 0.0, -own * log_probability).sum(1)[counts].sum() / counts.sum()

    def normalized(x: Tensor) -> Tensor:
        if not o["normalize_logits"]:
            return x
        deviation = x - x.mean(1, keepdim=True)
        return deviation / (deviation.pow(2).mean(1, keepdim=True) + o["eps"]).sqrt()

    distilled = counted if not o["distill_ignored"] else torch.ones(rows, dtype=torch.bool)
    knowledge = {0: normalized(z[0]).detach()}
    terms = [cross_entropy(z[0])]
    loss = o["ce_weight"] * terms[0] if o["ce_weight"] else 0.0 * full.nan_to_num(0, 0, 0).sum()
    loss = loss + 0.0 * leaf.nan_to_num(0, 0, 0).sum()
    for s in range(1, len(z)):
        g = (s - 1) % groups + 1
        n = normalized(z[s])
        log_p = knowledge[g - 1][: len(n)] / temperature
        log_p = log_p - log_p.logsumexp(1, keepdim=True)
        log_q = n / temperature - (n / temperature).logsumexp(1, keepdim=True)
        divergence = torch.where(log_p.exp() == 0, 0.0, log_p.exp() * (log_p - log_q)).sum(1)
        counts = distilled[: len(n)]
        kd = temperature**2 * divergence[counts].sum() / counts.sum()
        terms.append(kd)
        if o["kd_weight"]:
            loss = loss + o["kd_weight"] * kd
        if o["subnet_ce_weight"]:
            loss = loss + o["subnet_ce_weight"] * cross_entropy(z[s])
        n = n.detach()
        if g not in knowledge or o["ema"] == 0:
            knowledge[g] = n
        elif o["ema"] != 1:
            knowledge[g] = o["ema"] * knowledge[g] + (1 - o["ema"]) * n
    loss.backward()
    results = loss.detach(), torch.stack(terms).detach()
    if full_logits is not None:
        return *results, leaf.grad, full.grad
    return *results, torch.cat([full.grad[None], leaf.grad[1:]])


def relative_norm(actual: Tensor, wanted: Tensor) -> float:
    """|actual - wanted| / |wanted|; the norm itself where nothing is wanted, as of a single class."""
    return (actual.double() - wanted).norm().item() / (wanted.norm().item() or 1.0)


def rounding_error(wanted: Tensor, dtype: torch.dtype) -> float:
    """Relative error of the exact gradient in this dtype: rounded, or as Triton's interpreter does, truncated."""
    truncates = registry.requested_backend() == "triton" and os.environ.get("TRITON_INTERPRET") == "1"
    if truncates and dtype == torch.bfloat16:
        return relative_norm((wanted.float().view(torch.int32) & -65536).view(torch.float32), wanted)
    return relative_norm(wanted.to(dtype), wanted)
