"""The plain restatement in tests/reference agrees with transformers 5, live; run `-m parity`.

Weights go the way a user's do: official names in a safetensors file, read by transformers. float32
models must agree to 1e-4. Then every float32 of the transformers module is widened to float64, so
that only the difference of the equations is left: 1e-10, small enough to tell where each 1e-6
epsilon is. transformers has no MTP, but its parts.
"""

import json

import numpy as np
import pytest
from reference import indexer, rotary, transformer
from reference.loss import loss
from reference.weights import random_weights, shapes

from v4jax.config import CSA, WINDOW_ONLY, ModelConfig, RopeScaling

pytestmark = pytest.mark.parity

YARN = RopeScaling(factor=8.0, original_max_position_embeddings=96, beta_fast=8.0, beta_slow=1.0)
FLASH_LIKE, PRO_LIKE = (0, 0, 4, 128, 4), (128, 128, 4, 128)
PLAIN = dict(
    vocab_size=61,
    hidden_size=48,
    moe_intermediate_size=20,
    num_attention_heads=4,
    head_dim=24,
    qk_rope_head_dim=8,
    q_lora_rank=28,
    o_groups=2,
    o_lora_rank=12,
    n_routed_experts=7,
    num_experts_per_tok=3,
    routed_scaling_factor=1.5,
    num_hash_layers=3,
    index_n_heads=16,
    index_head_dim=16,
    index_topk=6,
    compress_rope_theta=160000.0,
    max_position_embeddings=768,  # factor * original length of YARN, or transformers warns
)
ODD = PLAIN | dict(
    vocab_size=53,
    hidden_size=46,
    moe_intermediate_size=13,
    num_attention_heads=9,
    head_dim=26,
    qk_rope_head_dim=10,
    q_lora_rank=19,
    o_groups=3,
    o_lora_rank=7,
    n_routed_experts=5,
    num_experts_per_tok=2,
    routed_scaling_factor=2.5,
    num_hash_layers=1,
    sliding_window=37,
    hc_mult=3,
    hc_sinkhorn_iters=7,
    index_n_heads=13,
    index_head_dim=18,
    index_topk=11,
    compress_rope_theta=40000.0,
    swiglu_limit=3.0,
)


def config(ratios: tuple[int, ...], sizes: dict, yarn: RopeScaling | None) -> ModelConfig:
    return ModelConfig(
        **sizes,
        compress_ratios=(*ratios, WINDOW_ONLY),
        num_hidden_layers=len(ratios),
        rope_scaling=yarn,
    )


CONFIGS = {
    "flash-like": config(FLASH_LIKE, PLAIN, None),
    "flash-like yarn": config(FLASH_LIKE, PLAIN, YARN),
    "pro-like": config(PRO_LIKE, PLAIN, None),
    "pro-like yarn": config(PRO_LIKE, PLAIN, YARN),
    "flash-like odd yarn": config(FLASH_LIKE, ODD, YARN),
    "pro-like odd": config(PRO_LIKE, ODD, None),
}
BIG_EPS = {  # epsilons large enough to show in the logits where they stand
    name: CONFIGS[name].replace(hc_eps=0.03, rms_norm_eps=0.05)
    for name in ("flash-like yarn", "pro-like odd")
}


def configs(*in_ci):
    """All names of CONFIGS; those not in `in_ci` are run by hand."""
    return [
        name if name in in_ci else pytest.param(name, marks=pytest.mark.long) for name in CONFIGS
    ]


