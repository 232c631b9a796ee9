"""Group Knowledge based Training (GKT) of residual networks at nearly the cost of plain training."""

from .ops import ghost_batch_norm, use_backend

__version__ = "0.1.0"

__all__ = ["__version__", "ghost_batch_norm", "use_backend"]
