"""Maps official tensor names to places in the parameter tree and back, by v4jax/parameters.py.

An official tensor is one matrix or vector of one layer, [out, in]. A leaf of the tree may stack
many of them, [in, out]. So a name maps to a leaf's path, an index into the leaf's leading axes, and
whether to transpose.

Example: layers.4.ffn.experts.7.w1.weight of V4-Flash is
tree["layers_3_42"]["block_1"]["ffn"]["experts"]["w1"][0, 7].T: layer 4 is the second block of the
pattern that starts at layer 3, in its first repetition.

Shapes: V vocabulary, K experts of a token.
Next file to read: v4jax/checkpoint/load.py.
"""

import logging
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple, cast

import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from v4jax.config import ModelConfig
from v4jax.parameter_tree import MTP_KIND, Path, layer_specs, leaves, single_specs, spec_named
from v4jax.parameters import ParamSpec
from v4jax.quant.packed import is_packed

# transformers 5's name -> official name. Its own pattern for `.norm.` also catches kv_norm
# (docs/equations.md#trap-37).
_FROM_TRANSFORMERS = (
    (r"^model\.", ""),
    (r"^embed_tokens\.weight$", "embed.weight"),
    (r"^hc_head\.hc_(fn|base|scale)$", r"hc_head_\1"),
    (r"\.attn\.norm\.weight$", ".attn.kv_norm.weight"),
)

_ROWS, _COLUMNS = 16, 1024


class Slot(NamedTuple):
    """The place of an official tensor: tree[path][index], transposed if `transpose`."""

    path: Path
    index: tuple[int, ...]
    transpose: bool


# ---- names ---------------------------------------------------------------------------------------


def official_names(cfg: ModelConfig) -> dict[str, Slot]:
    """Every tensor of a checkpoint of `cfg`, in file order.

    A slot's index is (repetition,) in a scanned group, and (repetition, expert) for its experts; in
    MTP it is () and (expert,).
    """
    own, experts = single_specs(cfg), cfg.n_routed_experts
    names = dict(_expand([spec for spec in own if spec.where == "model"], "", "", (), experts))
    for group in cfg.layer_groups:
        for r in range(group.repeats):
            for i, kind in enumerate(group.kinds):
                layer = f"layers.{group.first + r * len(group.kinds) + i}"
                block = f"{group.name}/block_{i}"
                names.update(_expand(layer_specs(kind), layer, block, (r,), experts))
    if cfg.num_nextn_predict_layers:
        specs = [*layer_specs(MTP_KIND), *(spec for spec in own if spec.where == "mtp")]
        names.update(_expand(specs, "mtp.0", "mtp/block", (), experts))
    return names


def transformers_to_official(name: str) -> str:
    """The official name of a tensor that save_pretrained wrote; official names pass unchanged."""
    for pattern, replacement in _FROM_TRANSFORMERS:
        name = re.sub(pattern, replacement, name)
    return name


