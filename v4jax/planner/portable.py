"""The training step as a portable StableHLO module with shardings, for compilers unknown to JAX.

The file is what jax.export writes. jax.export.deserialize(bytes) gives it back, .mlir_module() its
text, and on devices of the platform that it was lowered for .call runs it: (leaves of the state,
batch) -> (leaves, metrics). Experts run as a grouped product on TPUs and as a loop over blocks
elsewhere.

Next file to read: docs/ascend.md.
"""

import functools
import importlib.util

import jax
import jax.numpy as jnp

from sharding.mesh import make_mesh, parse_mesh
from sharding.rules import layout_for
from v4jax.parameter_tree import abstract_params
from v4jax.planner.estimate import platform_of
from v4jax.planner.hardware import Hardware
from v4jax.storage import file_to_write
from v4jax.train.config import TrainConfig
from v4jax.train.step import batch_sharding, check_batch, state_from, state_shardings, train_step

_LOWERED_AS = {"cpu": "cpu", "tpu": "tpu", "gpu": "cuda"}


def write_stablehlo(path: str, cfg: TrainConfig, hardware: Hardware) -> dict[str, object]:
    """Writes the training step of `cfg`, lowered for the kind of chip that `hardware` is.

    It needs as many (simulated) devices as the mesh has.

    Raises:
      ValueError: flatbuffers (extra `export`) is missing, or mesh and batch do not fit.
    """
    if importlib.util.find_spec("flatbuffers") is None:
        raise ValueError("--stablehlo needs the extra `export`: pip install 'v4jax[export]'")
    from jax import export

    target = file_to_write(path, "path")
    sizes = parse_mesh(cfg.mesh)
    rules, mesh = layout_for(cfg.layout, sizes), make_mesh(sizes)
    check_batch(cfg, rules, sizes)
    places = state_shardings(cfg, rules, mesh)
    abstract = jax.eval_shape(functools.partial(state_from, cfg), abstract_params(cfg.model))
    state = jax.tree.map(
        lambda a, place: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=place), abstract, places
    )
    rows = jax.ShapeDtypeStruct(
        (cfg.batch_size, cfg.seq_len), jnp.int32, sharding=batch_sharding(rules, mesh)
    )
    platform = _LOWERED_AS[platform_of(hardware)]
    leaves, tree = jax.tree.flatten(state)

    # Plain lists and dicts: whoever reads the file needs none of our classes.
    def step(leaves, batch):
        state, metrics = train_step(cfg, rules, tree.unflatten(leaves), batch)
        return jax.tree.leaves(state), metrics

    with jax.set_mesh(mesh):
        exported = export.export(jax.jit(step, donate_argnums=0), platforms=(platform,))(
            leaves, {"tokens": rows, "segment_ids": rows}
        )
    data = exported.serialize()
    target.write_bytes(data)
    return {
        "file": str(target),
        "bytes": len(data),
        "platform": platform,
        "devices": exported.nr_devices,
        "inputs": len(exported.in_avals),
    }
