"""Claims about v4jax/config/."""

import json
import math

import pytest
from trees import small_config

from configs.models import flash, pro
from v4jax.config import CSA, HCA, WINDOW_ONLY, LayerGroup, LayerKind, ModelConfig, RopeScaling

YARN = {
    "type": "yarn",
    "factor": 16,
    "original_max_position_embeddings": 65536,
    "beta_fast": 32,
    "beta_slow": 1,
}
NAMES = {
    0: "sliding_attention",
    4: "compressed_sparse_attention",
    128: "heavily_compressed_attention",
}
DROP = object()


def official():
    return small_config().to_dict()


def transformers_style():
    """The config.json that transformers 5.23 writes for `small_config`, where the styles differ."""
    cfg, raw = small_config(), official()
    for key in ("compress_ratios", "num_hash_layers", "rope_scaling", "swiglu_limit"):
        del raw[key]
    main = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 1 / 3}
    compress = YARN | {"rope_type": "yarn", "attention_factor": 1.0, "rope_theta": 160000.0}
    return raw | {
        "layer_types": [NAMES[ratio] for ratio in cfg.compress_ratios[:7]],
        "mlp_layer_types": ["hash_moe"] * 3 + ["moe"] * 4,
        "compress_rates": {"compressed_sparse_attention": 4, "heavily_compressed_attention": 128},
        "partial_rotary_factor": 1 / 3,
        "rope_parameters": {"main": main, "compress": compress},
        "swiglu_limit": 10.0,
        "pad_token_id": None,
        "dtype": "float32",
    }


def changed(raw, changes):
    raw = raw | changes
    return {key: value for key, value in raw.items() if value is not DROP}


# ---- files ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "cfg", [small_config(), flash(), pro(), small_config(rope_scaling=None)], ids=str
)
def test_what_is_written_is_read_back(cfg, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(cfg.to_dict()))
    assert ModelConfig.from_json(tmp_path) == cfg == ModelConfig.from_json(tmp_path / "config.json")
    assert hash(cfg) == hash(ModelConfig.from_json(tmp_path))


def test_both_styles_describe_the_same_model():
    assert ModelConfig.from_dict(transformers_style()) == small_config()


@pytest.mark.parametrize("mtp", [0, 1, None, DROP])
def test_transformers_counts_mtp_but_gives_its_layer_no_type(mtp):
    cfg = ModelConfig.from_dict(changed(transformers_style(), {"num_nextn_predict_layers": mtp}))
    assert cfg.num_nextn_predict_layers == (0 if mtp == 0 else 1)
    assert cfg.compress_ratios == (0, 0, 4, 128, 4, 128, 4) + (0,) * cfg.num_nextn_predict_layers


def test_rope_dims_come_from_the_partial_factor():
    raw = changed(transformers_style(), {"qk_rope_head_dim": DROP})
    assert (
        ModelConfig.from_dict(raw).qk_rope_head_dim == 8
    )  # 24 * 0.333... rounds to 8, where int() may give 7


def test_rope_of_transformers_without_yarn():
    rope = {
        "main": {"rope_theta": 5000.0},
        "compress": {"rope_type": "default", "rope_theta": 7000.0},
    }
    cfg = ModelConfig.from_dict(transformers_style() | {"rope_parameters": rope})
    assert (cfg.rope_theta, cfg.compress_rope_theta, cfg.rope_scaling) == (5000.0, 7000.0, None)


def test_keys_that_describe_no_equation_are_ignored():
    extra = {
        "quantization_config": {"quant_method": "fp8"},
        "torch_dtype": "bfloat16",
        "use_cache": True,
    }
    assert ModelConfig.from_dict(official() | extra) == small_config()


