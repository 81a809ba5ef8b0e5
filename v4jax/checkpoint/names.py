"""Maps official tensor names to places in the parameter tree and back, by one literal table.

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
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from v4jax.config import CSA, WINDOW_ONLY, LayerKind, ModelConfig
from v4jax.model.init import abstract_params

# (where it exists, official name, path in the tree, transposed). {layer} is layers.N or mtp.0,
# {block} its place in the tree, {e} an expert.
_TABLE = (
    ("model", "embed.weight", "embed/weight", False),
    ("model", "norm.weight", "norm/weight", False),
    ("model", "hc_head_fn", "hc_head/fn", True),
    ("model", "hc_head_base", "hc_head/base", False),
    ("model", "hc_head_scale", "hc_head/scale", False),
    ("model", "head.weight", "head/weight", True),
    ("block", "{layer}.attn_norm.weight", "{block}/attn_norm/weight", False),
    ("block", "{layer}.ffn_norm.weight", "{block}/ffn_norm/weight", False),
    ("block", "{layer}.hc_attn_fn", "{block}/hc_attn/fn", True),
    ("block", "{layer}.hc_attn_base", "{block}/hc_attn/base", False),
    ("block", "{layer}.hc_attn_scale", "{block}/hc_attn/scale", False),
    ("block", "{layer}.hc_ffn_fn", "{block}/hc_ffn/fn", True),
    ("block", "{layer}.hc_ffn_base", "{block}/hc_ffn/base", False),
    ("block", "{layer}.hc_ffn_scale", "{block}/hc_ffn/scale", False),
    ("block", "{layer}.attn.attn_sink", "{block}/attn/attn_sink", False),
    ("block", "{layer}.attn.wq_a.weight", "{block}/attn/wq_a", True),
    ("block", "{layer}.attn.q_norm.weight", "{block}/attn/q_norm/weight", False),
    ("block", "{layer}.attn.wq_b.weight", "{block}/attn/wq_b", True),
    ("block", "{layer}.attn.wkv.weight", "{block}/attn/wkv", True),
    ("block", "{layer}.attn.kv_norm.weight", "{block}/attn/kv_norm/weight", False),
    ("block", "{layer}.attn.wo_a.weight", "{block}/attn/wo_a", True),
    ("block", "{layer}.attn.wo_b.weight", "{block}/attn/wo_b", True),
    ("compressed", "{layer}.attn.compressor.ape", "{block}/attn/compressor/ape", False),
    ("compressed", "{layer}.attn.compressor.wkv.weight", "{block}/attn/compressor/wkv", True),
    ("compressed", "{layer}.attn.compressor.wgate.weight", "{block}/attn/compressor/wgate", True),
    (
        "compressed",
        "{layer}.attn.compressor.norm.weight",
        "{block}/attn/compressor/norm/weight",
        False,
    ),
    ("csa", "{layer}.attn.indexer.wq_b.weight", "{block}/attn/indexer/wq_b", True),
    ("csa", "{layer}.attn.indexer.weights_proj.weight", "{block}/attn/indexer/weights_proj", True),
    ("csa", "{layer}.attn.indexer.compressor.ape", "{block}/attn/indexer/compressor/ape", False),
    (
        "csa",
        "{layer}.attn.indexer.compressor.wkv.weight",
        "{block}/attn/indexer/compressor/wkv",
        True,
    ),
    (
        "csa",
        "{layer}.attn.indexer.compressor.wgate.weight",
        "{block}/attn/indexer/compressor/wgate",
        True,
    ),
    (
        "csa",
        "{layer}.attn.indexer.compressor.norm.weight",
        "{block}/attn/indexer/compressor/norm/weight",
        False,
    ),
    ("block", "{layer}.ffn.gate.weight", "{block}/ffn/gate", True),
    ("hash", "{layer}.ffn.gate.tid2eid", "router/{block}/ffn/tid2eid", False),
    ("score", "{layer}.ffn.gate.bias", "router/{block}/ffn/bias", False),
    ("expert", "{layer}.ffn.experts.{e}.w1.weight", "{block}/ffn/experts/w1", True),
    ("expert", "{layer}.ffn.experts.{e}.w2.weight", "{block}/ffn/experts/w2", True),
    ("expert", "{layer}.ffn.experts.{e}.w3.weight", "{block}/ffn/experts/w3", True),
    ("block", "{layer}.ffn.shared_experts.w1.weight", "{block}/ffn/shared_experts/w1", True),
    ("block", "{layer}.ffn.shared_experts.w2.weight", "{block}/ffn/shared_experts/w2", True),
    ("block", "{layer}.ffn.shared_experts.w3.weight", "{block}/ffn/shared_experts/w3", True),
    ("mtp", "mtp.0.e_proj.weight", "mtp/e_proj", True),
    ("mtp", "mtp.0.h_proj.weight", "mtp/h_proj", True),
    ("mtp", "mtp.0.enorm.weight", "mtp/enorm/weight", False),
    ("mtp", "mtp.0.hnorm.weight", "mtp/hnorm/weight", False),
    ("mtp", "mtp.0.norm.weight", "mtp/norm/weight", False),
    ("mtp", "mtp.0.hc_head_fn", "mtp/hc_head/fn", True),
    ("mtp", "mtp.0.hc_head_base", "mtp/hc_head/base", False),
    ("mtp", "mtp.0.hc_head_scale", "mtp/hc_head/scale", False),
)

# transformers 5's name -> official name. Its own pattern for `.norm.` also catches kv_norm
# (docs/equations.md#trap-37).
_FROM_TRANSFORMERS = (
    (r"^model\.", ""),
    (r"^embed_tokens\.weight$", "embed.weight"),
    (r"^hc_head\.hc_(fn|base|scale)$", r"hc_head_\1"),
    (r"\.attn\.norm\.weight$", ".attn.kv_norm.weight"),
)

Path = tuple[str, ...]
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
    names = dict(_expand({"model"}, "", "", (), 1))
    experts = cfg.n_routed_experts
    for group in cfg.layer_groups:
        for r in range(group.repeats):
            for i, kind in enumerate(group.kinds):
                layer = f"layers.{group.first + r * len(group.kinds) + i}"
                names.update(
                    _expand(_parts_of(kind), layer, f"{group.name}/block_{i}", (r,), experts)
                )
    if cfg.num_nextn_predict_layers:
        kind = LayerKind(WINDOW_ONLY, hash_routed=False)
        names.update(_expand(_parts_of(kind) | {"mtp"}, "mtp.0", "mtp/block", (), experts))
    return names


def transformers_to_official(name: str) -> str:
    """The official name of a tensor that save_pretrained wrote; official names pass unchanged."""
    for pattern, replacement in _FROM_TRANSFORMERS:
        name = re.sub(pattern, replacement, name)
    return name


def official_shapes(cfg: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Official name -> shape in official orientation, derived from the model's own shapes."""
    leaves = _declared(cfg)
    shapes = {}
    for name, slot in official_names(cfg).items():
        shape = leaves[slot.path].shape[len(slot.index) :]
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
    if found not in (jnp.dtype("float32"), jnp.dtype("bfloat16")):
        raise ValueError(f"dtype: got {dtype!r}; allowed: 'float32', 'bfloat16'")
    return found


