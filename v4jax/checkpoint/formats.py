"""How each official tensor is stored: plain, fp8 with block scales, or MXFP4; both directions.

A whole checkpoint has one of four formats: "float32"; "bfloat16"; "official", that of instruct
releases (fp8 matrices, MXFP4 experts, ue8m0 scales); "fp8", that of -Base releases (experts in fp8
too, float32 scales). See docs/equations.md#low-precision.

Shapes: O output features, I input features.

Next file to read: v4jax/checkpoint/files.py.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from v4jax.parameter_tree import spec_named
from v4jax.quant import fp8, mxfp4, scales

FORMATS = ("float32", "bfloat16", "fp8", "official")

DTYPES = {
    "F32": np.dtype("float32"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I64": np.dtype("int64"),
    "I32": np.dtype("int32"),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
    "I8": np.dtype("int8"),
    "U8": np.dtype("uint8"),
}
"""safetensors' name of a dtype -> NumPy's dtype. MXFP4 is stored as I8, two numbers per byte."""


class Kind(NamedTuple):
    """safetensors' dtype of a tensor and, in low precision, of its scales."""

    dtype: str
    scale: str | None = None


FLOAT32, BFLOAT16, FP8_BASE, FP8, MXFP4 = (
    Kind("F32"),
    Kind("BF16"),
    Kind("F8_E4M3", "F32"),
    Kind("F8_E4M3", "F8_E8M0"),
    Kind("I8", "F8_E8M0"),
)


class Stored(NamedTuple):
    """A tensor as a file has it. `scale` is the tensor called *.scale; None in plain precision."""

    data: np.ndarray
    scale: np.ndarray | None = None


def check_format(dtype: Any) -> str:
    """`dtype` as one of FORMATS.

    Raises:
      ValueError: any other.
    """
    name = (
        dtype
        if isinstance(dtype, str)
        else getattr(dtype, "name", None) or getattr(dtype, "__name__", None)
    )
    if name not in FORMATS:
        raise ValueError(f"dtype: got {dtype!r}; allowed: {', '.join(map(repr, FORMATS))}")
    return name


def kind_in(format: str, name: str) -> Kind:
    """How a checkpoint in `format` stores the tensor called `name`.

    What released files keep in float32 is float32 in every format, and tid2eid int64. Only what
    they store in low precision ever is.

    Raises:
      ValueError: a name of no tensor.
    """
    precision = spec_named(name).precision
    if precision == "int64":
        return Kind("I64")
    if "float32" in (precision, format):
        return FLOAT32
    if "bfloat16" in (precision, format):
        return BFLOAT16
    if format == "fp8":
        return FP8_BASE
    return MXFP4 if precision == "mxfp4" else FP8


def allowed_kinds(name: str) -> tuple[Kind, ...]:
    """Every way to store the tensor called `name` that v4jax reads.

    Raises:
      ValueError: a name of no tensor.
    """
    return kinds_of(spec_named(name).precision)


def kinds_of(precision: str) -> tuple[Kind, ...]:
    """Every way to store a tensor of this precision (ParamSpec.precision) that v4jax reads."""
    if precision == "int64":
        return Kind("I64"), Kind("I32")
    kinds = [FLOAT32, BFLOAT16]
    if precision in ("fp8", "mxfp4"):
        kinds += [Kind("F8_E4M3", scale) for scale in ("F32", "F8_E8M0", "U8")]
    if precision == "mxfp4":
        kinds += [Kind("I8", scale) for scale in ("F8_E8M0", "U8")]
    return tuple(kinds)


def format_of(kinds: Mapping[str, Kind]) -> str:
    """The one of FORMATS that a checkpoint with these tensors has, judged by its matrices."""
    stored = {kind.dtype for name, kind in kinds.items() if spec_named(name).is_low}
    for dtype, format in (("I8", "official"), ("F8_E4M3", "fp8"), ("BF16", "bfloat16")):
        if dtype in stored:
            return format
    return "float32"


