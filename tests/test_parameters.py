"""The table of parameters is what the model declares, and nobody else guesses from names."""

import ast
import functools
import pathlib
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from flax.traverse_util import flatten_dict
from reference import muon as muon_reference
from reference.weights import shapes as reference_shapes
from trees import small_config

from configs.models import flash, pro
from v4jax.checkpoint.formats import FORMATS, allowed_kinds, kind_in
from v4jax.checkpoint.names import official_names, official_shapes
from v4jax.config import ModelConfig
from v4jax.context import Context
from v4jax.model.segments import read_segments
from v4jax.model.transformer import Transformer
from v4jax.parameter_tree import abstract_params, leaves, param_axes, spec_named, spec_of
from v4jax.parameters import TABLE

ROOT = pathlib.Path(__file__).parent.parent
NO_MTP = {"num_nextn_predict_layers": 0, "compress_ratios": (0, 0, 4, 128, 4, 128, 4)}
CONFIGS = {
    "flash": flash(),
    "pro": pro(),
    "small": small_config(),
    "no_mtp": small_config(**NO_MTP),
    "three_streams": small_config(hc_mult=3, num_hash_layers=0),
}


@pytest.fixture(params=CONFIGS.values(), ids=CONFIGS)
def cfg(request):
    return request.param


# ---- the model and its files ---------------------------------------------------------------------


def declared(cfg: ModelConfig) -> dict:
    """Path -> (shape, dtype, axes) of what the modules really declare."""

    def fresh():
        tokens_BS = jnp.zeros((1, 1), jnp.int32)
        segments = read_segments(cfg, 1, None)
        return Transformer(Context(), cfg).init(jax.random.key(0), tokens_BS, segments)

    variables = jax.eval_shape(fresh)
    boxes = flatten_dict(dict(variables["params"]) | {"router": dict(variables["router"])})
    assert all(isinstance(box, nn.LogicallyPartitioned) for box in boxes.values())
    return {
        path: (box.value.shape, box.value.dtype, tuple(box.names)) for path, box in boxes.items()
    }


def test_the_model_declares_exactly_the_table(cfg):
    shapes, axes = flatten_dict(abstract_params(cfg)), flatten_dict(param_axes(cfg))
    assert {path: (leaf.shape, leaf.dtype, axes[path]) for path, leaf in shapes.items()} == (
        declared(cfg)
    )


def test_the_tree_is_in_the_order_of_jax(cfg):
    paths, _ = zip(*jax.tree_util.tree_leaves_with_path(abstract_params(cfg)), strict=True)
    assert [tuple(key.key for key in path) for path in paths] == list(leaves(cfg))


def test_released_files_hold_exactly_the_table(cfg):
    assert official_shapes(cfg) == reference_shapes(cfg)


def test_the_released_models_use_every_line():
    assert {leaf.spec for leaf in leaves(flash()).values()} == set(TABLE)
    assert {spec.part for spec in TABLE if spec.optimizer is None} == {"router"}


def test_a_path_and_an_official_name_lead_to_the_same_line(cfg):
    for name, slot in official_names(cfg).items():
        assert spec_of(slot.path) is spec_named(name), name
        assert len(slot.index) + len(spec_of(slot.path).shape) == len(
            leaves(cfg)[slot.path].shape
        ) + (spec_of(slot.path).is_expert)


@pytest.mark.parametrize("path", ["attn/wq_a", "layers_0_1/block_0/attn/wq_c", "mtp/wq_a", ""])
def test_a_path_of_no_parameter_is_refused(path):
    with pytest.raises(ValueError, match=f"^{path}: not a parameter"):
        spec_of(tuple(path.split("/")))


@pytest.mark.parametrize("name", ["layers.1.attn.wq_c.weight", "mtp.1.enorm.weight", "weight"])
def test_a_name_of_no_tensor_is_refused(name):
    with pytest.raises(ValueError, match=f"{name}: not a tensor"):
        spec_named(name)


# ---- what the table says -------------------------------------------------------------------------


