"""Adapters as files: what is written is read back, by v4jax and by PEFT; bad ones are refused."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference.weights import random_weights
from test_mesh import SMALL

import v4jax
from v4jax.adapters.base import CONFIG_FILE, base_at
from v4jax.adapters.config import Lora
from v4jax.adapters.files import MODEL_FILE, MTP_FILE, save_adapter
from v4jax.adapters.read import load_adapter
from v4jax.adapters.tree import init_adapters
from v4jax.checkpoint.export import save_safetensors
from v4jax.checkpoint.files import headers_of, read_tensor, write_file
from v4jax.checkpoint.names import from_official

LORA = Lora(rank=2, alpha=8, targets=("*", "indexer.*"))


def pairs(lora=LORA, cfg=SMALL):
    fresh = init_adapters(cfg, lora, jax.random.key(0))
    keys = iter(jax.random.split(jax.random.key(1), len(jax.tree.leaves(fresh))))
    return jax.tree.map(lambda x: x + 0.1 * jax.random.normal(next(keys), x.shape), fresh)


def same(got, want):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    jax.tree.map(np.testing.assert_array_equal, got, jax.tree.map(np.asarray, want))


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"scaling": "rank_stabilised", "rank": 4},  # a scale of 4: division is exact
        {"targets": ("w1", "wo_a")},
        {"targets": ("w3",)},
        {"targets": ("w2", "gate")},
        {"targets": ("experts.*",)},
        {"targets": ("e_proj", "h_proj")},  # of MTP alone: no file of PEFT's
    ],
)
def test_what_is_written_is_read_back(tmp_path, fields):
    lora = Lora(**{"rank": 2, "alpha": 8, "targets": LORA.targets} | fields)
    tree = pairs(lora)
    save_adapter(SMALL, tree, tmp_path, lora)
    same(load_adapter(SMALL, tmp_path), tree)


def test_an_earlier_adapter_leaves_nothing(tmp_path):
    save_adapter(SMALL, pairs(), tmp_path, LORA)
    assert (tmp_path / MTP_FILE).exists()
    head = Lora(rank=2, targets=("head",))
    save_adapter(SMALL, pairs(head), tmp_path, head)
    assert not (tmp_path / MTP_FILE).exists()
    assert [one.stored for one in headers_of(tmp_path / MODEL_FILE)] == [
        "base_model.model.lm_head.lora_A.weight",
        "base_model.model.lm_head.lora_B.weight",
    ]


def change(folder, **fields):
    config = json.loads((folder / CONFIG_FILE).read_text())
    (folder / CONFIG_FILE).write_text(json.dumps(config | fields))


def rewrite(folder, edit):
    """Writes the adapter's tensors anew, as `edit` has changed their dict."""
    tensors = {one.stored: read_tensor(one) for one in headers_of(folder / MODEL_FILE)}
    edit(tensors)
    plan = {name: ("F32", array.shape) for name, array in tensors.items()}
    write_file(folder / MODEL_FILE, plan, iter(tensors.items()))


