"""Distillation: the divergence is that of dense logits, and teachers are adapters of the base."""

import dataclasses
import functools
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from pairs import CFG as PAIRED
from pairs import MODEL, pair_batch, pairs_of
from reference.weights import random_weights
from small_runs import MODEL as TINY
from small_runs import small_run, write_text
from test_dpo import hidden_of
from trees import close, random_params

import v4jax
from sharding.mesh import make_mesh, parse_mesh
from sharding.rules import AxisRules, layout_for
from v4jax.adapters.base import base_at
from v4jax.adapters.config import Lora
from v4jax.adapters.files import save_adapter
from v4jax.adapters.tree import abstract_adapters
from v4jax.checkpoint.export import save_safetensors
from v4jax.checkpoint.names import from_official
from v4jax.context import Context
from v4jax.data.config import DataConfig
from v4jax.model.adapted import Adapted
from v4jax.train.evaluation import evaluator
from v4jax.train.loop import train
from v4jax.train.losses import distill, next_token
from v4jax.train.losses.distill import Distill, divergences
from v4jax.train.metrics_file import read_metrics

SETTINGS = Distill(teachers=("", "./one"), weights=(0.5, 2.0))
CFG = dataclasses.replace(PAIRED, objective="distill", distill=SETTINGS, data=DataConfig())


def dense(student, teachers):
    """KL(student || teacher) of each position, from whole logits."""

    def logits(one):
        head = one.head_DV
        if isinstance(head, Adapted):
            return one.x_BSD @ head.w + one.x_BSD @ head.a @ head.b
        return one.x_BSD @ head

    log_p, *log_qs = (jax.nn.log_softmax(logits(one)) for one in (student, *teachers))
    return [jnp.sum(jnp.exp(log_p) * (log_p - log_q), -1) for log_q in log_qs]


def adapted(one, seed):
    """The same with a low-rank pair on the head."""
    rng = np.random.default_rng(seed)
    a, b = rng.normal(size=(8, 2)), rng.normal(size=(2, one.head_DV.shape[1]))
    return one._replace(head_DV=Adapted(one.head_DV, a.astype(np.float32), b.astype(np.float32)))


@pytest.mark.parametrize(
    ("mesh", "bytes_at_once"), [("", 2**27), ("", 2000), ("data=2,context=2,tensor=2", 500)]
)
def test_divergences_are_those_of_dense_logits(monkeypatch, mesh, bytes_at_once):
    """Values and gradients; also some positions at a time, and with the vocabulary cut."""
    monkeypatch.setattr(distill, "LOGIT_BYTES", bytes_at_once)
    student, teachers = (
        adapted(hidden_of(0, 12), 0),
        [hidden_of(1, 12), adapted(hidden_of(2, 12), 1)],
    )
    factor_BS = np.random.default_rng(0).normal(size=(4, 64)).astype(np.float32)
    sizes = parse_mesh(mesh)
    ctx = Context(rules=layout_for("full", sizes) if mesh else AxisRules(), frozen=True)

    def total(function, x_BSD, a, b):
        head = student.head_DV._replace(a=a, b=b)
        found = function(student._replace(x_BSD=x_BSD, head_DV=head), teachers)
        return jnp.sum(factor_BS * (found[0] + 2 * found[1]))

    inputs = student.x_BSD, student.head_DV.a, student.head_DV.b
    results = []
    with jax.set_mesh(make_mesh(sizes)):
        for function in (functools.partial(divergences, ctx), dense):
            take = jax.value_and_grad(functools.partial(total, function), argnums=(0, 1, 2))
            results.append(jax.tree.map(np.asarray, jax.jit(take)(*inputs)))
    close(*results, tolerance=5e-6)


def test_teachers_have_no_gradient():
    def total(x_BSD):
        teacher = hidden_of(1, 12)._replace(x_BSD=x_BSD)
        return divergences(Context(), hidden_of(0, 12), [teacher])[0].sum()

    assert not np.any(jax.grad(total)(hidden_of(1, 12).x_BSD))


@pytest.mark.slow
def test_each_teacher_is_the_base_with_its_own_pairs():
    """The measure of a batch, in micro-batches, against logits of whole models."""
    weights = from_official(MODEL, random_weights(MODEL, 0))
    batch = {name: jnp.asarray(x) for name, x in pair_batch().items()}
    student, one = (pairs_of(seed=seed) for seed in range(2))
    params = weights | {"lora": student, "teachers": {"1": one}}
    cfg = dataclasses.replace(CFG, gradient_accumulation=4, batch_size=4)
    found = evaluator(cfg, AxisRules(), lambda batch: batch)(params, [batch])

    def log_p(low):
        whole = weights | ({} if low is None else {"lora": low})
        out = v4jax.forward(MODEL, whole, batch["tokens"], batch["segment_ids"])
        return jax.nn.log_softmax(out.logits)

    own, counts_BS = log_p(student), next_token.targets(batch, 1)[1]
    each = []
    for low in (None, one):
        kl_BS = jnp.sum(jnp.exp(own) * (own - log_p(low)), -1)
        each.append(float(jnp.mean(kl_BS, where=counts_BS)))
    assert min(each) > 0.01
    for n, kl in enumerate(each):
        assert found[f"teacher_{n}_kl"] == pytest.approx(kl, rel=1e-4)
    assert found["kl"] == pytest.approx(np.dot(SETTINGS.weights, each), rel=1e-4)


