"""The kernels behind one function per op, and the choice of backend."""

from .ghost_batch_norm import ghost_batch_norm, ghost_batch_norm_reference
from .group_knowledge_loss import (
    GroupKnowledge,
    LossOptions,
    Past,
    group_knowledge_loss,
    group_knowledge_loss_reference,
    wrong_class_index,
)
from .native import build_info
from .registry import BackendError, explain, use_backend
from .residual_block import residual_block, residual_block_reference

__all__ = [
    "BackendError",
    "GroupKnowledge",
    "LossOptions",
    "Past",
    "build_info",
    "explain",
    "ghost_batch_norm",
    "ghost_batch_norm_reference",
    "group_knowledge_loss",
    "group_knowledge_loss_reference",
    "residual_block",
    "residual_block_reference",
    "use_backend",
    "wrong_class_index",
]
