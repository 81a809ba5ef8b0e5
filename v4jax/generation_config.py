"""generation_config.json of a checkpoint: which further tokens end a row; and where special tokens of its files disagree.

What it says about choosing tokens is read in v4jax/generate/choice.py.

Next file to read: v4jax/cost.py.
"""

from typing import Any

from v4jax.config import ModelConfig, is_token
from v4jax.foreign import file_in, read_json
from v4jax.storage import local_path

GENERATION_FILE = "generation_config.json"


def read_generation_config(directory) -> dict[str, Any]:
    """The contents of a checkpoint's generation_config.json, as they are; {} without the file.

    Raises:
      ValueError: naming the file: a link out of its directory, or no JSON object.
    """
    directory = local_path(directory, "directory")
    try:
        raw = read_json(file_in(directory, GENERATION_FILE))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise ValueError(f"{directory}/{error}") from None
    if not isinstance(raw, dict):
        raise ValueError(f"{directory / GENERATION_FILE}: expected a JSON object, got {type(raw).__name__}")
    return raw


def end_tokens(directory, vocab_size: int) -> list[int]:
    """The tokens at which rows end by a checkpoint's generation_config.json: none, one or several.

    Raises:
      ValueError: see read_generation_config; or no id in [0, vocab_size).
    """
    found = read_generation_config(directory).get("eos_token_id")
    if found is None:
        return []
    ids = found if isinstance(found, list) else [found]
    for token in ids:
        if not is_token(token, vocab_size):
            path = local_path(directory) / GENERATION_FILE
            raise ValueError(f"{path}: eos_token_id: got {token!r}; must be in [0, vocab_size={vocab_size})")
    return ids


def with_end_tokens(cfg: ModelConfig, directory) -> ModelConfig:
    """`cfg`, whose rows also end where the checkpoint's generation_config.json says. Raises ValueError: see end_tokens."""
    return cfg.ending_at(end_tokens(directory, cfg.vocab_size))


def disagreement(cfg: ModelConfig, tokenizer) -> str:
    """In words, where the special tokens of a tokenizer are not those of the model's configuration; "" if they are."""
    said = []
    if tokenizer.eos_token_id not in cfg.eos_token_ids:
        ends = ", ".join(map(str, cfg.eos_token_ids)) or "nothing"
        said.append(f"the tokenizer's end token is {tokenizer.eos_token_id}, and rows end at {ends}")
    if cfg.bos_token_id is not None and tokenizer.bos_token_id != cfg.bos_token_id:
        said.append(f"the tokenizer's begin token is {tokenizer.bos_token_id}, and config.json's is {cfg.bos_token_id}")
    return "; ".join(said)
