"""DPO: the loss and its gradients are those of the formula, and pairs stay whole."""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from pairs import CFG, MODEL, WHOLE_MODEL, pair_batch, pairs_of, write_pairs
from reference.weights import random_weights
from small_runs import MODEL as TINY
from small_runs import small_run
from trees import close, random_params

import v4jax
from sharding.mesh import make_mesh, parse_mesh
from sharding.params import named_shardings
from sharding.rules import layout_for
from v4jax.adapters.config import Lora
from v4jax.checkpoint.export import save_safetensors
from v4jax.checkpoint.names import from_official
from v4jax.context import Context
from v4jax.data.config import DataConfig
from v4jax.parameter_tree import abstract_params, param_axes
from v4jax.train.adapters import trained_axes
from v4jax.train.gradients import gradients
from v4jax.train.loop import train
from v4jax.train.losses import dpo
from v4jax.train.losses.dpo import Dpo
from v4jax.train.metrics_file import read_metrics
from v4jax.train.stages import Stage
from v4jax.train.step import batch_sharding

SETTINGS = Dpo(beta=0.3, label_smoothing=0.1, sft=0.5)
CFG = dataclasses.replace(CFG, dpo=SETTINGS)
MICRO = dataclasses.replace(CFG, gradient_accumulation=4, batch_size=4)


@functools.cache
def weights(model=MODEL):
    return from_official(model, random_weights(model, 0))


@functools.cache
def step_of(cfg):
    """The gradients of a step as a function of (pairs, batch)."""
    base = dict(weights(cfg.model))
    router = base.pop("router")

    @jax.jit
    def take(low, batch):
        ctx = Context(remat=cfg.remat)
        return gradients(cfg, ctx, {"lora": low}, router, batch, base=base)[:2]

    return take


# ---- the formula ---------------------------------------------------------------------------------


def by_the_formula(settings, log_p_BSV, reference_BSV, batch, xp=jnp):
    """(loss, metrics) of DPO, pair by pair; log_p[b,t] is the distribution of token t.

    xp: jax.numpy for gradients, or numpy.
    """
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
                ratio = xp.mean if settings.per_token else xp.sum
                sides.append((settings.beta * ratio(policy - before), -xp.mean(policy)))
            (better, nll), (worse, _) = sides
            found.append((better, worse, nll))
    better, worse, nll = (xp.stack(column) for column in zip(*found, strict=True))
    margin, swapped = better - worse, settings.label_smoothing
    losses = (1 - swapped) * xp.log1p(xp.exp(-margin)) + swapped * xp.log1p(xp.exp(margin))
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
    """In four micro-batches, of 3, 2, 1 and no pairs."""
    batch, low = pair_batch(), pairs_of()
    grads, metrics = step_of(MICRO)(low, batch)
    reference = log_p_of(weights(), batch)

    def plain(low):
        found = by_the_formula(
            SETTINGS, log_p_of(weights() | {"lora": low}, batch), reference, batch
        )
        return found[0], found[1]

    expected, told = jax.jit(jax.grad(plain, has_aux=True))(low)
    assert 0 < told["accuracy"] < 1 and abs(told["margin"]) > 1e-3
    for name, value in told.items():
        np.testing.assert_allclose(metrics[name], value, rtol=1e-4, atol=1e-6, err_msg=name)
    # The balance loss, of weight 1e-4, is not in the formula, so the gate's inputs see it.
    agree(grads["lora"], expected, 2e-3)