Q = "base_model.model.model.layers.0.self_attn.q_b_proj.lora_A.weight"


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda at: change(at, r=0), "r: got 0; must be at least 1"),
        (lambda at: change(at, peft_type="IA3"), "peft_type: got 'IA3'; must be 'LORA'"),
        (lambda at: change(at, use_dora=True), "use_dora: got True; must be False"),
        (lambda at: (at / MODEL_FILE).unlink(), "no adapter_model.safetensors there"),
        (lambda at: (at / CONFIG_FILE).write_text("[1]"), "got list; must be an object"),
        (lambda at: change(at, r=4), "layers.0.self_attn.q_b_proj: got rank 2; .* say 4"),
        (lambda at: change(at, r="2"), "r: got '2'; must be at least 1"),
        (lambda at: change(at, lora_alpha=None), "lora_alpha: got None; must be a finite number"),
        (lambda at: change(at, lora_alpha=float("nan")), "lora_alpha: got nan"),
        (lambda at: change(at, use_rslora="no"), "use_rslora: got 'no'; must be True or False"),
        (lambda at: change(at, alpha_pattern=[1]), r"alpha_pattern: got \[1\]; must be an object"),
        (
            lambda at: change(at, alpha_pattern={"q[": 1}),
            "alpha_pattern: got 'q\\['; must be a reg",
        ),
        (lambda at: change(at, rank_pattern={"q_b_proj": 0}), "q_b_proj: got 0; must be at least"),
        (
            lambda at: change(at, target_parameters="w"),
            "target_parameters: got 'w'; must be a list",
        ),
        (lambda at: change(at, init_lora_weights="pissa"), "init_lora_weights: got 'pissa'; must"),
        (lambda at: change(at, alora_invocation_tokens=[1]), r"alora_invocation_tokens: got \[1\]"),
        (lambda at: change(at, layer_replication=[[0, 2]]), "layer_replication: got"),
        (lambda at: rewrite(at, lambda t: t.update({Q: t[Q][0]})), r"got shape \[16\]; must"),
        (lambda at: rewrite(at, lambda t: t.update({Q: t[Q] * np.nan})), "not finite"),
        (lambda at: rewrite(at, lambda t: t.pop(Q)), f"lacks {Q}"),
        (
            lambda at: rewrite(at, lambda t: t.update({Q: t[Q][:, 1:]})),
            r"layers.0 attn.wq_b: got a \[15, 2\] and b \[2, 64\]; the matrix is \[16, 64\]",
        ),
        (
            lambda at: rewrite(at, lambda t: t.update({Q.replace("q_b", "q"): t.pop(Q)})),
            "lacks .*q_b_proj.lora_A.weight",
        ),
        (
            lambda at: rewrite(at, lambda t: t.update({"model.q_proj.lora_A.weight": t[Q]})),
            "model.q_proj.lora_A.weight adapts nothing in this model",
        ),
        (lambda at: rewrite(at, lambda t: t.clear()), "has no pairs of this model"),
    ],
)
def test_bad_adapters_are_refused_in_one_line(tmp_path, spoil, said):
    lora = Lora(rank=2, targets=("wq_b",))
    save_adapter(SMALL, pairs(lora), tmp_path, lora)
    (tmp_path / MTP_FILE).unlink()
    spoil(tmp_path)
    with pytest.raises(ValueError, match=said) as refused:
        load_adapter(SMALL, tmp_path)
    assert "\n" not in str(refused.value) and str(tmp_path) in str(refused.value)


def test_another_base_is_refused(tmp_path):
    params = from_official(SMALL, random_weights(SMALL, 0))
    for name in ("one", "other"):
        save_safetensors(SMALL, params, tmp_path / name, dtype="float32")
        params["head"]["weight"] = params["head"]["weight"] + 1
    lora = Lora(rank=2, targets=("wq_b",))
    save_adapter(SMALL, pairs(lora), tmp_path / "adapter", lora, base_at(str(tmp_path / "one")))
    load_adapter(SMALL, tmp_path / "adapter", str(tmp_path / "one"))
    with pytest.raises(ValueError, match="belongs to the base .*one .*; .*other has other weights"):
        load_adapter(SMALL, tmp_path / "adapter", str(tmp_path / "other"))


@pytest.mark.parity
@pytest.mark.filterwarnings("default")  # torch, transformers and peft warn about themselves
def test_peft_opens_it_with_the_same_logits(tmp_path):
    """Every matrix but MTP's, routed experts, gate and wo_a as parameters."""
    import peft
    import torch
    from transformers import DeepseekV4ForCausalLM

    torch.set_num_threads(2)
    cfg = SMALL.replace(num_hidden_layers=3, compress_ratios=(128, 4, 4, 0), index_n_heads=8)
    params = jax.tree.map(jnp.asarray, from_official(cfg, random_weights(cfg, 0)))
    save_safetensors(cfg, params, tmp_path / "base", dtype="float32")
    tree = pairs(LORA, cfg)
    save_adapter(cfg, tree, tmp_path / "adapter", LORA, base_at(str(tmp_path / "base")))
    peer = DeepseekV4ForCausalLM.from_pretrained(
        tmp_path / "base", dtype=torch.float32, attn_implementation="eager"
    )
    tokens = np.random.default_rng(0).integers(0, 96, (2, 70))
    with torch.no_grad():
        before = peer(torch.tensor(tokens)).logits.numpy()
        adapted = peft.PeftModel.from_pretrained(peer, tmp_path / "adapter").eval()
        after = adapted(torch.tensor(tokens)).logits.numpy()
    got = np.asarray(v4jax.forward(cfg, params | {"lora": tree}, jnp.asarray(tokens)).logits)
    assert np.abs(after - before).max() > 0.5
    np.testing.assert_allclose(got, after, atol=2e-4 * np.abs(after).max())

    adapted.save_pretrained(tmp_path / "again")  # and what PEFT writes is read
    again = load_adapter(cfg, tmp_path / "again")
    again = {"mtp": tree["mtp"]} | again
    close = np.asarray(v4jax.forward(cfg, params | {"lora": again}, jnp.asarray(tokens)).logits)
    np.testing.assert_allclose(close, got, atol=1e-5 * np.abs(got).max())
