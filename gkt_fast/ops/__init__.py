"""The kernels behind one function per op, and the choice of backend."""

from .ghost_batch_norm.op import ghost_batch_norm
from .group_knowledge_loss.op import GroupKnowledge, group_knowledge_loss, group_knowledge_loss_reference
from .native import build_info
from .registry import BackendError, explain, use_backend

__all__ = [
    "BackendError",
    "GroupKnowledge",
    "build_info",
    "explain",
    "ghost_batch_norm",
    "group_knowledge_loss",
    "group_knowledge_loss_reference",
    "use_backend",
]
