"""What one call of the model needs beside its configuration, weights and inputs.

Shapes: B batch, S positions, K active experts.
Next file to read: v4jax/model/weights.py.
"""

import dataclasses

import jax.numpy as jnp

from sharding.rules import AxisRules
from v4jax.kernels.choice import Kernels
from v4jax.remat import policy_name


@dataclasses.dataclass(frozen=True, kw_only=True)
class SparseMode:
    """How CSA layers attend.

    Attributes:
      dense: to every visible entry instead of the chosen ones.
      train_indexer: compute the indexer's loss too.
    """

    dense: bool = False
    train_indexer: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class Collect:
    """What layers return beside their output.

    Attributes:
      index: indices of the chosen experts (Routing.index_BSK in v4jax/model/router.py).
      watch: diagnostics of every layer (v4jax/diagnostics.py).
      taps: the mean of the streams after every layer, which a DSpark drafter reads.
    """

    index: bool = False
    watch: bool = False
    taps: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class Context:
    """Hashable and static: a program is compiled for one Context. Every module hands it on.

    Attributes:
      rules: the layout; its mesh is ambient (jax.set_mesh).
      dtype: compute dtype; a dtype or its name.
      quant: "none", or "official" for the low-precision numbers of the served model
        (v4jax/quant/fake.py).
      sparse: how CSA layers attend.
      collect: what layers return beside their output.
      kernels: which implementation of each op runs.
      remat: what the backward pass recomputes (v4jax/remat.py).
      sums: the layout of weights and of the sums of their gradients, where the model is given
        weights that are gathered already, for `rules` that say so; None: that of `rules`.
      frozen: weights are constants, and only low-rank pairs learn (v4jax/model/adapted.py).
      dropout: share of the inputs of pairs that are dropped; 0 but in training.
    """

    rules: AxisRules = AxisRules()
    dtype: jnp.dtype | str = jnp.dtype("float32")
    quant: str = "none"
    sparse: SparseMode = SparseMode()
    collect: Collect = Collect()
    kernels: Kernels = Kernels()
    remat: str = "none"
    sums: AxisRules | None = None
    frozen: bool = False
    dropout: float = 0.0

    def __post_init__(self):
        object.__setattr__(self, "dtype", jnp.dtype(self.dtype))
        object.__setattr__(self, "remat", policy_name(self.remat))
