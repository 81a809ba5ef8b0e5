"""What the backward pass recomputes instead of keeping it: six policies, each a name.

`wrapped` puts one around a module. A group of layers is recomputed pattern by pattern, attention
and experts each by themselves. Gradients are those of "none" under every policy.

Next file to read: v4jax/context.py.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import flax.linen as nn
import jax

from sharding.host_memory import HOST

LAYERS, ATTENTION, EXPERTS = "layers", "attention", "experts"
STREAMS = "streams"
"""The name of the residual streams before each pattern of layers."""
PRODUCTS = "products"
"""The name of products with weights; those of routed experts have none."""

_Module = TypeVar("_Module", bound=type[nn.Module])


class Policy(NamedTuple):
    """One policy.

    Attributes:
      keeps: what the forward pass keeps, in words.
      part: what is recomputed: LAYERS, ATTENTION, EXPERTS, or "" for nothing.
      saves: what is kept inside that part, as jax.checkpoint takes it; None: nothing.
    """

    keeps: str
    part: str = ""
    saves: Callable[..., Any] | None = None


_policies = jax.checkpoint_policies
POLICIES = {
    "none": Policy("everything"),
    "layer": Policy("the streams before each pattern of layers", LAYERS),
    "attention": Policy("everything but what attention computes inside", ATTENTION),
    "experts": Policy("everything but what routers and experts compute inside", EXPERTS),
    "dots": Policy(
        "the streams, and products with weights, except those of routed experts",
        LAYERS,
        _policies.save_only_these_names(STREAMS, PRODUCTS),
    ),
    "offload": Policy(
        "the streams, in the host's memory",
        LAYERS,
        _policies.save_and_offload_only_these_names(
            names_which_can_be_saved=[],
            names_which_can_be_offloaded=[STREAMS],
            offload_src="device",
            offload_dst=HOST,
        ),
    ),
}


def policy_name(remat: str | bool) -> str:
    """The name of a policy: True is "layer" and False is "none".

    Raises:
      ValueError: no such policy.
    """
    if isinstance(remat, bool):
        return "layer" if remat else "none"
    if remat not in POLICIES:
        raise ValueError(f"remat: got {remat!r}; allowed: {', '.join(POLICIES)}")
    return remat


def wrapped(module: _Module, part: str, remat: str, in_loop: bool = False) -> _Module:
    """`module`, recomputed in the backward pass if the policy `remat` recomputes this `part`.

    Args:
      in_loop: the module is the body of a loop. Elsewhere XLA would merge the recomputation with
        the first computation and keep every intermediate value.
    """
    policy = POLICIES[remat]
    if policy.part != part:
        return module
    return nn.remat(module, policy=policy.saves, prevent_cse=not in_loop)
