"""Claims about v4jax/checkpoint/names.py."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict
from reference.weights import shapes as reference_shapes
from trees import random_params, small_config

from configs.models import flash, pro
from v4jax.checkpoint import (
    Slot,
    from_official,
    official_names,
    to_official,
    transformers_to_official,
)
from v4jax.checkpoint.names import official_shapes
from v4jax.parameter_tree import abstract_params

CONFIGS = {
    "small": small_config(),
    "pro_pattern": small_config(compress_ratios=(128, 128, 4, 128, 4, 128, 4, 0)),
    "no_hash": small_config(num_hash_layers=0),
    "no_mtp": small_config(num_nextn_predict_layers=0, compress_ratios=(0, 0, 4, 128, 4, 128, 4)),
    "window_only": small_config(num_hidden_layers=1, compress_ratios=(0, 0), num_hash_layers=1),
}


@pytest.fixture(params=CONFIGS.values(), ids=CONFIGS)
def cfg(request):
    return request.param


# ---- names ---------------------------------------------------------------------------------------


def test_names_are_the_official_ones(cfg):
    """Those of docs/equations.md#checkpoint-names, which the reference writes out a second time."""
    assert set(official_names(cfg)) == set(reference_shapes(cfg))


def test_every_element_of_the_tree_has_exactly_one_name(cfg):
    seen = {
        path: np.zeros(leaf.shape, int) for path, leaf in flatten_dict(abstract_params(cfg)).items()
    }
    for slot in official_names(cfg).values():
        seen[slot.path][slot.index] += 1
    assert all((count == 1).all() for count in seen.values())


def test_the_tests_tree_is_the_models(cfg):
    tree, declared = flatten_dict(random_params(cfg)), flatten_dict(abstract_params(cfg))
    assert {path: (leaf.shape, leaf.dtype) for path, leaf in tree.items()} == {
        path: (leaf.shape, leaf.dtype) for path, leaf in declared.items()
    }


def test_a_slot_is_path_index_transpose():
    names = official_names(flash())
    assert Slot._fields == ("path", "index", "transpose")
    experts = ("layers_3_42", "block_1", "ffn", "experts", "w1")
    assert names["layers.4.ffn.experts.7.w1.weight"] == (experts, (0, 7), True)
    assert names["layers.42.ffn.experts.255.w1.weight"] == (experts, (19, 255), True)
    assert names["layers.41.ffn.gate.bias"] == (
        ("router", "layers_3_42", "block_0", "ffn", "bias"),
        (19,),
        False,
    )
    assert names["layers.1.ffn.gate.tid2eid"] == (
        ("router", "layers_0_1", "block_0", "ffn", "tid2eid"),
        (1,),
        False,
    )
    assert names["mtp.0.ffn.experts.3.w2.weight"] == (
        ("mtp", "block", "ffn", "experts", "w2"),
        (3,),
        True,
    )
    assert names["mtp.0.attn_norm.weight"] == (("mtp", "block", "attn_norm", "weight"), (), False)
    assert names["hc_head_fn"] == (("hc_head", "fn"), (), True)


def test_layers_come_in_file_order():
    layers = [
        name.split(".")[1] for name in official_names(small_config()) if name.startswith("layers.")
    ]
    assert [key for key, _ in itertools.groupby(layers)] == [str(n) for n in range(7)]


@pytest.mark.parametrize(
    ("config", "experts"), [(flash(), 256), (pro(), 384)], ids=["flash", "pro"]
)
def test_released_sizes_have_official_shapes(config, experts):
    shapes, layers = official_shapes(config), config.num_hidden_layers
    hidden, heads = config.hidden_size, config.num_attention_heads
    assert sum(".experts." in name for name in shapes) == 3 * experts * (layers + 1)
    assert shapes["layers.3.attn.wo_a.weight"] == (
        config.o_groups * 1024,
        heads // config.o_groups * 512,
    )
    assert shapes["layers.3.attn.compressor.wkv.weight"] == (512, hidden)
    assert shapes["layers.4.attn.compressor.wkv.weight"] == (1024, hidden)
    assert shapes["layers.4.attn.compressor.ape"] == (4, 1024)
    assert shapes["layers.4.attn.indexer.wq_b.weight"] == (64 * 128, config.q_lora_rank)
    assert shapes[f"layers.{layers - 1}.ffn.experts.{experts - 1}.w2.weight"] == (
        hidden,
        config.moe_intermediate_size,
    )
    assert shapes["layers.2.ffn.gate.tid2eid"] == (129280, 6)
    assert shapes["layers.9.hc_attn_fn"] == (24, 4 * hidden)
    assert shapes["head.weight"] == shapes["embed.weight"] == (129280, hidden)


@pytest.mark.parametrize(
    ("written", "official"),
    [
        ("model.embed_tokens.weight", "embed.weight"),
        ("head.weight", "head.weight"),
        ("model.norm.weight", "norm.weight"),
        ("model.hc_head.hc_fn", "hc_head_fn"),
        ("model.hc_head.hc_scale", "hc_head_scale"),
        ("model.layers.3.attn.norm.weight", "layers.3.attn.kv_norm.weight"),
        ("model.layers.3.attn.q_norm.weight", "layers.3.attn.q_norm.weight"),
        ("model.layers.3.attn_norm.weight", "layers.3.attn_norm.weight"),
        ("model.layers.3.attn.compressor.norm.weight", "layers.3.attn.compressor.norm.weight"),
        (
            "model.layers.3.attn.indexer.compressor.norm.weight",
            "layers.3.attn.indexer.compressor.norm.weight",
        ),
        ("model.layers.3.hc_attn_fn", "layers.3.hc_attn_fn"),
    ],
)
def test_what_transformers_writes_is_understood(written, official):
    assert transformers_to_official(written) == official


