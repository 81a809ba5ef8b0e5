"""Anticipatory routing: the weights of step t - lag choose the experts that step t uses.

The weights of step t still set how much each chosen expert counts. Router and network then no
longer chase each other, which settles a run after a loss spike
(docs/equations.md#anticipatory-routing). No older weights are kept. Instead the run reads each
batch `lag` steps early and chooses its experts then, in a forward pass with the weights of that
moment; only the indices are stored. For the first `lag` steps of each stage, the weights at the
start of the stage choose.

    step t:  draw batch t + lag, choose its experts with the weights of step t
             -> train on batch t with the experts chosen for it

Shapes: L layers of a group, B batch, S positions, K active experts, M micro-batches.
Next file to read: v4jax/train/resume.py.
"""

import collections
import contextlib
import functools
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from sharding.micro_batches import join_rows
from sharding.rules import AxisRules
from v4jax.context import Collect, Context
from v4jax.functional import apply
from v4jax.kernels.choice import kernels_from
from v4jax.train.config import TrainConfig
from v4jax.train.gradients import split_batch
from v4jax.train.programs import CompiledTogether, Compiling
from v4jax.train.stages import Batches
from v4jax.train.step import TrainState, batch_sharding

Chosen = dict[str, dict[str, jax.Array]]
"""Group -> block -> the experts of each token, int32 [L,B,S,K] ("mtp": [B,S,K]).

Only score-routed layers appear.
"""


def choose_experts(
    cfg: TrainConfig, rules: AxisRules, params, batch: Mapping[str, jax.Array]
) -> Chosen:
    """The experts that `params` (the public dict) choose for a batch, by micro-batches as a step.

    Under jit, XLA drops all work that no index depends on.
    """
    count = cfg.micro_batches
    if count == 1:
        return _choose(cfg, rules, params, batch)
    chosen_M = jax.lax.map(
        functools.partial(_choose, cfg, rules, params), split_batch(rules, batch, count)
    )
    return jax.tree.map(lambda x: join_rows(rules, x, axis=x.ndim - 4), chosen_M)


def _choose(cfg: TrainConfig, rules: AxisRules, params, batch: Mapping[str, jax.Array]) -> Chosen:
    hidden = apply(
        cfg.model,
        params,
        batch["tokens"],
        batch.get("segment_ids"),
        ctx=Context(
            rules=rules,
            dtype=cfg.dtype,
            quant=cfg.quant,
            collect=Collect(index=True),
            kernels=kernels_from(cfg.kernels),
        ),
    )
    found = {
        group: {
            block: route.index_BSK for block, route in blocks.items() if route.index_BSK is not None
        }
        for group, blocks in hidden.routing.items()
    }

    def place(x):
        return rules.constrain(x, *[None] * (x.ndim - 3), "act_batch", "act_seq", None)

    return jax.tree.map(place, {group: blocks for group, blocks in found.items() if blocks})


def compile_choice(
    cfg: TrainConfig,
    rules: AxisRules,
    shardings: TrainState,
    mesh: Mesh,
    compiling: Compiling = contextlib.nullcontext,
) -> Callable:
    """`choose_experts` as a function of (public params, batch), compiled at its first call.

    compiling: as for CompiledTogether.
    """
    function = functools.partial(choose_experts, cfg, rules)
    jitted = jax.jit(function, in_shardings=(shardings.public, batch_sharding(rules, mesh)))
    return CompiledTogether(jitted, compiling)


class RoutedBatchQueue:
    """The batches of a run, in order; while on, it draws some ahead and chooses their experts.

    Args:
      data: host batches.
      put: places a batch on the mesh.
      choose: (public params, batch) -> Chosen, compiled.
      lag: steps ahead, 1 or more.
      ahead: batches restored from a checkpoint (see `items`).
    """

    def __init__(
        self,
        data: Iterator | Batches,
        put: Callable,
        choose: Callable,
        lag: int,
        ahead: Mapping[str, Any] | None = None,
    ):
        self._data, self._put, self._choose, self._lag = data, put, choose, lag
        waiting = sorted((ahead or {}).items(), key=lambda item: int(item[0]))
        self._waiting = collections.deque((one["batch"], one["chosen"]) for _, one in waiting)

    def __len__(self) -> int:
        """How many batches are drawn but not yet given out."""
        return len(self._waiting)

    def next(
        self, params, on: bool, left: float = math.inf
    ) -> tuple[dict[str, jax.Array], Chosen | None]:
        """The next batch, and while `on` the experts chosen for it (else None).

        Args:
          params: the current weights.
          on: whether to draw ahead and choose experts.
          left: batches of this shape that the stage still needs, this one included. The queue never
            draws more.
        """
        while on and len(self._waiting) < min(self._lag + 1, left):
            batch = self._put(next(self._data))
            # On CPU two programs must not run at once (sharding/processes.py). Elsewhere the next
            # step would wait for this one anyway.
            self._waiting.append((batch, jax.block_until_ready(self._choose(params, batch))))
        batch, chosen = (
            self._waiting.popleft() if self._waiting else (self._put(next(self._data)), None)
        )
        return batch, chosen if on else None

    def drop(self) -> None:
        """Forgets the batches drawn ahead; the data does not give them again."""
        self._waiting.clear()

    def items(self) -> dict[str, Any]:
        """The batches drawn ahead, as a checkpoint item; {} if there are none.

        The data's saved position is that of the last batch drawn, so these batches must be saved
        too.
        """
        waiting = {
            str(i): {"batch": batch, "chosen": chosen}
            for i, (batch, chosen) in enumerate(self._waiting)
        }
        return {"ahead": waiting} if waiting else {}


def ahead_placed(stored, rules: AxisRules, mesh: Mesh):
    """Shapes, types and shardings for restoring a checkpoint's `ahead` item from its metadata.

    Batches are [B,S]; expert indices are [...,B,S,K].
    """

    def placed(path, leaf):
        names = ("act_batch", "act_seq") + (None,) * (path[1].key == "chosen")
        lead = (None,) * (len(leaf.shape) - len(names))
        spec = rules.spec((*lead, *names)) if rules else PartitionSpec()
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, spec))

    return jax.tree_util.tree_map_with_path(placed, stored)
