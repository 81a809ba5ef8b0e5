"""Every parameter: its shape, its products per token, its optimizer, and how a layout cuts it.

All of it comes from the table that the model is made from (v4jax/parameters.py), so a new weight
cannot be forgotten here.

Next file to read: v4jax/planner/terms.py.
"""

import functools
import math
from collections.abc import Mapping
from typing import NamedTuple

from sharding.rules import AxisRules
from v4jax.adapters.config import Lora, adapted_paths
from v4jax.config import ModelConfig
from v4jax.cost import NAMES
from v4jax.packed_tree import check_cuts, released_formats
from v4jax.parameter_tree import Leaf, Path, leaves
from v4jax.parameters import sizes
from v4jax.train.config import TrainConfig
from v4jax.train.muon import optimizer_of

RELEASED = {"mxfp4": 0.53, "fp8": 1.0, "bfloat16": 2.0, "float32": 4.0, "int64": 4.0}
"""Bytes of a number in the released formats (docs/equations.md#low-precision).

MXFP4 has a scale byte per 32 numbers, fp8 a scale per 128 x 128. Hash tables are held in float32.
"""


class Weight(NamedTuple):
    """One parameter of the model, before any layout.

    Attributes:
      name: its path in the tree.
      shape: its size along each axis.
      axes: the logical name of each axis.
      optimizer: "muon" or "adamw"; "frozen", where no gradient comes by, as in the indexer;
        "constant", what adapters adapt, where gradients pass; or "none" for router tables.
      precision: what released files store (ParamSpec.precision).
      float32: whether its products keep it in float32.
      uses: how many products of one row a token makes with it; K/E for routed experts.
      part: the part of the model, by the names of v4jax/cost.py.
      in_mtp: whether MTP's module has it.
      held: bytes of a number as it is held in training.
    """

    name: str
    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    optimizer: str
    precision: str
    float32: bool
    uses: float
    part: str
    in_mtp: bool
    held: float = 4.0

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
    return tuple(_weight(cfg, path, leaf) for path, leaf in leaves(cfg).items())


def trained_weights(cfg: TrainConfig) -> tuple[Weight, ...]:
    """The arrays that a step of training works with: parameters, or constants and their pairs."""
    return weights_of(cfg.model) if cfg.lora is None else _with_pairs(cfg.model, cfg.lora)


@functools.cache
def _with_pairs(cfg: ModelConfig, lora: Lora) -> tuple[Weight, ...]:
    weights = {weight.name: weight for weight in weights_of(cfg)}
    pairs = []
    for path in adapted_paths(cfg, lora):
        weight = weights["/".join(path)]
        *lead, rows, columns = zip(weight.shape, weight.axes, strict=True)
        for name, sides in (("a", (rows, (lora.rank, None))), ("b", ((lora.rank, None), columns))):
            shape, axes = zip(*lead, *sides, strict=True)
            pair = weight._replace(name=f"lora/{weight.name}/{name}", shape=shape, axes=axes)
            pairs.append(pair._replace(optimizer=lora.optimizer, float32=False))
    return tuple(_constant(weight, lora.base_dtype) for weight in weights.values()) + tuple(pairs)


def check_packed(cfg: ModelConfig, rules: AxisRules, sizes: Mapping[str, int]) -> None:
    """Raises ValueError if the layout would cut blocks of a packed release."""
    _check_packed(cfg, rules, tuple(sizes.items()))


@functools.lru_cache(64)
def _check_packed(cfg: ModelConfig, rules: AxisRules, items: tuple[tuple[str, int], ...]) -> None:
    check_cuts(cfg, released_formats(cfg), rules, dict(items))


def _constant(weight: Weight, base_dtype: str) -> Weight:
    """A weight of the base of adapters, as it lies in memory."""
    exact = weight.precision in ("float32", "int64") or base_dtype == "float32"
    held = 4.0 if exact else RELEASED[weight.precision] if base_dtype == "packed" else 2.0
    kind = "constant" if weight.optimizer in ("muon", "adamw") else weight.optimizer
    return weight._replace(held=held, optimizer=kind)


def _weight(cfg: ModelConfig, path: Path, leaf: Leaf) -> Weight:
    spec = leaf.spec
    uses = sizes(cfg)[spec.uses]
    if spec.part == "head":  # MTP applies it too
        uses = 1 + cfg.num_nextn_predict_layers
    return Weight(
        name="/".join(path),
        shape=leaf.shape,
        axes=leaf.axes,
        optimizer="none" if spec.optimizer is None else optimizer_of(path),
        precision=spec.precision,
        float32=spec.float32,
        uses=uses,
        part=NAMES[spec.part],
        in_mtp=leaf.in_mtp,
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
        for part, logical in zip(parts, weight.axes, strict=True)
        if logical == "experts"
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
