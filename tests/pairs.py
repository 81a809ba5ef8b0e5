"""Preference pairs for tests: packed rows of random tokens, and records of a few words."""

import dataclasses
import json
import pathlib

import jax
import numpy as np
from test_mesh import CFG as WHOLE
from test_mesh import SMALL

from v4jax.adapters.config import Lora
from v4jax.adapters.tree import abstract_adapters
from v4jax.data.config import DataConfig

MODEL = SMALL.replace(
    num_hidden_layers=2, compress_ratios=(0, 0), num_hash_layers=0, num_nextn_predict_layers=0
)
"""Two layers of one kind: the objective does not ask what is in them."""
WHOLE_MODEL = SMALL.replace(num_hidden_layers=2, compress_ratios=(4, 4, 0), num_hash_layers=1)
"""CSA layers and MTP, for layouts."""
LORA = Lora(rank=4, alpha=2, targets=("wq_b", "experts.*", "head"))
DATA = DataConfig(source="unused", format="preference", packing="best_fit")
CFG = dataclasses.replace(
    WHOLE, model=MODEL, lora=LORA, init_from="unused", remat="none", objective="dpo", data=DATA
)


def pairs_of(model=MODEL, moved: bool = True, seed: int = 0):
    """Low-rank pairs of LORA; `moved`: b is not 0."""
    rng = np.random.default_rng(seed)

    def one(path, leaf):
        factor = 0.05 if path[-1].key == "b" else 0.2
        return rng.normal(0, factor * (moved or path[-1].key == "a"), leaf.shape).astype(np.float32)

    return jax.tree_util.tree_map_with_path(one, abstract_adapters(model, LORA))


def pair_batch(rows: int = 4, seq: int = 64, vocab: int = 96, seed: int = 0):
    """Rows of 3, 2, 1, 0, 3, ... pairs: a prompt of 4 tokens, and answers of 2 to 6 tokens."""
    rng = np.random.default_rng(seed)
    batch = {
        name: np.zeros((rows, seq), np.int32) for name in ("tokens", "segment_ids", "loss_mask")
    }
    for row in range(rows):
        at = 0
        for pair in range(3 - row % 4):
            prompt = rng.integers(0, vocab, 4)
            for side in (1, 2):
                tokens = np.concatenate([prompt, rng.integers(0, vocab, rng.integers(2, 7))])
                here = slice(at, at + len(tokens))
                batch["tokens"][row, here] = tokens
                batch["segment_ids"][row, here] = 2 * pair + side
                batch["loss_mask"][row, here] = np.arange(len(tokens)) >= 4
                at = here.stop
    return batch


def write_pairs(path: pathlib.Path, count: int = 24) -> DataConfig:
    """A file of short pairs, and the settings that read it."""
    records = (
        {"prompt": f"What is {i}?", "chosen": f"It is {i}.", "rejected": "no idea " * (i % 3 + 1)}
        for i in range(count)
    )
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return DataConfig(
        source=str(path),
        format="preference",
        packing="best_fit",
        tokenizer="byte-chat",
        held_out=0.2,
    )
