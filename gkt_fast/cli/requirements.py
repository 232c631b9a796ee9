"""Optional packages, looked for before work begins."""

from __future__ import annotations

import importlib.util
import sys

__all__ = ["EXTRAS", "require"]

EXTRAS = {
    "torchvision": "vision",
    "timm": "vision",
    "sklearn": "vision",
    "matplotlib": "vision",
    "tensorboard": "logging",
    "wandb": "logging",
    "onnx": "export",
    "onnxscript": "export",
    "onnxruntime": "export",
}
"""For each module that a command may need, the extra of this package that installs it."""


def require(what: str, *modules: str) -> None:
    """Checks that modules are installed, without importing them.

    Args:
        what: the flag or command that needs them, for the message.
        modules: their names.

    Raises:
        ImportError: one is missing; the message holds the command that installs it.
    """
    missing = [name for name in modules if not _is_installed(name)]
    if missing:
        raise ImportError(
            f"{what} needs {', '.join(missing)}, which is not installed: "
            f'pip install "gkt_fast[{",".join(sorted({EXTRAS[name] for name in missing}))}]"'
        )


def _is_installed(name: str) -> bool:
    if name in sys.modules:
        return sys.modules[name] is not None
    return importlib.util.find_spec(name) is not None
