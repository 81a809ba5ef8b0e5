"""What the newer releases add to config.json: a DSpark drafter, and a vision tower.

The trunk's ModelConfig has neither: v4jax carries their tensors, and builds the drafter apart.
See docs/checkpoints.md#releases.

Next file to read: v4jax/config/json_styles.py.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from v4jax.config.validation import is_number, is_token

DSPARK_KEYS = (
    "dspark_block_size",
    "dspark_noise_token_id",
    "dspark_target_layer_ids",
    "dspark_markov_rank",
)
_FIXED = {"dspark_markov_head_type": "vanilla", "sample_from_anchor": True}
"""Keys that servers read and no release has, with the only value that v4jax builds."""
_STAGES = "n_mtp_layers"
DRAFTER_KEYS = (*DSPARK_KEYS, *_FIXED, _STAGES)
"""All keys that describe a drafter."""
VISION_KEYS = (
    "vision_n_layers",
    "vision_dim",
    "vision_n_heads",
    "vision_inter_dim",
    "vision_patch_size",
    "vision_rope_theta",
    "vision_downsample_ratio",
    "vision_max_n_token",
    "vision_min_pixels",
    "vision_max_wh_ratio",
)
_LONGEST_BLOCK, _LARGEST_RANK, _MOST_VISION_LAYERS = 256, 2**24, 1000


@dataclasses.dataclass(frozen=True, kw_only=True)
class DSparkConfig:
    """A DSpark drafter. Its stages have the sizes of the trunk's layers.

    Raises:
      ValueError: naming the key of config.json, the value and the rule.
    """

    stages: int
    """Blocks that a draft passes: the entries of compress_ratios after the trunk's layers."""
    block_size: int
    """Tokens that it drafts at a time."""
    noise_token_id: int
    """Input of all positions of a block but the first."""
    target_layer_ids: tuple[int, ...]
    """Layers of the trunk, from 0 on, whose output it sees."""
    markov_rank: int
    """Width of the head that adds what the token before says."""

    def __post_init__(self):
        object.__setattr__(self, "target_layer_ids", tuple(self.target_layer_ids))
        for name, most in (("block_size", _LONGEST_BLOCK), ("markov_rank", _LARGEST_RANK)):
            value = getattr(self, name)
            if type(value) is not int or not 1 <= value <= most:
                raise ValueError(f"dspark_{name}: got {value!r}; must be an integer in [1, {most}]")


def read_dspark(raw: Mapping[str, Any]) -> DSparkConfig | None:
    """The drafter that a config.json describes; None without one.

    Raises:
      ValueError: some of its keys only, an unknown one, or a value that v4jax does not build.
    """
    found = [name for name in raw if name.startswith("dspark_")]
    if not found:
        return None
    known = (*DSPARK_KEYS, *_FIXED)
    unknown = [name for name in found if name not in known]
    if unknown:
        raise ValueError(
            f"{unknown[0]}: not a key of a DSpark drafter; allowed: {', '.join(known)}"
        )
    missing = [name for name in DSPARK_KEYS if raw.get(name) is None]
    if missing:
        raise ValueError(f"{missing[0]}: missing beside {found[0]}; a DSpark drafter has all four")
    for name, only in _FIXED.items():
        if raw.get(name, only) != only:
            raise ValueError(f"{name}: got {raw[name]!r}; v4jax builds only {only!r}")
    _check_ids(raw)
    values = {name.removeprefix("dspark_"): raw[name] for name in DSPARK_KEYS}
    stages = len(draft_ratios(raw))
    if raw.get(_STAGES, stages) != stages:
        rule = f"must be {stages}, the entries of compress_ratios after the layers'"
        raise ValueError(f"{_STAGES}: got {raw[_STAGES]!r}; {rule}")
    return DSparkConfig(stages=stages, **values)


def _check_ids(raw: Mapping[str, Any]) -> None:
    """Refuses a noise token outside of the vocabulary, and layers that the trunk does not have."""
    token, vocab = raw["dspark_noise_token_id"], raw.get("vocab_size")
    if type(vocab) is int and not is_token(token, vocab):
        rule = f"must be in [0, vocab_size={vocab})"
        raise ValueError(f"dspark_noise_token_id: got {token!r}; {rule}")
    ids, layers = raw["dspark_target_layer_ids"], raw.get("num_hidden_layers")
    is_list = isinstance(ids, (list, tuple)) and len(ids) > 0
    if not is_list or any(type(one) is not int for one in ids) or len(set(ids)) < len(ids):
        raise ValueError(f"dspark_target_layer_ids: got {ids!r}; must be a list of distinct layers")
    if type(layers) is int and not all(0 <= one < layers for one in ids):
        rule = f"must be in [0, num_hidden_layers={layers})"
        raise ValueError(f"dspark_target_layer_ids: got {list(ids)}; {rule}")


def draft_ratios(raw: Mapping[str, Any]) -> list[Any]:
    """The entries of compress_ratios after the layers', which belong to what drafts."""
    ratios, layers = raw.get("compress_ratios"), raw.get("num_hidden_layers")
    if not isinstance(ratios, (list, tuple)) or type(layers) is not int or layers < 0:
        return []
    return list(ratios[layers:])


def trunk_ratios(raw: Mapping[str, Any], modules: int) -> list[Any]:
    """compress_ratios of the layers, and a 0 for each of `modules` MTP modules.

    Example: 3 layers and [0, 4, 128, 0, 0, 0] with one module are [0, 4, 128, 0].

    Raises:
      ValueError: another number than 0 after the layers'.
    """
    tail = draft_ratios(raw)
    layers = len(raw["compress_ratios"]) - len(tail)
    odd = [ratio for ratio in tail if ratio != 0 or isinstance(ratio, bool)]
    if odd:
        raise ValueError(
            f"compress_ratios: got {odd[0]!r} after the {layers} entries of the layers; what "
            "drafts allows only 0"
        )
    return [*raw["compress_ratios"][:layers], *[0] * modules]


def vision_layers(raw: Mapping[str, Any]) -> int:
    """The blocks of a config.json's vision tower; 0 without one.

    Raises:
      ValueError: an unknown vision_* key, or a number of blocks that cannot be meant.
    """
    unknown = [name for name in raw if name.startswith("vision_") and name not in VISION_KEYS]
    if unknown:
        raise ValueError(
            f"{unknown[0]}: not a key of the vision tower; allowed: {', '.join(VISION_KEYS)}"
        )
    for name in VISION_KEYS:
        if raw.get(name) is not None and not (is_number(raw[name]) and raw[name] >= 0):
            raise ValueError(f"{name}: got {raw[name]!r}; must be a number, 0 or more")
    count = raw.get("vision_n_layers") or 0
    if type(count) is not int or count > _MOST_VISION_LAYERS:
        rule = f"must be an integer in [0, {_MOST_VISION_LAYERS}]"
        raise ValueError(f"vision_n_layers: got {count!r}; {rule}")
    return count


def without_drafter(raw: Mapping[str, Any]) -> dict[str, Any]:
    """The config.json of the same trunk without anything that drafts."""
    found = {name: value for name, value in raw.items() if name not in DRAFTER_KEYS}
    if "compress_ratios" in found:
        found["compress_ratios"] = trunk_ratios(raw, 0)
    return found | {"num_nextn_predict_layers": 0}


def without_vision(raw: Mapping[str, Any]) -> dict[str, Any]:
    """The config.json of the same model for text alone."""
    return {name: value for name, value in raw.items() if name not in VISION_KEYS}
