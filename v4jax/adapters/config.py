"""What a LoRA run trains: rank, scale, and the matrices that get a pair.

A matrix W [I,O] that has a pair multiplies as x W + scale (dropout(x) a) b, with a [I,r] and b
[r,O]. W itself never changes.

Shapes: I and O rows and columns of a matrix.

Next file to read: v4jax/adapters/tree.py.
"""

import dataclasses
import fnmatch
import math
from collections.abc import Iterator

from v4jax.config import ModelConfig
from v4jax.parameter_tree import Path, leaves
from v4jax.parameters import ParamSpec

_INDEXER = "indexer."


@dataclasses.dataclass(frozen=True, kw_only=True)
class Lora:
    """Low-rank adapters: what is trained in place of the weights."""

    rank: int = 16
    """Columns of a and rows of b, 1 or more."""
    alpha: float = 16.0
    """What the pair's product is multiplied by, before it is divided as `scaling` says; 0 or
    more."""
    targets: tuple[str, ...] = ("*",)
    """Matrices that get a pair: names of the checkpoint without layer and .weight, or the ends of
    them, or globs, such as wq_b, wo_b, experts.*, shared_experts.*, head, or * (all matrices). The
    indexer's are matched only by targets that begin with indexer."""
    experts: bool = True
    """Whether routed experts are among what targets match; they get one pair a matrix of each
    expert."""
    dropout: float = 0.0
    """Share of the inputs of a that training sets to 0, in [0, 1); must be 0 where routed experts
    have pairs."""
    scaling: str = "plain"
    """What alpha is divided by: plain (rank), or rank_stabilised (the root of rank)."""
    optimizer: str = "adamw"
    """What trains the pairs: adamw or muon."""
    base_dtype: str = "float32"
    """How the frozen weights lie in memory: float32, bfloat16, or packed (fp8 and MXFP4 as
    init_from's safetensors hold them, docs/packed.md). What releases store in float32 stays so."""

    def __post_init__(self):
        listed = not isinstance(self.targets, str)
        _require("targets", repr(self.targets), listed, "a tuple of names or globs")
        object.__setattr__(self, "targets", tuple(self.targets))
        _require("rank", self.rank, self.rank >= 1, "at least 1")
        finite = math.isfinite(self.alpha) and self.alpha >= 0
        _require("alpha", self.alpha, finite, "finite, and 0 or above")
        _require("dropout", self.dropout, 0 <= self.dropout < 1, "in [0, 1)")
        _require("targets", self.targets, bool(self.targets), "at least one name or glob")
        for name, allowed in (
            ("scaling", ("plain", "rank_stabilised")),
            ("optimizer", ("adamw", "muon")),
            ("base_dtype", ("float32", "bfloat16", "packed")),
        ):
            got = getattr(self, name)
            if got not in allowed:
                raise ValueError(f"lora.{name}: got {got!r}; allowed: {', '.join(allowed)}")

    @property
    def scale(self) -> float:
        """alpha / rank, or alpha / sqrt(rank) with scaling "rank_stabilised"."""
        return self.alpha / (self.rank if self.scaling == "plain" else self.rank**0.5)


def _require(name: str, got, holds: bool, rule: str) -> None:
    if not holds:
        raise ValueError(f"lora.{name}: got {got}; must be {rule}")


def check_lora(cfg) -> None:
    """Checks what a run of adapters (a TrainConfig) needs, and what it cannot do.

    Raises:
      ValueError: names the field, what was got and what is allowed.
    """
    if cfg.lora is None:
        return
    exports, rate = cfg.export != "none", cfg.index_learning_rate
    learns = adapts_indexer(cfg.model, cfg.lora)
    rules = [
        ("init_from", cfg.init_from != "", "a checkpoint with lora: the frozen base"),
        ("gather", cfg.gather == "micro_batch", "micro_batch with lora"),
        (
            "sample_tokens",
            cfg.sample_tokens == 0 or exports,
            "0 with lora and export none: the sample reads the run's adapter",
        ),
        (
            "index_learning_rate",
            rate > 0 or not learns,
            "above 0 where lora.targets name the indexer: no other loss reaches it",
        ),
        (
            "index_learning_rate",
            rate == 0 or learns,
            "0 where no target of lora begins with indexer: its weights are frozen",
        ),
    ]
    for name, holds, rule in rules:
        if not holds:
            raise ValueError(f"{name}: got {getattr(cfg, name)}; must be {rule}")


def target_name(spec: ParamSpec) -> str:
    """What `targets` call a matrix: its official name without layer, expert and .weight.

    Example: {layer}.ffn.experts.{e}.w1.weight is "ffn.experts.w1", mtp.0.e_proj.weight "e_proj".
    """
    name = spec.official.removesuffix(".weight")
    for part in ("{layer}.", "mtp.0.", "{e}."):
        name = name.replace(part, "")
    return name


def is_adaptable(spec: ParamSpec) -> bool:
    """Whether a pair can adapt this parameter: a matrix that multiplies what a token carries.

    Those that mix streams are left out: they are 24 columns wide, and a pair saves nothing there.
    """
    return spec.transpose and spec.part != "hyper"


def matches(target: str, name: str) -> bool:
    """Whether `target` names the matrix `name`, or its end after a dot; see Lora.targets."""
    if _INDEXER in name:
        end = name[name.index(_INDEXER) :]
        return target.startswith(_INDEXER[:-1]) and fnmatch.fnmatchcase(end, target)
    parts = name.split(".")
    return any(fnmatch.fnmatchcase(".".join(parts[first:]), target) for first in range(len(parts)))


def adapts_indexer(cfg: ModelConfig, lora: Lora) -> bool:
    """Whether a matrix of the indexer gets a pair."""
    return any(leaves(cfg)[path].spec.part == "indexer" for path in adapted_paths(cfg, lora))


def adapted_paths(cfg: ModelConfig, lora: Lora) -> Iterator[Path]:
    """Places of the matrices that get a pair, in the order of the tree.

    Raises:
      ValueError: a target that matches nothing (names what there is), or dropout where routed
        experts have pairs.
    """
    specs = {path: leaf.spec for path, leaf in leaves(cfg).items() if is_adaptable(leaf.spec)}
    allowed = [path for path, spec in specs.items() if lora.experts or not spec.is_expert]
    names = {path: target_name(specs[path]) for path in allowed}
    for target in lora.targets:
        if not any(matches(target, name) for name in names.values()):
            there = ", ".join(sorted(set(names.values())))
            raise ValueError(f"lora.targets: {target!r} matches no matrix; there are {there}")
    for path in allowed:
        if any(matches(target, names[path]) for target in lora.targets):
            if specs[path].is_expert and lora.dropout:
                raise ValueError(
                    f"lora.dropout: got {lora.dropout}; must be 0 where routed experts have pairs "
                    "(experts=False leaves them out)"
                )
            yield path
