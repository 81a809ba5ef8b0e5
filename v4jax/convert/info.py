"""What a checkpoint is: its release, its parts and their precision, and what goes with the weights.

Only headers and small files are read, also of a bucket and of the Hub.

Next file to read: v4jax/cli/main.py.
"""

import collections
import dataclasses
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from v4jax.adapters.base import refuse_adapters
from v4jax.chat.release import ENCODER, ChatRelease, chat_release
from v4jax.checkpoint.carried import DRAFTER, VISION, check_carried, part_of
from v4jax.checkpoint.export import kinds_for
from v4jax.checkpoint.files import Header, tensor_size
from v4jax.checkpoint.formats import Kind, shapes_of
from v4jax.checkpoint.load import open_safetensors
from v4jax.checkpoint.names import official_names, official_shapes
from v4jax.checkpoint.store import is_run
from v4jax.config import ModelConfig
from v4jax.config.json_styles import read_config_json
from v4jax.config.releases import read_dspark, vision_layers
from v4jax.cost import NAMES
from v4jax.generation_config import read_generation_config
from v4jax.parameter_tree import leaves
from v4jax.storage import Place, folder_of_checkpoint, streamed
from v4jax.tokenizer import load_tokenizer

_MTP = "MTP module"
_FLASH, _PRO = (43, 4096), (61, 7168)
_NAMES = {_FLASH: "DeepSeek-V4-Flash", _PRO: "DeepSeek-V4-Pro"}
_DATED = {_FLASH: "0731", _PRO: "0813"}
_PACKED = 2
"""MXFP4 numbers in a byte."""


class PartInfo(NamedTuple):
    """A part of a checkpoint.

    Attributes:
      parameters: their number; tables and biases of the routers count, scales do not.
      precision: what they are stored as, the most frequent first.
      size: bytes, scales included.
      trained: whether v4jax trains the part; otherwise it is only carried.
    """

    name: str
    parameters: int
    precision: str
    size: int
    trained: bool


@dataclasses.dataclass(frozen=True, kw_only=True)
class Info:
    """What `describe` found.

    Attributes:
      release: whose weights these are, as far as files tell.
      format: precision of the whole: one of formats.FORMATS, or a v4jax store.
      drafter: how it drafts, in words.
      tokenizer, encoder, generation: what there is beside the weights, in words.
    """

    release: str
    format: str
    layers: int
    parts: tuple[PartInfo, ...]
    drafter: str
    tokenizer: str
    encoder: str
    generation: str

    def rows(self) -> list[tuple[str, ...]]:
        """A table for people."""
        head = ("part", "parameters", "stored as", "GB", "")
        body = [
            (
                part.name,
                f"{part.parameters:,}",
                part.precision,
                f"{part.size / 1e9:.3f}",
                "trained" if part.trained else "only carried",
            )
            for part in self.parts
        ]
        return [head, *body, self._total()]

    def _total(self) -> tuple[str, ...]:
        """The table's last row; what is trained differs by part."""
        numbers = sum(part.parameters for part in self.parts)
        size = sum(part.size for part in self.parts)
        return ("total", f"{numbers:,}", "", f"{size / 1e9:.3f}", "")

    def to_dict(self) -> dict[str, Any]:
        """The same as plain values, for --json."""
        return dataclasses.asdict(self) | {"parts": [part._asdict() for part in self.parts]}

    def lines(self) -> dict[str, str]:
        """What is not in the table: name -> text."""
        found = self.to_dict()
        return {name: str(value) for name, value in found.items() if name != "parts"}


def describe(checkpoint) -> Info:
    """What a checkpoint of any kind is.

    Raises:
      ValueError: no checkpoint, or one whose files do not fit each other.
    """
    folder = folder_of_checkpoint(streamed(checkpoint), "checkpoint")
    refuse_adapters(folder, "v4jax info {base}")
    raw = read_config_json(folder / "config.json")
    if is_run(folder):
        cfg = ModelConfig.from_json(folder)
        kinds, carried = kinds_for(cfg, "float32"), check_carried(cfg, raw, folder)
        format = "a v4jax store (sizes as in float32)"
    else:
        source = open_safetensors(folder)
        cfg, kinds, carried = source.cfg, source.kinds, source.carried
        format = source.format
    chat = chat_release(folder)
    return Info(
        release=_release(cfg, raw, chat, format),
        format=format,
        layers=cfg.num_hidden_layers,
        parts=(*_trunk_parts(cfg, kinds), *_carried_parts(carried)),
        drafter=_drafter(cfg, raw, carried),
        tokenizer=_tokenizer(folder),
        encoder=f"chat of {chat}",
        generation=_generation(folder),
    )


