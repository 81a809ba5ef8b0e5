"""Claims about v4jax/checkpoint/load.py and export.py."""

import json
import logging
import re
import tracemalloc

import jax
import numpy as np
import pytest
from exports import BF16, CFG, INDEX, PARAMS, TENSORS, assert_same, write
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import NamedSharding, PartitionSpec
from safetensors import safe_open
from safetensors.numpy import load_file
from trees import random_params, small_config

from v4jax.checkpoint import load_safetensors, official_names, save_safetensors
from v4jax.checkpoint.names import official_shapes
from v4jax.config import ModelConfig
from v4jax.parameter_tree import spec_named, spec_of


def rounded(tree):
    """The tree as a bfloat16 file stores it."""
    flat = flatten_dict(tree)
    return unflatten_dict(
        {path: leaf if kept(spec_of(path)) else leaf.astype(BF16) for path, leaf in flat.items()}
    )


def kept(spec):
    """Whether files of every format hold it in float32 or int64."""
    return spec.precision in ("float32", "int64")


# ---- round trips ---------------------------------------------------------------------------------


@pytest.mark.parametrize("max_file_bytes", [5 * 10**9, 100_000, 1])
def test_float32_round_trip_is_exact(tmp_path, max_file_bytes):
    save_safetensors(CFG, PARAMS, tmp_path / "out", dtype="float32", max_file_bytes=max_file_bytes)
    cfg, params = load_safetensors(tmp_path / "out")
    assert cfg == CFG
    assert_same(params, PARAMS)


@pytest.mark.parametrize("max_file_bytes", [5 * 10**9, 100_000])
def test_bfloat16_round_trip_is_exact(tmp_path, max_file_bytes):
    save_safetensors(CFG, PARAMS, tmp_path / "a", max_file_bytes=max_file_bytes)
    _, params = load_safetensors(tmp_path / "a", dtype="bfloat16")
    assert_same(params, rounded(PARAMS))
    save_safetensors(CFG, params, tmp_path / "b", max_file_bytes=max_file_bytes)
    for file in (tmp_path / "a").iterdir():
        assert (tmp_path / "b" / file.name).read_bytes() == file.read_bytes()


def test_bfloat16_files_widen_exactly_and_float32_files_round(tmp_path):
    save_safetensors(CFG, PARAMS, tmp_path / "bf16")
    save_safetensors(CFG, PARAMS, tmp_path / "f32", dtype="float32")
    wide = jax.tree.map(lambda leaf: leaf.astype(np.float32), rounded(PARAMS))
    assert_same(load_safetensors(tmp_path / "bf16", dtype="float32")[1], wide)
    assert_same(load_safetensors(tmp_path / "f32", dtype="bfloat16")[1], rounded(PARAMS))


def test_arrays_spread_over_devices_are_saved_alike(tmp_path):
    mesh = jax.make_mesh((len(jax.devices()),), ("x",), axis_types=(jax.sharding.AxisType.Auto,))

    def place(leaf):
        axes = ["x" if size % mesh.size == 0 else None for size in leaf.shape]
        first = axes.index("x") + 1 if "x" in axes else 0
        return jax.device_put(leaf, NamedSharding(mesh, PartitionSpec(*axes[:first])))

    save_safetensors(CFG, jax.tree.map(place, PARAMS), tmp_path / "jax")
    save_safetensors(CFG, PARAMS, tmp_path / "numpy")
    files = [(tmp_path / kind / "model.safetensors").read_bytes() for kind in ("jax", "numpy")]
    assert files[0] == files[1]


def test_files_of_others_load(tmp_path):
    assert_same(load_safetensors(write(tmp_path / "in"))[1], PARAMS)


def test_int32_hash_tables_load(tmp_path):
    tensors = {
        name: x.astype(np.int32) if name.endswith("tid2eid") else x for name, x in TENSORS.items()
    }
    assert_same(load_safetensors(write(tmp_path / "in", tensors))[1], PARAMS)


# ---- what export writes --------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "stored"), [("float32", "F32"), ("bfloat16", "BF16")])
def test_stored_names_shapes_and_dtypes_are_official(tmp_path, dtype, stored):
    save_safetensors(CFG, PARAMS, tmp_path / "out", dtype=dtype)
    with safe_open(tmp_path / "out" / "model.safetensors", framework="numpy") as file:
        headers = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
        assert file.metadata() == {"format": "pt"}
    assert {name: tuple(header.get_shape()) for name, header in headers.items()} == official_shapes(
        CFG
    )
    for name, header in headers.items():
        spec = spec_named(name)
        expected = {"int64": "I64", "float32": "F32"}.get(spec.precision, stored)
        assert header.get_dtype() == expected, name


def test_values_are_in_official_orientation(tmp_path):
    save_safetensors(CFG, PARAMS, tmp_path / "out", dtype="float32")
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert set(tensors) == set(TENSORS)
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(tensor, TENSORS[name], err_msg=name)


def test_config_json_is_official(tmp_path):
    save_safetensors(CFG, PARAMS, tmp_path / "out")
    raw = json.loads((tmp_path / "out" / "config.json").read_text())
    assert raw == json.loads(json.dumps(CFG.to_dict())) | {"torch_dtype": "bfloat16"}
    assert (
        raw["compress_ratios"] == [0, 0, 4, 128, 4, 128, 4, 0]
        and raw["rope_scaling"]["type"] == "yarn"
    )
    assert "quantization_config" not in raw and "layer_types" not in raw


