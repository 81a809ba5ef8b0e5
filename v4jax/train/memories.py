"""What of a run lies in the host's memory: the optimizer's state, and streams that layers keep.

Next file to read: v4jax/train/step.py.
"""

import jax
from jax.sharding import Mesh

from sharding.host_memory import check_host_memory
from v4jax.train.config import TrainConfig


def check_memories(cfg: TrainConfig, mesh: Mesh) -> None:
    """Raises ValueError if `cfg` keeps anything in host memory that this process's devices lack."""
    process = jax.process_index()
    mine = [device for device in mesh.devices.flat if device.process_index == process]
    if cfg.remat == "offload":
        check_host_memory("remat: got 'offload'", "which keeps streams in", mine)
    if cfg.optimizer_memory == "host":
        check_host_memory("optimizer_memory: got 'host'", "which keeps its state in", mine)
