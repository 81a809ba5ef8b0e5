"""Runs of the same seed, mesh and version are the same, bit for bit.

The router's bias follows the loads of the whole batch.
"""

import dataclasses

import jax
import numpy as np
import pytest
from trees import small_config

from sharding.mesh import make_mesh, parse_mesh
from sharding.rules import AxisRules, layout_for
from v4jax.checkpoint.store import Store
from v4jax.data.config import DataConfig, tokenizer_of
from v4jax.train import loop
from v4jax.train.config import TrainConfig
from v4jax.train.metrics_file import read_metrics
from v4jax.train.prepare import stage_batches
from v4jax.train.resume import start
from v4jax.train.stages import Batches
from v4jax.train.step import batch_sharding, init_state, state_shardings, train_step

MODEL = small_config(
    vocab_size=260,
    num_hidden_layers=1,
    compress_ratios=(4,),
    num_hash_layers=0,
    num_nextn_predict_layers=0,
    hidden_size=32,
    moe_intermediate_size=32,
    num_attention_heads=4,
    o_groups=2,
    q_lora_rank=16,
    n_routed_experts=8,
)
CFG = TrainConfig(
    model=MODEL,
    run_dir="unused",
    steps=4,
    batch_size=4,
    seq_len=24,
    learning_rate=1e-2,
    warmup_steps=0,
    log_every=4,
    eval_batches=0,
    checkpoint_every=2,
    remat=False,
    export="none",
)


def states(cfg):
    """The states in all checkpoints of a run, as NumPy arrays by step."""
    sizes = parse_mesh(cfg.mesh)
    rules, mesh = layout_for(cfg.layout, sizes) if cfg.mesh else AxisRules(), make_mesh(sizes)
    found = {}
    with jax.set_mesh(mesh), Store(cfg.run_dir) as store:
        for step in (4, 2):
            data = Batches(cfg, lambda view: stage_batches(view, tokenizer_of(cfg.data), None))
            found[step] = jax.tree.map(
                np.asarray,
                start(
                    dataclasses.replace(cfg, steps=step),
                    rules,
                    state_shardings(cfg, rules, mesh),
                    store,
                    data,
                    pytest.fail,
                ).state,
            )
            store.put_aside_after(step - 1, "seen")
    return found


@pytest.mark.slow
@pytest.mark.parametrize(
    "mesh",
    [pytest.param("", marks=pytest.mark.long), "data=2,expert=2,tensor=2"],
    ids=["one device", "eight devices"],
)
def test_two_runs_are_the_same(mesh, tmp_path):
    rng = np.random.default_rng(0)
    (tmp_path / "text").mkdir()
    for i in range(6):
        (tmp_path / f"text/{i}.txt").write_bytes(
            rng.integers(97, 123, 400).astype(np.uint8).tobytes()
        )
    runs = [
        dataclasses.replace(
            CFG,
            run_dir=str(tmp_path / name),
            mesh=mesh,
            data=DataConfig(source=str(tmp_path / "text")),
            watch_every=4 if mesh else 0,
        )
        for name in "ab"
    ]
    for cfg in runs:
        loop.train(cfg)
    a, b = map(states, runs)
    for step in (2, 4):
        for (path, x), y in zip(
            jax.tree_util.tree_leaves_with_path(a[step]), jax.tree.leaves(b[step]), strict=True
        ):
            np.testing.assert_array_equal(x, y, f"{step} {jax.tree_util.keystr(path)}")
    looks = [
        [line["inside"] for line in read_metrics(cfg.run_dir) if "inside" in line] for cfg in runs
    ]
    assert looks[0] == looks[1] and len(looks[0]) == bool(mesh)
    assert any(
        (x != y).any()
        for x, y in zip(jax.tree.leaves(a[2].params), jax.tree.leaves(a[4].params), strict=True)
    )


@pytest.mark.parametrize("mesh", ["data=2,expert=2,tensor=2"])
def test_the_bias_follows_the_loads_of_the_whole_batch(mesh):
    """Each row repeats one word, so the busy experts of a device differ from the whole batch's."""
    tokens = np.repeat(np.arange(4, dtype=np.int32)[:, None] * 50, 24, axis=1)
    batch = {"tokens": tokens, "segment_ids": np.ones_like(tokens)}

    def program(mesh):
        """The bias after a step. Unused outputs, gradients and optimizer, are not compiled."""
        sizes = parse_mesh(mesh)
        rules, device_mesh = layout_for("full", sizes) if mesh else AxisRules(), make_mesh(sizes)
        with jax.set_mesh(device_mesh):
            places = state_shardings(CFG, rules, device_mesh)
            place = batch_sharding(rules, device_mesh)
            step = jax.jit(
                lambda state, batch: train_step(CFG, rules, state, batch)[0].router,
                in_shardings=(places, place),
            )
            state = init_state(CFG, places)
        return device_mesh, step, state, place

    programs = {one: program(one) for one in ("", mesh)}

    def step_on(mesh, rows=slice(None)):
        device_mesh, step, state, place = programs[mesh]
        whole = {
            name: value[rows].repeat(4 // len(value[rows]), axis=0) for name, value in batch.items()
        }
        with jax.set_mesh(device_mesh):
            router = step(state, jax.device_put(whole, place))
        return {
            name: np.sign(np.asarray(blocks["ffn"]["bias"])).reshape(-1)
            for group in router.values()
            for name, blocks in group.items()
        }

    whole = step_on("")
    for name, signs in step_on(mesh).items():
        np.testing.assert_array_equal(signs, whole[name])
    for device in (
        slice(0, 2),
        slice(2, 4),
    ):  # data=2: the rows of each device; the test could not fail if they agreed
        assert any((signs != whole[name]).any() for name, signs in step_on("", device).items())
