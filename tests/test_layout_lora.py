"""The layout lab knows adapters on a packed base, and decoding from packed weights."""

import dataclasses

import jax
import pytest
from pairs import DATA

from configs.demo import get_model
from sharding.mesh import make_mesh, parse_mesh
from sharding.params import bytes_per_device
from sharding.rules import layout_for
from v4jax.adapters.config import Lora
from v4jax.cli import main as cli
from v4jax.packed_tree import abstract_packed, released_formats
from v4jax.planner.estimate import estimate
from v4jax.planner.hardware import hardware_of
from v4jax.planner.lowered import lower_decode, lower_train
from v4jax.planner.search import search
from v4jax.train.config import TrainConfig
from v4jax.train.losses.distill import Distill

MODEL = get_model().replace(
    hidden_size=256,
    q_lora_rank=256,
    moe_intermediate_size=256,
    num_nextn_predict_layers=0,
    num_hidden_layers=3,
    compress_ratios=(0, 4, 128),
    num_hash_layers=1,
    head_dim=128,
)
MESH = "fsdp=2,expert=4"


def run(**changes) -> TrainConfig:
    fields = dict(
        model=MODEL,
        run_dir="",
        steps=1,
        batch_size=8,
        seq_len=128,
        learning_rate=1e-3,
        warmup_steps=0,
        mesh=MESH,
        dtype="bfloat16",
        init_from="./base",
        lora=Lora(rank=4, base_dtype="packed"),
    )
    return TrainConfig(**fields | changes)


def on_a_device(tree) -> int:
    leaves = jax.tree.leaves(tree)
    return bytes_per_device(leaves, [leaf.sharding for leaf in leaves])


@pytest.mark.parametrize("base_dtype", ["packed", "bfloat16", "float32"])
def test_weights_pairs_and_their_optimizer_are_what_the_state_holds(base_dtype):
    cfg = run(lora=Lora(rank=4, base_dtype=base_dtype))
    sizes = parse_mesh(MESH)
    _, state, _ = lower_train(cfg, layout_for(None, sizes), make_mesh(sizes))
    found = estimate(cfg, hardware_of("cpu")).memory
    held = on_a_device(state.base) + on_a_device(state.params) + on_a_device(state.router)
    assert found["weights"] == pytest.approx(held, rel=2e-3)  # 0.53 bytes of MXFP4 are 0.53125
    assert found["optimizer"] == pytest.approx(on_a_device(state.optimizer), rel=1e-3)
    assert found["gradients"] == pytest.approx(on_a_device(state.params), rel=1e-3)


def test_an_adapter_costs_less_than_training_all_weights():
    full, lora = (estimate(run(lora=one), hardware_of("v5p")) for one in (None, run().lora))
    assert lora.memory["optimizer"] < 0.1 * full.memory["optimizer"]
    assert sum(part[0] for part in lora.parts.values()) < 0.75 * sum(
        part[0] for part in full.parts.values()
    )


@pytest.mark.parametrize("remat", ["layer", "none"])
def test_a_frozen_model_adds_a_forward_pass_of_each_layer(remat):
    """An adapter's step has two products a weight, three with remat; a reference adds one."""
    cfg = run(remat=remat)
    teachers = Distill(teachers=("", "./a", "./b"))
    dpo = dataclasses.replace(cfg, objective="dpo", data=DATA)
    three = dataclasses.replace(cfg, objective="distill", distill=teachers)
    plain, one, more = (estimate(each, hardware_of("v5p")) for each in (cfg, dpo, three))
    for part in ("routed experts", "attention", "shared experts"):
        flops, hbm = ([each.parts[part][n] for each in (plain, one, more)] for n in (0, 1))
        passes = 3 if remat == "layer" else 2
        assert flops[1] == pytest.approx((passes + 1) / passes * flops[0], rel=0.05), part
        assert hbm[0] < hbm[1] < hbm[2]
        assert flops[2] - flops[0] == pytest.approx(3 * (flops[1] - flops[0])), part
    gathers = [each.sent[("fsdp",), "all-gather"][0] for each in (plain, one)]
    assert gathers[1] > 1.3 * gathers[0]
    assert one.memory == plain.memory and more.memory["weights"] > plain.memory["weights"]


def test_a_step_with_frozen_models_is_lowered_from_shapes():
    """No file of a teacher is read."""
    sizes = parse_mesh(MESH)
    changes = dict(objective="distill", distill=Distill(teachers=("", "./nowhere")))
    model = MODEL.replace(num_hidden_layers=1, compress_ratios=(0,), num_hash_layers=0)
    cfg = run(model=model, **changes)
    params, _, lowered = lower_train(cfg, layout_for(None, sizes), make_mesh(sizes))
    assert list(params["teachers"]) == ["1"] and "while" in lowered.as_text()


def test_a_search_leaves_out_what_would_cut_blocks():
    found = search(run(), hardware_of("v5p"), 8)
    assert found.rejected["would cut blocks of packed weights"] > 0
    assert not any("fsdp=8" in one.mesh for one in found.ranked)
    asked = dataclasses.replace(run(), lora=Lora(rank=4))
    plain = search(asked, hardware_of("v5p"), 8)
    assert "would cut blocks of packed weights" not in plain.rejected


def test_decoding_is_lowered_from_packed_weights():
    sizes = parse_mesh("expert=4,data=2")
    rules = layout_for("ep", sizes)
    cfg = run(lora=None, mesh="expert=4,data=2", layout="ep")
    params, _, _ = lower_decode(cfg, rules, make_mesh(sizes), released=True)
    wanted = abstract_packed(MODEL, released_formats(MODEL))
    for got, expected in zip(jax.tree.leaves(params), jax.tree.leaves(wanted), strict=True):
        assert (got.shape, got.dtype) == (expected.shape, expected.dtype)


def test_the_command_gives_any_configuration_adapters(capsys):
    """--what lora: rank 16 on all matrices of the packed release, a row a device."""
    options = ["--what", "lora", "--mesh", "data=2,expert=4", "--paper", "--target", "h100:8"]
    assert cli.main(["layout", "configs/demo.py", *options]) == 0
    assert "8 devices" in capsys.readouterr().out
    more = ["--gradient-accumulation", "2", "--batch", "16"]
    assert cli.main(["layout", "configs/demo.py", *options, *more]) == 0
    cut = ["--what", "lora", "--mesh", "data=4,tensor=2", "--paper", "--target", "h100:8"]
    assert cli.main(["layout", "configs/demo.py", *cut]) == 2
    assert "would cut a block of 128 numbers" in capsys.readouterr().err
