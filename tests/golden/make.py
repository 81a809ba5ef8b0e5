"""Makes tests/golden/*.npz from transformers 5, so that the default suite needs no torch.

    python tests/golden/make.py        needs the extra `parity`

Weights are not stored: reference.weights.random_weights(cfg, 0) makes them again. Of each gradient,
the file keeps its norm and its product with a fixed random direction.
"""

import pathlib
import sys
import tempfile

import numpy as np

HERE = pathlib.Path(__file__).parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent.parent)]

from reference.weights import random_weights  # noqa: E402
from safetensors.numpy import load_file  # noqa: E402
from trees import small_config  # noqa: E402

import v4jax  # noqa: E402
from v4jax.checkpoint.names import from_official, transformers_to_official  # noqa: E402

PATTERNS = {
    "flash": dict(
        compress_ratios=(0, 0, 4, 128, 4, 0),
        num_hidden_layers=5,
        num_hash_layers=3,
        index_n_heads=8,
    ),
    "pro": dict(
        compress_ratios=(128, 128, 4, 128, 0),
        num_hidden_layers=4,
        num_hash_layers=2,
        index_n_heads=8,
    ),
}
SEQ = 141


def inputs(cfg):
    """(tokens [1,S], the weights of the sum of logits that is differentiated [1,S,V])."""
    rng = np.random.default_rng(7)
    return rng.integers(0, cfg.vocab_size, (1, SEQ)), rng.normal(
        size=(1, SEQ, cfg.vocab_size)
    ).astype(np.float32)


def summary(name: str, gradient: np.ndarray) -> np.ndarray:
    """(norm, product with a random unit direction that depends on the shape only), float64."""
    direction = np.random.default_rng(gradient.size).normal(size=gradient.shape)
    gradient = gradient.astype(np.float64)
    return np.array(
        [np.linalg.norm(gradient), (gradient * direction).sum() / np.linalg.norm(direction)]
    )


def make(name: str) -> None:
    import torch
    from transformers import DeepseekV4ForCausalLM

    cfg = small_config(**PATTERNS[name])
    tokens, weight = inputs(cfg)
    with tempfile.TemporaryDirectory() as folder:
        v4jax.save_safetensors(
            cfg, from_official(cfg, random_weights(cfg, 0)), f"{folder}/in", dtype="float32"
        )
        peer = DeepseekV4ForCausalLM.from_pretrained(
            f"{folder}/in", dtype=torch.float32, attn_implementation="eager"
        ).eval()
        logits = peer(torch.tensor(tokens)).logits
        (logits * torch.tensor(weight)).sum().backward()
        with torch.no_grad():
            for parameter in peer.parameters():
                parameter.copy_(
                    torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                )
        peer.save_pretrained(f"{folder}/out")
        grads = {
            transformers_to_official(key): value
            for key, value in load_file(f"{folder}/out/model.safetensors").items()
        }
    kept = {
        f"grad:{key}": summary(key, value)
        for key, value in grads.items()
        if not key.endswith((".tid2eid", "gate.bias"))
    }
    np.savez_compressed(HERE / f"{name}.npz", logits=logits.detach().numpy(), **kept)
    print(f"{HERE / name}.npz: logits {tuple(logits.shape)}, {len(kept)} gradients")


if __name__ == "__main__":
    for pattern in PATTERNS:
        make(pattern)
