"""Small runs for tests: a folder of text, a model of one layer, and a run that takes seconds."""

import pathlib

from trees import small_config

from v4jax.data.config import DataConfig
from v4jax.train.config import TrainConfig

MODEL = small_config(
    vocab_size=260,
    num_hidden_layers=1,
    compress_ratios=(4, 0),
    num_hash_layers=0,
    hidden_size=32,
    moe_intermediate_size=16,
)
"""One CSA layer and MTP, for bytes."""


def write_text(folder: pathlib.Path, documents: int = 20, repeats: int = 20) -> pathlib.Path:
    """Writes text files that differ by their number into `folder`, made if needed; returns it."""
    folder.mkdir(exist_ok=True)
    for i in range(documents):
        text = f"document {i}: " + "the cat sat on the mat. " * repeats
        (folder / f"{i}.txt").write_text(text)
    return folder


def small_run(text, run, **changes) -> TrainConfig:
    """A run of 4 steps of MODEL on the text of a folder; change any field."""
    fields = dict(
        model=MODEL,
        data=DataConfig(source=str(text), held_out=0.2),
        run_dir=str(run),
        steps=4,
        batch_size=2,
        seq_len=32,
        learning_rate=5e-3,
        warmup_steps=2,
        eval_batches=0,
        remat=False,
        export="none",
    )
    return TrainConfig(**fields | changes)
