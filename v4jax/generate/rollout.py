"""Samples for reinforcement learning, with log probabilities and a log to resume from.

    plan, decoding = Plan(samples=8, max_new_tokens=256), DecodeConfig(sampling=warm)
    samples = rollout(cfg, params, prompts, plan, "run/rollout.jsonl", decoding=decoding)
    samples[p][s].tokens, samples[p][s].log_probs

Probabilities are the model's own, at temperature 1 and unfiltered: what training's forward pass
gives for the same tokens, up to the rounding of a cache (tests/test_rollout.py).

Tokens are written to the log before the next steps begin. To resume a batch that was interrupted at
any moment, call it again with the same arguments. Samples that have ended are read. Others go on
after their last token, with the same random keys, which depend on seed and position. A log of other
arguments is refused.

Next file to read: v4jax/generate/text.py.
"""

import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Sequence

import jax
import numpy as np

from v4jax.adapters.several import refuse_several
from v4jax.config import ModelConfig
from v4jax.generate.cache import split_layers
from v4jax.generate.decode import Completion, generate
from v4jax.generate.prefix import PrefixStore, digest
from v4jax.generate.request import check_request
from v4jax.generate.steps import DecodeConfig
from v4jax.storage import folder_to_fill, local_path
from v4jax.tokenizer import check_tokens

_VERSION = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """What is sampled.

    Attributes:
      samples: number of samples of each prompt.
      rows: sequences that run together.
      seed: seed of the first sample; the others count up from it.
      stop_tokens: a sample ends with one of these; None: the model's end tokens.

    Raises:
      ValueError: a number below 1 (seed: 0).
    """

    samples: int
    max_new_tokens: int
    rows: int = 8
    seed: int = 0
    stop_tokens: tuple[int, ...] | None = None

    def __post_init__(self):
        for name, least in (("samples", 1), ("max_new_tokens", 1), ("rows", 1), ("seed", 0)):
            value = getattr(self, name)
            if type(value) is not int or value < least:
                raise ValueError(f"{name}: got {value!r}; must be an integer of at least {least}")


def rollout(
    cfg: ModelConfig,
    params,
    prompts: Sequence[Sequence[int]],
    plan: Plan,
    log,
    *,
    decoding: DecodeConfig = DecodeConfig(),
    prefixes: PrefixStore | None = None,
) -> list[list[Completion]]:
    """Samples each prompt; `samples[p][s]` is sample s of prompt p.

    Args:
      log: path of the log, which is made if it does not exist.
      decoding: see v4jax/generate/decode.py.
      prefixes: likewise.

    Raises:
      ValueError: see `check_request`; a log of another batch; several processes or adapters.
    """
    if jax.process_count() > 1:
        raise ValueError(f"rollout: one process writes the log; this job has {jax.process_count()}")
    log = _log_file(log)
    stops = cfg.eos_token_ids if plan.stop_tokens is None else plan.stop_tokens
    each = [prompt for prompt in prompts for _ in range(plan.samples)]
    seeds = [(plan.seed + job) % 2**32 for job in range(len(each))]
    refuse_several(params, "rollout")
    check_request(cfg, each, seeds, plan.max_new_tokens, None, decoding)
    check_tokens(np.array(stops, int), cfg.vocab_size, "stop_tokens")
    jobs = [np.asarray(prompt).tolist() for prompt in each]
    identity = _identity(cfg, params, jobs, plan, decoding)
    with _Log(log, identity, len(jobs), plan, cfg.vocab_size) as done:
        params = split_layers(cfg, params, decoding.rules)
        left = done.unfinished(stops)
        for first in range(0, len(left), plan.rows):
            batch = left[first : first + plan.rows]

            def keep(b, tokens, scores, batch=batch):
                done.write(batch[b], tokens, scores)

            generate(
                cfg,
                params,
                [jobs[job] + done.tokens[job] for job in batch],
                [plan.max_new_tokens - len(done.tokens[job]) for job in batch],
                seeds=[seeds[job] for job in batch],
                stop=lambda _, tokens: tokens[-1] in stops,
                on_tokens=keep,
                capacity=max(map(len, jobs)) + plan.max_new_tokens,
                rows=plan.rows,
                decoding=decoding,
                prefixes=prefixes,
            )
        return done.completions(stops)