@pytest.mark.parametrize("style", [official, transformers_style])
@pytest.mark.parametrize(
    ("said", "ids", "written"),
    [
        (5, (5,), 5),
        ([5], (5,), 5),
        ([5, 6], (5, 6), [5, 6]),
        ([6, 5, 6, 5], (6, 5), [6, 5]),
        (None, (), None),
    ],
)
def test_every_end_token_is_read_and_written_back(style, said, ids, written):
    cfg = ModelConfig.from_dict(style() | {"eos_token_id": said})
    assert (cfg.eos_token_id, cfg.eos_token_ids) == (ids[0] if ids else None, ids)
    assert cfg.to_dict()["eos_token_id"] == written and "more_eos_token_ids" not in cfg.to_dict()
    again = ModelConfig.from_dict(cfg.to_dict())
    assert (again, again.eos_token_ids) == (cfg, ids)
    assert list(cfg.to_dict()) == list(small_config().to_dict())  # the place of the key, too


def test_a_missing_end_token_is_the_released_one_and_a_config_takes_a_list():
    cfg = ModelConfig.from_dict(changed(official(), {"eos_token_id": DROP, "bos_token_id": DROP}))
    assert (cfg.eos_token_ids, cfg.bos_token_id) == ((1,), 0)
    assert small_config(eos_token_id=[7, 1, 7]).eos_token_ids == (7, 1)
    assert small_config(eos_token_id=7, more_eos_token_ids=(7, 1)).eos_token_ids == (7, 1)
    assert small_config().replace(eos_token_id=9).eos_token_ids == (9,)
    assert small_config(eos_token_id=[7, 1]).replace(hidden_size=56).eos_token_ids == (7, 1)
    assert small_config().ending_at([1, 7, 7]).eos_token_ids == (1, 7)
    assert small_config(eos_token_id=None).ending_at([]).eos_token_ids == ()
    assert small_config(eos_token_id=None).ending_at([7]).eos_token_id == 7


@pytest.mark.parametrize(("said", "read"), [(3, 3), ([3], 3), (None, None)])
def test_a_begin_token_is_one_or_none(said, read):
    cfg = ModelConfig.from_dict(official() | {"bos_token_id": said})
    assert cfg.bos_token_id == cfg.to_dict()["bos_token_id"] == read


def test_what_else_ends_a_row_does_not_tell_models_apart():
    one, listed = small_config(), small_config(eos_token_id=[1, 7])
    assert one == listed and hash(one) == hash(listed) and one.difference(listed) is None
    assert one.difference(small_config(eos_token_id=[7, 1])) == "eos_token_id"
    assert one.difference(small_config(bos_token_id=None, eos_token_id=None)) is None
    assert one.difference(small_config(bos_token_id=3)) == "bos_token_id"
    assert one.difference(small_config(rope_scaling=None)) == "rope_scaling"
    assert one.difference(small_config(index_topk=8)) == "index_topk"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not JSON"),
        ("[1]", "expected a JSON object, got list"),
        ("\xff", "not JSON"),
        (None, "no such file"),
    ],
)
def test_bad_files_are_named(tmp_path, text, message):
    path = tmp_path / "config.json"
    if text is not None:
        path.write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match=message) as error:
        ModelConfig.from_json(path)
    assert str(path) in str(error.value)


def test_an_error_inside_a_file_names_the_file(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(official() | {"o_groups": 4}))
    with pytest.raises(ValueError, match="config.json: o_groups: got 4"):
        ModelConfig.from_json(tmp_path)


# ---- groups --------------------------------------------------------------------------------------

SWA_HASH, CSA_HASH, HCA_HASH = (LayerKind(ratio, True) for ratio in (WINDOW_ONLY, CSA, HCA))
PAIR = (LayerKind(HCA, False), LayerKind(CSA, False))


