"""The formulas of both ops in basic operations, apart from the package's own code; float64 in, float64 out.

Autograd differentiates them. Shapes are those of `gkt_fast.ops.group_knowledge_loss` and `ghost_batch_norm`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..ops import LossOptions

__all__ = ["ghost_batch_norm", "group_knowledge_loss"]


def group_knowledge_loss(
    logits: Tensor, targets: Tensor, groups: int, **options: int | float | bool
) -> tuple[Tensor, Tensor]:
    """Loss and terms of the streams' logits (S, B, C, *spatial)."""
    o = LossOptions(groups=groups, **options)
    z = _rows(logits, 2)  # (S, rows, C)
    streams, rows, classes = z.shape
    if targets.is_floating_point():
        wanted = _rows(targets, 1)
        counted = torch.ones(rows, dtype=torch.bool, device=z.device)
    else:
        counted = targets.reshape(-1) != o.ignore_index
        wanted = torch.eye(classes, dtype=z.dtype, device=z.device)[targets.reshape(-1).where(counted, 0)]
    wanted = (1 - o.label_smoothing) * wanted + o.label_smoothing / classes
    distilled = torch.ones_like(counted) if o.distill_ignored else counted

    def log_softmax(x: Tensor) -> Tensor:
        return x - x.logsumexp(1, keepdim=True)

    def cross_entropy(x: Tensor) -> Tensor:
        return -(wanted * log_softmax(x)).sum(1)[counted].sum() / counted.sum()

    def normalized(x: Tensor) -> Tensor:
        if not o.normalize_logits:
            return x
        deviation = x - x.mean(1, keepdim=True)
        return deviation / (deviation.square().mean(1, keepdim=True) + o.eps).sqrt()

    knowledge = {0: normalized(z[0]).detach()}
    terms = [cross_entropy(z[0])]
    loss = o.ce_weight * terms[0]
    for stream in range(1, streams):
        group = (stream - 1) % groups + 1
        n = normalized(z[stream])
        log_p = log_softmax(knowledge[group - 1] / o.temperature)
        log_q = log_softmax(n / o.temperature)
        divergence = (log_p.exp() * (log_p - log_q)).sum(1)[distilled].sum() / distilled.sum()
        terms.append(o.temperature**2 * divergence)
        loss = loss + o.kd_weight * terms[-1] + o.subnet_ce_weight * cross_entropy(z[stream])
        old, new = knowledge.get(group), n.detach()
        knowledge[group] = new if old is None else o.ema * old + (1 - o.ema) * new
    return loss, torch.stack(terms).detach()


def ghost_batch_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    ghosts: int,
    residual: Tensor | None = None,
    keep: Tensor | None = None,
    relu: bool = True,
    eps: float = 1e-5,
    running: tuple[Tensor, Tensor] | None = None,
    lead_rows: int | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y, mean, variance, and z before the activation; one ghost batch after another."""
    over, wide = [0, *range(2, x.dim())], (1, -1, *[1] * (x.dim() - 2))
    sizes = [x.shape[0] // ghosts] * ghosts
    if lead_rows is not None:
        sizes = [lead_rows, *[(x.shape[0] - lead_rows) // max(ghosts - 1, 1)] * (ghosts - 1)]
    results, first = [], 0
    for ghost, rows in enumerate(sizes):
        own = slice(first, first + rows)
        first, part = first + rows, x[own]
        values = part.numel() / part.shape[1]
        mean = part.sum(over) / values if running is None else running[0]
        centered = part - mean.reshape(wide)
        variance = centered.square().sum(over) / values if running is None else running[1]
        z = centered / (variance.reshape(wide) + eps).sqrt()
        z = z if weight is None else z * weight.reshape(wide)
        z = z if bias is None else z + bias.reshape(wide)
        skip = None if residual is None else residual[own]
        z = z if skip is None else z + skip
        y = z * (z > 0) if relu else z
        if keep is not None and not keep[ghost]:
            y = skip
        results.append((y, mean, variance, z))
    ys, means, variances, zs = zip(*results, strict=True)
    return torch.cat(ys), torch.stack(means), torch.stack(variances), torch.cat(zs)


def _rows(tensor: Tensor, class_dim: int) -> Tensor:
    """(..., B, C, *spatial) -> (..., rows, C)."""
    shape = tensor.shape[: class_dim - 1]
    return tensor.movedim(class_dim, -1).reshape(*shape, -1, tensor.shape[class_dim])