def test_official_names_are_left_alone(cfg):
    assert all(transformers_to_official(name) == name for name in official_names(cfg))


# ---- trees ---------------------------------------------------------------------------------------


def test_official_orientation():
    cfg, params = small_config(), random_params(small_config())
    assert [group.name for group in cfg.layer_groups] == ["layers_0_1", "layers_2_2", "layers_3_6"]
    tensors = to_official(cfg, params)
    block = params["layers_3_6"]["block_1"]
    np.testing.assert_array_equal(
        tensors["layers.6.ffn.experts.5.w2.weight"], block["ffn"]["experts"]["w2"][1, 5].T
    )
    np.testing.assert_array_equal(tensors["layers.4.attn.wo_a.weight"], block["attn"]["wo_a"][0].T)
    np.testing.assert_array_equal(
        tensors["layers.4.attn.compressor.ape"], block["attn"]["compressor"]["ape"][0]
    )
    np.testing.assert_array_equal(tensors["embed.weight"], params["embed"]["weight"])
    np.testing.assert_array_equal(tensors["head.weight"], params["head"]["weight"].T)
    np.testing.assert_array_equal(tensors["mtp.0.e_proj.weight"], params["mtp"]["e_proj"].T)
    assert {name: tensor.shape for name, tensor in tensors.items()} == official_shapes(cfg)
    assert all(tensor.flags.c_contiguous for tensor in tensors.values())


def test_every_matrix_is_transposed_and_nothing_else(cfg):
    """Only the embedding, ape and the hash tables are 2-D tensors stored as in files."""
    shapes = official_shapes(cfg)
    for name, slot in official_names(cfg).items():
        as_stored = name == "embed.weight" or name.endswith((".ape", ".tid2eid"))
        assert slot.transpose == (len(shapes[name]) == 2 and not as_stored), name


def test_there_and_back_is_exact(cfg):
    params = random_params(cfg)
    back = from_official(cfg, to_official(cfg, params))
    assert jax.tree.structure(back) == jax.tree.structure(params)
    jax.tree.map(np.testing.assert_array_equal, back, params)


def test_hash_tables_are_exact_integers():
    cfg = small_config(n_routed_experts=384, moe_intermediate_size=2)
    params, path = random_params(cfg), ("router", "layers_2_2", "block_0", "ffn", "tid2eid")
    flatten_dict(params)[path][0, 5] = 383, 257  # bfloat16 would say 384, 256
    tensors = to_official(cfg, params)
    table = tensors["layers.2.ffn.gate.tid2eid"]
    assert table.dtype == np.int64 and table[5].tolist() == [383, 257]
    leaf = flatten_dict(from_official(cfg, tensors, "bfloat16"))[path]
    assert leaf.dtype == np.float32
    np.testing.assert_array_equal(leaf[0], table)


def test_gradients_map_like_parameters():
    cfg = small_config()
    params = random_params(cfg)
    grads = jax.jit(
        jax.grad(lambda tree: sum(jnp.sum(leaf**2) / 2 for leaf in jax.tree.leaves(tree)))
    )(params)
    got, expected = to_official(cfg, grads), to_official(cfg, params)
    assert list(got) == list(expected)
    for name in got:
        np.testing.assert_array_equal(got[name], expected[name], err_msg=name)


def test_bfloat16_leaves_keep_their_dtype():
    cfg, tree = small_config(), random_params(small_config())
    tree["head"]["weight"] = tree["head"]["weight"].astype(jnp.bfloat16)
    assert to_official(cfg, tree)["head.weight"].dtype == jnp.bfloat16


def edited(tree, path, leaf):
    flat = flatten_dict(tree)
    if leaf is None:
        del flat[path]
    else:
        flat[path] = leaf
    return unflatten_dict(flat)


@pytest.mark.parametrize(
    ("path", "leaf", "message"),
    [
        (("norm", "weight"), None, r"missing parameter norm/weight \[48\]"),
        (("norm", "bias"), np.zeros(48), r"unexpected parameter norm/bias \[48\]"),
        (
            ("mtp", "e_proj"),
            np.zeros((48, 47)),
            r"parameter mtp/e_proj: got shape \[48, 47\]; must be \[48, 48\]",
        ),
        (
            ("router", "layers_2_2", "block_0", "ffn", "tid2eid"),
            np.full((1, 97, 2), 0.5),
            "layers.2.ffn.gate.tid2eid: got values that are not integers",
        ),
    ],
)
def test_trees_of_another_model_are_refused(path, leaf, message):
    with pytest.raises(ValueError, match=message):
        to_official(small_config(), edited(random_params(small_config()), path, leaf))


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("norm.weight", None, r"missing tensor norm.weight \[48\]"),
        ("layers.7.attn_norm.weight", np.zeros(48), "unexpected tensor layers.7.attn_norm.weight"),
        (
            "head.weight",
            np.zeros((48, 97)),
            r"tensor head.weight: got shape \[48, 97\]; must be \[97, 48\]",
        ),
    ],
)
def test_tensors_of_another_model_are_refused(name, tensor, message):
    tensors = to_official(small_config(), random_params(small_config()))
    tensors = {key: value for key, value in tensors.items() if key != name}
    with pytest.raises(ValueError, match=message):
        from_official(small_config(), tensors if tensor is None else tensors | {name: tensor})


def test_how_many_are_missing_is_told():
    with pytest.raises(
        ValueError, match=r"missing tensor embed.weight \[97, 48\] \(and 3.. more\)"
    ):
        from_official(small_config(), {})
