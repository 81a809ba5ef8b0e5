"""Layouts: frozen, strict tables from the logical axes of arrays to the axes of a device mesh.

The model says only what an axis is ("heads", "act_batch"); a layout says where it goes. Flax's own
translation silently leaves an axis unsharded if its name is unknown, or if another axis of the
array uses the same mesh axis; here both raise.

Next file to read: sharding/manual.py.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import PartitionSpec

from sharding.axes import LOGICAL_AXES, MESH_AXES, axes_of, check_table, close

_NO_AXIS: tuple[str, ...] = ()
_NOT_GATHERED = (
    "experts",
    "cache_slots",
    *(name for name in LOGICAL_AXES if name.startswith("act_")),
)
"""Logical axes that FSDP does not gather: tokens go to experts, and activations stay cut."""


@dataclasses.dataclass(frozen=True, repr=False)
class AxisRules:
    """A frozen table from logical axes to mesh axes, made by `layout`.

    The empty table means one device: arrays pass through its methods unchanged.

    Attributes:
      table: every logical axis with the mesh axes that split it, outermost first.
      exchange: whether each token is sent to the devices of its experts. Otherwise every device
        that holds experts gathers all tokens. Sending is better where more devices hold experts
        than a token has experts.
      name: what reports call the layout. Layouts that differ only in name are equal.
    """

    table: tuple[tuple[str, tuple[str, ...]], ...] = ()
    exchange: bool = False
    name: str = dataclasses.field(default="", compare=False)

    def __bool__(self) -> bool:
        return bool(self.table)

    def __str__(self) -> str:
        return self.name or "own"

    def __repr__(self) -> str:
        if not self.table:
            return "AxisRules()"
        said = [f"{name}={' '.join(axes)!r}" for name, axes in self.table if axes]
        said += ["exchange=True"] * self.exchange + [f"name={self.name!r}"] * bool(self.name)
        return f"layout({', '.join(said)})"

    def mesh_axes(self, name: str | None) -> tuple[str, ...]:
        """The mesh axes that split `name`; () for None and for a replicated axis.

        Raises:
          ValueError: `name` is not in the table.
        """
        if name is None or not self.table:
            return _NO_AXIS
        for known, axes in self.table:
            if known == name:
                return axes
        raise ValueError(
            f"logical axis {name!r} is not in the layout; "
            f"known: {', '.join(n for n, _ in self.table)}"
        )

    def spec(self, names: tuple[str | None, ...]) -> PartitionSpec:
        """The PartitionSpec of an array with the axes `names`.

        Raises:
          ValueError: an unknown name, or a mesh axis that two axes of the array use.
        """
        parts = [self.mesh_axes(name) for name in names]
        flat = [axis for part in parts for axis in part]
        for axis in flat:
            if flat.count(axis) > 1:
                raise ValueError(
                    f"mesh axis {axis!r} is used twice by an array with axes {names}: {parts}"
                )
        return PartitionSpec(*(part[0] if len(part) == 1 else part or None for part in parts))

    def constrain(self, x: jax.Array, *names: str | None) -> jax.Array:
        """`x`, placed as the table says. It needs an ambient mesh unless the table is empty."""
        return jax.lax.with_sharding_constraint(x, self.spec(names)) if self.table else x

    def gather(self, w: jax.Array, names: tuple[str | None, ...]) -> jax.Array:
        """Weight `w`, gathered over the mesh axes that also split tokens (FSDP).

        Axes that do not split tokens still cut it.

        The first step places the weight where it already lies, since XLA may otherwise gather it
        before it is cast. Then one axis after another is gathered, the innermost first: XLA:TPU
        turns a gather over a whole slice at once into an all-reduce of zeros and shards, which
        sends twice the bytes. Barriers keep XLA from joining these steps. The gradient is placed
        like the weight, so that XLA need not keep its whole sum.
        """
        if not self.table:
            return w
        tokens = self._token_axes()
        steps = tuple(self._uncut(tokens[i:]).spec(names) for i in range(len(tokens), -1, -1))
        return _gathered(w, tuple(dict.fromkeys(steps)))

    def whole_weights(self) -> "AxisRules":
        """The layout in which weights are gathered already (FSDP); experts stay where they are."""
        return self._uncut(self._token_axes())

    def _token_axes(self) -> tuple[str, ...]:
        """The mesh axes that split tokens, outermost first."""
        tokens = self.mesh_axes("act_batch") + self.mesh_axes("act_seq")
        return tuple(axis for axis in MESH_AXES if axis in tokens)

    def _uncut(self, over: tuple[str, ...]) -> "AxisRules":
        """The layout whose weights are not cut over the mesh axes `over`, except among experts."""
        table = tuple(
            (name, axes if name in _NOT_GATHERED else tuple(a for a in axes if a not in over))
            for name, axes in self.table
        )
        return dataclasses.replace(self, table=table)

    def shards(self, name: str) -> int:
        """How many parts the ambient mesh cuts `name` into; 1 for the empty table."""
        sizes = dict(jax.sharding.get_abstract_mesh().shape) if self.table else {}
        parts = 1
        for axis in self.mesh_axes(name):
            parts *= sizes.get(axis, 1)
        return parts


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _gathered(w, steps: tuple[PartitionSpec, ...]):
    w = jax.lax.with_sharding_constraint(w, steps[0])
    for n, spec in enumerate(steps[1:]):
        w = jax.lax.with_sharding_constraint(jax.lax.optimization_barrier(w) if n else w, spec)
    return w


_gathered.defvjp(
    lambda w, steps: (_gathered(w, steps), None),
    lambda steps, _, ct: (jax.lax.with_sharding_constraint(ct, steps[0]),),
)


def layout(
    *, exchange: bool = False, name: str = "", **where: str | Sequence[str] | None
) -> AxisRules:
    """A layout of your own: which mesh axes split each logical axis.

    Example: layout(act_batch="data expert", experts="expert"). A logical axis that is left out, or
    given None, is replicated: every device holds it whole. sharding/axes.py lists the axes.

    Args:
      exchange: see AxisRules.
      name: what reports call the layout (default: "own").
      where: logical_axis="mesh axes, separated by blanks", outermost first; a tuple; or None.

    Raises:
      ValueError: an unknown axis, a mesh axis that two axes of one array use, or a layout that the
        model cannot compute with.
    """
    if not isinstance(exchange, bool) or not isinstance(name, str):
        raise ValueError(
            f"layout: got exchange {exchange!r}, name {name!r}; must be a bool and a string"
        )
    if name in LAYOUTS:
        raise ValueError(f"layout: name: {name!r} is a layout of v4jax; choose another name")
    return _layout(name, exchange, **where)


def _layout(name: str, exchange: bool = False, **where) -> AxisRules:
    found = dict.fromkeys(LOGICAL_AXES, _NO_AXIS)
    found |= {axis: axes_of(axis, value) for axis, value in where.items()}
    check_table(found, exchange)
    return AxisRules(tuple(found.items()), exchange, name)


def _cut_weights(axes: str) -> dict[str, Any]:
    """FSDP: `axes` cut the embedding side of every matrix, which is gathered layer by layer."""
    return dict.fromkeys(("embed", "expert_embed", "streams_embed", "q_lora_in", "group_in"), axes)


_TENSOR: dict[str, Any] = dict(
    vocab="tensor",
    heads="tensor",
    sinks="tensor",
    groups="tensor",
    index_heads="tensor",
    hidden="tensor",
    expert_hidden="tensor",
    act_heads="tensor",
    act_hidden="tensor",
    act_vocab="tensor",
)

LAYOUTS: dict[str, AxisRules] = {
    # All axes at once: slice, data, fsdp and expert split the batch, context the sequence, expert
    # the experts; fsdp and context cut all weights.
    "full": _layout(
        "full",
        act_batch="slice data fsdp expert",
        act_seq="context",
        experts="expert",
        **_cut_weights("fsdp context"),
        **_TENSOR,
    ),
    # Every device holds all weights.
    "dp": _layout("dp", act_batch="slice data"),
    # fsdp cuts weights, which are gathered layer by layer.
    "fsdp": _layout("fsdp", act_batch="slice data fsdp", **_cut_weights("fsdp")),
    # Experts stay on their devices; everything else is replicated.
    "ep": _layout("ep", act_batch="slice data expert", experts="expert"),
    "ep_fsdp": _layout(
        "ep_fsdp", act_batch="slice data fsdp expert", experts="expert", **_cut_weights("fsdp")
    ),
    "ep_tp": _layout("ep_tp", act_batch="slice data expert", experts="expert", **_TENSOR),
    # Long sequences: each device holds a shard of every sequence; experts stay on their devices.
    "cp_ep": _layout("cp_ep", act_batch="slice data expert", act_seq="context", experts="expert"),
    # A pod: expert cuts the experts, and all axes that split tokens cut the other weights, so that
    # no device holds a copy of anything large.
    "pod": _layout(
        "pod",
        exchange=True,
        act_batch="slice data fsdp expert",
        act_seq="context",
        experts="expert",
        embed="fsdp context expert",
        expert_embed="fsdp context",
        streams_embed="fsdp context expert",
        q_lora_in="fsdp context expert",
        group_in="fsdp context expert",
        **_TENSOR,
    ),
}
"""The named layouts. `full` is the default; with axes of size 1 it becomes any other but `pod`."""


def rules_of(layout: AxisRules | str | None) -> AxisRules:
    """The layout that `layout` is or names; None means "full".

    Raises:
      ValueError: an unknown name, or an AxisRules that `layout` above would not have made.
    """
    if isinstance(layout, AxisRules):
        _check(layout)
        return layout
    if layout is not None and not isinstance(layout, str):
        raise ValueError(
            f"layout: got {layout!r}; must be a name or an AxisRules, see sharding.rules.layout"
        )
    name = "full" if layout is None else layout
    if name not in LAYOUTS:
        known = ", ".join(LAYOUTS)
        raise ValueError(f"layout: got {name!r}{close(name, tuple(LAYOUTS))}; known: {known}")
    return LAYOUTS[name]


def _check(rules: AxisRules) -> None:
    where = {name: axes_of(name, axes) for name, axes in rules.table}
    if missing := [name for name in LOGICAL_AXES if name not in where]:
        raise ValueError(
            f"layout: got an AxisRules without {missing[0]!r}; make it with sharding.rules.layout"
        )
    check_table(where, rules.exchange)


def layout_for(layout: AxisRules | str | None, mesh_sizes: dict[str, int]) -> AxisRules:
    """The layout that `layout` is or names (None: "full"), checked against the mesh it will run on.

    Raises:
      ValueError: an unknown name, or a mesh axis larger than 1 that the layout does not use.
    """
    rules = rules_of(layout)
    used = {axis for _, axes in rules.table for axis in axes}
    for axis, size in mesh_sizes.items():
        if size > 1 and axis not in used:
            raise ValueError(
                f"layout {str(rules)!r} does not use mesh axis {axis}={size}; "
                "drop it from --mesh or choose another layout"
            )
    return rules


def check_has_mesh(layout: AxisRules | str | None, mesh: str | None) -> None:
    """Raises ValueError if a layout other than "full" has no mesh, as it would then be ignored."""
    if not mesh and rules_of(layout) != LAYOUTS["full"]:
        raise ValueError(
            f"layout {str(layout)!r} needs a mesh; give one, for example --mesh data=2, "
            "or leave the layout at full"
        )