def official_shapes(cfg: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Official name -> shape in official orientation."""
    declared, shapes = leaves(cfg), {}
    for name, slot in official_names(cfg).items():
        shape = declared[slot.path].shape[len(slot.index) :]
        shapes[name] = shape[::-1] if slot.transpose else shape
    return shapes


def plain_dtype(dtype: Any) -> np.dtype:
    """The NumPy dtype of "float32" or "bfloat16".

    Raises:
      ValueError: any other.
    """
    try:
        found = jnp.dtype(dtype)
    except TypeError:
        found = None
    if found is None or found not in (jnp.dtype("float32"), jnp.dtype("bfloat16")):
        raise ValueError(f"dtype: got {dtype!r}; allowed: 'float32', 'bfloat16'")
    return found


def leaf_dtypes(cfg: ModelConfig, dtype: Any) -> dict[Path, np.dtype]:
    """The dtype of every array of a loaded tree; `dtype` is "float32" or "bfloat16"."""
    plain = plain_dtype(dtype)
    return {path: held_in(leaf.spec.precision, plain) for path, leaf in leaves(cfg).items()}


def held_in(precision: str, dtype: np.dtype) -> np.dtype:
    """The dtype in which a tensor is loaded: what official files keep in float32 stays float32.

    Integers (tid2eid) are held in float32 too, so that jax.grad works.
    """
    return np.dtype("float32") if precision in ("float32", "int64") else dtype


# ---- trees ---------------------------------------------------------------------------------------


def to_official(cfg: ModelConfig, tree: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Official name -> contiguous array in official orientation.

    Works for parameters and for any tree like them, such as gradients.

    Raises:
      ValueError: a leaf that is missing, extra or of another shape, or a tid2eid with values that
        are not integers.
    """
    arrays = {path: np.asarray(leaf) for path, leaf in check_tree(cfg, tree).items()}
    return {
        name: read_slot(name, arrays[slot.path], slot) for name, slot in official_names(cfg).items()
    }


def read_slot(name: str, leaf: Any, slot: Slot, dtype: np.dtype | None = None) -> np.ndarray:
    """Takes one official tensor out of a NumPy or JAX leaf, as a contiguous array.

    safetensors ignores strides and writes raw memory.
    """
    array = np.asarray(leaf[slot.index])
    if spec_named(name).precision == "int64":
        ids = np.rint(array)
        if not np.array_equal(ids, array):
            raise ValueError(f"{name}: got values that are not integers; must hold expert ids")
        return np.ascontiguousarray(ids, dtype="int64")
    return (
        turned(array, dtype or array.dtype)
        if slot.transpose
        else np.ascontiguousarray(array, dtype=dtype)
    )


def turned(array: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """The transposed matrix as a contiguous array.

    It is moved in small tiles, so that whole cache lines are written, and as integers, since NumPy
    copies its own dtypes faster than bfloat16.
    """
    out = np.empty(array.shape[::-1], dtype)
    bits = np.dtype(f"u{out.itemsize}")
    moved = out.view(bits)
    for column in range(0, array.shape[1], _COLUMNS):
        for row in range(0, array.shape[0], _ROWS):
            rows, columns = slice(row, row + _ROWS), slice(column, column + _COLUMNS)
            moved[columns, rows] = array[rows, columns].astype(dtype, copy=False).view(bits).T
    return out


def from_official(
    cfg: ModelConfig, tensors: Mapping[str, np.ndarray], dtype: Any = "float32"
) -> dict[str, Any]:
    """Builds the parameter tree of NumPy arrays from official tensors in memory.

    `load_safetensors` does it from files.

    Raises:
      ValueError: a tensor that is missing, extra or of another shape.
    """
    check_shapes(cfg, {name: tensor.shape for name, tensor in tensors.items()})
    return fill_tree(cfg, tensors.__getitem__, plain_dtype(dtype))


def fill_tree(
    cfg: ModelConfig,
    read: Callable[[str], np.ndarray],
    dtype: np.dtype,
    put: Callable[[Path, np.ndarray], Any] | None = None,
) -> dict[str, Any]:
    """Builds the tree leaf by leaf from the tensors that `read(name)` returns.

    `put(path, array)` may move a finished leaf away; its result takes the leaf's place. Hash tables
    come first: they are small, and the only tensors whose values can be wrong.
    """
    declared = leaves(cfg)
    tables_first = sorted(declared, key=lambda path: declared[path].spec.precision != "int64")
    of_leaf: dict[Path, list[tuple[str, Slot]]] = {path: [] for path in tables_first}
    for name, slot in official_names(cfg).items():
        of_leaf[slot.path].append((name, slot))
    arrays = {}
    for path, slots in of_leaf.items():
        array = np.empty(declared[path].shape, held_in(declared[path].spec.precision, dtype))
        for name, slot in slots:
            tensor = read(name)
            array[slot.index] = tensor.T if slot.transpose else tensor
        arrays[path] = array if put is None else put(path, array)
    return unflatten_dict(arrays)


# ---- checks --------------------------------------------------------------------------------------


def check_shapes(cfg: ModelConfig, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Refuses tensors that are not exactly those of `cfg`.

    shapes: official name -> shape in official orientation.
    """
    same_names(official_shapes(cfg), shapes, "tensor")
    _same_shapes(official_shapes(cfg), shapes, "tensor")


def check_tree(cfg: ModelConfig, tree: Mapping[str, Any]) -> dict[Path, Any]:
    """The leaves by path; refuses a tree whose leaves are not exactly those of `cfg`."""
    if is_packed(tree):
        raise ValueError(
            "params: got packed weights; they are written by converting the checkpoint they came "
            "from (v4jax convert)"
        )
    arrays = cast(dict[Path, Any], flatten_dict(tree))
    expected = {"/".join(path): leaf.shape for path, leaf in leaves(cfg).items()}
    got = {"/".join(path): np.shape(array) for path, array in arrays.items()}
    same_names(expected, got, "parameter")
    _same_shapes(expected, got, "parameter")
    return arrays


def check_table(cfg: ModelConfig, name: str, ids_VK: np.ndarray) -> None:
    """Refuses a hash table with an id of no expert; warns if a token has one expert twice.

    See docs/equations.md#trap-24. A repeated expert is computed once per occurrence, as
    transformers does, whose fresh models have tables of zeros.
    """
    experts = cfg.n_routed_experts
    outside = ids_VK[(ids_VK < 0) | (ids_VK >= experts)]
    if outside.size:
        raise ValueError(
            f"{name}: got expert id {outside[0]}; must be in [0, n_routed_experts={experts})"
        )
    ordered_VK = np.sort(ids_VK, axis=1)
    repeated = np.flatnonzero((ordered_VK[:, 1:] == ordered_VK[:, :-1]).any(axis=1))
    if repeated.size:
        row, unset = (
            repeated[0],
            "" if ids_VK.any() else "; the table is all zeros, as in a model nobody has filled",
        )
        logging.getLogger("v4jax").warning(
            "%s: row %d is %s: one expert twice%s", name, row, ids_VK[row].tolist(), unset
        )


def same_names(expected: Mapping[str, tuple], got: Mapping[str, tuple], what: str) -> None:
    """Refuses missing or extra arrays. Both arguments map names to shapes."""
    missing = [name for name in expected if name not in got]
    extra = [name for name in got if name not in expected]
    if missing:
        raise ValueError(
            f"missing {what} {missing[0]} {list(expected[missing[0]])}{_more(missing)}"
        )
    if extra:
        raise ValueError(f"unexpected {what} {extra[0]} {list(got[extra[0]])}{_more(extra)}")


def _same_shapes(expected: Mapping[str, tuple], got: Mapping[str, tuple], what: str) -> None:
    for name, shape in expected.items():
        if tuple(got[name]) != tuple(shape):
            raise ValueError(f"{what} {name}: got shape {list(got[name])}; must be {list(shape)}")


def _more(names: list[str]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""


def _expand(
    specs: Iterable[ParamSpec], layer: str, block: str, index: tuple[int, ...], experts: int
) -> Iterator[tuple[str, Slot]]:
    """Yields (name, slot) of one layer's tensors, those of its experts last.

    The layer's leaves are at `block` and `index` of the tree.
    """
    stacked = []
    for spec in specs:
        path = tuple(spec.path.format(block=block).split("/"))
        if spec.is_expert:
            stacked.append((spec, path))
        else:
            yield spec.official.format(layer=layer), Slot(path, index, spec.transpose)
    for e in range(experts):
        for spec, path in stacked:
            name = spec.official.format(layer=layer, e=e)
            yield name, Slot(path, (*index, e), spec.transpose)