@pytest.mark.parametrize(
    ("cfg", "first", "pairs"),
    [(flash(), SWA_HASH, 20), (pro(), HCA_HASH, 29)],
    ids=["flash", "pro"],
)
def test_released_sizes_are_three_groups(cfg, first, pairs):
    assert cfg.layer_groups == (
        LayerGroup(0, (first,), 2),
        LayerGroup(2, (CSA_HASH,), 1),
        LayerGroup(3, PAIR, pairs),
    )
    assert [group.name for group in cfg.layer_groups] == [
        "layers_0_1",
        "layers_2_2",
        f"layers_3_{2 + 2 * pairs}",
    ]
    assert cfg.num_hidden_layers == 3 + 2 * pairs


@pytest.mark.parametrize(
    "ratios",
    [
        (0,),
        (4, 4, 4),
        (0, 4, 0, 4, 0),
        (0, 0, 4, 128, 4),
        (128, 4, 128, 4, 4, 0, 0),
        (4, 4, 0, 4, 4, 0, 128),
    ],
)
@pytest.mark.parametrize("hashed", [0, 1])
def test_groups_unroll_to_the_layers(ratios, hashed):
    cfg = small_config(
        num_hidden_layers=len(ratios), compress_ratios=(*ratios, 0), num_hash_layers=hashed
    )
    unrolled = [kind for group in cfg.layer_groups for kind in group.kinds * group.repeats]
    assert (
        tuple(unrolled)
        == cfg.layer_kinds
        == tuple(LayerKind(r, i < hashed) for i, r in enumerate(ratios))
    )
    starts = [group.first for group in cfg.layer_groups]
    lengths = [len(group.kinds) * group.repeats for group in cfg.layer_groups]
    assert starts == [sum(lengths[:i]) for i in range(len(lengths))]


# ---- refusals ------------------------------------------------------------------------------------

