"""Programs that compile when they are first needed, in all processes of a job together.

Next file to read: v4jax/train/step.py.
"""

import contextlib
from collections.abc import Callable
from typing import Any

import jax

from sharding.agreement import wait_for_all

Compiling = Callable[[], contextlib.AbstractContextManager[None]]


class CompiledTogether:
    """A function, compiled when it first sees a shape; all processes finish before any runs it.

    Shapes of the first argument do not count: they never change. gloo's reduce-scatter fails when a
    process comes more than 30 s late.
    """

    def __init__(self, jitted: Any, compiling: Compiling = contextlib.nullcontext):
        """Takes what jax.jit gives.

        compiling: makes the context in which it compiles (goodput.Clock.compiling).
        """
        self._jitted, self._compiling, self._compiled = jitted, compiling, {}

    def __call__(self, state, *rest):
        """What the function returns."""
        shapes = tuple(leaf.shape for leaf in jax.tree.leaves(rest))
        if shapes not in self._compiled:
            arguments = jax.block_until_ready((state, *rest))
            with self._compiling():
                self._compiled[shapes] = self._jitted.lower(*arguments).compile()
                wait_for_all(f"a program for {shapes} is compiled")
        return self._compiled[shapes](state, *rest)

    def texts(self) -> list[str]:
        """The compiled programs so far, as HLO text."""
        return [program.as_text() for program in self._compiled.values()]
