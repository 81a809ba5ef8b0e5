"""From a projection's queries to the input of the next: norm, rotation, attention, rotation back.

The queries of a layer are normalised and rotated, attend to window keys, entries and the sink, and
each sum of values is rotated back (docs/equations.md#attention). `reference` computes one after
another, and composes attention of smaller ops. On TPU that is seven or eight passes over arrays of
all heads; `pallas_tpu` is one kernel, and one for the gradient. Where each query gathers a list of
entries, a second one of each kind goes on with the softmax of the window keys.

Shapes: B batch, S positions, U blocks of W queries, W window, Y window keys (W, then S), N heads, H
head dim, G groups of heads, I width of a group, M width of all heads N * H, C entries, R rope dims,
T lanes of the rotation's tables, P parts of a grid, K chosen entries of a query.
Next file to read: v4jax/kernels/fused_attention/operands.py.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from sharding.manual import vary_like
from v4jax.kernels.fused_attention import gathered_backward, gathered_forward
from v4jax.kernels.fused_attention.backward import Saved, backward
from v4jax.kernels.fused_attention.forward import forward
from v4jax.kernels.fused_attention.gathered import gathered, gradient_bytes
from v4jax.kernels.fused_attention.mass import entry_mass
from v4jax.kernels.fused_attention.operands import LayerKeys, RawQueries, operands
from v4jax.kernels.fused_attention.steps import Form, Operands, Scalars
from v4jax.kernels.norm import rms_norm
from v4jax.kernels.rotate import rotate
from v4jax.kernels.tpu import LANES, beyond_vmem, check_fits, on_tpu


def reference(
    queries: RawQueries,
    attended: Callable[[jax.Array], tuple[jax.Array, Any]],
    rotation: str | None = None,
) -> tuple[jax.Array, Any]:
    """Norm, rotation, attention and inverse rotation, one after another.

    Args:
      queries: see RawQueries.
      attended: attention of normalised and rotated queries: (output [B,S,N,H], anything else).
      rotation: implementation of `rotate`.

    Returns:
      (output [B,S,N,H], rotated back; what else `attended` returns).
    """
    rope = queries.rope.heads()
    q_BSNH = rotate(rms_norm(queries.q_BSNH, queries.eps), rope, False, rotation)
    out_BSNH, more = attended(q_BSNH)
    # Keys are values, so each value is rotated by its own position. Rotating the sum back by the
    # query's position leaves relative angles.
    return rotate(out_BSNH, rope, True, rotation), more


def pallas_tpu(
    queries: RawQueries,
    keys: LayerKeys,
    window: int,
    together: int | None = None,
    with_mass: bool = False,
) -> tuple[jax.Array, jax.Array | None]:
    """(the same output in one kernel, mass); other platforms than TPU interpret it, which is slow.

    The gradient needs the operands, the output and the logarithm of each softmax's denominator.

    Args:
      queries: see RawQueries.
      keys: see LayerKeys.
      window: how many tokens a query sees, itself included.
      together: heads that the next product reads as one: they are kept beside each other in memory.
        None: all.
      with_mass: also return the mass: the shares that all heads give to each entry, float32
        [B,S,C], without gradient. Otherwise it is None.

    Raises:
      ValueError: sizes that the kernel does not take (`unfit`).
    """
    gathers = 0 if keys.slot_BSK is None else keys.slot_BSK.shape[2]
    check_fits("fused_attention", unfit(queries, keys, window, gathers))
    q_BSNH = queries.q_BSNH
    seq, heads = q_BSNH.shape[1:3]
    together = heads if together is None or heads % together else together
    form = Form(heads, together, window, queries.eps, interpret=not on_tpu())
    if keys.slot_BSK is not None:
        return _with_gathered(form, queries, keys, with_mass)
    x, scalars = jax.tree.map(
        lambda x: vary_like(x, q_BSNH), operands(queries, keys, window, form.interpret)
    )
    found: tuple[jax.Array, jax.Array] = _fused(form, scalars, x)
    out_BGSI, lse_BSN = found  # of whole blocks of queries
    out_BSNH = jnp.moveaxis(out_BGSI[:, :, :seq], 1, 2).reshape(q_BSNH.shape)
    if not with_mass or keys.entry_BCH is None:
        return out_BSNH, None
    mass_BSC = entry_mass(form, *jax.lax.stop_gradient((scalars, x, lse_BSN)))
    return out_BSNH, mass_BSC[:, :seq, : keys.entry_BCH.shape[1]]


def _with_gathered(form: Form, queries: RawQueries, keys: LayerKeys, with_mass: bool):
    """`pallas_tpu` where each query has a list of entries."""
    q_BSNH, seq = queries.q_BSNH, queries.q_BSNH.shape[1]
    near = keys._replace(entry_BCH=None, last_BC=None, segment_BC=None)
    (x, scalars), entry_BCH, slot_BSK = jax.tree.map(
        lambda x: vary_like(x, q_BSNH),
        (operands(queries, near, form.window, form.interpret), keys.entry_BCH, keys.slot_BSK),
    )
    found: tuple[jax.Array, jax.Array] = _gathering(form, scalars, x, entry_BCH, slot_BSK)
    out_BGSI, mass_BSK = found
    out_BSNH = jnp.moveaxis(out_BGSI[:, :, :seq], 1, 2).reshape(q_BSNH.shape)
    return out_BSNH, mass_BSK[:, :seq] if with_mass else None


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _gathering(form: Form, scalars: Scalars, x: Operands, entry_BCH, slot_BSK) -> Any:
    """(output, mass of each chosen entry): the window keys' kernel, then that of the entries."""
    return _gathering_fwd(form, scalars, x, entry_BCH, slot_BSK)[0]


