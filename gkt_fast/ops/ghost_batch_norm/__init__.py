"""Batch normalisation per ghost batch, residual addition and ReLU in one op."""

from .op import ghost_batch_norm
from .reference import ghost_batch_norm_reference

__all__ = ["ghost_batch_norm", "ghost_batch_norm_reference"]
