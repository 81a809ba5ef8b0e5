"""Reads and writes tokenizer.json and tokenizer_config.json as text.

Next file to read: v4jax/tokenizer/byte_tokenizer.py.
"""

import hashlib
import json

from v4jax import storage
from v4jax.storage import Place, place

BOS_TOKEN, EOS_TOKEN = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"
"""The special tokens of the DeepSeek tokenizers; ids 0 and 1 in the released config.json."""


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def config_json() -> str:
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS_TOKEN,
        "eos_token": EOS_TOKEN,
        "clean_up_tokenization_spaces": False,
    }
    return json.dumps(config, ensure_ascii=False, indent=1)


def read_text(path: Place) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ValueError(
            f"{path}: no such file; expected a tokenizer.json or a directory that holds one"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: cannot be read: {error}") from None


def parse(path: Place, text: str) -> dict:
    try:
        raw = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: not JSON: {error}") from None
    if not isinstance(raw, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(raw).__name__}")
    return raw


def write(directory, tokenizer_text: str, config_text: str) -> None:
    directory = place(directory, "directory")
    storage.make_folder(directory)
    storage.write(directory / "tokenizer.json", tokenizer_text.encode())
    storage.write(directory / "tokenizer_config.json", config_text.encode())
