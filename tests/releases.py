"""Synthetic checkpoints of the newer releases: official names, shapes scaled down, fp8 and MXFP4.

Names and shapes of what is carried are stated here a second time, without v4jax's tables.
"""

import json

import ml_dtypes
import numpy as np
from reference.weights import random_weights
from trees import small_config

from v4jax.checkpoint import from_official, save_safetensors
from v4jax.checkpoint.files import INDEX_FILE, dtype_name, headers_of, write_file
from v4jax.checkpoint.formats import FP8, MXFP4, encode

BF16 = np.dtype(ml_dtypes.bfloat16)
STAGES, TAPS, RANK, BLOCK = 3, (4, 5, 6), 12, 5
VISION_BLOCKS, VISION_DIM, VISION_INTER = 2, 16, 24
DSPARK = {
    "dspark_block_size": BLOCK,
    "dspark_noise_token_id": 96,
    "dspark_target_layer_ids": list(TAPS),
    "dspark_markov_rank": RANK,
}
VISION = {
    "vision_n_layers": VISION_BLOCKS,
    "vision_dim": VISION_DIM,
    "vision_n_heads": 2,
    "vision_inter_dim": VISION_INTER,
    "vision_patch_size": 14,
    "vision_rope_theta": 10000,
    "vision_downsample_ratio": 3,
    "vision_max_n_token": 384,
    "vision_min_pixels": 147456,
    "vision_max_wh_ratio": 8,
}
ENCODERS = {
    "v4": b'REASONING_EFFORT_MAX = "Reasoning Effort: ..."\nraise SystemExit("never run")\n',
    "0731": b'REASONING_EFFORT_PROMPTS = {"high": "..."}\nraise SystemExit("never run")\n',
}
RELEASES = ("flash", "flash-0731", "pro-0813", "flash-vision-exp")
OTHER_FILES = {
    "README.md": b"# A model\n",
    "LICENSE": b"MIT\n",
    "encoding/README.md": b"how to encode\n",
    "encoding/tests/test_1.json": b"{}",
    "inference/config.json": b"{}",
    "inference/model.py": b"raise SystemExit\n",
}


def trunk_config(release, **further):
    """The ModelConfig of a release's trunk, scaled down; of flash with its MTP module."""
    changes = {"hidden_size": 64, "moe_intermediate_size": 32, "q_lora_rank": 32}
    changes["index_n_heads"] = 8
    ratios = (0, 0, 4, 128, 4, 128, 4)
    if release == "pro-0813":
        ratios = (128, 128, 4, 128, 4, 128, 4)
    if release == "flash-vision-exp":
        changes["rms_norm_eps"] = 1e-20
    mtp = release == "flash"
    ratios = (*ratios, 0) if mtp else ratios
    changes |= {"compress_ratios": ratios, "num_nextn_predict_layers": int(mtp)} | further
    return small_config(**changes)


def raw_config(release, raw):
    """The config.json that a release has, from that of its trunk."""
    if release == "flash":
        return raw
    raw = raw | DSPARK | {"compress_ratios": [*raw["compress_ratios"], *[0] * STAGES]}
    raw["num_nextn_predict_layers"] = 1
    if release == "flash-vision-exp":
        raw |= VISION | {"num_nextn_predict_layers": 3}
    return raw


def carried_tensors(cfg, release, seed=7):
    """Name -> array as files have it, of the drafter and the tower; scales included."""
    if release == "flash":
        return {}
    found = {}
    rng = np.random.default_rng(seed)
    for name, (shape, kind) in drafter_shapes(cfg).items():
        near_one = 1.0 if name.endswith("norm.weight") else 0.0
        x = near_one + rng.normal(size=shape).astype(np.float32) / np.sqrt(shape[-1])
        if kind in ("fp8", "mxfp4"):
            stored = encode(FP8 if kind == "fp8" else MXFP4, x)
            found[name] = stored.data
            found[name.removesuffix("weight") + "scale"] = stored.scale
        else:
            found[name] = x.astype(BF16 if kind == "bf16" else np.float32)
    if release == "flash-vision-exp":
        for name, (shape, kind) in vision_shapes(cfg).items():
            x = rng.normal(size=shape)
            found[name] = x.astype(BF16 if kind == "bf16" else np.float32)
    return found


