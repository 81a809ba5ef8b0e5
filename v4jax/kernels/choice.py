"""Which implementation of each op a program uses: by default the best of the platform.

An op is a function `op(..., implementation=None)`. None means the best for the platform that the
program is compiled for; "reference" is the equation in plain jnp, on every platform.
v4jax/kernels/README.md lists them all.

Next file to read: v4jax/model/segments.py.
"""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import TypeVar

from v4jax.kernels.tpu import on_tpu

NAMES: Mapping[str, tuple[str, ...]] = {
    "attention": ("reference", "blocked"),
    "fused_attention": ("reference", "pallas_tpu"),
    "index_scores": ("reference", "all_heads", "by_head"),
    "top_k": ("reference", "bisection", "groups", "pallas_tpu"),
    "pooling": ("reference", "aligned"),
    "expert_ffn": ("reference", "blocked", "ragged", "triton", "every_expert"),
    "sinkhorn": ("reference", "factors"),
    "streams": ("reference", "multiply_adds"),
    "hyper_connection": ("reference", "pallas_tpu"),
    "matmul": ("reference", "written_gradient"),
    "rotate": ("reference", "written_gradient"),
    "newton_schulz": ("reference", "pallas_tpu"),
}
"""Op -> the names of its implementations, which are the keys of the op's IMPLEMENTATIONS."""

_MADE_FOR = {"pallas_tpu": "tpu", "ragged": "tpu", "triton": "gpu"}
"""Implementation -> the platform whose compiler takes its kernels; others interpret them."""

_Function = TypeVar("_Function")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Kernels:
    """The implementation of each op; None is the platform's best.

    Raises:
      ValueError: a name that the op does not have.
    """

    attention: str | None = None
    """Attention of a chunk of queries: "reference" or "blocked"."""

    fused_attention: str | None = None
    """A layer's attention with norm and rotations around it: "reference" (one after another, by the
    ops `rotate` and `attention`) or "pallas_tpu" (one kernel)."""

    index_scores: str | None = None
    """The indexer's scores: "reference", "all_heads" or "by_head" (one after another)."""

    top_k: str | None = None
    """The best slots of each query: "reference" (lax.top_k), "bisection", "groups" or "pallas_tpu"
    (bisection in a kernel)."""

    pooling: str | None = None
    """The compressor's pooling: "reference" (any windows) or "aligned" (no gaps between them)."""

    expert_ffn: str | None = None
    """The routed experts: "reference", "blocked", "ragged" (TPU), "triton" (NVIDIA) or
    "every_expert" (decoding)."""

    sinkhorn: str | None = None
    """The doubly stochastic matrices of mHC: "reference" (its divisions) or "factors"."""

    streams: str | None = None
    """Collapse and expansion of the streams: "reference" (einsum) or "multiply_adds"."""

    hyper_connection: str | None = None
    """A site of mHC and the expansion that follows: "reference" (one after another, by the ops
    `matmul`, `sinkhorn` and `streams`) or "pallas_tpu" (one kernel each)."""

    matmul: str | None = None
    """x @ w: "reference" (gradient by autodiff) or "written_gradient"."""

    rotate: str | None = None
    """Rotary positions: "reference" (complex product) or "written_gradient"."""

    newton_schulz: str | None = None
    """A step of Muon's iteration: "reference" (three products) or "pallas_tpu" (half of the
    symmetric ones)."""

    def __post_init__(self):
        for op, names in NAMES.items():
            name = getattr(self, op)
            if name is not None and name not in names:
                raise ValueError(_unknown(op, name, names))


def kernels_from(text: str) -> Kernels:
    """The Kernels that `text` names.

    Example: "attention=reference,top_k=bisection"; the other ops stay at the platform's best.

    Args:
      text: "" for the best of all ops, "reference" for the reference of all, or op=implementation,
        separated by commas.

    Raises:
      ValueError: text of another form, an op that does not exist or is named twice, or a name that
        the op does not have.
    """
    if text == "":
        return Kernels()
    if text == "reference":
        return Kernels(**dict.fromkeys(NAMES, "reference"))
    chosen: dict[str, str] = {}
    for part in text.split(","):
        op, equals, name = (word.strip() for word in part.partition("="))
        if equals == "" or op not in NAMES or op in chosen:
            raise ValueError(
                f"kernels: got {text!r}; must be empty (the platform's best), 'reference', or "
                f"op=implementation, separated by commas, each op once; ops: {', '.join(NAMES)}"
            )
        chosen[op] = name
    return Kernels(**chosen)


def pick(
    op: str, implementations: Mapping[str, _Function], name: str | None, best: str
) -> _Function:
    """The implementation called `name`; None: the one called `best`.

    Raises:
      ValueError: an unknown name.
    """
    name = best if name is None else name
    if name not in implementations:
        raise ValueError(_unknown(op, name, implementations))
    return implementations[name]


def interprets(kernels: Kernels) -> bool:
    """Whether attention runs kernels step by step, because they are named outside of TPUs."""
    return "pallas_tpu" in (kernels.fused_attention, kernels.top_k) and not on_tpu()


def interpreted(text: str, platform: str) -> str:
    """What to say of named kernels that a platform interprets; "" if there are none.

    Args:
      text: as `kernels_from` reads it.
      platform: of the devices: "cpu", "gpu" or "tpu".
    """
    kernels = kernels_from(text)
    named = ((op, getattr(kernels, op)) for op in NAMES)
    slow = [f"{op}={name}" for op, name in named if _MADE_FOR.get(name, platform) != platform]
    if not slow:
        return ""
    return (
        f"kernels: {', '.join(slow)}: the platform is {platform}, which interprets this step by "
        "step, slowly; it is there to check numbers"
    )


def _unknown(op: str, name: str, names: Iterable[str]) -> str:
    return f"kernels: {op}: got {name!r}; must be one of {', '.join(names)}"