@pytest.mark.parametrize("spec", TABLE, ids=lambda spec: spec.path)
def test_a_line_agrees_with_the_rules(spec):
    """The rules of docs/equations.md, which the table spells out."""
    assert len(spec.shape) == len(spec.axes)
    expected = muon_reference.optimizer_of(spec.official)
    assert (spec.optimizer or "none") == expected
    matrix = len(spec.shape) - spec.is_expert == 2
    if spec.optimizer == "muon":
        assert matrix and spec.transpose
    # AdamW's matrices: the embedding, the head, and positions within a window.
    if spec.optimizer == "adamw":
        assert not matrix or spec.part in ("embed", "head") or spec.axes[0] == "ape_rows"
    assert (spec.uses == "0") == (spec.optimizer != "muon" and spec.part != "head")
    # What is stored in low precision is a matrix in the compute dtype.
    if spec.is_low:
        assert spec.optimizer == "muon" and not spec.float32
    if spec.precision in ("float32", "int64"):
        assert spec.float32
    assert spec.is_norm == spec.official.endswith("norm.weight")


def test_files_store_what_the_table_says():
    """Only what a release stores in low precision ever is; float32 stays float32."""
    stored = {"fp8": "F8_E4M3", "mxfp4": "I8", "bfloat16": "BF16", "float32": "F32", "int64": "I64"}
    for name in official_names(small_config()):
        spec = spec_named(name)
        assert kind_in("official", name).dtype == stored[spec.precision]
        assert (kind_in("fp8", name).dtype == "F8_E4M3") == spec.is_low
        for format in FORMATS:
            assert kind_in(format, name) in allowed_kinds(name)
        for format in ("float32", "bfloat16"):
            kept = spec.precision in ("float32", "int64")
            expected = stored[spec.precision if kept else format]
            assert kind_in(format, name).dtype == expected


# ---- nobody guesses ------------------------------------------------------------------------------

WORDS = {
    word
    for spec in TABLE
    for text in (spec.path, spec.official)
    for word in re.split(r"[/.]", text)
    if word.isidentifier()
} - {"scale", "router"} | {"hc"}
"""Words of parameters' names, less those that also mean a collection or a file's suffix."""
FREE = (
    "v4jax/parameters.py",
    "v4jax/parameter_tree.py",
    "v4jax/checkpoint/load.py",
    "v4jax/checkpoint/carried.py",
    "v4jax/checkpoint/vision_tensors.py",
)
"""The table, its readers by name, and what reads the names of a file that may be anything."""


def guesses(text: str) -> list[str]:
    """Places in Python code that look at a name to find out what a parameter is."""
    return [ast.unparse(node) for node in ast.walk(ast.parse(text)) if _guesses(node)]


def _guesses(node: ast.AST) -> bool:
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
        return node.func.attr in ("startswith", "endswith") and any(map(_has_word, node.args))
    if not isinstance(node, ast.Compare):
        return False
    sides = [node.left, *node.comparators]
    named = any(_is_path(side) for side in sides)
    return named and any(_has_word(side) for side in sides)


def _is_path(node: ast.AST) -> bool:
    """path, name or the like, or a piece of one."""
    if isinstance(node, ast.Subscript):
        return _is_path(node.value)
    names = {"path", "name", "keys", "official"}
    is_name = isinstance(node, ast.Name) and node.id in names
    return is_name or (isinstance(node, ast.Attribute) and node.attr in names)


def _has_word(node: ast.AST) -> bool:
    constants = [one.value for one in ast.walk(node) if isinstance(one, ast.Constant)]
    texts = [value for value in constants if isinstance(value, str)]
    return any(text.strip("./_") in WORDS for text in texts)


@functools.cache
def files() -> list[pathlib.Path]:
    return list((ROOT / "v4jax").rglob("*.py"))


@pytest.mark.parametrize("path", files(), ids=lambda path: path.relative_to(ROOT).as_posix())
def test_what_a_parameter_is_is_asked_of_the_table(path):
    if path.relative_to(ROOT).as_posix() not in FREE:
        assert guesses(path.read_text()) == []


@pytest.mark.parametrize(
    "code",
    [
        'path[-1] in ("base", "scale", "ape")',
        'path[0] == "embed"',
        '"indexer" in path',
        'weight.name.startswith("head/")',
        'any(part.startswith("hc_") for part in path)',
        'name.endswith(".tid2eid")',
        'path[-2:] == ("compressor", "wkv")',
        '"_proj" in name or "gate" in weight.name',
    ],
)
def test_a_guess_is_found(code):
    assert guesses(code)


@pytest.mark.parametrize(
    "code", ['path.endswith(".json")', 'name == "config.json"', 'x in ("embed",)']
)
def test_other_names_are_free(code):
    assert guesses(code) == []
