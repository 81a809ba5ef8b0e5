"""Experts chosen ahead: whose weights choose, what the choice changes, and what it does not."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from trees import random_params, small_config

from sharding.mesh import make_mesh, parse_mesh
from sharding.rules import AxisRules, layout_for
from v4jax.context import Collect, Context
from v4jax.train.anticipate import RoutedBatchQueue, choose_experts, compile_choice
from v4jax.train.config import TrainConfig
from v4jax.train.loss import loss_and_routing
from v4jax.train.step import batch_sharding, state_from, state_shardings

MODEL = small_config(
    vocab_size=96,
    num_hidden_layers=3,
    compress_ratios=(0, 4, 4, 0),
    num_hash_layers=1,
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
    steps=1,
    batch_size=4,
    seq_len=24,
    learning_rate=1e-3,
    warmup_steps=0,
    remat=False,
)


def feed_of(lag, data, ahead=None):
    return RoutedBatchQueue(
        data, lambda batch: batch, lambda weights, batch: (weights, batch), lag, ahead
    )


@pytest.mark.parametrize("lag", [1, 3])
def test_the_weights_of_lag_steps_before_choose(lag):
    """The queue runs from step 5 to 11; weights of step t are called t, and so are batches."""
    feed = feed_of(lag, iter(range(1, 99)))
    for t in range(1, 20):
        on = 5 <= t <= 11
        batch, chosen = feed.next(t, on)
        assert batch == t  # none lost, none twice, also when it ends
        assert chosen == ((max(t - lag, 5), t) if on else None)
        assert len(feed) == (lag if on else max(0, lag - (t - 11)) if t > 11 else 0)


def test_what_was_drawn_ahead_survives_a_checkpoint():
    feed = feed_of(2, iter(range(1, 99)))
    for t in (1, 2):
        feed.next(t, True)
    resumed = feed_of(2, iter(range(5, 99)), feed.items()["ahead"])
    assert [resumed.next(t, t < 6) for t in range(3, 9)] == [
        feed.next(t, t < 6) for t in range(3, 9)
    ]
    assert feed_of(2, iter(())).items() == {}
    feed.next(9, True)
    feed.drop()
    assert len(feed) == 0


@pytest.fixture(scope="module")
def chosen_by():
    """(batch, params of two moments, what each chooses, loss and routing under a choice)."""
    rng = np.random.default_rng(0)
    batch = {
        "tokens": jnp.asarray(rng.integers(0, 96, (4, 24)), jnp.int32),
        "segment_ids": jnp.ones((4, 24), jnp.int32),
    }
    params = [
        jax.tree.map(
            lambda a: a if a.ndim < 2 or a.shape[-1] == 2 else a * 0.1, random_params(MODEL, seed)
        )
        for seed in (0, 1)
    ]
    choose = jax.jit(functools.partial(choose_experts, CFG, AxisRules()))
    run = jax.jit(
        lambda params, chosen: loss_and_routing(
            MODEL, params, batch, Context(collect=Collect(watch=True)), chosen=chosen
        )
    )
    return batch, params, [choose(one, batch) for one in params], run


def test_indices_choose_and_current_weights_weigh(chosen_by):
    _, (old, new), (by_old, by_new), run = chosen_by
    plain, (_, routing) = run(new, None)
    own, (_, same) = run(new, by_new)
    assert own == plain  # what the weights would choose anyway
    for group, blocks in same.items():  # the diagnostics have a value for each layer
        for route in blocks.values():
            assert all(
                value.shape == route.balance.shape and jnp.isfinite(value).all()
                for value in route.diagnostics
            ), group
    other, (_, moved) = run(new, by_old)
    assert other != plain
    for group, blocks in by_old.items():
        for block, index in blocks.items():
            counts = np.stack(
                [
                    np.bincount(one.ravel(), minlength=8)
                    for one in np.asarray(index).reshape(-1, 4 * 24, 2)
                ]
            )
            load = np.asarray(moved[group][block].load_E).reshape(-1, 8)
            # In MTP the last token of each row does not count.
            assert np.abs(load - counts).sum() <= (2 * 4 if group == "mtp" else 0)
            assert (load != np.asarray(routing[group][block].load_E).reshape(-1, 8)).any()
    assert set(by_old) == set(routing) - {"layers_0_0"}  # a table chooses this layer's experts


@pytest.mark.slow
def test_on_eight_devices_the_same_experts_are_chosen(chosen_by):
    batch, (old, _), (by_old, _), _ = chosen_by
    sizes = parse_mesh("data=2,expert=2,tensor=2")
    rules, mesh = layout_for("full", sizes), make_mesh(sizes)
    with jax.set_mesh(mesh):
        places = state_shardings(CFG, rules, mesh)
        state = jax.device_put(state_from(CFG, jax.tree.map(jnp.asarray, old)), places)
        found = compile_choice(CFG, rules, places, mesh)(
            state.public, jax.device_put(batch, batch_sharding(rules, mesh))
        )
    jax.tree.map(np.testing.assert_array_equal, found, by_old)
