"""From one kind of checkpoint to another: safetensors directory <-> v4jax store, in plain precision.

The whole model passes through host memory; streaming and low precision come with a later release.

Next file to read: v4jax/cli.py.
"""

import pathlib
import shutil

from v4jax.api import load
from v4jax.checkpoint.export import save_safetensors
from v4jax.checkpoint.store import Store, write_config

CARRIED = ("tokenizer.json", "tokenizer_config.json", "generation_config.json")
"""Files that travel with a checkpoint."""


def convert(source, target, format: str = "safetensors", dtype: str = "float32") -> dict:
    """Writes the checkpoint `source` (any kind) to the new directory `target`.

    Raises:
      ValueError: a target that exists and is not empty, a dtype that is not built yet, or a bad source.
    """
    if dtype not in ("float32", "bfloat16"):
        raise ValueError(f"dtype: got {dtype!r}; allowed: float32, bfloat16 (fp8 and official are not built yet)")
    source, target = pathlib.Path(source), pathlib.Path(target)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(f"{target}: exists and is not an empty directory; choose another")
    cfg, params = load(source, dtype)
    if format == "safetensors":
        save_safetensors(cfg, params, target, dtype=dtype)
    else:
        write_config(target, cfg)
        with Store(target, writes=True) as store:
            store.save(0, {"params": params})
    for name in CARRIED:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)
    return {"target": str(target), "format": format, "dtype": dtype}
