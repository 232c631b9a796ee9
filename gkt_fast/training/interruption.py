"""Ctrl-C that waits until the training step is finished."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from ..distributed import is_distributed

__all__ = ["Interruption", "deferred_interrupt"]


@dataclass
class Interruption:
    """Whether the run was asked to stop."""

    requested: bool = False


@contextmanager
def deferred_interrupt() -> Iterator[Interruption]:
    """Inside, Ctrl-C is only noted; a second one interrupts at once. One that nobody acted on is raised at the end.

    In a thread other than the main one, which gets no signals, nothing is changed.
    """
    interruption = Interruption()
    if threading.current_thread() is not threading.main_thread():
        yield interruption
        return
    previous = signal.getsignal(signal.SIGINT)

    def interrupt(signum: int, frame: Any) -> None:
        if interruption.requested and not is_distributed():  # torchrun passes on what the terminal sends too
            raise KeyboardInterrupt
        interruption.requested = True

    signal.signal(signal.SIGINT, interrupt)
    try:
        yield interruption
    finally:
        signal.signal(signal.SIGINT, previous)
    if interruption.requested:
        raise KeyboardInterrupt
