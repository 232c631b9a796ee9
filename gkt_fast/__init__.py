"""Group Knowledge based Training (GKT) of residual networks at nearly the cost of plain training."""

from .checkpoint import CheckpointError
from .config import GKTConfig
from .evaluation import Evaluation, evaluate
from .export import ExportError, export_onnx
from .extraction import active_subnet, extract_subnet, recalibrate_batch_norm
from .fusion import fuse_blocks, unfuse_blocks
from .gkt import GKT, GKTOutput
from .losses import GroupKnowledgeLoss
from .methods import METHODS, method_config
from .ops import ghost_batch_norm, group_knowledge_loss, use_backend
from .subnet import Stage, Subnet
from .subnet_table import (
    SubnetResult,
    best_subnet,
    choose_subnets,
    evaluate_subnets,
    pareto_front,
    plot_subnets,
    write_subnets_csv,
)
from .survival import survival_scaling
from .trainer import GKTTrainer, NonFiniteLossError

__version__ = "0.1.0"

__all__ = [
    "GKT",
    "METHODS",
    "CheckpointError",
    "Evaluation",
    "ExportError",
    "GKTConfig",
    "GKTOutput",
    "GKTTrainer",
    "GroupKnowledgeLoss",
    "NonFiniteLossError",
    "Stage",
    "Subnet",
    "SubnetResult",
    "__version__",
    "active_subnet",
    "best_subnet",
    "choose_subnets",
    "evaluate",
    "evaluate_subnets",
    "export_onnx",
    "extract_subnet",
    "fuse_blocks",
    "ghost_batch_norm",
    "group_knowledge_loss",
    "method_config",
    "pareto_front",
    "plot_subnets",
    "recalibrate_batch_norm",
    "survival_scaling",
    "unfuse_blocks",
    "use_backend",
    "write_subnets_csv",
]
