"""Whether tokens, a tokenizer and a model fit together.

Next file to read: v4jax/chat/tokens.py.
"""

from collections.abc import Iterable

import numpy as np

from v4jax.config import ModelConfig
from v4jax.tokenizer.load import Tokenizer

IMAGE = "<｜deepseek_image｜>"
"""The token of Flash-Vision-Exp that stands for an image."""


def disagreement(cfg: ModelConfig, tokenizer: Tokenizer) -> str:
    """Says how a tokenizer's special tokens differ from those of the config; "" if they do not."""
    said = []
    if tokenizer.eos_token_id not in cfg.eos_token_ids:
        ends = ", ".join(map(str, cfg.eos_token_ids)) or "nothing"
        said.append(
            f"the tokenizer's end token is {tokenizer.eos_token_id}, but rows end at {ends}"
        )
    begin = tokenizer.bos_token_id
    if cfg.bos_token_id is not None and begin != cfg.bos_token_id:
        own = cfg.bos_token_id
        said.append(f"the tokenizer's begin token is {begin}, but config.json has {own}")
    return "; ".join(said)


def require_tokens(tokenizer: Tokenizer, names: Iterable[str], purpose: str) -> None:
    """Raises ValueError unless each name is one token of the tokenizer.

    purpose: what needs the tokens, for the message.
    """
    for name in names:
        if len(tokenizer.encode(name)) != 1:
            raise ValueError(
                f"tokenizer: has no token {name}, which {purpose} needs; take that of a "
                "DeepSeek-V4 release, or 'byte-chat'"
            )


def check_no_image(tokenizer: Tokenizer, text: str) -> None:
    """Raises ValueError for a text with the token of an image, if the tokenizer has that token."""
    if IMAGE in text and len(tokenizer.encode(IMAGE)) == 1:
        raise ValueError(f"got {IMAGE} in a message; v4jax takes text only")


def check_tokens(tokens, vocab_size: int, name: str = "tokens") -> None:
    """Refuses token ids outside [0, vocab_size).

    An embedding lookup would silently clamp a bad id to a valid one.

    Args:
      tokens: integer array of any shape.

    Raises:
      ValueError: names the first bad id, its index and the allowed range.
    """
    tokens = np.asarray(tokens)
    if not np.issubdtype(tokens.dtype, np.integer):
        got = (
            f"dtype {tokens.dtype}"
            if tokens.dtype != object
            else f"{tokens.ravel()[0]!r} and others that are no 64-bit integers"
        )
        raise ValueError(f"{name}: got {got}; allowed: integers in [0, vocab_size={vocab_size})")
    bad = np.argwhere((tokens < 0) | (tokens >= vocab_size))
    if len(bad):
        place = tuple(int(i) for i in bad[0])
        where = ", ".join(map(str, place))
        raise ValueError(
            f"{name}: got id {tokens[place]} at [{where}]; allowed: [0, vocab_size={vocab_size})"
        )
