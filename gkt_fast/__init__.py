"""Group Knowledge based Training (GKT) of residual networks at nearly the cost of plain training."""

from .losses import GroupKnowledgeLoss
from .ops import group_knowledge_loss, use_backend

__version__ = "0.1.0"

__all__ = ["GroupKnowledgeLoss", "__version__", "group_knowledge_loss", "use_backend"]
