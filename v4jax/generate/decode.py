"""Continues prompts: prefill in chunks, then all sequences together, with or without speculation.

Two programs run, whatever the lengths (v4jax/generate/steps.py). One continues all rows by a chunk
of their prompts, and rows whose prompt is over wait. The other decodes a few steps at a time. The
cache is donated to each, so it is never copied.

Speculation: MTP drafts the token after the newest one, or DSpark the next few (drafts.py). All run
through the model at once, and drafts stay up to the first where the model chooses another token.
Draft and choice use the same random key, that of the position, so they agree as often as coupled
Gumbel noise allows, and the result equals plain decoding token for token, greedy or sampled. A
rejected draft is taken back by a smaller length: the cache is addressed by position, so the draft's
values are overwritten before anything reads them.

Shapes: B batch (padded to what the mesh cuts), P steps, T new tokens of a step.
Next file to read: v4jax/generate/request.py.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from sharding.process_rows import gather
from v4jax.adapters.several import check_choice, with_choice
from v4jax.config import ModelConfig
from v4jax.generate.cache import Cache, decoding_rules, split_layers
from v4jax.generate.prefix import PrefixStore
from v4jax.generate.request import check_request, per_prompt
from v4jax.generate.sampling import Sampling
from v4jax.generate.steps import DecodeConfig, State, StepOutput, advance, prefill, start_cache

StopRule = Callable[[int, Sequence[int]], bool]
"""(sequence, its new tokens) -> whether it ends here. Called once for every new token."""

Listener = Callable[[int, Sequence[int], Sequence[float]], None]
"""Called with (sequence, the tokens that a step added, their log probabilities)."""


class Completion(NamedTuple):
    """The continuation of one prompt.

    Attributes:
      tokens: new tokens, the one that stopped it included.
      log_probs: log probability of each under the model, not as shaped for sampling.
      ended: "stop" or "length".
      drafted, accepted: number of tokens that were drafted, and of those that stayed.
      accepted_at: how often the first draft of a round stayed, the second one, and so on; `rounds`
        times each was drafted.
    """

    tokens: list[int]
    log_probs: list[float]
    ended: str
    drafted: int = 0
    accepted: int = 0
    accepted_at: tuple[int, ...] = ()
    rounds: int = 0


def generate(
    cfg: ModelConfig,
    params,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int | Sequence[int],
    *,
    seeds: Sequence[int] | None = None,
    stop: StopRule | None = None,
    on_tokens: Listener | None = None,
    capacity: int | None = None,
    rows: int = 1,
    decoding: DecodeConfig = DecodeConfig(),
    prefixes: PrefixStore | None = None,
    adapters: Sequence[str | None] | None = None,
) -> list[Completion]:
    """Continues each prompt by at most max_new_tokens: one number for all, or one for each.

    Args:
      seeds: one per prompt; default: 0, 1, 2, ...
      stop: when a sequence ends; default: at any of cfg.eos_token_ids.
      on_tokens: called after every step.
      capacity: tokens that fit in the cache, per row; default: what the longest prompt needs.
      rows: least number of rows of the batch.
      decoding: its rules are a layout, with the mesh ambient (jax.set_mesh).
      prefixes: the store in which beginnings of prompts are looked up and kept.
      adapters: where `params` have named adapters (v4jax/adapters/several.py), the name of each
        prompt's, or None for the base. Another choice is not compiled anew.

    Raises:
      ValueError: no prompt, an empty one, ids outside the vocabulary, lengths beyond the cache or
        the model, no MTP to draft with, an adapter that `params` do not have, or NaN logits.
    """
    seeds = list(range(len(prompts))) if seeds is None else list(seeds)
    check_request(cfg, prompts, seeds, max_new_tokens, capacity, decoding)
    check_choice(params, adapters, len(prompts))
    stop = stop or (lambda _, tokens: tokens[-1] in cfg.eos_token_ids)
    decoding = decoding._replace(rules=decoding_rules(decoding.rules))
    params = split_layers(cfg, params, decoding.rules)
    names = [None] * len(prompts) if adapters is None else list(adapters)
    shards = decoding.rules.shards("act_batch")
    max_new_tokens = per_prompt(max_new_tokens, prompts)
    rows = -(-max(rows, len(prompts)) // shards) * shards
    padded = [*prompts, *[prompts[0][:1]] * (rows - len(prompts))]  # every device must hold a row
    params = with_choice(params, adapters, len(prompts), rows)
    names += [None] * (rows - len(prompts))
    seed_B = np.array([*seeds, *[0] * (rows - len(prompts))], np.uint32)
    capacity = (
        max(len(prompt) + new for prompt, new in zip(prompts, max_new_tokens, strict=True))
        if capacity is None
        else capacity
    )
    cache, known, keep = _known_prefixes(prefixes, cfg, decoding, padded, capacity, names)
    state, output = prefill(
        cfg,
        decoding,
        params,
        [row[n:] for row, n in zip(padded, known, strict=True)],
        seed_B,
        capacity,
        cache,
        keep,
    )
    return decode(cfg, decoding, params, state, output, seed_B, stop, max_new_tokens, on_tokens)[0]


def _known_prefixes(
    prefixes: PrefixStore | None,
    cfg: ModelConfig,
    decoding: DecodeConfig,
    prompts: Sequence[Sequence[int]],
    capacity: int,
    adapters: Sequence[str | None],
) -> tuple[Cache | None, list[int], Callable | None]:
    """(a cache that holds the beginnings that the store knows, how long they are, what keeps more).

    Without a store: (None, zeros, None).
    """
    known = [0] * len(prompts)
    if prefixes is None:
        return None, known, None
    plain = decoding._replace(sampling=Sampling())
    cache = start_cache(cfg, plain, len(prompts), capacity)
    cache, known = prefixes.begin(cache, prompts, adapters)
    return cache, known, functools.partial(prefixes.keep, prompts, known, adapters=adapters)


def decode(
    cfg: ModelConfig,
    decoding: DecodeConfig,
    params,
    state: State,
    output: StepOutput,
    seed_B,
    stop: StopRule,
    max_new_tokens: Sequence[int],
    on_tokens: Listener | None = None,
) -> tuple[list[Completion], Cache]:
    """Continues the first rows until each stops or has its number of new tokens.

    Returns:
      The continuations, and the cache, which lacks the newest token of each row.
    """
    sequences = [_Sequence(b, stop, on_tokens, new) for b, new in enumerate(max_new_tokens)]
    count = len(sequences)
    while True:
        for token_BT, score_BT, count_B in zip(
            *(gather(array).tolist() for array in output), strict=True
        ):
            for b, sequence in enumerate(sequences):
                sequence.take(token_BT[b][: count_B[b]], score_BT[b])
        active_B = np.array([b < count and not sequences[b].ended for b in range(len(seed_B))])
        if not active_B.any():
            return [sequence.completion() for sequence in sequences], state.cache
        state, output = advance(cfg, decoding, params, state, active_B, seed_B)


class _Sequence:
    """The new tokens of one sequence so far, and whether it goes on."""

    def __init__(
        self, number: int, stop: StopRule, on_tokens: Listener | None, max_new_tokens: int
    ):
        self.number, self.stop = number, stop
        self.on_tokens, self.max_new_tokens = on_tokens, max_new_tokens
        self.tokens: list[int] = []
        self.scores: list[float] = []
        self.ended = ""  # while it goes on
        self.drafted = self.accepted = self.rounds = 0
        self.accepted_at: list[int] = []

    def take(self, tokens: Sequence[int], scores: Sequence[float]) -> None:
        if self.ended:
            return
        self._count(len(scores) - 1, len(tokens) - 1)
        before = len(self.tokens)
        self._append(tokens, scores)
        if self.on_tokens is not None:
            self.on_tokens(self.number, self.tokens[before:], self.scores[before:])

    def _count(self, drafted: int, accepted: int) -> None:
        if drafted == 0:
            return
        self.rounds += 1
        self.drafted += drafted
        self.accepted += accepted
        self.accepted_at += [0] * (drafted - len(self.accepted_at))
        for slot in range(accepted):
            self.accepted_at[slot] += 1

    def _append(self, tokens: Sequence[int], scores: Sequence[float]) -> None:
        for token, score in zip(tokens, scores, strict=False):
            if math.isnan(score):
                raise ValueError(
                    f"sequence {self.number}: the model's logits are NaN at new token "
                    f"{len(self.tokens)}; are all its weights numbers?"
                )
            self.tokens.append(token)
            self.scores.append(score)
            if self.stop(self.number, self.tokens):
                self.ended = "stop"
            elif len(self.tokens) == self.max_new_tokens:
                self.ended = "length"
            if self.ended:
                return

    def completion(self) -> Completion:
        counts = (self.drafted, self.accepted, tuple(self.accepted_at), self.rounds)
        return Completion(self.tokens, self.scores, self.ended, *counts)
