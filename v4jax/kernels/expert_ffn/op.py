"""The experts' feed-forward on rows sorted by expert.

Equation: docs/equations.md#moe. Implementations share the formulas of
v4jax/kernels/expert_ffn/formulas.py. v4jax/kernels/README.md lists them, with their tests.

Shapes: P rows in blocks, D hidden, F expert hidden, E experts.
Next file to read: v4jax/kernels/expert_ffn/every_expert.py.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
from jax import lax

from sharding.experts import Groups
from v4jax.kernels.choice import pick
from v4jax.kernels.expert_ffn import blocked, gpu, grad_tpu, packed_gpu, packed_tpu, rows_tpu, whole
from v4jax.kernels.expert_ffn.every_expert import every_expert_on_rows, reference
from v4jax.kernels.expert_ffn.formulas import Activation, ExpertWeights
from v4jax.kernels.expert_ffn.whole import Products, ragged_back, ragged_dot
from v4jax.quant.packed import Packed


class Way(NamedTuple):
    """One way to compute: (y, h1, h3) of rows, and from these the gradients."""

    forward: Callable
    backward: Callable


def _whole(products: Products) -> Way:
    return Way(
        functools.partial(whole.forward, products), functools.partial(whole.backward, products)
    )


BLOCKED = Way(blocked.forward, blocked.backward)
RAGGED = _whole(
    Products(
        ragged_dot, grad_tpu.grouped_outer, ragged_back, packed_tpu.grouped_dot, packed_tpu.suits
    )
)
TRITON = _whole(
    Products(
        gpu.grouped_dot, gpu.grouped_outer, packed=packed_gpu.grouped_dot, suits=packed_gpu.suits
    )
)


def expert_ffn(
    form: Activation,
    w: ExpertWeights,
    x_PD: jax.Array,
    gate_P: jax.Array,
    groups: Groups,
    implementation: str | None = None,
) -> jax.Array:
    """y = w2(gate * clamped_swiglu(w1 x, w3 x)) with each row's own expert, in the dtype of x.

    The routed weight multiplies the hidden activation before w2 (docs/equations.md#trap-30). Rows
    of gate 0 give 0.

    Args:
      form: see Activation.
      w: matrices, cast to the dtype of x when used.
      x_PD: rows, in whole blocks of one expert.
      gate_P: float32, routed weight of each row.
      groups: which rows belong to which expert (sharding/experts.py).
      implementation: "reference", "blocked", "ragged", "triton" or "every_expert"; None: ragged on
        TPU, triton on NVIDIA GPUs where widths suit it, otherwise blocked. Platforms without the
        kernels of ragged and triton interpret them, which is slow.

    Raises:
      ValueError: an unknown implementation, or "triton" for widths that it cannot cut.
    """
    check(implementation, w, x_PD, groups)
    if implementation is None:
        return _written(BEST, form, w, x_PD, gate_P, groups)
    function = pick("expert_ffn", IMPLEMENTATIONS, implementation, best="blocked")
    return function(form, w, x_PD, gate_P, groups)


def check(implementation: str | None, w: ExpertWeights, x_PD: jax.Array, groups: Groups) -> None:
    """Raises ValueError for "triton" with widths that it cannot cut."""
    if implementation == "triton" and not _suits(w, x_PD, groups):
        raise ValueError(
            f"kernels: expert_ffn: got 'triton' for widths {x_PD.shape[1]} and {w.w2.shape[-2]} "
            f"and {x_PD.shape[0] // len(groups.block_expert)} rows a block; must divide by "
            f"{gpu.LEAST}"
        )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _written(way: Way, form, w, x_PD, gate_P, groups):
    """`expert_ffn`, whose gradient is written out."""
    return way.forward(form, w, x_PD, gate_P, groups)[0]


def _fwd(way: Way, form, w, x_PD, gate_P, groups):
    y_PD, h1_PF, h3_PF = way.forward(form, w, x_PD, gate_P, groups)
    return y_PD, (w, x_PD, gate_P, groups, h1_PF, h3_PF)


def _bwd(way: Way, form, saved, ct_PD):
    ct_w, ct_x, ct_gate = way.backward(form, *saved, ct_PD)
    return ct_w, ct_x, ct_gate, None


_written.defvjp(_fwd, _bwd)


def _suits(w: ExpertWeights, x_PD: jax.Array, groups: Groups) -> bool:
    """Whether the kernels for NVIDIA GPUs can cut these widths, and the rows of a block.

    That for packed matrices takes blocks of any size.
    """
    rows = x_PD.shape[0] // groups.block_expert.shape[0]
    if gpu.suits(rows, x_PD.shape[1], w.w2.shape[-2]):
        return True
    matrices = [m for m in w if m is not None]
    return all(isinstance(m, Packed) and packed_gpu.suits(x_PD, m, groups) for m in matrices)


def _best_forward(form, *args):
    return _by_platform([way.forward for way in (BLOCKED, RAGGED, TRITON)], form, args)


def _best_backward(form, *args):
    return _by_platform([way.backward for way in (BLOCKED, RAGGED, TRITON)], form, args)


def _by_platform(functions, form: Activation, args):
    """What the platform computes best, chosen when the program is compiled."""
    loop, ragged, triton = (functools.partial(function, form) for function in functions)
    w, x_PD, _, groups = args[:4]
    cuda = triton if _suits(w, x_PD, groups) else loop
    return lax.platform_dependent(*args, cpu=loop, cuda=cuda, rocm=loop, default=ragged)


BEST = Way(_best_forward, _best_backward)


def _anywhere(kernel: Callable, platform: str) -> Callable:
    """A kernel of one platform, which the others interpret step by step."""

    def run(*args):
        interpreted = functools.partial(kernel, interpret=True)
        return lax.platform_dependent(*args, default=interpreted, **{platform: kernel})

    return run


ragged_back_anywhere = functools.partial(
    ragged_back, kernel=_anywhere(rows_tpu.grouped_back, "tpu")
)
RAGGED_ANYWHERE = Products(
    functools.partial(ragged_dot, kernel=_anywhere(rows_tpu.grouped_dot, "tpu")),
    _anywhere(grad_tpu.grouped_outer, "tpu"),
    ragged_back_anywhere,
    _anywhere(packed_tpu.grouped_dot, "tpu"),
    packed_tpu.suits,
)
TRITON_ANYWHERE = Products(
    _anywhere(gpu.grouped_dot, "cuda"),
    _anywhere(gpu.grouped_outer, "cuda"),
    packed=_anywhere(packed_gpu.grouped_dot, "cuda"),
    suits=packed_gpu.suits,
)
grouped_back_anywhere = _anywhere(gpu.grouped_back, "cuda")

IMPLEMENTATIONS = {
    "reference": reference,
    "blocked": functools.partial(_written, BLOCKED),
    "ragged": functools.partial(_written, _whole(RAGGED_ANYWHERE)),
    "triton": functools.partial(_written, _whole(TRITON_ANYWHERE)),
    "every_expert": every_expert_on_rows,
}
