"""Group Knowledge based Training (GKT) of residual networks at nearly the cost of plain training."""

from . import moved as _moved  # noqa: F401  (old names of modules, for pickles)
from .batch_norm.fusion import fuse_blocks, unfuse_blocks
from .config import GKTConfig
from .deployment.calibration import recalibrate_batch_norm
from .deployment.evaluation import Evaluation, evaluate
from .deployment.export import ExportError, export_onnx
from .deployment.extraction import active_subnet, extract_subnet
from .deployment.subnet_table import (
    SubnetResult,
    best_subnet,
    choose_subnets,
    evaluate_subnets,
    pareto_front,
    plot_subnets,
    write_subnets_csv,
)
from .deployment.survival import survival_scaling
from .gkt import GKT, GKTOutput
from .losses import GroupKnowledgeLoss
from .methods import METHODS, method_config
from .network.compilation import compile_blocks
from .ops import ghost_batch_norm, group_knowledge_loss, use_backend
from .subnets.subnet import Stage, Subnet
from .training.batches import DataLoadingError
from .training.callbacks import Callback
from .training.checkpoint import CheckpointError
from .training.loggers import TensorBoardLogger, WandbLogger
from .training.nonfinite import NonFiniteLossError
from .training.schedules import LinearWarmup
from .training.trainer import GKTTrainer

__version__ = "0.1.0"

__all__ = [
    "GKT",
    "METHODS",
    "Callback",
    "CheckpointError",
    "DataLoadingError",
    "Evaluation",
    "ExportError",
    "GKTConfig",
    "GKTOutput",
    "GKTTrainer",
    "GroupKnowledgeLoss",
    "LinearWarmup",
    "NonFiniteLossError",
    "Stage",
    "Subnet",
    "SubnetResult",
    "TensorBoardLogger",
    "WandbLogger",
    "__version__",
    "active_subnet",
    "best_subnet",
    "choose_subnets",
    "compile_blocks",
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