def _release(cfg: ModelConfig, raw: Mapping[str, Any], chat: ChatRelease, format: str) -> str:
    """The name of the release with these sizes and keys.

    The first Flash and Pro have an MTP module, -DSpark and the dated ones a DSpark drafter; the
    encoder tells these apart.
    """
    size = (cfg.num_hidden_layers, cfg.hidden_size)
    name = _NAMES.get(size, f"a DeepSeek-V4 of {size[0]} layers and width {size[1]}")
    if vision_layers(raw):
        return f"{name}-Vision-Exp"
    if read_dspark(raw) is None:
        return f"{name}-Base" if format == "fp8" else name
    dated = _DATED.get(size, "0731")
    if chat.why == ENCODER:
        return f"{name}-{dated if chat.name == '0731' else 'DSpark'}"
    return f"{name}-{dated} or -DSpark, whose config.json is the same"


def _drafter(cfg: ModelConfig, raw: Mapping[str, Any], carried: Mapping[str, Header]) -> str:
    dspark = read_dspark(raw)
    if cfg.num_nextn_predict_layers:
        return "MTP: one more token"
    if dspark is None:
        return "none"
    if not any(part_of(name) == DRAFTER for name in carried):
        return "none (config.json describes a DSpark drafter, and there are no mtp.* tensors)"
    taps = ", ".join(map(str, dspark.target_layer_ids))
    return (
        f"DSpark: {dspark.block_size} tokens a draft, {dspark.stages} stages, which see layers "
        f"{taps}"
    )


# ---- parts ---------------------------------------------------------------------------------------


def _trunk_parts(cfg: ModelConfig, kinds: Mapping[str, Kind]) -> list[PartInfo]:
    """The parts of what v4jax builds, in the order of `v4jax cost`."""
    declared, slots = leaves(cfg), official_names(cfg)
    found: dict[str, list[tuple[int, int, str]]] = collections.defaultdict(list)
    for name, shape in official_shapes(cfg).items():
        leaf = declared[slots[name].path]
        part = _MTP if leaf.in_mtp else NAMES[leaf.spec.part]
        found[part].append(_measured(kinds[name], shape))
    order = [*dict.fromkeys(NAMES.values()), _MTP]
    return [_part(name, found[name], trained=True) for name in order if found[name]]


def _measured(kind: Kind, shape: tuple[int, ...]) -> tuple[int, int, str]:
    """(numbers, bytes, precision) of a tensor."""
    data, scale = shapes_of(kind, shape)
    size = tensor_size(kind.dtype, data)
    if kind.scale is not None and scale is not None:
        size += tensor_size(kind.scale, scale)
    return math.prod(shape), size, _precision(kind.dtype)


def _precision(dtype: str) -> str:
    return "MXFP4" if dtype == "I8" else dtype


def _carried_parts(carried: Mapping[str, Header]) -> list[PartInfo]:
    found: dict[str, list[tuple[int, int, str]]] = {DRAFTER: [], VISION: []}
    for name, header in carried.items():
        size = tensor_size(header.dtype, header.shape)
        if name.endswith(".scale"):
            found[part_of(name)].append((0, size, ""))
        else:
            per = _PACKED if header.dtype == "I8" else 1
            numbers = per * math.prod(header.shape)
            found[part_of(name)].append((numbers, size, _precision(header.dtype)))
    return [_part(name, one, trained=False) for name, one in found.items() if one]


def _part(name: str, tensors: list[tuple[int, int, str]], trained: bool) -> PartInfo:
    held: collections.Counter[str] = collections.Counter()
    for numbers, _, precision in tensors:
        held[precision] += numbers
    precision = ", ".join(one for one, _ in held.most_common() if one)
    sizes = sum(size for _, size, _ in tensors)
    return PartInfo(name, sum(held.values()), precision, sizes, trained)


# ---- files ---------------------------------------------------------------------------------------


def _tokenizer(folder: Place) -> str:
    if not (folder / "tokenizer.json").is_file():
        return "none"
    try:
        return f"tokenizer.json, {load_tokenizer(folder).vocab_size} tokens"
    except ValueError as error:
        return f"tokenizer.json, which cannot be read: {' '.join(str(error).split())}"


def _generation(folder: Place) -> str:
    raw = read_generation_config(folder)
    neutral = ("transformers_version", "_from_model_config")
    said = [f"{name} {value}" for name, value in raw.items() if name not in neutral]
    return ", ".join(said) or "none"
