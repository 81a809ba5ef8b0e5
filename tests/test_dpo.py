"""DPO: the loss and its gradients are those of the formula, and pairs stay whole."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from pairs import CFG, LORA, MODEL, pair_batch, write_pairs
from reference.weights import random_weights
from small_runs import MODEL as TINY
from small_runs import small_run
from trees import random_params

import v4jax
from sharding.mesh import make_mesh, parse_mesh
from sharding.params import named_shardings
from sharding.rules import AxisRules, layout_for
from v4jax.adapters.config import Lora
from v4jax.adapters.tree import init_adapters
from v4jax.checkpoint.export import save_safetensors
from v4jax.checkpoint.names import from_official
from v4jax.context import Context
from v4jax.data.config import DataConfig
from v4jax.parameter_tree import abstract_params, param_axes
from v4jax.train.adapters import trained_axes
from v4jax.train.gradients import gradients
from v4jax.train.losses import dpo
from v4jax.train.losses.dpo import Dpo
from v4jax.train.loop import train
from v4jax.train.metrics_file import read_metrics
from v4jax.train.stages import Stage
from v4jax.train.step import batch_sharding

SETTINGS = Dpo(beta=0.3, label_smoothing=0.1, sft=0.5)
CFG = dataclasses.replace(CFG, dpo=SETTINGS)


@functools.cache
def weights():
    return from_official(MODEL, random_weights(MODEL, 0))


def pairs_of(moved: bool = True):
    """Low-rank pairs; `moved`: b is not 0."""
    fresh = init_adapters(MODEL, LORA, jax.random.key(0))
    keys = iter(jax.random.split(jax.random.key(1), len(jax.tree.leaves(fresh))))
    shift = jax.tree.map(lambda x: 0.05 * jax.random.normal(next(keys), x.shape), fresh)
    return jax.tree.map(jnp.add, fresh, shift) if moved else fresh


@functools.cache
def step_of(cfg):
    """The gradients of a step as a function of (pairs, batch)."""
    base = {name: tree for name, tree in weights().items() if name != "router"}

    @jax.jit
    def take(low, batch):
        ctx = Context(remat=cfg.remat)
        found = gradients(cfg, ctx, {"lora": low}, weights()["router"], batch, base=base)
        return found[:2]

    return take


# ---- the formula ---------------------------------------------------------------------------------


def by_the_formula(settings, log_p_BSV, reference_BSV, batch):
    """(loss, metrics) of DPO, pair by pair; log_p[b,t] is the distribution of token t."""
    tokens, segments, mask = (batch[name] for name in ("tokens", "segment_ids", "loss_mask"))
    found = []
    for row, ids in enumerate(segments):
        for chosen in range(1, ids.max(), 2):
            sides = []
            for segment in (chosen, chosen + 1):
                (places,) = np.nonzero((ids == segment) & (mask[row] > 0))
                policy, before = (
                    log_p[row, places, tokens[row, places]] for log_p in (log_p_BSV, reference_BSV)
                )
                ratio = jnp.mean if settings.per_token else jnp.sum
                sides.append((settings.beta * ratio(policy - before), -jnp.mean(policy)))
            (better, nll), (worse, _) = sides
            found.append((better, worse, nll))
    better, worse, nll = (jnp.stack(column) for column in zip(*found, strict=True))
    margin, swapped = better - worse, settings.label_smoothing
    losses = (1 - swapped) * jnp.log1p(jnp.exp(-margin)) + swapped * jnp.log1p(jnp.exp(margin))
    metrics = {
        "dpo": losses.mean(),
        "margin": margin.mean(),
        "accuracy": (margin > 0).mean(),
        "reward_chosen": better.mean(),
        "reward_rejected": worse.mean(),
        "chosen_nll": nll.mean(),
    }
    return losses.mean() + settings.sft * nll.mean(), metrics


def log_p_of(params, batch):
    """log p of each token, [B,S,V]; the first of a row has none."""
    logits = v4jax.forward(MODEL, params, batch["tokens"], batch["segment_ids"]).logits
    return jnp.pad(jax.nn.log_softmax(logits), ((0, 0), (1, 0), (0, 0)))[:, :-1]


def test_gradients_are_those_of_the_formula():
    batch, low = pair_batch(), pairs_of()
    grads, metrics = step_of(CFG)(low, batch)
    reference = log_p_of(weights(), batch)

    def plain(low):
        found = by_the_formula(SETTINGS, log_p_of(weights() | {"lora": low}, batch), reference, batch)
        return found[0], found[1]

    expected, told = jax.jit(jax.grad(plain, has_aux=True))(low)
    assert 0 < told["accuracy"] < 1 and abs(told["margin"]) > 1e-3
    for name, value in told.items():
        np.testing.assert_allclose(metrics[name], value, rtol=1e-4, atol=1e-6, err_msg=name)
    # The balance loss, of weight 1e-4, is not in the formula, so the gate's inputs see it.
    agree(grads["lora"], expected, 2e-3)


def agree(got, expected, tolerance):
    """Gradients agree up to sums in another order, leaf by leaf."""
    flat = flatten_dict(expected)
    assert all(np.abs(value).max() > 0 for value in flat.values())
    for path, value in flatten_dict(got).items():
        error = np.linalg.norm(value - flat[path])
        assert error <= tolerance * np.linalg.norm(flat[path]) + 1e-8, path


@pytest.mark.parametrize(
    "settings",
    [
        Dpo(),
        Dpo(beta=0.5, label_smoothing=0.2),
        Dpo(per_token=True, beta=2.0),
        Dpo(sft=0.3, per_token=True),
    ],
    ids=str,
)
def test_every_setting_is_that_of_the_formula(settings):
    batch = pair_batch(vocab=12)
    rng = np.random.default_rng(1)
    hidden, reference = (
        _Hidden(rng.normal(size=(4, 64, 8)).astype(np.float32), head)
        for head in rng.normal(size=(2, 8, 12)).astype(np.float32)
    )
    loss, metrics = dpo.mean(settings, (reference,), hidden, batch, Context())
    log_ps = [
        np.pad(jax.nn.log_softmax(one.x_BSD @ one.head_DV), ((0, 0), (1, 0), (0, 0)))[:, :-1]
        for one in (hidden, reference)
    ]
    expected, told = by_the_formula(settings, *log_ps, batch)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    assert metrics.keys() == told.keys()
    for name, value in told.items():
        np.testing.assert_allclose(metrics[name], value, rtol=1e-5, atol=1e-6, err_msg=name)
    assert dpo.count(MODEL, batch) == 6


@dataclasses.dataclass
class _Hidden:
    """What the loss reads of the network's results."""

    x_BSD: np.ndarray
    head_DV: np.ndarray


