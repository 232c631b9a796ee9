"""Group Knowledge based Training (GKT) of residual networks at nearly the cost of plain training.

Names are imported when they are first used, so that what needs no torch (`gkt_fast --help`, the configuration) starts
without it.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from . import moved as _moved  # noqa: F401  (old names of modules, for pickles)

if TYPE_CHECKING:
    from .batch_norm.fusion import fuse_blocks, unfuse_blocks
    from .config import GKTConfig
    from .deployment.calibration import recalibrate_batch_norm
    from .deployment.cascade import Cascade, CascadeEvaluation, CascadeResult
    from .deployment.cascade_fit import fit_cascade
    from .deployment.elastic import ElasticNetwork, load_elastic, make_elastic
    from .deployment.evaluation import Evaluation, evaluate
    from .deployment.export import ExportError, export_onnx
    from .deployment.extraction import active_subnet, extract_subnet
    from .deployment.latency import Latency
    from .deployment.subnet_choice import choose_subnets
    from .deployment.subnet_report import plot_subnets, write_subnets_csv
    from .deployment.subnet_table import SubnetResult, best_subnet, evaluate_subnets, pareto_front
    from .deployment.survival import survival_scaling
    from .execution.memory import GroupKnowledgeMemory
    from .gkt import GKT, GKTOutput
    from .losses import GroupKnowledgeLoss, NormalizedCrossEntropy
    from .methods import METHODS, method_config
    from .network.compilation import compile_blocks
    from .ops import ghost_batch_norm, group_knowledge_loss, residual_block, use_backend
    from .subnets.subnet import Stage, Subnet
    from .training.batches import DataLoadingError
    from .training.callbacks import Callback
    from .training.checkpoint import CheckpointError
    from .training.loggers import TensorBoardLogger, WandbLogger
    from .training.nonfinite import NonFiniteLossError
    from .training.schedules import LinearWarmup
    from .training.trainer import GKTTrainer

__version__ = "0.2.0"

_NAMES = {
    "batch_norm.fusion": ("fuse_blocks", "unfuse_blocks"),
    "config": ("GKTConfig",),
    "deployment.calibration": ("recalibrate_batch_norm",),
    "deployment.cascade": ("Cascade", "CascadeEvaluation", "CascadeResult"),
    "deployment.cascade_fit": ("fit_cascade",),
    "deployment.elastic": ("ElasticNetwork", "load_elastic", "make_elastic"),
    "deployment.evaluation": ("Evaluation", "evaluate"),
    "deployment.export": ("ExportError", "export_onnx"),
    "deployment.extraction": ("active_subnet", "extract_subnet"),
    "deployment.latency": ("Latency",),
    "deployment.subnet_choice": ("choose_subnets",),
    "deployment.subnet_report": ("plot_subnets", "write_subnets_csv"),
    "deployment.subnet_table": ("SubnetResult", "best_subnet", "evaluate_subnets", "pareto_front"),
    "deployment.survival": ("survival_scaling",),
    "execution.memory": ("GroupKnowledgeMemory",),
    "gkt": ("GKT", "GKTOutput"),
    "losses": ("GroupKnowledgeLoss", "NormalizedCrossEntropy"),
    "methods": ("METHODS", "method_config"),
    "network.compilation": ("compile_blocks",),
    "ops": ("ghost_batch_norm", "group_knowledge_loss", "residual_block", "use_backend"),
    "subnets.subnet": ("Stage", "Subnet"),
    "training.batches": ("DataLoadingError",),
    "training.callbacks": ("Callback",),
    "training.checkpoint": ("CheckpointError",),
    "training.loggers": ("TensorBoardLogger", "WandbLogger"),
    "training.nonfinite": ("NonFiniteLossError",),
    "training.schedules": ("LinearWarmup",),
    "training.trainer": ("GKTTrainer",),
}
"""Where each public name lives: the same as the imports above, which type checkers read."""

_HOME = {name: module for module, names in _NAMES.items() for name in names}
_MODULES = (
    "config",
    "data",
    "distributed",
    "integrations",
    "losses",
    "methods",
    "models",
    "ops",
    "pictures",
    "selfcheck",
)
"""Modules that `gkt_fast.NAME` reaches without an import of their own."""

__all__ = [
    "GKT",
    "METHODS",
    "Callback",
    "Cascade",
    "CascadeEvaluation",
    "CascadeResult",
    "CheckpointError",
    "DataLoadingError",
    "ElasticNetwork",
    "Evaluation",
    "ExportError",
    "GKTConfig",
    "GKTOutput",
    "GKTTrainer",
    "GroupKnowledgeLoss",
    "GroupKnowledgeMemory",
    "Latency",
    "LinearWarmup",
    "NonFiniteLossError",
    "NormalizedCrossEntropy",
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
    "fit_cascade",
    "fuse_blocks",
    "ghost_batch_norm",
    "group_knowledge_loss",
    "load_elastic",
    "make_elastic",
    "method_config",
    "pareto_front",
    "plot_subnets",
    "recalibrate_batch_norm",
    "residual_block",
    "survival_scaling",
    "unfuse_blocks",
    "use_backend",
    "write_subnets_csv",
]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        value = getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
        globals()[name] = value
        return value
    if name in _MODULES:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_MODULES})
