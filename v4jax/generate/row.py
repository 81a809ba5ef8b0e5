"""One sequence whose cache stays between calls: of the next prompt only what is new is run.

    row = Row(cfg, params, decoding, capacity=4096)
    first = row.answer([0, 5, 6], 64, 0, stop)
    again = row.answer([0, 5, 6, *first.tokens, 7], 64, 0, stop)      # runs the newest token of `first`, and 7

Tokens are compared by their ids. Where a prompt leaves what is kept, a few tokens are taken back, if the cache still has what came
before them; otherwise it begins anew. The answer is the one that an empty cache gives, up to the rounding of other chunks.

Next file to read: v4jax/generate/chat.py.
"""

import itertools
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np

from v4jax.cache.layer import SPARE_ROWS
from v4jax.config import ModelConfig
from v4jax.generate.cache import Cache, decoding_rules, split_layers
from v4jax.generate.decode import Completion, DecodeConfig, StopRule, check_request, decode, prefill


class Row:
    """Room for one sequence of `capacity` tokens, with the mesh of decoding.rules ambient; without speculation.

    Attributes:
      tokens: those that the cache holds.
    """

    def __init__(self, cfg: ModelConfig, params, decoding: DecodeConfig, capacity: int):
        if decoding.speculative:
            raise ValueError("speculative: a kept row is continued a token at a time")
        self._cfg, self._capacity = cfg, capacity
        self._params = split_layers(cfg, params, decoding.rules)
        # A step at a time: what comes behind a stop would have to be taken back.
        self._decoding = decoding._replace(rules=decoding_rules(decoding.rules), steps=1)
        self._cache: Cache | None = None
        self._reach = (
            0  # positions that were ever written: rings have lost what is a whole turn before them
        )
        self.tokens: list[int] = []

    def known(self, prompt: Sequence[int]) -> int:
        """How many tokens of the prompt need not be run again. Its last one always is: the answer comes from it."""
        pairs = zip(self.tokens, prompt[:-1], strict=False)
        same = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
        return same if self._reach - same <= SPARE_ROWS else 0

    def answer(
        self, prompt: Sequence[int], max_new_tokens: int, seed: int, stop: StopRule
    ) -> Completion:
        """What follows the prompt.

        Raises:
          ValueError: see `check_request`; the row is then as it was.
        """
        check_request(self._cfg, [prompt], [seed], max_new_tokens, self._capacity, self._decoding)
        known, rows = (
            self.known(prompt),
            self._decoding.rules.shards("act_batch"),
        )  # every device must hold a row
        cache = (
            self._cache._replace(length_B=jnp.minimum(self._cache.length_B, known))
            if known
            else None
        )
        self._cache, self.tokens = None, []  # an interrupted call leaves nothing half done
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
