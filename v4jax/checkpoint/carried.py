"""Tensors of a checkpoint that are no part of the trunk: the drafter's and the vision tower's.

They are checked by name, shape and dtype, and copied with their bytes: training never changes them.
In a run or store they are safetensors in a folder of their own.

Next file to read: v4jax/checkpoint/vision_tensors.py.
"""

import logging
import re
from collections.abc import Iterable, Mapping
from typing import Any

from v4jax.checkpoint.files import INDEX_FILE, Header, read_headers, read_tensor, tensor_size
from v4jax.checkpoint.formats import Kind, Stored, kinds_of, shapes_of
from v4jax.checkpoint.vision_tensors import VISION_BIAS, take_vision
from v4jax.config import ModelConfig
from v4jax.config.releases import DSparkConfig, read_dspark
from v4jax.drafter_parameters import drafter_tensors
from v4jax.storage import Place

DRAFTER, VISION = "drafter", "vision"
CARRIED = "carried"
"""The folder of a run or store for what is carried."""
_FIRST = "model.safetensors"
_STAGE = re.compile(r"mtp\.(\d+)\.")


def take_carried(
    cfg: ModelConfig, raw: Mapping[str, Any], headers: dict[str, Header]
) -> dict[str, Header]:
    """Takes out of `headers` what is carried, and checks that it is what config.json describes.

    Where config.json describes a drafter or a tower and there is none, it says so.

    Args:
      headers: official name -> place of the tensor, scales included.

    Raises:
      ValueError: naming the tensor: a drafter or tower that is not whole, or that config.json does
        not describe.
    """
    dspark = read_dspark(raw)
    carried = take_vision(cfg, raw, headers)
    drafter = _take_drafter(cfg, dspark, headers)
    if dspark and drafter and carried:
        _check_stages(dspark.stages, carried)
    return drafter | carried


def _check_stages(stages: int, carried: Mapping[str, Header]) -> None:
    """Refuses a tower unless each draft stage, and nothing else, has a bias that images need."""
    expected = [f"mtp.{stage}.ffn.gate.bias_vl" for stage in range(stages)]
    for name in expected:
        if name not in carried:
            raise ValueError(f"missing tensor {name} of the vision tower")
    for name in carried:
        if name.startswith("mtp.") and name not in expected:
            raise ValueError(f"unexpected tensor {name}: there are {stages} draft stages")


def part_of(name: str) -> str:
    """DRAFTER or VISION, of the name of a carried tensor."""
    return DRAFTER if name.startswith("mtp.") and not VISION_BIAS.fullmatch(name) else VISION


def parts_in(carried: Iterable[str]) -> list[str]:
    """Which of DRAFTER and VISION some carried tensors are of."""
    found = {part_of(name) for name in carried}
    return [part for part in (DRAFTER, VISION) if part in found]


def without_part(carried: Mapping[str, Header], part: str) -> dict[str, Header]:
    """What is still carried when a part is left out; all of mtp.* goes with the drafter."""
    gone = (lambda name: name.startswith("mtp.")) if part == DRAFTER else _is_vision
    return {name: header for name, header in carried.items() if not gone(name)}


def _is_vision(name: str) -> bool:
    return part_of(name) == VISION


def check_carried(cfg: ModelConfig, raw: Mapping[str, Any], folder: Place) -> dict[str, Header]:
    """Name -> place of the tensors that a run or store carries; {} without any.

    Raises:
      ValueError: they are not what config.json describes.
    """
    if not (folder / CARRIED / _FIRST).is_file() and not (folder / CARRIED / INDEX_FILE).is_file():
        return {}
    try:
        headers = read_headers(folder / CARRIED)
        found = take_carried(cfg, raw, headers)
    except ValueError as error:
        raise ValueError(f"{folder / CARRIED}: {error}") from None
    if headers:
        raise ValueError(f"{folder / CARRIED}: unexpected tensor {next(iter(headers))}")
    return found


def bytes_of(carried: Mapping[str, Header]) -> int:
    """Bytes of carried tensors."""
    return sum(tensor_size(one.dtype, one.shape) for one in carried.values())


def grouped(carried: Mapping[str, Header]) -> dict[str, dict[str, Header]]:
    """Name -> the tensor and, if it has some, its scales."""
    found: dict[str, dict[str, Header]] = {}
    for name, header in carried.items():
        if not _is_scale(name, carried):
            found[name] = {name: header}
            scale = _scale_of(name)
            if scale in carried:
                found[name][scale] = carried[scale]
    return found


