"""Compares two checkpoints of one model, tensor by tensor.

Next file to read: v4jax/convert/info.py.
"""

from collections.abc import Sequence

import numpy as np

from v4jax.checkpoint.files import read_tensor
from v4jax.checkpoint.load import Source
from v4jax.checkpoint.names import official_shapes
from v4jax.convert.progress import progress
from v4jax.convert.sources import StoreSource, open_checkpoint, without_parts
from v4jax.storage import checkpoint_path


def compare(first, second, drop: Sequence[str] = ()) -> dict:
    """Compares two checkpoints of one model, of any kinds and precisions.

    Args:
      drop: parts of the first that the second need not have: "drafter", "vision".

    Returns:
      The number of tensors and of equal ones; the name of the worst tensor, its largest difference,
        and that difference divided by the largest number of the first checkpoint's tensor.

    Raises:
      ValueError: a bad checkpoint, or two models (names the first tensor or shape that differs, or
        the first carried tensor with other bytes).
    """
    a = without_parts(open_checkpoint(checkpoint_path(first, "first", weights=True)), drop)
    b = open_checkpoint(checkpoint_path(second, "second", weights=True))
    shapes, others = official_shapes(a.cfg), official_shapes(b.cfg)
    for name in shapes | others:
        if shapes.get(name) != others.get(name):
            raise ValueError(
                f"{name}: {shapes.get(name)} in {first}, {others.get(name)} in {second}; these are "
                "two models"
            )
    _check_carried(a, b)
    equal, worst = 0, ("", 0.0, 0.0)
    with progress("comparing", len(shapes), bytes_=False) as wrote:
        for name in shapes:
            x, y = (np.asarray(side.numbers(name), np.float32) for side in (a, b))
            difference = float(np.max(np.abs(x - y), initial=0))
            equal += difference == 0
            relative = difference / max(
                float(np.max(np.abs(x), initial=0)), np.finfo(np.float32).tiny
            )
            worst = max(worst, (name, difference, relative), key=lambda one: one[2])
            wrote(1)
    return {
        "tensors": len(shapes),
        "equal": equal,
        "worst": worst[0],
        "difference": worst[1],
        "relative": worst[2],
    }


def _check_carried(a: Source | StoreSource, b: Source | StoreSource) -> None:
    """Refuses carried tensors that are not the same, byte for byte."""
    for name in a.carried | b.carried:
        if name not in a.carried or name not in b.carried:
            lacking = a if name in b.carried else b
            raise ValueError(f"{name}: {lacking.directory} has no such tensor")
        x, y = (read_tensor(side.carried[name], once=True) for side in (a, b))
        if (x.dtype, x.shape, x.tobytes()) != (y.dtype, y.shape, y.tobytes()):
            raise ValueError(f"{name}: is carried, and differs in {b.directory}")
