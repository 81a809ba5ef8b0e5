"""What configurations share that go on from released weights of V4-Flash.

Command: v4jax train configs/flash_continue.py --dry-run
Next file to read: configs/models.py.
"""

from typing import Any

from configs import models
from v4jax.train.config import TrainConfig


def from_flash(checkpoint: str, learning_rate: float, **own: Any) -> TrainConfig:
    """A run in bfloat16 whose weights, the indexer's too, learn at one rate.

    Args:
      checkpoint: a store of the released weights.
      own: all other fields of the run.
    """
    return TrainConfig(
        model=models.flash(),
        init_from=checkpoint,
        layout="pod",
        dtype="bfloat16",
        learning_rate=learning_rate,
        index_learning_rate=learning_rate,
        momentum_dtype="bfloat16",
        moment_dtype="bfloat16",
        **own,
    )
