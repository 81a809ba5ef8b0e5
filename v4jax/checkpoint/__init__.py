"""Official safetensors checkpoints, read and written.

Next file to read: v4jax/checkpoint/names.py.
"""

from v4jax.checkpoint.export import save_safetensors
from v4jax.checkpoint.load import load_safetensors
from v4jax.checkpoint.names import (
    Slot,
    from_official,
    official_names,
    to_official,
    transformers_to_official,
)

__all__ = [
    "Slot",
    "from_official",
    "load_safetensors",
    "official_names",
    "save_safetensors",
    "to_official",
    "transformers_to_official",
]
