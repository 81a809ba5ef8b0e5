"""What adapter_config.json says: rank and scale of each adapted module, as PEFT computes them.

Next file to read: v4jax/adapters/read.py.
"""

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any

_PLAIN = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    "use_dora": (False, None),
    "fan_in_fan_out": (False, None),
    "modules_to_save": (None, []),
    "trainable_token_indices": (None, []),
    "lora_bias": (False, None),
    "use_qalora": (False, None),
    "use_bdlora": (None, False),
    "alora_invocation_tokens": (None, []),
    "layer_replication": (None, []),
    "arrow_config": (None,),
    "kasa_config": (None,),
    # The others, such as pissa and olora, take the first pair off the base's weights.
    "init_lora_weights": (True, False, None, "gaussian", "eva", "orthogonal"),
}
"""Fields that are read at these values alone; the first is the default."""

_Pattern = tuple[tuple[str, float], ...]
"""(regular expression of the ends of modules' names, value); the first that matches counts."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class PeftConfig:
    """The fields that change what pairs compute."""

    r: int
    """Rank of modules that rank_pattern does not name, 1 or more."""
    lora_alpha: float
    """Alpha of modules that alpha_pattern does not name, finite."""
    use_rslora: bool
    """Whether alpha is divided by the root of the rank instead of the rank."""
    rank_pattern: _Pattern
    alpha_pattern: _Pattern
    target_parameters: tuple[str, ...]
    """Parameters, not modules, that have pairs."""

    def __post_init__(self):
        for name, rank in (("r", self.r), *self.rank_pattern):
            if type(rank) is not int or rank < 1:
                raise ValueError(f"{name}: got {rank!r}; must be at least 1")
        for name, alpha in (("lora_alpha", self.lora_alpha), *self.alpha_pattern):
            if type(alpha) not in (int, float) or not math.isfinite(alpha):
                raise ValueError(f"{name}: got {alpha!r}; must be a finite number")

    def scale(self, rank: int, module: str | None = None) -> float:
        """What multiplies the product of a pair of this rank: alpha / rank, or alpha / sqrt(rank).

        Args:
          module: its full name in transformers; None: a module that no pattern names.

        Raises:
          ValueError: another rank than the fields say.
        """
        expected = _first(self.rank_pattern, module, self.r)
        if rank != expected:
            name = "a module of MTP" if module is None else module
            raise ValueError(f"{name}: got rank {rank}; r and rank_pattern say {expected}")
        alpha = _first(self.alpha_pattern, module, self.lora_alpha)
        return float(alpha) / (rank**0.5 if self.use_rslora else rank)


def parse_config(found: Any) -> PeftConfig:
    """The configuration in a parsed adapter_config.json.

    Raises:
      ValueError: another kind of adapter, or a field of another type; names it.
    """
    if not isinstance(found, Mapping):
        raise ValueError(f"got {type(found).__name__}; must be an object of PEFT's fields")
    if "peft_type" not in found:
        raise ValueError("peft_type: got None; must be 'LORA'")
    for name, allowed in _PLAIN.items():
        got = found.get(name, allowed[0])
        if got not in allowed:
            rule = " or ".join(repr(value) for value in allowed)
            raise ValueError(f"{name}: got {got!r}; must be {rule}")
    stabilised = found.get("use_rslora", False)
    if stabilised not in (True, False, None):
        raise ValueError(f"use_rslora: got {stabilised!r}; must be True or False")
    parameters = found.get("target_parameters") or []
    if not isinstance(parameters, list) or not all(isinstance(one, str) for one in parameters):
        raise ValueError(f"target_parameters: got {parameters!r}; must be a list of names")
    return PeftConfig(
        r=found.get("r", 8),
        lora_alpha=found.get("lora_alpha", 8),
        use_rslora=bool(stabilised),
        rank_pattern=_pattern(found, "rank_pattern"),
        alpha_pattern=_pattern(found, "alpha_pattern"),
        target_parameters=tuple(parameters),
    )


def _pattern(found: Mapping[str, Any], name: str) -> _Pattern:
    pattern = found.get(name) or {}
    if not isinstance(pattern, dict):
        raise ValueError(f"{name}: got {pattern!r}; must be an object of names and values")
    for key in pattern:
        try:
            re.compile(key)
        except re.error as error:
            raise ValueError(
                f"{name}: got {key!r}; must be a regular expression: {error}"
            ) from None
    return tuple(pattern.items())


def _first(pattern: _Pattern, module: str | None, default: float) -> float:
    """The value of the first expression that matches the end of the module's name."""
    if module is None:
        return default
    for key, value in pattern:
        if re.fullmatch(rf"(.*\.)?({key})", module):
            return value
    return default
