"""A residual block of several states as one op: convolutions, batch norms per ghost batch, the addition and ReLU."""

from .op import residual_block
from .problem import Convolution, Norm
from .reference import residual_block_reference

__all__ = ["Convolution", "Norm", "residual_block", "residual_block_reference"]
