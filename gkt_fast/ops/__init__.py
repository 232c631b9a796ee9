"""The kernels behind one function per op, and the choice of backend."""

from .registry import BackendError, explain, use_backend

__all__ = ["BackendError", "explain", "use_backend"]
