"""Claims about v4jax/cost.py."""

import json
import math

import jax
import pytest
from flax.traverse_util import flatten_dict
from trees import small_config

from configs.models import flash, pro
from v4jax.cost import cost as model_cost
from v4jax.cost import deepseek_v32, train_flops_per_token
from v4jax.parameter_tree import abstract_params

MILLION = 1048576
NO_MTP = small_config(num_nextn_predict_layers=0, compress_ratios=(0, 0, 4, 128, 4, 128, 4))


def parts(cost):
    return {part.name: part for part in cost.parts}


# ---- parameters ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cfg", "total", "active"), [(flash(), 284, 13), (pro(), 1573, 49)], ids=["flash", "pro"]
)
def test_released_sizes_have_the_reports_counts(cfg, total, active):
    cost = model_cost(cfg)
    assert (round(cost.total.parameters / 1e9), round(cost.total.active / 1e9)) == (
        total,
        active,
    )  # 1.573T is 1.6T


def test_no_other_way_of_counting_gives_the_reports_numbers():
    small, large = model_cost(flash()), model_cost(pro())

    def rounded(*counts):
        return tuple(round(count / 1e9) for count in counts)

    assert rounded(small.total.parameters + small.mtp.parameters) == (291,)
    assert rounded(small.total.parameters - 2 * parts(small)["head"].parameters) == (283,)
    with_embedding = [
        cost.total.active + parts(cost)["embedding"].parameters for cost in (small, large)
    ]
    assert rounded(*with_embedding) == (14, 50)
    assert rounded(large.total.active - parts(large)["head"].active) == (48,)


@pytest.mark.parametrize(
    "cfg", [flash(), pro(), small_config(), NO_MTP], ids=["flash", "pro", "small", "no_mtp"]
)
def test_every_weight_of_the_model_is_counted_once(cfg):
    leaves = flatten_dict(abstract_params(cfg))
    cost = model_cost(cfg, 1)

    def count(*marks, without=()):
        return sum(
            math.prod(leaf.shape)
            for path, leaf in leaves.items()
            if (set(marks) & set(path)) and not set(without) & set(path)
        )

    rest = ("mtp", "router")
    assert cost.total.parameters + cost.mtp.parameters + cost.buffers == sum(
        math.prod(leaf.shape) for leaf in jax.tree.leaves(leaves)
    )
    assert cost.mtp.parameters == count("mtp", without=("router",))
    assert cost.buffers == count("router")
    got = {name: part.parameters for name, part in parts(cost).items()}
    norms = ("attn_norm", "ffn_norm", "q_norm", "kv_norm", "norm")
    assert got.pop("norms") == count(*norms, without=rest)
    assert got.pop("indexers") == count("indexer", without=(*rest, "norm"))
    assert got.pop("compressors") == count("compressor", without=(*rest, "norm", "indexer"))
    assert got.pop("gates") == count("gate", without=rest)
    assert got.pop("routed experts") == count("experts", without=rest)
    assert got.pop("shared experts") == count("shared_experts", without=rest)
    assert got.pop("mHC") == count("hc_attn", "hc_ffn", "hc_head", without=rest)
    assert got.pop("embedding") == count("embed", without=rest)
    assert got.pop("head") == count("head", without=rest)
    assert sum(got.values()) == count("attn", without=(*rest, "compressor", "indexer", *norms))
    assert all(name.startswith("attention ") for name in got)


def test_active_experts_are_k_and_the_shared_one():
    cost = parts(model_cost(small_config()))
    assert cost["routed experts"].active == 7 * 2 * 3 * 48 * 40
    assert cost["shared experts"].active == cost["shared experts"].parameters == 7 * 3 * 48 * 40


# ---- cache ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("cfg", "percent"), [(flash(), 7), (pro(), 10)], ids=["flash", "pro"])
def test_cache_at_a_million_tokens_against_v32(cfg, percent):
    cost = model_cost(cfg, MILLION)
    assert round(100 * cost.total.cache / cost.v32.cache) == percent
    assert cost.v32.cache == 61 * MILLION * 788


def test_cache_of_1000_tokens_by_hand():
    entry, key = 448 + 7 + 128, 64 + 4
    cost = parts(model_cost(flash(), 1000))
    assert cost["attention SWA"].cache == 2 * 128 * entry
    assert cost["attention CSA"].cache == 21 * (128 + 250) * entry
    assert cost["attention HCA"].cache == 20 * (128 + 7) * entry
    csa_state, hca_state = 2 * 8 * 1024 * 4, 2 * 128 * 512 * 4
    assert cost["compressors"].cache == 21 * csa_state + 20 * hca_state
    assert cost["indexers"].cache == 21 * (250 * key + 2 * 8 * 256 * 4)
    assert sum(part.cache for part in cost.values()) == model_cost(flash(), 1000).total.cache


