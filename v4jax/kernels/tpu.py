"""What kernels for TPUs share: sizes of the chip, contractions, and whether there is one.

Next file to read: v4jax/kernels/hyper_connection/blocks.py.
"""

import jax

LANES = 128
"""Width of a TPU's vectors."""

VMEM_BYTES = 62 * 2**20
"""What a kernel may use of a core's fast memory: 64 MiB on v5p and TPU7x, 128 on v5e and v6e."""

NT = (((1,), (1,)), ((), ()))
NN = (((1,), (0,)), ((), ()))
TN = (((0,), (0,)), ((), ()))
"""Contractions: a b^T, a b and a^T b."""


def on_tpu() -> bool:
    """Whether the program that is traced is for TPUs: the mesh's devices, or the default ones."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return (jax.default_backend() if device is None else device.platform) == "tpu"
