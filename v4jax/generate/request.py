"""What `generate` refuses before anything runs.

Next file to read: v4jax/generate/text.py.
"""

from collections.abc import Sequence

import numpy as np

from v4jax.cache.layer import SPARE_ROWS
from v4jax.config import ModelConfig
from v4jax.generate.cache import check_storage
from v4jax.generate.steps import DecodeConfig
from v4jax.kernels.choice import kernels_from
from v4jax.quant.fake import check_quant
from v4jax.tokenizer import check_tokens


def per_prompt(max_new_tokens: int | Sequence[int], prompts) -> list[int]:
    """One number for each prompt."""
    numbers = [int(new) for new in np.ravel(max_new_tokens)]
    return numbers * len(prompts) if np.ndim(max_new_tokens) == 0 else numbers


def _check_drafter(cfg: ModelConfig, decoding: DecodeConfig) -> None:
    """Refuses speculation without a drafter, or with one whose drafts no ring has places for."""
    if decoding.drafter is not None:
        most = SPARE_ROWS - 1
        if decoding.drafter.block_size > most:
            got = decoding.drafter.block_size
            raise ValueError(f"dspark_block_size: got {got}; v4jax drafts at most {most} tokens")
    elif decoding.speculative and not cfg.num_nextn_predict_layers:
        raise ValueError("speculative: the model has no MTP layer and no DSpark drafter")


def check_request(
    cfg: ModelConfig,
    prompts,
    seeds,
    max_new_tokens: int | Sequence[int],
    capacity: int | None,
    decoding: DecodeConfig,
) -> None:
    """Raises ValueError for a request that `generate` cannot serve."""
    check_storage(decoding.storage, decoding.quant)
    check_quant(cfg, decoding.quant)
    kernels_from(decoding.kernels)
    _check_drafter(cfg, decoding)
    if not len(prompts) or not all(len(prompt) for prompt in prompts):
        raise ValueError(
            "prompt: got no tokens; at least one is needed (the begin-of-text token, for example)"
        )
    for prompt in prompts:
        check_tokens(np.asarray(prompt), cfg.vocab_size, "prompt")
    if len(seeds) != len(prompts) or not all(0 <= seed < 2**32 for seed in seeds):
        raise ValueError(
            f"seeds: got {seeds}; must be one number in [0, 2^32) for each of {len(prompts)} "
            "prompt(s)"
        )
    max_new_tokens = per_prompt(max_new_tokens, prompts)
    if len(max_new_tokens) != len(prompts):
        raise ValueError(
            f"max_new_tokens: got {len(max_new_tokens)} numbers; must be one, or one for each of "
            f"{len(prompts)} prompt(s)"
        )
    if min(max_new_tokens) < 1:
        raise ValueError(f"max_new_tokens: got {min(max_new_tokens)}; must be at least 1")
    needed, new = max(
        (len(prompt) + new, new) for prompt, new in zip(prompts, max_new_tokens, strict=True)
    )
    text, limit = (
        f"prompt of {needed - new} tokens + max_new_tokens {new} is longer than",
        cfg.max_position_embeddings,
    )
    if capacity is not None and needed > capacity:
        raise ValueError(f"{text} the cache, which has room for {capacity}")
    if needed > limit:
        raise ValueError(f"{text} max_position_embeddings={limit}")
    if capacity is not None and capacity > limit:
        raise ValueError(
            f"the cache: got room for {capacity} tokens; max_position_embeddings={limit} are the "
            "most that the model takes"
        )
