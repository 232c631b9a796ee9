"""A residual block of several states as one op: convolutions, batch norms per ghost batch, the addition and ReLU."""

from .checks import check_recompute
from .op import autocast_dtype, residual_block, run_plain_residual_block
from .problem import SLOTS, Convolution, Geometry, Norm, Problem, shape_after
from .reference import residual_block_reference

__all__ = [
    "SLOTS",
    "Convolution",
    "Geometry",
    "Norm",
    "Problem",
    "autocast_dtype",
    "check_recompute",
    "residual_block",
    "residual_block_reference",
    "run_plain_residual_block",
    "shape_after",
]