def _gathering_fwd(form: Form, scalars: Scalars, x: Operands, entry_BCH, slot_BSK):
    near = forward(form, scalars, x)
    chosen = gathered(x, entry_BCH, slot_BSK)
    out_BGSI, lse_BSN, mass_BSK = gathered_forward.forward(form, chosen, *near)
    saved = scalars, x, entry_BCH, slot_BSK, out_BGSI, lse_BSN
    return (out_BGSI, mass_BSK), saved


def _gathering_bwd(form: Form, saved, cts):
    scalars, x, entry_BCH, slot_BSK, out_BGSI, lse_BSN = saved
    ct_BGSI = cts[0]
    dim = x.kv_BYH.shape[2]
    delta_BSN = jnp.concatenate(
        # A slice each, as a head is whole vectors; with an axis for heads XLA would copy all.
        [
            jnp.sum(
                ct_BGSI[..., first : first + dim].astype(jnp.float32)
                * out_BGSI[..., first : first + dim],
                axis=-1,
            )[..., None]
            for first in range(0, out_BGSI.shape[3], dim)
        ],
        axis=3,
    )
    delta_BSN = jnp.moveaxis(delta_BSN, 1, 2).reshape(lse_BSN.shape)
    chosen = gathered(x, entry_BCH, slot_BSK)
    far_BSM, ct_BCH = gathered_backward.backward(form, chosen, ct_BGSI, delta_BSN, lse_BSN)
    given = Saved(ct_BGSI, out_BGSI, lse_BSN, far_BSM)
    return None, _fused_bwd(form, scalars, x, given), ct_BCH.astype(entry_BCH.dtype), None


_gathering.defvjp(_gathering_fwd, _gathering_bwd)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _fused(form: Form, scalars: Scalars, x: Operands) -> Any:
    """(output, lse) of the kernel; the output has the gradient of the other kernel, lse none."""
    return forward(form, scalars, x)


def _fwd(form: Form, scalars: Scalars, x: Operands):
    out_BGSI, lse_BSN = forward(form, scalars, x)
    return (out_BGSI, lse_BSN), (scalars, x, out_BGSI, lse_BSN)


def _bwd(form: Form, saved, cts):
    scalars, x, out_BGSI, lse_BSN = saved
    return None, _fused_bwd(form, scalars, x, Saved(cts[0], out_BGSI, lse_BSN))


def _fused_bwd(form: Form, scalars: Scalars, x: Operands, saved: Saved) -> Operands:
    """Gradients of the operands."""
    ct = backward(form, scalars, x, saved)
    # A block's window keys are those of the block before it, and its own.
    before_BUWH, own_BUWH = jnp.split(ct.kv_BUYH, 2, axis=2)
    ends = ((0, 0), (0, 1), (0, 0), (0, 0))
    ct_kv = jnp.pad(before_BUWH, ends) + jnp.pad(own_BUWH, (ends[0], ends[1][::-1], *ends[2:]))
    nothing = Operands(*[None] * len(x))
    return nothing._replace(
        q_BSM=ct.q_BSM,
        kv_BYH=ct_kv.reshape(x.kv_BYH.shape).astype(x.kv_BYH.dtype),
        entry_BCH=None if ct.entry_BPCH is None else ct.entry_BPCH.sum(1).astype(x.q_BSM.dtype),
        sink_N=ct.sink_BU1N.sum((0, 1, 2)),
    )


_fused.defvjp(_fwd, _bwd)

IMPLEMENTATIONS = {"reference": reference, "pallas_tpu": pallas_tpu}
"""They take different arguments: `reference` composes attention of the ops that it is given."""


def implementation_of(name: str | None, fault: str) -> str:
    """The implementation that runs: the one that is named, or the platform's best.

    Unlike other ops, this one is chosen when the program is traced, for the devices of the mesh or
    the default ones: differentiating a choice between two would keep the values of both.

    Args:
      name: of an implementation; None: "pallas_tpu" on TPU, if it can, otherwise "reference".
      fault: why "pallas_tpu" cannot compute this layer; "" if it can.

    Raises:
      ValueError: "pallas_tpu" is named and cannot.
    """
    if name is None:
        return "pallas_tpu" if on_tpu() and not fault else "reference"
    if name == "pallas_tpu":
        check_fits("fused_attention", fault)
    return name


def unfit(queries: RawQueries, keys: LayerKeys, window: int, gathers: int = 0) -> str:
    """Why the kernel does not take these sizes, in words; "" if it does.

    Args:
      gathers: how many entries each query gathers; 0: it masks the others.
    """
    dim, rope = queries.q_BSNH.shape[3], 2 * queries.rope.cos.shape[2]
    if not on_tpu():
        return ""
    if dim % LANES or window % LANES or rope > LANES:
        return (
            f"head dim {dim}, window {window} and {rope} rope dims; on TPU the first two must "
            f"divide by {LANES}, and rope dims be at most {LANES}"
        )
    entries = 0 if keys.entry_BCH is None else keys.entry_BCH.shape[1]
    if gathers:
        need = gradient_bytes(queries.q_BSNH, window, entries, gathers)
    else:
        need = _vmem(entries, dim, window, queries.q_BSNH.dtype.itemsize)
    return beyond_vmem(f"{entries} entries of {dim}", need)


def _vmem(entries: int, dim: int, window: int, itemsize: int) -> int:
    """Bytes that a step of the gradient keeps in fast memory, by what grows with the entries."""
    # Entries and their float32 gradient, both in two buffers; the bias and a mask of int8.
    each = 2 * itemsize * dim + 2 * 4 * dim + 4 * window + 2 * window
    return entries * each + 20 * 2**20