@pytest.fixture(autouse=True)
def one_thread():
    """Tiny matrices: threads only wait for each other."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def peer(cfg: ModelConfig, weights: dict, path):
    """The float32 transformers model that reads `weights` from official files.

    Every tensor it has must be found.
    """
    import torch
    from safetensors.numpy import save_file
    from transformers import AutoModelForCausalLM

    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    (path / "config.json").write_text(json.dumps(cfg.to_dict()))
    model, info = AutoModelForCausalLM.from_pretrained(
        path,
        dtype=torch.float32,
        attn_implementation="eager",
        experts_implementation="eager",
        output_loading_info=True,
    )
    assert not info["missing_keys"] and not info["mismatched_keys"]
    assert all(name.startswith("mtp.") for name in info["unexpected_keys"])
    return model.eval()


def logits_of(model, tokens_BS: np.ndarray) -> np.ndarray:
    import torch

    with torch.no_grad():
        return model(torch.from_numpy(tokens_BS), use_cache=False).logits.double().numpy()


def random_tokens(cfg: ModelConfig, length: int, rows: int = 2) -> np.ndarray:
    return np.random.default_rng(length).integers(0, cfg.vocab_size, (rows, length))


def widen(model, cfg: ModelConfig, monkeypatch):
    """The model with float64 for every float32 of its module, rotary tables included."""
    import torch
    from transformers.models.deepseek_v4 import modeling_deepseek_v4 as module

    class Wide:
        """torch, except that float32 is float64."""

        def __getattr__(self, name):
            return torch.float64 if name in ("float", "float32") else getattr(torch, name)

    monkeypatch.setattr(module, "torch", Wide())
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    for part in model.double().modules():
        if isinstance(part, module.DeepseekV4RotaryEmbedding):
            for kind, ratio in (("main", WINDOW_ONLY), ("compress", CSA)):
                ours, theirs = rotary.frequencies(cfg, ratio), getattr(part, f"{kind}_inv_freq")
                np.testing.assert_allclose(theirs.numpy(), ours, rtol=1e-6)
                theirs.copy_(torch.from_numpy(ours))
    return model


@pytest.mark.parametrize("name", configs("flash-like yarn", "pro-like odd"))
def test_float32_logits_agree(name, tmp_path):
    cfg = CONFIGS[name]
    weights = random_weights(cfg, seed=1)
    model = peer(cfg, weights, tmp_path)
    for length in (1, 3, 4, 5, 127, 128, 129, 300):
        tokens_BS = random_tokens(cfg, length)
        ours = transformer.forward(cfg, weights, tokens_BS).logits
        np.testing.assert_allclose(
            logits_of(model, tokens_BS), ours, rtol=0, atol=1e-4, err_msg=f"S={length}"
        )


@pytest.mark.parametrize("name", configs("flash-like yarn", "pro-like yarn", "pro-like odd"))
def test_equations_agree_in_float64(name, tmp_path, monkeypatch):
    cfg = CONFIGS[name]
    weights = random_weights(cfg, seed=2)
    model = widen(peer(cfg, weights, tmp_path), cfg, monkeypatch)
    for length in (1, 4, 6, 131, 300, 515):
        tokens_BS = random_tokens(cfg, length, rows=1)
        ours = transformer.forward(cfg, weights, tokens_BS).logits
        assert 0.3 < ours.std() < 3, "logits of unit scale, or the tolerance means nothing"
        np.testing.assert_allclose(
            logits_of(model, tokens_BS), ours, rtol=0, atol=1e-10, err_msg=f"S={length}"
        )


@pytest.mark.parametrize("name", BIG_EPS)
def test_each_epsilon_stands_where_transformers_has_it(name, tmp_path, monkeypatch):
    cfg = BIG_EPS[name]
    weights = random_weights(cfg, seed=3)
    tokens_BS = random_tokens(cfg, 140, rows=1)
    theirs = logits_of(widen(peer(cfg, weights, tmp_path), cfg, monkeypatch), tokens_BS)
    np.testing.assert_allclose(
        theirs, transformer.forward(cfg, weights, tokens_BS).logits, rtol=0, atol=1e-10
    )


def test_index_scores_agree_in_float64(tmp_path, monkeypatch):
    """The scores themselves are compared, on the peer's inputs.

    Their scale changes no selection, and hence no logit.
    """
    cfg = CONFIGS["flash-like odd yarn"]
    weights = random_weights(cfg, seed=5)
    model = widen(peer(cfg, weights, tmp_path), cfg, monkeypatch)
    part = model.model.layers[4].self_attn.compressor.indexer
    inputs, scores = [], []
    part.register_forward_pre_hook(lambda _, args: inputs.extend(x[0].numpy() for x in args[:2]))
    part.scorer.register_forward_hook(lambda _, args, output: scores.append(output[0].numpy()))
    logits_of(model, random_tokens(cfg, 70, rows=1))
    ours = indexer.scores(cfg, weights, "layers.4.attn.indexer", *inputs)
    assert ours.shape == (70, 17)
    np.testing.assert_allclose(scores[0], ours, rtol=0, atol=1e-10)


def test_mtp_agrees_with_the_same_block_in_transformers(tmp_path, monkeypatch):
    """A one-layer transformers model that holds mtp.0's block, collapse and norm.

    Only the line that joins embedding and streams is written here again (official MTPBlock:
    e_proj(enorm(embed)) on each stream + h_proj(hnorm(stream))).
    """
    import torch

    cfg = CONFIGS["flash-like odd yarn"]
    weights = random_weights(cfg, seed=7)
    tokens_BS = random_tokens(cfg, 90)
    main = widen(peer(cfg, weights, tmp_path), cfg, monkeypatch)
    streams = []
    main.model.layers[-1].register_forward_hook(lambda _, args, output: streams.append(output))
    logits_of(main, tokens_BS)

    cfg_1 = cfg.replace(
        num_hidden_layers=1,
        compress_ratios=(WINDOW_ONLY,),
        num_hash_layers=0,
        num_nextn_predict_layers=0,
    )
    weights_1 = {
        name.replace("mtp.0.", "layers.0."): w
        for name, w in weights.items()
        if name.startswith("mtp.0.")
    }
    weights_1 |= {
        name.removeprefix("layers.0."): weights_1[name]
        for name in list(weights_1)
        if "hc_head" in name
    }
    weights_1 |= {"norm.weight": weights["mtp.0.norm.weight"]}
    weights_1 |= {name: weights[name] for name in ("embed.weight", "head.weight")}
    single = widen(
        peer(cfg_1, {name: weights_1[name] for name in shapes(cfg_1)}, tmp_path), cfg_1, monkeypatch
    )

    def joined(_, args, kwargs):
        names = ("e_proj", "h_proj", "enorm", "hnorm")
        w = {name: torch.from_numpy(weights[f"mtp.0.{name}.weight"]).double() for name in names}
        norm = torch.nn.functional.rms_norm
        e = (
            norm(args[0][:, :, :1], (cfg.hidden_size,), w["enorm"], cfg.rms_norm_eps)
            @ w["e_proj"].T
        )
        return (
            e + norm(streams[0], (cfg.hidden_size,), w["hnorm"], cfg.rms_norm_eps) @ w["h_proj"].T,
        ), kwargs

    single.model.layers[0].register_forward_pre_hook(joined, with_kwargs=True)
    theirs = logits_of(single, np.roll(tokens_BS, -1, axis=1))[:, :-1]
    ours = transformer.forward(cfg, weights, tokens_BS).mtp_logits[:, :-1]
    np.testing.assert_allclose(theirs, ours, rtol=0, atol=1e-10)


def test_next_token_loss_agrees(tmp_path):
    import torch

    cfg = CONFIGS["pro-like"]
    weights = random_weights(cfg, seed=6)
    tokens_BS = random_tokens(cfg, 50)
    tokens = torch.from_numpy(tokens_BS)
    theirs = float(
        peer(cfg, weights, tmp_path)(tokens, labels=tokens, use_cache=False).loss.detach()
    )
    ours = loss(cfg, transformer.forward(cfg, weights, tokens_BS), tokens_BS)
    assert ours.next_token == pytest.approx(theirs, abs=1e-5)


def test_what_transformers_saves_are_these_names_and_shapes(tmp_path):
    """save_pretrained writes the same tensors, with the prefix `model.` and four new spellings."""
    from safetensors.numpy import load_file

    cfg = CONFIGS["flash-like"]
    weights = random_weights(cfg, seed=4)
    peer(cfg, weights, tmp_path).save_pretrained(tmp_path / "saved")
    saved = {}
    for name, value in load_file(tmp_path / "saved" / "model.safetensors").items():
        name = (
            name.removeprefix("model.")
            .replace("attn.norm.", "attn.kv_norm.")
            .replace("hc_head.hc_", "hc_head_")
        )
        saved[name.replace("embed_tokens.", "embed.").replace("lm_head.", "head.")] = value
    assert saved.keys() == {name for name in shapes(cfg) if not name.startswith("mtp.")}
    for name, value in saved.items():
        np.testing.assert_array_equal(value, weights[name], err_msg=name)