def stored_as_is(carried: Mapping[str, Header], name: str) -> Stored:
    """A carried tensor, with its scales, as its file has it."""
    parts = [read_tensor(one, once=True) for one in parts_of(carried, name).values()]
    return Stored(*parts)


def parts_of(carried: Mapping[str, Header], name: str) -> dict[str, Header]:
    """The tensor `name` and, if it has some, its scales."""
    names = [one for one in (name, _scale_of(name)) if one in carried]
    return {one: carried[one] for one in names}


def said(carried: Mapping[str, Header]) -> str:
    """What is carried, in words; "" for nothing."""
    texts = []
    for part in parts_in(carried):
        own = {name: one for name, one in carried.items() if part_of(name) == part}
        texts.append(f"the {part} ({len(own)} tensors, {bytes_of(own) / 1e9:.3g} GB)")
    return " and ".join(texts)


def _scale_of(name: str) -> str:
    return f"{name.removesuffix('weight')}scale" if name.endswith(".weight") else ""


def _is_scale(name: str, carried: Mapping[str, Header]) -> bool:
    return name.endswith(".scale") and f"{name.removesuffix('scale')}weight" in carried


# ---- the drafter ---------------------------------------------------------------------------------


def _take_drafter(
    cfg: ModelConfig, dspark: DSparkConfig | None, headers: dict[str, Header]
) -> dict[str, Header]:
    """Takes mtp.* out of the headers if config.json describes a DSpark drafter."""
    found = [name for name in headers if name.startswith("mtp.")]
    if dspark is None:
        _check_module(found)
        return {}
    if not found:
        logging.getLogger("v4jax").warning(
            "config.json describes a DSpark drafter, and there are no mtp.* tensors: opened without"
        )
        return {}
    if "mtp.0.e_proj.weight" in found:
        raise ValueError(
            "tensor mtp.0.e_proj.weight: is of an MTP module; config.json has the dspark_* keys of "
            "a DSpark drafter, which has no such tensor"
        )
    odd = next((name for name in found if not _STAGE.match(name)), None)
    if odd is not None:
        raise ValueError(f"tensor {odd}: not a tensor of a DSpark drafter")
    stages = len({name.split(".")[1] for name in found})
    if stages != dspark.stages:
        raise ValueError(
            f"got {stages} draft stages (mtp.N) and {dspark.stages} entries of compress_ratios "
            "after the layers'; must be as many"
        )
    taken = {name: headers.pop(name) for name in found}
    _check_drafter(cfg, dspark, taken)
    return taken


def _check_module(found: list[str]) -> None:
    """Refuses mtp.* that is not the one MTP module of a first release."""
    later = [name for name in found if not name.startswith("mtp.0.")]
    if later or (found and "mtp.0.enorm.weight" not in found):
        raise ValueError(
            f"tensor {(later or found)[0]}: is of a DSpark drafter, and config.json has no "
            "dspark_* keys; allowed: these keys, or one MTP module with mtp.0.enorm.weight"
        )


def _check_drafter(cfg: ModelConfig, dspark: DSparkConfig, taken: dict[str, Header]) -> None:
    """Refuses a drafter with other tensors, shapes or dtypes than config.json implies."""
    left = {name: one for name, one in taken.items() if not VISION_BIAS.fullmatch(name)}
    for name, expected in drafter_tensors(cfg, dspark).items():
        if name not in left:
            raise ValueError(f"missing tensor {name} {list(expected.shape)} of the drafter")
        header, scale = left.pop(name), None
        if name.endswith(".weight"):
            scale = left.pop(_scale_of(name), None)
        kind = Kind(header.dtype, scale.dtype if scale else None)
        if kind not in kinds_of(expected.precision):
            with_it = f"with {scale.dtype} scales" if scale else "without scales"
            raise ValueError(f"tensor {name}: got {header.dtype} {with_it}, which it never has")
        data, scales = shapes_of(kind, expected.shape)
        if header.shape != data:
            raise ValueError(f"tensor {name}: got shape {list(header.shape)}; must be {list(data)}")
        if scale is not None and scale.shape != scales:
            must = f"must be {list(scales or ())}"
            raise ValueError(f"tensor {scale.stored}: got shape {list(scale.shape)}; {must}")
    if left:
        raise ValueError(f"unexpected tensor {next(iter(left))} of the drafter")
