"""Which parts of a layer the backward pass computes again, under each remat policy.

A part that is recomputed by itself (attention, experts) counts in full, although its last product,
which only leads out of it, is not needed again.

Next file to read: v4jax/planner/work.py.
"""

from v4jax.remat import ATTENTION, EXPERTS, LAYERS, POLICIES
from v4jax.train.config import TrainConfig

_INSIDE = {
    ATTENTION: ("attention", "attention scores", "compressors", "indexers"),
    EXPERTS: ("gates", "routed experts", "shared experts"),
    LAYERS: (
        "attention",
        "attention scores",
        "compressors",
        "indexers",
        "gates",
        "routed experts",
        "shared experts",
        "mHC",
        "norms",
    ),
    "": (),
}
_PRODUCTS = ("attention", "compressors", "indexers", "shared experts")
"""Parts whose products with weights "dots" keeps."""


def recomputes(cfg: TrainConfig, part: str) -> bool:
    """Whether the backward pass computes this part of a layer again (names of v4jax/cost.py)."""
    return part in _INSIDE[POLICIES[cfg.remat].part]


def multiplies_again(cfg: TrainConfig, part: str) -> bool:
    """Whether it also makes the part's products with weights again."""
    return recomputes(cfg, part) and not (cfg.remat == "dots" and part in _PRODUCTS)