def drafter_shapes(cfg, taps=3):
    """Name -> (shape [out, in], how releases store it)."""
    d, v, n, h = cfg.hidden_size, cfg.vocab_size, cfg.hc_mult, cfg.head_dim
    heads, q, e, f = (
        cfg.num_attention_heads,
        cfg.q_lora_rank,
        cfg.n_routed_experts,
        cfg.moe_intermediate_size,
    )
    groups, o = cfg.o_groups, cfg.o_lora_rank
    found = {}
    for s in range(STAGES):
        block = {
            "attn_norm.weight": ((d,), "bf16"),
            "ffn_norm.weight": ((d,), "bf16"),
            "attn.attn_sink": ((heads,), "f32"),
            "attn.wq_a.weight": ((q, d), "fp8"),
            "attn.q_norm.weight": ((q,), "bf16"),
            "attn.wq_b.weight": ((heads * h, q), "fp8"),
            "attn.wkv.weight": ((h, d), "fp8"),
            "attn.kv_norm.weight": ((h,), "bf16"),
            "attn.wo_a.weight": ((groups * o, heads // groups * h), "fp8"),
            "attn.wo_b.weight": ((d, groups * o), "fp8"),
            "ffn.gate.weight": ((e, d), "bf16"),
            "ffn.gate.bias": ((e,), "f32"),
        }
        for site in ("attn", "ffn"):
            block[f"hc_{site}_fn"] = (((2 + n) * n, n * d), "f32")
            block[f"hc_{site}_base"] = (((2 + n) * n,), "f32")
            block[f"hc_{site}_scale"] = ((3,), "f32")
        for where, kind in [(f"experts.{i}", "mxfp4") for i in range(e)] + [
            ("shared_experts", "fp8")
        ]:
            for name, shape in (("w1", (f, d)), ("w2", (d, f)), ("w3", (f, d))):
                block[f"ffn.{where}.{name}.weight"] = (shape, kind)
        if s == 0:
            block["main_proj.weight"] = ((d, taps * d), "fp8")
            block["main_norm.weight"] = ((d,), "bf16")
        if s == STAGES - 1:
            block["norm.weight"] = ((d,), "bf16")
            block["hc_head_fn"] = ((n, n * d), "f32")
            block["hc_head_base"] = ((n,), "f32")
            block["hc_head_scale"] = ((1,), "f32")
            block["markov_head.markov_w1.weight"] = ((v, RANK), "bf16")
            block["markov_head.markov_w2.weight"] = ((v, RANK), "bf16")
            block["confidence_head.proj.weight"] = ((1, d + RANK), "bf16")
        found |= {f"mtp.{s}.{name}": one for name, one in block.items()}
    return found


def vision_shapes(cfg):
    """Name -> (shape, how releases store it)."""
    d, dim, inter = cfg.hidden_size, VISION_DIM, VISION_INTER
    found = {
        "vision.patch_embed.proj.weight": ((dim, 3 * 14 * 14), "bf16"),
        "vision.patch_embed.proj.bias": ((dim,), "bf16"),
        "vision.norm.weight": ((dim,), "bf16"),
        "aligner.w1.weight": ((d, 9 * dim), "bf16"),
        "aligner.w1.bias": ((d,), "bf16"),
        "aligner.w2.weight": ((d, d), "bf16"),
        "aligner.w2.bias": ((d,), "bf16"),
    }
    for i in range(VISION_BLOCKS):
        block = {
            "norm1.weight": (dim,),
            "attn.wqkv.weight": (3 * dim, dim),
            "attn.wqkv.bias": (3 * dim,),
            "attn.wo.weight": (dim, dim),
            "attn.wo.bias": (dim,),
            "norm2.weight": (dim,),
            "mlp.w1.weight": (2 * inter, dim),
            "mlp.w2.weight": (dim, inter),
        }
        found |= {f"vision.blocks.{i}.{name}": (shape, "bf16") for name, shape in block.items()}
    found |= {f"image_{name}": ((d,), "bf16") for name in ("start", "end", "newline", "pad")}
    layers = [f"layers.{i}" for i in range(cfg.num_hidden_layers)]
    layers += [f"mtp.{s}" for s in range(STAGES)]
    for layer in layers:
        found[f"{layer}.ffn.gate.bias_vl"] = ((cfg.n_routed_experts,), "f32")
    for i in range(cfg.num_hash_layers):
        found[f"layers.{i}.ffn.gate.bias"] = ((cfg.n_routed_experts,), "f32")
    return found


def make_release(folder, release, dtype="official", change=None, few_tokens=0, **further):
    """Writes a release; returns (cfg of its trunk, params).

    change: a function of (config.json, carried tensors) that harms it.
    few_tokens: trunk and drafter choose among this number of tokens, so that they often agree.
    further: fields of the trunk's ModelConfig.
    """
    cfg = trunk_config(release, **further)
    weights = random_weights(cfg, 0)
    if few_tokens:
        weights["head.weight"][few_tokens:] = 0
    params = from_official(cfg, weights)
    save_safetensors(cfg, params, folder, dtype=dtype, max_file_bytes=200_000)
    raw = raw_config(release, json.loads((folder / "config.json").read_text()))
    carried = carried_tensors(cfg, release)
    if few_tokens:
        carried[f"mtp.{STAGES - 1}.markov_head.markov_w2.weight"][few_tokens:] = 0
    if change is not None:
        change(raw, carried)
    (folder / "config.json").write_text(json.dumps(raw | {"note": "kept"}))
    if carried:
        _add(folder, carried)
    encoder = ENCODERS["v4" if release == "flash" else "0731"]
    files = OTHER_FILES | {"encoding/encoding_dsv4.py": encoder, "tokenizer.json": b"{}"}
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return cfg, params


def _add(folder, carried):
    file = "model-carried.safetensors"
    tensors = {name: (dtype_name(x.dtype), x.shape) for name, x in carried.items()}
    write_file(folder / file, tensors, iter(carried.items()))
    index = json.loads((folder / INDEX_FILE).read_text())
    index["weight_map"] |= dict.fromkeys(carried, file)
    (folder / INDEX_FILE).write_text(json.dumps(index))


def tensors_of(folder):
    """Name -> (dtype, bytes) of all safetensors of a folder."""
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        content = file.read_bytes()
        for one in headers_of(file):
            size = int(np.prod(one.shape)) * _WIDTH[one.dtype]
            found[one.stored] = (one.dtype, one.shape, content[one.start : one.start + size])
    return found


_WIDTH = {"F32": 4, "BF16": 2, "I64": 8, "I8": 1, "F8_E4M3": 1, "F8_E8M0": 1}
