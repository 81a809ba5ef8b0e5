"""Reads a checkpoint's generation_config.json: the further tokens that end a row.

v4jax/generate/choice.py reads what the file says about choosing tokens.

Next file to read: v4jax/cost.py.
"""

from typing import Any

from v4jax.config import ModelConfig
from v4jax.config.validation import is_token
from v4jax.storage import checkpoint_path
from v4jax.untrusted import file_in, read_json

GENERATION_FILE = "generation_config.json"


def read_generation_config(directory) -> dict[str, Any]:
    """The contents of a checkpoint's generation_config.json, unchecked; {} without the file.

    Raises:
      ValueError: naming the file: a link out of its directory, or no JSON object.
    """
    directory = checkpoint_path(directory, "directory")
    try:
        raw = read_json(file_in(directory, GENERATION_FILE))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise ValueError(f"{directory}/{error}") from None
    if not isinstance(raw, dict):
        got = type(raw).__name__
        raise ValueError(f"{directory / GENERATION_FILE}: expected a JSON object, got {got}")
    return raw


def end_tokens(directory, vocab_size: int) -> list[int]:
    """The tokens that end a row by generation_config.json: none, one or several.

    Raises:
      ValueError: see read_generation_config; or an id outside [0, vocab_size).
    """
    found = read_generation_config(directory).get("eos_token_id")
    if found is None:
        return []
    ids = found if isinstance(found, list) else [found]
    for token in ids:
        if not is_token(token, vocab_size):
            path = checkpoint_path(directory) / GENERATION_FILE
            rule = f"must be in [0, vocab_size={vocab_size})"
            raise ValueError(f"{path}: eos_token_id: got {token!r}; {rule}")
    return ids


def with_end_tokens(cfg: ModelConfig, directory) -> ModelConfig:
    """`cfg` with the end tokens of the checkpoint's generation_config.json added.

    Raises:
      ValueError: see end_tokens.
    """
    return cfg.ending_at(end_tokens(directory, cfg.vocab_size))