def test_a_window_holds_no_more_tokens_than_there_are():
    assert parts(model_cost(flash(), 3))["attention SWA"].cache == 2 * 3 * 583


# ---- FLOPs ---------------------------------------------------------------------------------------


def test_flops_at_a_million_tokens_against_v32():
    small, large = model_cost(flash(), MILLION), model_cost(pro(), MILLION)
    assert 0.10 <= small.total.flops / small.v32.flops <= 0.13
    assert large.total.flops / large.v32.flops == pytest.approx(0.27, abs=0.015)


def test_v32_has_37_billion_active_parameters():
    assert deepseek_v32(1).flops / 2 == pytest.approx(37e9, rel=0.03)


def test_flops_grow_by_the_indexer_and_the_dense_entries_alone():
    half, whole = parts(model_cost(flash(), MILLION // 2)), parts(model_cost(flash(), MILLION))
    grown = {
        name: whole[name].flops - half[name].flops
        for name in whole
        if whole[name].flops != half[name].flops
    }
    assert grown == {
        "indexers": 21 * 2 * 64 * (128 + 1) * MILLION // 8,
        "attention HCA": 20 * 4 * 64 * 512 * MILLION // 256,
    }


def test_flops_of_one_token_by_hand():
    """12 tokens of the small model: window 8, 3 entries, no HCA entry. CSA would select up to 4."""
    cost = parts(model_cost(small_config(), 12))
    projections = 48 * 20 + 20 * 144 + 48 * 24 + 3 * 8 * 48 + 3 * 48 * 8
    assert cost["attention SWA"].flops == 2 * (2 * projections + 4 * 6 * 24 * 8)
    assert cost["attention HCA"].flops == 2 * (2 * projections + 4 * 6 * 24 * 8)
    assert cost["attention CSA"].flops == 3 * (2 * projections + 4 * 6 * 24 * (8 + 3))
    indexer = 2 * (20 * 64 + 48 * 4 + 2 * 48 * 32) + 2 * 4 * (16 + 1) * 3
    assert cost["indexers"].flops == 3 * indexer
    assert cost["mHC"].flops == 14 * 2 * (192 * 24 + 192 + 16 * 48 + 192) + 2 * (192 * 4 + 192)
    assert cost["embedding"].flops == cost["norms"].flops == 0
    assert cost["head"].flops == 2 * 97 * 48


def test_selection_stops_growing_at_top_k():
    flops = [parts(model_cost(small_config(), n))["attention CSA"].flops for n in (15, 16, 400)]
    assert flops[0] < flops[1] == flops[2]


@pytest.mark.parametrize("seq_len", [1, 7, 130, 300])
def test_a_training_token_costs_three_mean_forwards_with_mtp(seq_len):
    costs = [model_cost(small_config(), n) for n in range(1, seq_len + 1)]
    mean = sum(cost.total.flops + cost.mtp.flops for cost in costs) / seq_len
    assert train_flops_per_token(small_config(), seq_len) == pytest.approx(3 * mean, rel=1e-12)
    assert costs[-1].train_flops == train_flops_per_token(small_config(), seq_len)


def test_mtp_pays_for_the_head_and_one_projection_per_stream():
    cost = model_cost(small_config(), 1)
    block = cost.mtp.flops - 2 * 97 * 48 - 2 * 48 * 48 * (1 + 4) - 2 * (192 * 4 + 192)
    layer = [parts(cost)[name].flops / 7 for name in ("gates", "routed experts", "shared experts")]
    mixing = 2 * 2 * (192 * 24 + 192 + 16 * 48 + 192)
    assert block == sum(layer) + parts(cost)["attention SWA"].flops / 2 + mixing
    assert model_cost(NO_MTP, 1).mtp[1:] == (0, 0, 0, 0)


# ---- printing ------------------------------------------------------------------------------------


def test_rows_and_dict_tell_the_same():
    cost = model_cost(flash())  # at its longest
    assert cost == model_cost(flash(), MILLION)
    rows = {row[0]: row[1:] for row in cost.rows()}
    assert rows["total"] == ("284.33B", "13.27B", "141.06B", "3.69B")
    assert rows["ratio to it"] == ("", "", "12.1%", "7.3%")
    assert len({len(row) for row in cost.rows()}) == 1
    plain = json.loads(json.dumps(cost.to_dict()))
    assert (
        plain["total"]["parameters"]
        == sum(part["parameters"] for part in plain["parts"])
        == cost.total.parameters
    )
    assert plain["v32"]["cache"] == cost.v32.cache and plain["context"] == MILLION


@pytest.mark.parametrize("context", [0, -1, MILLION + 1, 1.5, True, "4096"])
def test_a_context_outside_the_model_is_refused(context):
    with pytest.raises(
        ValueError,
        match="context: got .*; must be an integer in .1, max_position_embeddings=1048576",
    ):
        model_cost(flash(), context)