def shapes_of(kind: Kind, shape: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...] | None]:
    """Shapes of data and scale of a tensor of `shape`: in MXFP4, (256, 64) has (256, 32), (256, 2).

    Raises:
      ValueError: a matrix that MXFP4 cannot hold.
    """
    if kind.scale is None:
        return shape, None
    if kind.dtype == "I8":
        return (shape[0], shape[1] // 2), mxfp4.scale_shape((shape[0], shape[1]))
    return shape, fp8.scale_shape((shape[0], shape[1]))


def check_stored(kind: Kind, stored: Stored) -> None:
    """Refuses a tensor of low precision with numbers that are not finite.

    Raises:
      ValueError: NaN codes, scales that are not positive and finite, or products that float32
        cannot hold.
    """
    if kind.scale is None:
        return
    scale = _scale_of(kind, stored)
    if kind.dtype == "F8_E4M3":
        fp8.check_codes(stored.data)
    # Only where some product may overflow are all of them computed.
    if scale.size and scale.max() > np.finfo(np.float32).max / (2 * fp8.LARGEST):
        decode(kind, stored)


def decode(kind: Kind, stored: Stored) -> np.ndarray:
    """The numbers of a tensor: float32 [O,I] from fp8, bfloat16 from MXFP4, else as stored.

    bfloat16 holds MXFP4 numbers exactly.

    Raises:
      ValueError: NaN codes, or scales that are not positive and finite.
    """
    if kind.scale is None:
        return stored.data
    code = mxfp4 if kind.dtype == "I8" else fp8
    return code.dequantise(stored.data, _scale_of(kind, stored))


def _scale_of(kind: Kind, stored: Stored) -> np.ndarray:
    assert stored.scale is not None, f"a tensor of {kind} has scales"
    return float_scale(kind, stored.scale)


def float_scale(kind: Kind, scale: np.ndarray) -> np.ndarray:
    """The scales of a tensor of low precision as float32, whatever their form on disk.

    Raises:
      ValueError: a scale that is not positive and finite.
    """
    if kind.scale == "F32":
        return scales.check_float_scale(scale)
    return scales.from_ue8m0(scale.view(np.uint8))


def encode(kind: Kind, x: np.ndarray, scale: np.ndarray | None = None) -> Stored:
    """Rounds `x` (float32 or bfloat16) to `kind`, as the official kernels do.

    Args:
      scale: float32 scales of the file that the numbers come from. They are kept if they reproduce
        `x` exactly. A scale does not always follow from its numbers, since the largest number of a
        block may have been rounded down.

    Raises:
      ValueError: numbers that are not finite.
    """
    if kind.scale is None:
        return Stored(np.ascontiguousarray(x, DTYPES[kind.dtype]))
    code = mxfp4 if kind.dtype == "I8" else fp8
    x = np.ascontiguousarray(x, None if code is mxfp4 and x.dtype == mxfp4.BFLOAT16 else np.float32)
    if scale is not None and kind.scale != "F32" and (np.frexp(scale)[0] != 0.5).any():
        scale = None  # a float32 scale of a -Base release, which ue8m0 cannot hold
    if scale is not None:
        data, _ = code.quantise(x, scale)
        again, bits = code.dequantise(data, scale).astype(x.dtype, copy=False), f"u{x.itemsize}"
        if not np.array_equal(again.view(bits), x.view(bits)):
            scale = None
    if scale is None:
        data, scale = code.quantise(x)
    return Stored(
        data, scale if kind.scale == "F32" else scales.to_ue8m0(scale).view(DTYPES[kind.scale])
    )


def quantization_config(format: str) -> dict[str, Any]:
    """The quantization_config of a low-precision config.json; {} in plain precision.

    transformers, vLLM and SGLang choose by it how to read the files.
    """
    if format not in ("fp8", "official"):
        return {}
    how = {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "scale_fmt": "ue8m0",
        "weight_block_size": [fp8.BLOCK] * 2,
    }
    return {"quantization_config": how} | ({"expert_dtype": "fp4"} if format == "official" else {})
