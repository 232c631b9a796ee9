"""The formulas of the ops in basic operations, apart from the package's own code; float64 in, float64 out.

Autograd differentiates them. Shapes are those of the ops in `gkt_fast.ops`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import conv2d

from ..ops import LossOptions

__all__ = ["ghost_batch_norm", "group_knowledge_loss", "residual_block"]


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


def residual_block(
    x: Tensor,
    weights: Sequence[Tensor],
    norms: Sequence[tuple[Tensor, Tensor]],
    projection: tuple[Tensor, tuple[Tensor, Tensor]] | None,
    ghosts: int,
    keep: Tensor | None,
    preactivation: bool,
    lead_rows: int | None,
) -> tuple[Tensor, list[tuple[Tensor, Tensor]], Tensor]:
    """y, mean and variance of each norm, and z before the last activation; convolutions keep their input's size.

    Args:
        x: (rows, C, height, width).
        weights: of the main branch's convolutions.
        norms: weight and bias of the norm of each.
        projection: the same of the shortcut; None: it has neither.
        ghosts: number of ghost batches.
        keep: (ghosts,); False: the main branch counts nothing.
        preactivation: whether norms and activations come before convolutions.
        lead_rows: rows of the first ghost batch.
    """
    statistics = []

    def normalized(
        a: Tensor, norm: tuple[Tensor, Tensor], relu: bool = True, **last: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        y, mean, variance, z = ghost_batch_norm(a, *norm, ghosts, relu=relu, lead_rows=lead_rows, **last)
        statistics.append((mean, variance))
        return y, z

    def convolved(a: Tensor, weight: Tensor) -> Tensor:
        return conv2d(a, weight, padding=weight.shape[-1] // 2)

    a = x
    if preactivation:
        for weight, norm in zip(weights, norms, strict=True):
            a = convolved(normalized(a, norm)[0], weight)
        if keep is not None:
            sizes = torch.tensor([len(x) // ghosts] * ghosts, device=x.device)
            a = a * keep.repeat_interleave(sizes)[:, None, None, None]
        return a + x, statistics, a + x
    for weight, norm in zip(weights[:-1], norms[:-1], strict=True):
        a = normalized(convolved(a, weight), norm)[0]
    residual, of_shortcut = x, []
    if projection is not None:
        residual = normalized(convolved(x, projection[0]), projection[1], relu=False)[0]
        of_shortcut = [statistics.pop()]
    y, z = normalized(convolved(a, weights[-1]), norms[-1], residual=residual, keep=keep)
    return y, statistics + of_shortcut, z


def _rows(tensor: Tensor, class_dim: int) -> Tensor:
    """(..., B, C, *spatial) -> (..., rows, C)."""
    shape = tensor.shape[: class_dim - 1]
    return tensor.movedim(class_dim, -1).reshape(*shape, -1, tensor.shape[class_dim])