def test_pieces_respect_the_limit_and_the_index_lists_them(tmp_path):
    save_safetensors(CFG, PARAMS, tmp_path / "out", max_file_bytes=60_000)
    index = json.loads((tmp_path / "out" / INDEX).read_text())
    files = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    assert files == [
        f"model-{i:05}-of-{len(files):05}.safetensors" for i in range(1, len(files) + 1)
    ]
    assert (
        set(index["weight_map"]) == set(official_names(CFG))
        and sorted(set(index["weight_map"].values())) == files
    )
    sizes = [
        sum(tensor.nbytes for tensor in load_file(tmp_path / "out" / file).values())
        for file in files
    ]
    assert (
        max(sizes) <= 60_000
        and sum(sizes) == index["metadata"]["total_size"]
        and len(sizes) == len(files) > 5
    )


def test_a_model_that_fits_is_one_file_without_index(tmp_path):
    save_safetensors(CFG, PARAMS, tmp_path / "deep" / "out")
    assert sorted(path.name for path in (tmp_path / "deep" / "out").iterdir()) == [
        "config.json",
        "model.safetensors",
    ]


# ---- memory --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """A checkpoint of some megabytes, mostly experts, and its size in memory as float32."""
    cfg = small_config(hidden_size=96, moe_intermediate_size=128, n_routed_experts=16)
    directory = tmp_path_factory.mktemp("wide") / "out"
    params = random_params(cfg)
    save_safetensors(cfg, params, directory)
    load_safetensors(directory)  # shapes are traced once and kept
    return cfg, params, directory, sum(leaf.nbytes for leaf in jax.tree.leaves(params))


def peak_of(action):
    tracemalloc.start()
    try:
        action()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_loading_holds_one_copy(wide):
    _, _, directory, size = wide
    assert size > 2e7
    assert peak_of(lambda: load_safetensors(directory)) < 1.1 * size


def test_loading_with_put_holds_one_leaf(wide):
    _, params, directory, size = wide
    largest = max(leaf.nbytes for leaf in jax.tree.leaves(params))
    peak = peak_of(lambda: load_safetensors(directory, put=lambda path, leaf: None))
    assert peak < largest + 0.12 * size < 0.5 * size  # 1 800 headers take 2 MB


def test_saving_holds_one_tensor(wide, tmp_path):
    cfg, params, _, size = wide
    peak = peak_of(lambda: save_safetensors(cfg, params, tmp_path / "out", dtype="float32"))
    assert peak < 0.1 * size


def test_put_places_every_leaf(tmp_path):
    seen = {}

    def put(path, leaf):
        seen[path] = leaf
        return path

    _, params = load_safetensors(write(tmp_path / "in"), put=put)
    assert flatten_dict(params) == {path: path for path in flatten_dict(PARAMS)}
    for path, leaf in flatten_dict(PARAMS).items():
        np.testing.assert_array_equal(seen[path], leaf)


# ---- transformers --------------------------------------------------------------------------------


def as_transformers(tensors):
    """Tensors under the names that transformers 5.23 gives them, MTP dropped."""
    renamed = {}
    for name, tensor in tensors.items():
        if not name.startswith("mtp."):
            name = re.sub(r"^hc_head_", "hc_head.hc_", name).replace(
                ".attn.kv_norm.", ".attn.norm."
            )
            name = {"embed.weight": "embed_tokens.weight"}.get(name, name)
            renamed[name if name == "head.weight" else f"model.{name}"] = tensor
    return renamed


def without_mtp(tree):
    tree = {name: value for name, value in tree.items() if name != "mtp"}
    return tree | {
        "router": {name: value for name, value in tree["router"].items() if name != "mtp"}
    }


def test_transformers_names_load_without_mtp_and_say_so(tmp_path, caplog):
    with caplog.at_level(logging.WARNING, logger="v4jax"):
        cfg, params = load_safetensors(write(tmp_path / "in", as_transformers(TENSORS)))
    assert [record.getMessage() for record in caplog.records] == [
        "transformers wrote no mtp.* tensors: loading without the MTP module"
    ]
    assert cfg == CFG.replace(num_nextn_predict_layers=0, compress_ratios=CFG.compress_ratios[:-1])
    assert_same(params, without_mtp(PARAMS))


def test_transformers_files_are_checked_like_others(tmp_path):
    tensors = as_transformers(TENSORS)
    del tensors["model.layers.3.attn.norm.weight"]
    with pytest.raises(ValueError, match="missing tensor layers.3.attn.kv_norm.weight"):
        load_safetensors(write(tmp_path / "in", tensors))


@pytest.mark.parity
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize(
    ("dtype", "max_file_bytes"), [("float32", 5 * 10**9), ("bfloat16", 300_000)]
)
def test_transformers_opens_an_export_and_what_it_saves_is_the_same(
    tmp_path, dtype, max_file_bytes
):
    transformers = pytest.importorskip("transformers")
    save_safetensors(CFG, PARAMS, tmp_path / "ours", dtype=dtype, max_file_bytes=max_file_bytes)
    model, info = transformers.DeepseekV4ForCausalLM.from_pretrained(
        tmp_path / "ours", output_loading_info=True
    )
    assert not any(info.values()), info
    assert str(model.dtype) == f"torch.{dtype}"
    model.save_pretrained(tmp_path / "theirs", max_shard_size="300KB")
    cfg, params = load_safetensors(tmp_path / "theirs", dtype=dtype)
    assert cfg == CFG.replace(num_nextn_predict_layers=0, compress_ratios=CFG.compress_ratios[:-1])
    assert_same(params, without_mtp(load_safetensors(tmp_path / "ours", dtype=dtype)[1]))
    assert ModelConfig.from_json(tmp_path / "theirs") == CFG
