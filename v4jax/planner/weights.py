"""Every parameter: its shape, its products per token, its optimizer, and how a layout cuts it.

Shapes and axis names come from the model itself, as abstract arrays, so a new weight cannot be
forgotten here.

Next file to read: v4jax/planner/terms.py.
"""

import functools
import math
from collections.abc import Mapping
from typing import NamedTuple

import jax

from sharding.rules import AxisRules
from v4jax.config import ModelConfig
from v4jax.model.init import abstract_params, param_axes
from v4jax.train.muon import optimizer_of

_FLOAT32 = {"fn", "base", "scale", "ape", "wgate", "gate", "attn_sink", "weight"}


class Weight(NamedTuple):
    """One parameter of the model, before any layout.

    Attributes:
      name: its path in the tree.
      shape: its size along each axis.
      axes: the logical name of each axis.
      optimizer: "muon", "adamw", "frozen", or "none" for router tables.
      float32: whether its products keep it in float32.
      uses: how many products of one row a token makes with it; K/E for routed experts.
    """

    name: str
    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    optimizer: str
    float32: bool
    uses: float

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def layers(self) -> int:
        return self.shape[0] if self.axes[:1] == ("layers",) else 1

    @property
    def is_expert(self) -> bool:
        return "experts" in self.axes


class Cut(NamedTuple):
    """How a layout cuts one weight. Mesh axes of size 1 are left out.

    Attributes:
      parts: the mesh axes that cut each dimension.
      token_axes: those that split tokens too, over which the weight is gathered.
      other_axes: the rest.
      tokens, others: into how many parts token_axes and other_axes cut it.
    """

    parts: tuple[tuple[str, ...], ...]
    token_axes: tuple[str, ...]
    other_axes: tuple[str, ...]
    tokens: int
    others: int

    @property
    def devices(self) -> int:
        return self.tokens * self.others


@functools.cache
def weights_of(cfg: ModelConfig) -> tuple[Weight, ...]:
    """The table of all parameters, router tables included."""
    axes = jax.tree_util.tree_leaves_with_path(
        param_axes(cfg), is_leaf=lambda leaf: isinstance(leaf, tuple)
    )
    leaves = jax.tree.leaves(abstract_params(cfg))
    return tuple(
        _weight(cfg, tuple(key.key for key in path), leaf.shape, names)
        for (path, names), leaf in zip(axes, leaves, strict=True)
    )


def _weight(cfg: ModelConfig, path: tuple[str, ...], shape, names) -> Weight:
    router = path[0] == "router"
    norm = path[-1] == "weight" and path[0] != "embed" and path[0] != "head"
    matrix = (
        not router
        and not norm
        and path[0] != "embed"
        and path[-1] not in ("base", "scale", "ape", "attn_sink")
    )
    uses = {"head": 1 + cfg.num_nextn_predict_layers}.get(path[0], 1) if matrix else 0
    if path[-1] == "h_proj":
        uses = cfg.hc_mult
    if "experts" in path:
        uses = cfg.num_experts_per_tok / cfg.n_routed_experts
    kept = path[-1] in _FLOAT32 - {"weight"} or norm or path[-2:] == ("compressor", "wkv")
    return Weight(
        "/".join(path), tuple(shape), names, "none" if router else optimizer_of(path), kept, uses
    )


def cut_of(weight: Weight, rules: AxisRules, sizes: Mapping[str, int]) -> Cut:
    """How the layout cuts `weight`.

    Raises:
      ValueError: a dimension does not divide by its mesh axes.
    """
    return _cut_of(weight, rules, tuple(sizes.items()))


@functools.lru_cache(1024)
def _cut_of(weight: Weight, rules: AxisRules, items: tuple[tuple[str, int], ...]) -> Cut:
    sizes = dict(items)
    split = set(rules.mesh_axes("act_batch") + rules.mesh_axes("act_seq"))
    parts = []
    for size, name in zip(weight.shape, weight.axes, strict=True):
        here = tuple(axis for axis in rules.mesh_axes(name) if sizes[axis] > 1)
        if size % (count := math.prod(sizes[axis] for axis in here)):
            where = " x ".join(f"{axis}={sizes[axis]}" for axis in here)
            raise ValueError(
                f"{weight.name} {weight.shape}: axis {name!r} of size {size} "
                f"does not divide by {where} = {count}"
            )
        parts.append(here)
    flat = [axis for part in parts for axis in part]
    # Experts stay where they are although their axis splits tokens too. Every other weight is
    # gathered over such axes.
    held = [
        axis
        for part, name in zip(parts, weight.axes, strict=True)
        if name == "experts"
        for axis in part
    ]
    tokens = tuple(axis for axis in flat if axis in split and axis not in held)
    others = tuple(axis for axis in flat if axis not in tokens)
    return Cut(
        tuple(parts),
        tokens,
        others,
        math.prod(sizes[a] for a in tokens),
        math.prod(sizes[a] for a in others),
    )