def agree(got, expected, tolerance):
    """Gradients agree up to sums in another order, leaf by leaf."""
    flat = {path: x for path, x in flatten_dict(expected).items() if path[0] != "mtp"}
    assert min(np.abs(value).max() for value in flat.values()) > 0
    for path, value in flatten_dict(got).items():
        want = flat.get(path, 0)  # MTP takes no part
        error = np.linalg.norm(value - want)
        assert error <= tolerance * np.linalg.norm(want) + 1e-8, path


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
    hidden, reference = hidden_of(0, 12), hidden_of(1, 12)
    take = jax.jit(lambda *arrays: dpo.mean(settings, arrays[:1], *arrays[1:], Context()))
    loss, metrics = take(reference, hidden, batch)
    log_ps = [
        np.pad(x - np.log(np.exp(x).sum(-1, keepdims=True)), ((0, 0), (1, 0), (0, 0)))[:, :-1]
        for x in (one.x_BSD @ one.head_DV for one in (hidden, reference))
    ]
    expected, told = by_the_formula(settings, *log_ps, batch, np)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    assert metrics.keys() == told.keys()
    for name, value in told.items():
        np.testing.assert_allclose(metrics[name], value, rtol=1e-5, atol=1e-6, err_msg=name)
    assert dpo.count(MODEL, batch) == 6


class _Hidden(NamedTuple):
    """What the loss reads of the network's results."""

    x_BSD: np.ndarray
    head_DV: np.ndarray


def hidden_of(seed: int, vocab: int, rows: int = 4):
    rng = np.random.default_rng(seed)
    x_BSD, head_DV = rng.normal(size=(rows, 64, 8)), rng.normal(size=(8, vocab))
    return _Hidden(x_BSD.astype(np.float32), head_DV.astype(np.float32))


def test_the_loss_of_cut_rows_and_a_cut_vocabulary_is_that_of_one_device():
    """Pairs lie across the devices that cut the sequence."""
    batch, one, other = pair_batch(vocab=12), hidden_of(0, 12), hidden_of(1, 12)

    def loss(ctx, x_BSD, batch):
        return dpo.mean(SETTINGS, (other,), one._replace(x_BSD=x_BSD), batch, ctx)

    sizes = parse_mesh("data=2,context=2,tensor=2")
    rules, mesh = layout_for("full", sizes), make_mesh(sizes)
    results = []
    for ctx in (Context(), Context(rules=rules)):
        with jax.set_mesh(mesh if ctx.rules else make_mesh(parse_mesh(""))):
            take = jax.jit(jax.value_and_grad(functools.partial(loss, ctx), has_aux=True))
            results.append(jax.tree.map(np.asarray, take(one.x_BSD, batch)))
    close(results[1], results[0])


def test_the_first_step_is_at_log_2():
    """The policy begins as its reference: rewards are 0 up to rounding."""
    grads, metrics = step_of(MICRO)(pairs_of(moved=False), pair_batch())
    np.testing.assert_allclose(metrics["dpo"], np.log(2), rtol=1e-6)
    for name in ("margin", "reward_chosen", "reward_rejected"):
        assert abs(metrics[name]) < 1e-5
    moves = [np.abs(x).max() for path, x in flatten_dict(grads).items() if path[-1] == "b"]
    assert min(moves) > 0


@pytest.mark.long
@pytest.mark.parametrize(
    ("mesh", "layout"),
    [
        ("context=2,expert=2,tensor=2", "pod"),
        ("fsdp=2,expert=2,tensor=2", "full"),
        ("context=4,expert=2", "cp_ep"),
        ("data=2,fsdp=2,expert=2", "ep_fsdp"),
    ],
)
def test_gradients_on_eight_devices_are_those_on_one(mesh, layout):
    model = WHOLE_MODEL
    cfg = dataclasses.replace(CFG, model=model, remat="layer")
    batch, low = pair_batch(8), pairs_of(model)
    expected, metrics = step_of(cfg)(low, batch)
    sizes = parse_mesh(mesh)
    rules, device_mesh = layout_for(layout, sizes), make_mesh(sizes)

    def take(low, params, batch):
        base = {name: tree for name, tree in params.items() if name != "router"}
        ctx = Context(rules=rules, remat="layer")
        return gradients(cfg, ctx, {"lora": low}, params["router"], batch, base=base)[:2]

    with jax.set_mesh(device_mesh):
        places = [
            named_shardings(device_mesh, rules, low, trained_axes(cfg)["lora"]),
            named_shardings(device_mesh, rules, abstract_params(model), param_axes(model)),
            batch_sharding(rules, device_mesh),
        ]
        placed = jax.device_put((low, weights(model), batch), tuple(places))
        got, told = jax.tree.map(np.asarray, jax.jit(take)(*placed))
    for name, value in metrics.items():
        np.testing.assert_allclose(told[name], value, rtol=1e-5, atol=1e-6, err_msg=name)
    agree(got["lora"], expected["lora"], 1e-4)