def test_the_first_step_is_at_log_2():
    """The policy begins as its reference: rewards are 0 up to rounding."""
    grads, metrics = step_of(CFG)(pairs_of(moved=False), pair_batch())
    np.testing.assert_allclose(metrics["dpo"], np.log(2), rtol=1e-6)
    for name in ("margin", "reward_chosen", "reward_rejected"):
        assert abs(metrics[name]) < 1e-5
    moves = [np.abs(x).max() for path, x in flatten_dict(grads).items() if path[-1] == "b"]
    assert min(moves) > 0


def test_micro_batches_are_one_batch():
    """They have 3, 2, 1 and no pairs."""
    batch, low = pair_batch(), pairs_of()
    expected, metrics = step_of(CFG)(low, batch)
    grads, summed = step_of(dataclasses.replace(CFG, gradient_accumulation=4, batch_size=4))(
        low, batch
    )
    for name, value in metrics.items():
        np.testing.assert_allclose(summed[name], value, rtol=1e-5, atol=1e-7, err_msg=name)
    agree(grads["lora"], expected["lora"], 1e-5)


@pytest.mark.parametrize(
    ("mesh", "layout"),
    [
        pytest.param("context=2,expert=2,tensor=2", "pod", marks=pytest.mark.slow),
        pytest.param("fsdp=2,expert=2,tensor=2", "full", marks=pytest.mark.long),
        pytest.param("context=4,expert=2", "cp_ep", marks=pytest.mark.long),
        pytest.param("data=2,fsdp=2,expert=2", "ep_fsdp", marks=pytest.mark.long),
    ],
)
def test_gradients_on_eight_devices_are_those_on_one(mesh, layout):
    batch, low = pair_batch(8), pairs_of()
    expected, metrics = step_of(CFG)(low, batch)
    sizes = parse_mesh(mesh)
    rules, device_mesh = layout_for(layout, sizes), make_mesh(sizes)

    def take(low, params, batch):
        base = {name: tree for name, tree in params.items() if name != "router"}
        ctx = Context(rules=rules, remat="layer")
        return gradients(CFG, ctx, {"lora": low}, params["router"], batch, base=base)[:2]

    with jax.set_mesh(device_mesh):
        places = [
            named_shardings(device_mesh, rules, low, trained_axes(CFG)["lora"]),
            named_shardings(device_mesh, rules, abstract_params(MODEL), param_axes(MODEL)),
            batch_sharding(rules, device_mesh),
        ]
        placed = jax.device_put((low, weights(), batch), tuple(places))
        got, told = jax.tree.map(np.asarray, jax.jit(take)(*placed))
    for name, value in metrics.items():
        np.testing.assert_allclose(told[name], value, rtol=1e-5, atol=1e-6, err_msg=name)
    agree(got["lora"], expected["lora"], 1e-4)