# ---- a run ---------------------------------------------------------------------------------------

MODEL_OF_RUN = TINY.replace(compress_ratios=(0,), num_nextn_predict_layers=0)
TARGETS = Lora(rank=4, targets=("attn.*", "head"))


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with text, a base of random weights, and an adapter of it."""
    folder = tmp_path_factory.mktemp("distill")
    write_text(folder / "text")
    save_safetensors(MODEL_OF_RUN, random_params(MODEL_OF_RUN), folder / "base", dtype="float32")
    rng = np.random.default_rng(0)
    pairs = jax.tree.map(
        lambda leaf: rng.normal(0, 0.3, leaf.shape).astype(np.float32),
        abstract_adapters(MODEL_OF_RUN, TARGETS),
    )
    save_adapter(MODEL_OF_RUN, pairs, folder / "expert", TARGETS, base_at(folder / "base"))
    return folder


def run_of(folder, name, **changes):
    fields = dict(
        model=MODEL_OF_RUN,
        objective="distill",
        distill=Distill(teachers=(str(folder / "expert"), ""), weights=(1.0, 0.1)),
        lora=TARGETS,
        init_from=str(folder / "base"),
        steps=6,
        checkpoint_every=3,
        eval_batches=1,
        eval_every=6,
        learning_rate=4e-3,
        log_every=1,
    )
    return small_run(folder / "text", folder / name, **fields | changes)


@pytest.mark.slow
def test_a_run_learns_its_teacher_and_resumes_with_the_same_bits(place):
    summary = train(run_of(place, "run"))
    lines = [line for line in read_metrics(place / "run") if "kl" in line]
    assert lines[0]["teacher_1_kl"] == pytest.approx(0, abs=1e-5)  # the student begins as the base
    assert lines[-1]["teacher_0_kl"] < 0.9 * lines[0]["teacher_0_kl"]
    assert summary["held_out_kl"] < lines[0]["kl"]
    shutil.copytree(place / "run", place / "resumed")
    shutil.rmtree(place / "resumed/checkpoints/6")
    train(run_of(place, "resumed"))
    again = [line for line in read_metrics(place / "resumed") if "kl" in line]
    assert [line["kl"] for line in again] == [line["kl"] for line in lines]


def test_a_teacher_of_another_base_is_refused_before_anything_is_made(place, tmp_path):
    shutil.copytree(place / "expert", tmp_path / "other")
    base = json.loads((tmp_path / "other/base.json").read_text())
    (tmp_path / "other/base.json").write_text(json.dumps(base | {"fingerprint": "0" * 64}))
    for teacher, said in (
        (
            tmp_path / "other",
            "distill.teachers: adapter: .*belongs to the base .* has other weights",
        ),
        (tmp_path / "nowhere", "distill.teachers: adapter: .*nowhere"),
    ):
        cfg = run_of(place, "refused", distill=Distill(teachers=(str(teacher),)))
        with pytest.raises(ValueError, match=said) as refused:
            train(cfg)
        assert "\n" not in str(refused.value)
    assert not (place / "refused").exists()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"distill": Distill()}, r"distill.teachers: got \(\); at least one must be an adapter"),
        ({"distill": Distill(teachers=("",))}, r"distill.teachers: got \(''"),
        ({"lora": None}, "lora: got None with objective distill"),
        ({"data": PAIRED.data}, "data.format: got preference with objective distill"),
        ({"objective": "next_token"}, "distill: got .* with objective next_token; only distill"),
    ],
)
def test_what_does_not_go_together_is_refused_in_one_line(changes, said):
    with pytest.raises(ValueError, match=said) as refused:
        dataclasses.replace(CFG, **changes)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"weights": (1.0,)}, r"distill.weights: got 1; must be one for each of 2 teacher\(s\)"),
        ({"teachers": "./one"}, "distill.teachers: got './one'; must be a tuple, one a teacher"),
        ({"weights": 1.0}, "distill.weights: got 1.0; must be a tuple"),
        ({"weights": (1.0, 0.0)}, "distill.weights: got .*; each must be above 0"),
        ({"teachers": ("ftp://a",), "weights": ()}, "distill.teachers: got 'ftp://a'"),
    ],
)
def test_settings_are_checked(changes, said):
    with pytest.raises(ValueError, match=said):
        dataclasses.replace(SETTINGS, **changes)


def test_teachers_weigh_the_same_unless_told():
    assert Distill(teachers=("", "a")).shares == (0.5, 0.5)