def _identity(cfg: ModelConfig, params, jobs, plan: Plan, decoding: DecodeConfig) -> list:
    """What a log must have been begun with, so that its samples are those of this batch."""
    return [
        cfg.to_dict(),
        digest(params).hex(),
        jobs,
        dataclasses.asdict(plan),
        decoding.dtype,
        decoding.quant,
        decoding.storage,
        dataclasses.asdict(decoding.sampling),
    ]


def _log_file(log) -> pathlib.Path:
    """The path of the log. Raises ValueError if no file can be there."""
    path = local_path(log, "log")
    folder_to_fill(path.parent, "log")
    if path.is_dir():
        raise ValueError(f"log: got {path}; must be a file, and is a folder")
    return path


class _Log:
    """Tokens and log probabilities of every sample so far, in memory and in a file.

    The file's first line identifies the batch; each further line is one step of one sample. A line
    that a kill cut short is dropped.
    """

    def __init__(self, path: pathlib.Path, batch, jobs: int, plan: Plan, vocab: int):
        self._plan, self._vocab = plan, vocab
        head = (
            json.dumps(
                {
                    "version": _VERSION,
                    "batch": hashlib.sha256(json.dumps(batch).encode()).hexdigest(),
                }
            ).encode()
            + b"\n"
        )
        content = path.read_bytes() if path.is_file() else b""
        whole = content[: content.rfind(b"\n") + 1]
        # A kill may have cut the first line itself short.
        if not content.startswith(head) and not head.startswith(content):
            raise ValueError(
                f"{path}: the log of another batch (model, weights, prompts, plan or setting "
                "differ); remove it, or name another file"
            )
        self.tokens, self.scores = ([[] for _ in range(jobs)] for _ in "ts")
        for n, line in enumerate(whole.splitlines()[1:], 2):
            try:
                self._read(line)
            except (ValueError, TypeError) as error:
                raise ValueError(
                    f"{path}: line {n} is damaged ({error}); remove it and what follows, or name "
                    "another file"
                ) from None
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("r+b" if content else "wb", buffering=0)
        self._file.truncate(len(whole))
        self._file.seek(0, 2)
        if not whole:
            self._file.write(head)

    def __enter__(self) -> "_Log":
        return self

    def __exit__(self, *error) -> None:
        self._file.close()

    def write(self, job: int, tokens: Sequence[int], scores: Sequence[float]) -> None:
        line = json.dumps([job, list(tokens), list(scores)], allow_nan=False)
        self._file.write(line.encode() + b"\n")
        self._add(job, tokens, scores)

    def unfinished(self, stops: Sequence[int]) -> list[int]:
        """The samples that may go on: shorter than the plan's, and without an end token."""
        return [
            job
            for job, tokens in enumerate(self.tokens)
            if len(tokens) < self._plan.max_new_tokens and not set(tokens[-1:]) & set(stops)
        ]

    def completions(self, stops: Sequence[int]) -> list[list[Completion]]:
        """All samples, by prompt."""
        found = [
            Completion(tokens, scores, "stop" if tokens[-1] in stops else "length")
            for tokens, scores in zip(self.tokens, self.scores, strict=True)
        ]
        each = self._plan.samples
        return [found[first : first + each] for first in range(0, len(found), each)]

    def _read(self, line: bytes) -> None:
        """Adds a line of the file. Raises ValueError or TypeError if `write` never writes such."""
        job, tokens, scores = json.loads(line)
        if type(job) is not int or not 0 <= job < len(self.tokens):
            raise ValueError(f"sample {job!r} of {len(self.tokens)}")
        check_tokens(np.array(tokens), self._vocab, f"sample {job}")
        if (
            len(tokens) != len(scores)
            or len(self.tokens[job]) + len(tokens) > self._plan.max_new_tokens
        ):
            raise ValueError(
                f"sample {job} has {len(self.tokens[job])} tokens; got {len(tokens)} with "
                f"{len(scores)} log probabilities"
            )
        self._add(job, tokens, scores)

    def _add(self, job: int, tokens: Sequence[int], scores: Sequence[float]) -> None:
        self.tokens[job] += tokens
        self.scores[job] += scores
