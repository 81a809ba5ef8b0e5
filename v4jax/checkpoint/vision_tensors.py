"""The tensors of a vision tower: which there are, and what is known of their shapes and dtypes.

v4jax carries a tower and never runs it, so it knows sizes only as far as config.json names them or
one tensor implies those of another. What fits none of that is refused.

Next file to read: v4jax/checkpoint/carried_files.py.
"""

import logging
import math
import re
from collections.abc import Mapping
from typing import Any

from v4jax.checkpoint.files import Header
from v4jax.checkpoint.formats import kinds_of
from v4jax.config import ModelConfig
from v4jax.config.releases import vision_layers

VISION_BIAS = re.compile(r"(layers|mtp)\.\d+\.ffn\.gate\.bias_vl")
"""The bias that images are routed by."""
_HASH_BIAS = re.compile(r"layers\.(\d+)\.ffn\.gate\.bias")
_IMAGE = ("image_start", "image_end", "image_newline", "image_pad")
_PATCHES = "vision.patch_embed.proj.weight"
_TOWER = (_PATCHES, "vision.patch_embed.proj.bias", "vision.norm.weight")
_BLOCK = (
    "norm1.weight",
    "attn.wqkv.weight",
    "attn.wqkv.bias",
    "attn.wo.weight",
    "attn.wo.bias",
    "norm2.weight",
    "mlp.w1.weight",
    "mlp.w2.weight",
)
_ALIGNER = tuple(f"aligner.{name}" for name in ("w1.weight", "w1.bias", "w2.weight", "w2.bias"))
_DTYPES = tuple(kind.dtype for kind in kinds_of("bfloat16"))
_READ_STREAM = (".attn.wqkv.weight", ".mlp.w1.weight")
"""Matrices of a block, [out, in], whose input is as wide as the tower."""
_WRITE_STREAM = (".attn.wo.weight", ".mlp.w2.weight", _PATCHES)
"""Those whose output is."""


def take_vision(
    cfg: ModelConfig, raw: Mapping[str, Any], headers: dict[str, Header]
) -> dict[str, Header]:
    """Takes the tower's tensors out of the headers, with the biases that images are routed by.

    Where config.json describes a tower and there is none, it says so.

    Raises:
      ValueError: a tower without its key in config.json; naming the tensor: one that lacks, that no
        tower has, or whose shape or dtype cannot be.
    """
    blocks = vision_layers(raw)
    found = [name for name in headers if _is_of_tower(cfg, name)]
    if not blocks:
        if found:
            raise ValueError(
                f"tensor {found[0]}: is of a vision tower, and config.json has no vision_n_layers"
            )
        return {}
    if not found:
        logging.getLogger("v4jax").warning(
            "config.json describes a vision tower, and there are no vision.* tensors: opened "
            "without"
        )
        return {}
    expected = _names(cfg, blocks)
    for name in expected:
        if name not in headers:
            raise ValueError(f"missing tensor {name} of the vision tower")
    stages = [name for name in found if name.startswith("mtp.")]
    unknown = next((name for name in found if name not in expected and name not in stages), None)
    if unknown is not None:
        raise ValueError(f"unexpected tensor {unknown} of the vision tower")
    taken = {name: headers.pop(name) for name in found}
    for name, header in taken.items():
        _check(header, _shape(cfg, raw, name, taken))
    return taken


def _is_of_tower(cfg: ModelConfig, name: str) -> bool:
    hashed = _HASH_BIAS.fullmatch(name)
    return (
        name.startswith(("vision.", "aligner.", "image_"))
        or VISION_BIAS.fullmatch(name) is not None
        or (hashed is not None and int(hashed[1]) < cfg.num_hash_layers)
    )


def _names(cfg: ModelConfig, blocks: int) -> dict[str, None]:
    """The tensors of a release with a tower, but for the biases of its draft stages."""
    tower = [f"vision.blocks.{n}.{name}" for n in range(blocks) for name in _BLOCK]
    layers = range(cfg.num_hidden_layers)
    gates = [f"layers.{n}.ffn.gate.bias_vl" for n in layers]
    gates += [f"layers.{n}.ffn.gate.bias" for n in layers[: cfg.num_hash_layers]]
    return dict.fromkeys([*_TOWER, *tower, *_ALIGNER, *_IMAGE, *gates])


def _shape(
    cfg: ModelConfig, raw: Mapping[str, Any], name: str, taken: Mapping[str, Header]
) -> tuple[int | None, ...]:
    """The shape of a tensor as far as it is known; None for an axis of unknown size.

    Example: with vision_dim 1024, mlp.w1.weight has (None, 1024), and attn.wqkv.bias as many
    numbers as attn.wqkv.weight has rows.
    """
    width = raw.get("vision_dim")
    if ".gate." in name:
        return (cfg.n_routed_experts,)
    if name in _IMAGE:
        return (cfg.hidden_size,)
    if name.endswith(".bias"):
        return (taken[f"{name.removesuffix('bias')}weight"].shape or (None,))[:1]
    if "norm" in name:
        return (width,)
    if name == "aligner.w2.weight":
        return (cfg.hidden_size, None)
    if name.endswith(_READ_STREAM):
        return (None, width)
    rows = width if name.endswith(_WRITE_STREAM) else None
    # The patches' matrix may be that of a convolution: [out, colours, rows, columns].
    axes = 4 if name == _PATCHES and len(taken[name].shape) == 4 else 2
    return (rows, *[None] * (axes - 1))


def _check(header: Header, expected: tuple[int | None, ...]) -> None:
    """Refuses a tensor of another dtype than floats, or of another shape."""
    name, shape = header.stored, header.shape
    if header.dtype not in _DTYPES:
        raise ValueError(f"tensor {name}: got {header.dtype}; allowed: {', '.join(_DTYPES)}")
    fits = len(shape) == len(expected) and all(
        want is None or size == want for size, want in zip(shape, expected, strict=True)
    )
    if not fits:
        must = ", ".join("any" if want is None else str(want) for want in expected)
        raise ValueError(f"tensor {name}: got shape {list(shape)}; must be [{must}]")
    if math.prod(shape) == 0:
        raise ValueError(f"tensor {name}: got shape {list(shape)}; must not be empty")