def leaf_dtype(name: str, dtype: np.dtype) -> np.dtype:
    """The dtype of a tensor in the tree: as in official files, only *.weight follows `dtype`.

    tid2eid is stored as integers in float32, so that jax.grad works.
    """
    return dtype if name.endswith(".weight") else np.dtype("float32")


# ---- trees ---------------------------------------------------------------------------------------


def to_official(cfg: ModelConfig, tree: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Official name -> contiguous array in official orientation.

    Works for parameters and for any tree like them, such as gradients.

    Raises:
      ValueError: a leaf that is missing, extra or of another shape, or a tid2eid with values that
        are not integers.
    """
    leaves = {path: np.asarray(leaf) for path, leaf in check_tree(cfg, tree).items()}
    return {
        name: read_slot(name, leaves[slot.path], slot) for name, slot in official_names(cfg).items()
    }


def read_slot(name: str, leaf: Any, slot: Slot, dtype: np.dtype | None = None) -> np.ndarray:
    """Takes one official tensor out of a NumPy or JAX leaf, as a contiguous array.

    safetensors ignores strides and writes raw memory.
    """
    array = np.asarray(leaf[slot.index])
    if name.endswith(".tid2eid"):
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
    declared = _declared(cfg)
    tables_first = sorted(declared, key=lambda path: path[-1] != "tid2eid")
    of_leaf: dict[Path, list[tuple[str, Slot]]] = {path: [] for path in tables_first}
    for name, slot in official_names(cfg).items():
        of_leaf[slot.path].append((name, slot))
    leaves = {}
    for path, slots in of_leaf.items():
        leaf = np.empty(declared[path].shape, leaf_dtype(slots[0][0], dtype))
        for name, slot in slots:
            tensor = read(name)
            leaf[slot.index] = tensor.T if slot.transpose else tensor
        leaves[path] = leaf if put is None else put(path, leaf)
    return unflatten_dict(leaves)


# ---- checks --------------------------------------------------------------------------------------


def check_shapes(cfg: ModelConfig, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Refuses tensors that are not exactly those of `cfg`.

    shapes: official name -> shape in official orientation.
    """
    same_names(official_shapes(cfg), shapes, "tensor")
    _same_shapes(official_shapes(cfg), shapes, "tensor")


def check_tree(cfg: ModelConfig, tree: Mapping[str, Any]) -> dict[Path, Any]:
    """The leaves by path; refuses a tree whose leaves are not exactly those of `cfg`."""
    leaves = flatten_dict(tree)
    expected = {"/".join(path): leaf.shape for path, leaf in _declared(cfg).items()}
    got = {"/".join(path): np.shape(leaf) for path, leaf in leaves.items()}
    same_names(expected, got, "parameter")
    _same_shapes(expected, got, "parameter")
    return leaves


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


def _parts_of(kind: LayerKind) -> set[str]:
    """The parts of the table that a layer of this kind has."""
    parts = {"block", "expert", "hash" if kind.hash_routed else "score"}
    parts |= {"compressed"} if kind.compress_ratio else set()
    return parts | ({"csa"} if kind.compress_ratio == CSA else set())


def _expand(parts: set[str], layer: str, block: str, index: tuple[int, ...], experts: int):
    """Yields (name, slot) of one layer's tensors: the table's lines of `parts`.

    The layer's leaves are at `block` and `index` of the tree.
    """
    rows = [row for row in _TABLE if row[0] in parts]
    for part, name, path, transpose in rows:
        if part != "expert":
            yield name.format(layer=layer), Slot(_path(path, block), index, transpose)
    for e in range(experts):
        for part, name, path, transpose in rows:
            if part == "expert":
                yield (
                    name.format(layer=layer, e=e),
                    Slot(_path(path, block), (*index, e), transpose),
                )


def _path(pattern: str, block: str) -> Path:
    return tuple(pattern.format(block=block).split("/"))


def _declared(cfg: ModelConfig) -> dict[Path, Any]:
    """Path -> leaf (jax.ShapeDtypeStruct) that the model declares."""
    return flatten_dict(abstract_params(cfg))
