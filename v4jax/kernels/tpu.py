"""What kernels for TPUs share: sizes of the chip, contractions, and what it can compute.

Next file to read: v4jax/kernels/hyper_connection/blocks.py.
"""

import jax
import jax.numpy as jnp

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


def beyond_vmem(what: str, need: int) -> str:
    """Why a step that needs `need` bytes of fast memory does not fit, in words; "" if it does."""
    if need <= VMEM_BYTES:
        return ""
    return (
        f"{what}: a step needs {need / 2**20:.0f} MiB of fast memory, and {VMEM_BYTES >> 20} are "
        "there"
    )


def check_fits(op: str, fault: str) -> None:
    """Refuses "pallas_tpu" of `op` for what it cannot compute.

    Args:
      fault: what that is; "" if it can.

    Raises:
      ValueError: there is a fault.
    """
    if fault:
        raise ValueError(f"kernels: {op}: got 'pallas_tpu' for {fault}")


def padded(x: jax.Array, more: int, fill: int = 0) -> jax.Array:
    """`more` times `fill` at the end of axis 1."""
    if more == 0:
        return x
    sides = ((0, 0), (0, more), *((0, 0) for _ in x.shape[2:]))
    return jnp.pad(x, sides, constant_values=fill)
