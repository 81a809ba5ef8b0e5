"""Every tensor of a DSpark drafter: blocks of its stages, and what the first and last have besides.

A stage is a block as the trunk's, score-routed and without compression. See
docs/equations.md#dspark.

Shapes, by their letters (`sizes` of v4jax/parameters.py), and T tapped layers, R Markov rank.

Next file to read: v4jax/checkpoint/carried.py.
"""

import dataclasses
from collections.abc import Iterator
from typing import NamedTuple

from v4jax.config import ModelConfig
from v4jax.config.releases import DSparkConfig
from v4jax.parameter_tree import MTP_KIND, Path, layer_specs
from v4jax.parameters import ParamSpec, sizes


@dataclasses.dataclass(frozen=True)
class _Own:
    """A tensor that one stage has besides its block.

    Attributes:
      path: its place in the drafter's tree.
      official: its name in released files, after mtp.N.
      shape: the names of its sizes as files have it, [out, in].
      axes: the logical name of each axis in the tree; "-" is none.
      precision: what releases store (ParamSpec.precision).
      last: whether the last stage has it; otherwise the first.
      transpose: whether the tree has it the other way round.
    """

    path: str
    official: str
    shape: str
    axes: str
    precision: str
    last: bool = True
    transpose: bool = False


_OWN = (
    _Own("main_proj", "main_proj.weight", "D TD", "- embed_out", "fp8", last=False, transpose=True),
    _Own("main_norm/weight", "main_norm.weight", "D", "norm", "bfloat16", last=False),
    _Own("norm/weight", "norm.weight", "D", "norm", "bfloat16"),
    _Own("hc_head/fn", "hc_head_fn", "X XD", "streams_embed mix", "float32", transpose=True),
    _Own("hc_head/base", "hc_head_base", "X", "mix", "float32"),
    _Own("hc_head/scale", "hc_head_scale", "1", "-", "float32"),
    _Own("markov_w1", "markov_head.markov_w1.weight", "V R", "- -", "bfloat16"),
    _Own("markov_w2", "markov_head.markov_w2.weight", "V R", "- -", "bfloat16", transpose=True),
    _Own("confidence", "confidence_head.proj.weight", "1 D+R", "- -", "bfloat16", transpose=True),
)


class DraftTensor(NamedTuple):
    """An official tensor of a drafter.

    Attributes:
      path: its place in the drafter's tree (v4jax/model/dspark.py).
      index: (expert,) of routed experts, else ().
      shape: as files have it, [out, in].
      axes: the logical name of each axis of its array in the tree, that of experts included.
      transpose: whether the tree has it the other way round.
      precision: what releases store.
    """

    path: Path
    index: tuple[int, ...]
    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    transpose: bool
    precision: str


def drafter_tensors(cfg: ModelConfig, dspark: DSparkConfig) -> dict[str, DraftTensor]:
    """Official name -> tensor, of all stages.

    Example: mtp.1.attn.wkv.weight is tree["stage_1"]["attn"]["wkv"].T.
    """
    found = {}
    for stage in range(dspark.stages):
        for spec in layer_specs(MTP_KIND):
            found.update(_of_block(cfg, spec, stage))
        first, last = stage == 0, stage == dspark.stages - 1
        for own in _OWN:
            if last if own.last else first:
                named = sizes(cfg) | _further(cfg, dspark)
                shape = tuple(int(named[name]) for name in own.shape.split())
                path = tuple(own.path.split("/"))
                axes = tuple(None if axis == "-" else axis for axis in own.axes.split())
                one = DraftTensor(path, (), shape, axes, own.transpose, own.precision)
                found[f"mtp.{stage}.{own.official}"] = one
    return found


def _further(cfg: ModelConfig, dspark: DSparkConfig) -> dict[str, float]:
    taps, rank = len(dspark.target_layer_ids), dspark.markov_rank
    return {"TD": taps * cfg.hidden_size, "R": rank, "D+R": cfg.hidden_size + rank}


def _of_block(cfg: ModelConfig, spec: ParamSpec, stage: int) -> Iterator[tuple[str, DraftTensor]]:
    """The tensors of one line of the trunk's table in a stage: several of routed experts."""
    path = tuple(spec.path.format(block=f"stage_{stage}").split("/"))
    shape = spec.size(cfg)
    if not spec.is_expert:
        shape = shape[::-1] if spec.transpose else shape
        one = DraftTensor(path, (), shape, spec.axes, spec.transpose, spec.precision)
        yield spec.official.format(layer=f"mtp.{stage}"), one
        return
    for e in range(cfg.n_routed_experts):
        one = DraftTensor(path, (e,), shape[:0:-1], spec.axes, spec.transpose, spec.precision)
        yield spec.official.format(layer=f"mtp.{stage}", e=e), one