# ---- a run ---------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_run_learns_to_prefer(tmp_path):
    model = TINY.replace(vocab_size=280, compress_ratios=(0,), num_nextn_predict_layers=0)
    save_safetensors(model, random_params(model), tmp_path / "base", dtype="float32")
    cfg = small_run(
        tmp_path,
        tmp_path / "run",
        model=model,
        data=write_pairs(tmp_path / "pairs.jsonl"),
        objective="dpo",
        lora=Lora(rank=4, targets=("attn.*", "head")),
        init_from=str(tmp_path / "base"),
        steps=8,
        seq_len=128,
        learning_rate=1e-2,
        eval_batches=2,
        eval_every=4,
        log_every=1,
    )
    summary = train(cfg)
    lines = [line for line in read_metrics(tmp_path / "run") if "dpo" in line]
    np.testing.assert_allclose(lines[0]["dpo"], np.log(2), rtol=1e-5)
    assert lines[-1]["dpo"] < 0.3 and lines[-1]["accuracy"] == 1
    assert summary["held_out_dpo"] < 0.6 and summary["held_out_accuracy"] > 0.5
    assert "unigram_nll" not in summary and (tmp_path / "run/loss.png").is_file()


def test_an_adapter_to_begin_from_is_refused_by_what_it_is(tmp_path):
    """Conversations ask the checkpoint for its format, which is the first time that it is read."""
    (tmp_path / "sft").mkdir()
    (tmp_path / "sft/adapter_config.json").write_text("{}")
    data = write_pairs(tmp_path / "pairs.jsonl")
    cfg = dataclasses.replace(
        CFG, data=data, init_from=str(tmp_path / "sft"), run_dir=str(tmp_path / "run"), mesh=""
    )
    with pytest.raises(ValueError, match="init_from: .*sft: an adapter, which has no weights of"):
        train(cfg)
    assert not (tmp_path / "run").exists()


LOOSE = dict(objective="next_token", dpo=Dpo(), data=DataConfig())


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"lora": None}, "lora: got None with objective dpo; must be set"),
        ({"attention": "indexer", "index_learning_rate": 1e-3}, "attention: got indexer with"),
        ({"index_learning_rate": 1e-3}, "index_learning_rate: got 0.001 with objective dpo"),
        ({"lora": Lora(targets=("indexer.*",))}, "lora.targets: .* must not name the indexer"),
        ({"bias_rate": 1e-3}, "bias_rate: got 0.001 with objective dpo; must be 0"),
        ({"stages": (Stage(after=2, mtp=0.1),)}, "stages: got an MTP weight of 0.1 with"),
        ({"data": DataConfig()}, "data.format: got text with objective dpo; must be preference"),
        (LOOSE | {"data": CFG.data}, "data.format: got preference with objective next_token"),
        (LOOSE | {"dpo": Dpo(beta=1.0)}, "dpo: got .*beta=1.0.* only dpo reads it"),
        (LOOSE | {"objective": "ppo"}, "objective: got 'ppo'; allowed: next_token, dpo, distill"),
    ],
)
def test_what_does_not_go_together_is_refused_in_one_line(changes, said):
    with pytest.raises(ValueError, match=said) as refused:
        dataclasses.replace(CFG, **{"model": WHOLE_MODEL} | changes)
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
