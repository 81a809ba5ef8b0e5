"""Scores a file of tokens: logits, MTP logits and per-token loss of every row, on any mesh.

Next file to read: v4jax/cli/main.py.
"""

import os
import pathlib
import tempfile
from typing import Any

import jax
import numpy as np

from sharding.process_rows import gather
from sharding.processes import is_first
from v4jax.adapters.base import refuse_adapters
from v4jax.api import load, place_on
from v4jax.config import ModelConfig
from v4jax.functional import forward
from v4jax.kernels.choice import interpreted, kernels_from
from v4jax.quant.fake import check_quant
from v4jax.stderr import say
from v4jax.storage import checkpoint_path, file_to_write, local_path
from v4jax.tokenizer import check_tokens


def read_tokens(path, vocab_size: int) -> np.ndarray:
    """Reads token ids, int32 [B,S], from a .npy file.

    Raises:
      ValueError: no such file, not an integer matrix, or an id outside [0, vocab_size).
    """
    path = local_path(path, "tokens")
    try:
        tokens = np.load(path, allow_pickle=False)
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file") from None
    except (ValueError, OSError, EOFError) as error:
        raise ValueError(f"{path}: not a .npy file of integers: {error}") from None
    if (
        not isinstance(tokens, np.ndarray)
        or tokens.ndim != 2
        or not np.issubdtype(tokens.dtype, np.integer)
    ):
        raise ValueError(
            f"{path}: got {getattr(tokens, 'dtype', type(tokens))} {getattr(tokens, 'shape', '')}; "
            "must be integers [B, S]"
        )
    if 0 in tokens.shape:
        raise ValueError(f"{path}: got shape {tokens.shape}; B and S must be at least 1")
    check_tokens(tokens, vocab_size, str(path))
    return tokens.astype(np.int32)


def score(
    checkpoint,
    tokens_path,
    out_path,
    mesh=None,
    layout=None,
    dtype="float32",
    quant="none",
    kernels="",
    adapter=None,
) -> dict:
    """Writes logits, MTP logits and per-token loss of a file of tokens to an .npz file.

    The arrays are float32: logits [B,S,V], mtp_logits [B,S,V] (models with MTP), nll [B,S-1]. Rows
    run a few at a time, as many as the mesh splits a batch into. The first of several processes
    writes.

    Raises:
      ValueError: bad tokens, checkpoint, mesh, quant or kernels; nothing is written then.
    """
    folder = checkpoint_path(checkpoint, "checkpoint")
    out = file_to_write(out_path, "out")
    kernels_from(kernels)
    refuse_adapters(folder, "v4jax score {base} --adapter {adapter} ...")
    if folder.is_dir():  # so bad tokens are refused before a large checkpoint is read
        model = ModelConfig.from_json(folder)
        check_quant(model, quant)
        read_tokens(tokens_path, model.vocab_size)
    say(interpreted(kernels, jax.default_backend()))
    cfg, params = load(checkpoint, dtype, mesh, layout, adapter)
    tokens = read_tokens(tokens_path, cfg.vocab_size)
    device_mesh, rules = place_on(mesh, layout)
    parts: dict[str, list[np.ndarray]] = {"logits": [], "mtp_logits": [], "nll": []}
    with jax.set_mesh(device_mesh):
        step = rules.shards("act_batch")
        for start in range(0, len(tokens), step):
            rows = tokens[start : start + step]
            padded = np.pad(rows, ((0, step - len(rows)), (0, 0)))
            # A NumPy array will do for `forward`, on any mesh.
            prompt: Any = padded
            output = forward(cfg, params, prompt, quant=quant, rules=rules, kernels=kernels)
            logits = gather(output.logits)[: len(rows)]
            parts["logits"].append(logits)
            parts["nll"].append(_nll(logits, rows))
            if output.mtp_logits is not None:
                parts["mtp_logits"].append(gather(output.mtp_logits)[: len(rows)])
    arrays = {name: np.concatenate(rows) for name, rows in parts.items() if rows}
    if is_first():
        _write_npz(out, arrays)
    return {
        "out": str(out),
        "rows": len(tokens),
        "mean_nll": float(arrays["nll"].mean()) if arrays["nll"].size else None,
        **{name: list(array.shape) for name, array in arrays.items()},
    }


def _nll(logits: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """-log softmax(logits)[next token], float32 [B,S-1]."""
    logits = logits[:, :-1].astype(np.float64)
    peak = logits.max(-1, keepdims=True)
    total = np.log(np.exp(logits - peak).sum(-1)) + peak[..., 0]
    picked = np.take_along_axis(logits, tokens[:, 1:, None].astype(np.int64), axis=-1)[..., 0]
    return (total - picked).astype(np.float32)


def _write_npz(out: pathlib.Path, arrays: dict[str, np.ndarray]) -> None:
    """Writes an .npz file whole or not at all."""
    with tempfile.NamedTemporaryFile(dir=out.parent, suffix=".tmp", delete=False) as file:
        np.savez(file, **arrays)  # pyright: ignore[reportArgumentType] (none is allow_pickle)
    os.replace(file.name, out)
