"""One sequence whose cache stays between calls, so only new tokens of the next prompt run.

    row = Row(cfg, params, decoding, capacity=4096)
    first = row.answer([0, 5, 6], 64, 0, stop)
    again = row.answer([0, 5, 6, *first.tokens, 7], 64, 0, stop)
    # runs only the newest token of `first`, and 7

Tokens are compared by their ids. Where a prompt differs from the kept tokens, the last few are
taken back if the cache still has what came before them; otherwise the row starts anew. The answer
is that of an empty cache, up to the rounding of different chunks.

Shapes: B batch (the sequence, then fillers, so that every device has a row).
Next file to read: v4jax/generate/chat.py.
"""

import itertools
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np

from v4jax.adapters.several import refuse_several
from v4jax.cache.layer import SPARE_ROWS
from v4jax.config import ModelConfig
from v4jax.generate.cache import Cache, decoding_rules, split_layers
from v4jax.generate.decode import Completion, StopRule, decode
from v4jax.generate.request import check_request
from v4jax.generate.steps import DecodeConfig, prefill


class Row:
    """One sequence of up to `capacity` tokens, without speculation.

    The mesh of decoding.rules is ambient.

    Attributes:
      tokens: the tokens that the cache has.
    """

    def __init__(self, cfg: ModelConfig, params, decoding: DecodeConfig, capacity: int):
        if decoding.speculative:
            raise ValueError("speculative: a kept row is continued a token at a time")
        refuse_several(params, "Row")
        self._cfg, self._capacity = cfg, capacity
        self._params = split_layers(cfg, params, decoding.rules)
        # One step per call: tokens after a stop would have to be taken back.
        self._decoding = decoding._replace(rules=decoding_rules(decoding.rules), steps=1)
        self._cache: Cache | None = None
        # Positions ever written: a ring has lost what is a whole turn before them.
        self._reach = 0
        self.tokens: list[int] = []

    def known(self, prompt: Sequence[int]) -> int:
        """Number of the prompt's tokens that need not run. The last one gives the answer."""
        pairs = zip(self.tokens, prompt[:-1], strict=False)
        same = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
        return same if self._reach - same <= SPARE_ROWS else 0

    def answer(
        self, prompt: Sequence[int], max_new_tokens: int, seed: int, stop: StopRule
    ) -> Completion:
        """Continues the prompt.

        Raises:
          ValueError: see `check_request`; the row is unchanged then.
        """
        check_request(self._cfg, [prompt], [seed], max_new_tokens, self._capacity, self._decoding)
        # Every device must hold a row, so the batch has one for each.
        known, rows = self.known(prompt), self._decoding.rules.shards("act_batch")
        cache = self._cache if known > 0 else None
        if cache is not None:
            cache = cache._replace(length_B=jnp.minimum(cache.length_B, known))
        self._cache, self.tokens = None, []  # so an interrupted call leaves nothing half done
        prompts, seed_B = (
            [prompt[known:], *[prompt[:1]] * (rows - 1)],
            np.array([seed] * rows, np.uint32),
        )
        own = (self._cfg, self._decoding, self._params)
        state, output = prefill(*own, prompts, seed_B, self._capacity, cache)
        (completion,), self._cache = decode(*own, state, output, seed_B, stop, [max_new_tokens])
        self.tokens = [*prompt, *completion.tokens[:-1]]
        self._reach = max(self._reach if known else 0, len(self.tokens))
        return completion
