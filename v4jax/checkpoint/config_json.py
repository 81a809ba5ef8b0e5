"""The config.json of an export: the source's where it describes this model, else our own.

Next file to read: v4jax/checkpoint/checksums.py.
"""

from collections.abc import Collection, Mapping
from typing import Any

from v4jax.checkpoint.formats import quantization_config
from v4jax.config import ModelConfig


def config_json(
    cfg: ModelConfig,
    format: str,
    raw: Mapping[str, Any] | None = None,
    elsewhere: Collection[int] = (),
) -> dict[str, Any]:
    """The config.json of an export.

    It is the source's, if that is of official style and describes this model, with only what the
    precision changes replaced. Rows end where they end in the source, and where `cfg` says.

    Args:
      raw: the source's config.json.
      elsewhere: end tokens that the export's generation_config.json has, so config.json need not
        repeat them.
    """
    found = cfg.to_dict()
    if raw is not None and raw.get("model_type") == "deepseek_v4":
        theirs = ModelConfig.from_dict(dict(raw))
        # Not ==: a special token that only one of them has does not make another model. It is kept.
        if cfg.difference(theirs) is None:
            found = _from_source(cfg, theirs, raw, elsewhere)
    low = quantization_config(format)
    for name in ("quantization_config", "expert_dtype"):
        if name not in low:
            found.pop(name, None)
    found |= {name: value for name, value in low.items() if name not in found}
    return found | {
        "dtype" if "dtype" in found else "torch_dtype": "float32"
        if format == "float32"
        else "bfloat16"
    }


def _from_source(
    cfg: ModelConfig, theirs: ModelConfig, raw: Mapping[str, Any], elsewhere: Collection[int]
) -> dict[str, Any]:
    """The source's config.json with the special tokens of both; our own for another style."""
    both = _with_both_tokens(cfg, theirs)
    if "compress_ratios" not in raw or "layer_types" in raw:
        return both.to_dict()
    found = dict(raw)
    if set(both.eos_token_ids) - set(theirs.eos_token_ids) - set(elsewhere):
        found["eos_token_id"] = list(both.eos_token_ids)
    if both.bos_token_id != theirs.bos_token_id:
        found["bos_token_id"] = both.bos_token_id
    return found


def _with_both_tokens(cfg: ModelConfig, theirs: ModelConfig) -> ModelConfig:
    """The source's config, with end tokens of `cfg` added, and its bos if the source has none."""
    begin = cfg.bos_token_id if theirs.bos_token_id is None else theirs.bos_token_id
    return theirs.replace(bos_token_id=begin).ending_at(cfg.eos_token_ids)