_OFFICIAL_REFUSALS = [
    # other architectures
    ({"model_type": "deepseek_v3"}, "model_type: got 'deepseek_v3'; allowed: 'deepseek_v4'"),
    ({"model_type": DROP}, "model_type: got None"),
    ({"model_type": "deepseek_v4.1"}, "DeepSeek-V4.1 is another architecture"),
    ({"model_type": "deepseek_v4_1"}, "DeepSeek-V4.1 is another architecture"),
    ({"architectures": ["DeepseekV41ForCausalLM"]}, "DeepSeek-V4.1 is another architecture"),
    ({"architectures": "DeepseekV41ForCausalLM"}, "DeepSeek-V4.1 is another architecture"),
    ({"dspark_block_size": 4}, "dspark_noise_token_id: missing beside dspark_block_size"),
    ({"n_shared_experts": 2}, "n_shared_experts: got 2; DeepSeek-V4 allows only 1"),
    ({"num_key_value_heads": 8}, "num_key_value_heads: got 8"),
    ({"scoring_func": "sigmoid"}, "scoring_func: got 'sigmoid'"),
    ({"norm_topk_prob": False}, "norm_topk_prob: got False"),
    ({"hidden_act": "gelu"}, "hidden_act: got 'gelu'"),
    ({"tie_word_embeddings": True}, "tie_word_embeddings: got True"),
    ({"attention_bias": True}, "attention_bias: got True"),
    ({"mlp_bias": True}, "mlp_bias: got True"),
    # missing keys and wrong types
    ({"hidden_size": DROP, "head_dim": DROP}, "missing key.* hidden_size, head_dim"),
    ({"compress_ratios": DROP}, "missing key.* compress_ratios"),
    ({"compress_ratios": 4}, "compress_ratios: got 4; must be a list"),
    ({"rope_scaling": "yarn"}, "rope_scaling: got 'yarn'; must be an object"),
    ({"hidden_size": 48.0}, "hidden_size: got 48.0; must be a positive integer"),
    ({"vocab_size": "97"}, "vocab_size: got '97'; must be a positive integer"),
    ({"hc_mult": 0}, "hc_mult: got 0; must be a positive integer"),
    ({"sliding_window": -1}, "sliding_window: got -1; must be a positive integer"),
    ({"q_lora_rank": True}, "q_lora_rank: got True; must be a positive integer"),
    ({"index_topk": 0}, "index_topk: got 0; must be a positive integer"),
    ({"hc_eps": 0}, "hc_eps: got 0; must be a number above 0"),
    ({"rms_norm_eps": math.nan}, "rms_norm_eps: got nan"),
    ({"rope_theta": math.inf}, "rope_theta: got inf"),
    ({"swiglu_limit": "10"}, "swiglu_limit: got '10'"),
    ({"routed_scaling_factor": False}, "routed_scaling_factor: got False"),
    ({"num_nextn_predict_layers": 2}, "num_nextn_predict_layers: got 2; allowed: 0 or 1"),
    ({"num_nextn_predict_layers": True}, "num_nextn_predict_layers: got True; allowed: 0 or 1"),
    ({"bos_token_id": 97}, "bos_token_id: got 97; must be in .0, vocab_size=97"),
    ({"eos_token_id": "end"}, "eos_token_id: got 'end'"),
    ({"eos_token_id": []}, "eos_token_id: got "),
    ({"eos_token_id": [1, 97]}, "eos_token_id: got 97; must be in .0, vocab_size=97"),
    ({"eos_token_id": [1, -1]}, "eos_token_id: got -1"),
    ({"eos_token_id": [1, None]}, "eos_token_id: got None"),
    ({"eos_token_id": [True]}, "eos_token_id: got True"),
    ({"eos_token_id": 1.0}, "eos_token_id: got 1.0"),
    ({"eos_token_id": {"a": 1}}, "eos_token_id: got {'a': 1}"),
    ({"bos_token_id": [0, 1]}, "bos_token_id: got .0, 1."),
    ({"bos_token_id": -1}, "bos_token_id: got -1"),
    # layers
    ({"compress_ratios": [0, 4]}, "compress_ratios: got 2 entries; must be 8"),
    ({"compress_ratios": [0, 0, 4, 128, 4, 128]}, "compress_ratios: got 6 entries; must be 8"),
    (
        {"compress_ratios": [0, 0, 4, 128, 48, 128, 4, 0]},
        "compress_ratios: got 48; allowed: 0 .*, 4 .*, 128",
    ),
    ({"compress_ratios": [0, 0, 4, 128, [4], 128, 4, 0]}, "compress_ratios: got .4.; allowed"),
    ({"compress_ratios": [0, 0, 4.0, 128, 4, 128, 4, 0]}, "compress_ratios: got 4.0; allowed"),
    (
        {"compress_ratios": [0, 0, 4, 128, 4, 128, 4, 4]},
        "got 4 after the 7 entries of the layers; what drafts allows only 0",
    ),
    ({"num_hash_layers": 8}, "num_hash_layers: got 8; must be in .0, num_hidden_layers=7"),
    ({"num_hash_layers": "3"}, "num_hash_layers: got '3'"),
    # rotary
    (
        {"compress_rope_theta": DROP},
        "compress_rope_theta: got None; a model with compressed layers must state it",
    ),
    ({"compress_rope_theta": 0}, "compress_rope_theta: got 0;"),
    ({"compress_rope_theta": "160000"}, "compress_rope_theta: got '160000'"),
    (
        {"rope_scaling": YARN | {"type": "linear"}},
        "rope_scaling: got type 'linear'; allowed: 'yarn'",
    ),
    (
        {"rope_scaling": {"type": "yarn", "factor": 16}},
        "rope_scaling: missing key.* original_max_position_embeddings",
    ),
    (
        {"rope_scaling": YARN | {"attention_factor": 1.277}},
        "attention_factor 1.277; DeepSeek-V4 allows only 1.0",
    ),
    ({"rope_scaling": YARN | {"factor": 0.5}}, "rope_scaling: .* allowed: factor >= 1"),
    ({"rope_scaling": YARN | {"factor": "16"}}, "rope_scaling: .* allowed: factor >= 1"),
    ({"rope_scaling": YARN | {"factor": math.nan}}, "rope_scaling: .* allowed: factor >= 1"),
    ({"rope_scaling": YARN | {"beta_fast": 1}}, "rope_scaling: .* beta_fast > beta_slow"),
    # divisions
    ({"o_groups": 4}, "o_groups: got 4; must divide num_attention_heads=6"),
    ({"qk_rope_head_dim": 7}, "qk_rope_head_dim: got 7; must be even"),
    ({"qk_rope_head_dim": 26}, "qk_rope_head_dim: got 26; must be at most head_dim=24"),
    ({"index_head_dim": 6}, "index_head_dim: got 6; must be at least qk_rope_head_dim=8"),
    ({"num_experts_per_tok": 7}, "num_experts_per_tok: got 7; must be at most n_routed_experts=6"),
]
_TRANSFORMERS_REFUSALS = [
    (
        {"layer_types": ["full_attention"] * 7},
        "layer_types: got 'full_attention'; allowed: sliding_attention",
    ),
    ({"layer_types": [["sliding_attention"]] * 7}, "layer_types: got "),
    ({"layer_types": ["sliding_attention"] * 3}, "compress_ratios: got 4 entries; must be 8"),
    ({"layer_types": 7}, "layer_types: got 7; must be a list"),
    ({"layer_types": DROP}, "missing key.* compress_ratios"),
    (
        {"compress_rates": {"compressed_sparse_attention": 8}},
        "compress_rates: .*=8; DeepSeek-V4 allows only 4",
    ),
    ({"compress_rates": 4}, "compress_rates: got 4; must be an object"),
    (
        {"mlp_layer_types": ["moe", "hash_moe"] + ["moe"] * 5},
        "must be hash_moe layers first, then moe, 7 in all",
    ),
    ({"mlp_layer_types": ["moe"] * 6}, "must be hash_moe layers first, then moe, 7 in all"),
    ({"mlp_layer_types": "moe"}, "mlp_layer_types: got 'moe'; must be a list"),
    ({"qk_rope_head_dim": DROP, "partial_rotary_factor": "x"}, "missing key.* qk_rope_head_dim"),
    (
        {"rope_parameters": YARN},
        "rope_parameters: .* must be an object with the objects main and compress",
    ),
    (
        {"rope_parameters": {"main": {}, "compress": 4}},
        "must be an object with the objects main and compress",
    ),
    (
        {"rope_parameters": {"main": {}, "compress": {"rope_type": "linear"}}},
        "rope_scaling: got type 'linear'",
    ),
    ({"num_nextn_predict_layers": "1"}, "num_nextn_predict_layers: got '1'; allowed: 0 or 1"),
]


@pytest.mark.parametrize(("changes", "message"), _OFFICIAL_REFUSALS)
def test_official_style_refuses(changes, message):
    with pytest.raises(ValueError, match=message) as error:
        ModelConfig.from_dict(changed(official(), changes))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("changes", "message"), _TRANSFORMERS_REFUSALS)
def test_transformers_style_refuses(changes, message):
    with pytest.raises(ValueError, match=message) as error:
        ModelConfig.from_dict(changed(transformers_style(), changes))
    assert "\n" not in str(error.value)


def test_replace_checks_again():
    with pytest.raises(ValueError, match="o_groups: got 5"):
        small_config().replace(o_groups=5)


def test_window_only_models_need_no_compressed_rotary_and_no_indexer():
    ratios = (0,) * 8
    cfg = small_config(
        compress_ratios=ratios, compress_rope_theta=None, rope_scaling=None, index_topk=0
    )
    assert ModelConfig.from_dict(cfg.to_dict()) == cfg


def test_yarn_defaults_are_the_released_ones():
    assert flash().rope_scaling == pro().rope_scaling == RopeScaling()