# ---- a run ---------------------------------------------------------------------------------------


def test_a_run_learns_to_prefer(tmp_path):
    model = TINY.replace(vocab_size=280)
    save_safetensors(model, random_params(model), tmp_path / "base", dtype="float32")
    cfg = small_run(
        tmp_path,
        tmp_path / "run",
        model=model,
        data=write_pairs(tmp_path / "pairs.jsonl"),
        objective="dpo",
        lora=Lora(rank=4, targets=("attn.*", "head")),
        init_from=str(tmp_path / "base"),
        steps=12,
        seq_len=128,
        learning_rate=1e-2,
        eval_batches=2,
        eval_every=6,
        log_every=1,
    )
    summary = train(cfg)
    lines = [line for line in read_metrics(tmp_path / "run") if "dpo" in line]
    np.testing.assert_allclose(lines[0]["dpo"], np.log(2), rtol=1e-5)
    assert lines[-1]["dpo"] < 0.3 and lines[-1]["accuracy"] == 1
    assert summary["held_out_dpo"] < 0.6 and summary["held_out_accuracy"] > 0.5
    assert "unigram_nll" not in summary and (tmp_path / "run/loss.png").is_file()


LOOSE = dict(objective="next_token", dpo=Dpo(), data=DataConfig())


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"lora": None}, "lora: got None with objective dpo; must be set"),
        ({"attention": "indexer", "index_learning_rate": 1e-3}, "attention: got indexer with"),
        ({"stages": (Stage(after=2, attention="indexer"),)}, "attention: got sparse with .* stages"),
        ({"index_learning_rate": 1e-3}, "index_learning_rate: got 0.001 with objective dpo"),
        ({"lora": Lora(targets=("indexer.*",))}, "lora.targets: .* must not name the indexer"),
        ({"bias_rate": 1e-3}, "bias_rate: got 0.001 with objective dpo; must be 0"),
        ({"stages": (Stage(after=2, mtp=0.1),)}, "stages: got an MTP weight of 0.1 with"),
        ({"data": DataConfig()}, "data.format: got text with objective dpo; must be preference"),
        (LOOSE | {"data": CFG.data}, "data.format: got preference with objective next_token"),
        (LOOSE | {"dpo": Dpo(beta=1.0)}, "dpo: got .*beta=1.0.* only dpo reads it"),
        (LOOSE | {"objective": "ppo"}, "objective: got 'ppo'; allowed: next_token, dpo"),
    ],
)
def test_what_does_not_go_together_is_refused_in_one_line(changes, said):
    with pytest.raises(ValueError, match=said) as refused:
        dataclasses.replace(CFG, **changes)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"beta": 0.0}, "dpo.beta: got 0.0; must be above 0"),
        ({"label_smoothing": 0.5}, r"dpo.label_smoothing: got 0.5; must be in \[0, 0.5\)"),
        ({"sft": -1.0}, "dpo.sft: got -1.0; must be 0 or above"),
    ],
)
def test_settings_are_checked(changes, said):
    with pytest.raises(ValueError, match=said):
        Dpo(**changes)
