"""Group Knowledge based Training (GKT) of residual networks at nearly the cost of plain training."""

from .config import GKTConfig
from .gkt import GKT, GKTOutput
from .losses import GroupKnowledgeLoss
from .ops import ghost_batch_norm, group_knowledge_loss, use_backend
from .subnet import Stage, Subnet

__version__ = "0.1.0"

__all__ = [
    "GKT",
    "GKTConfig",
    "GKTOutput",
    "GroupKnowledgeLoss",
    "Stage",
    "Subnet",
    "__version__",
    "ghost_batch_norm",
    "group_knowledge_loss",
    "use_backend",
]
