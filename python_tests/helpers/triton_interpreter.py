"""Triton's interpreter, which runs its kernels where there is no GPU, in half the time."""

from __future__ import annotations

import functools


@functools.cache
def patch_the_language_once_per_launch() -> None:
    """Lets calls inside a kernel find Triton's language as the launch has prepared it.

    The interpreter prepares it again at every call of a function, by a search through all of its members. What that
    changes depends on the module of the function alone, and lasts until the launch ends.
    """
    from triton.runtime.interpreter import GridExecutor, InterpretedFunction

    launch, call = GridExecutor.__call__, InterpretedFunction.__call__
    prepared = set()

    def launch_afresh(self, *arguments, **options):
        prepared.clear()
        return launch(self, *arguments, **options)

    def call_prepared(self, *arguments, **options):
        if id(self.fn.__globals__) in prepared:
            return self.rewrite()(*arguments, **options)
        prepared.add(id(self.fn.__globals__))
        return call(self, *arguments, **options)

    GridExecutor.__call__, InterpretedFunction.__call__ = launch_afresh, call_prepared
