"""Runs `v4jax generate`: checks the flags, loads, continues the prompt, returns or streams text.

The flags are declared in v4jax/cli/generate.py.

Next file to read: v4jax/generate/decode.py.
"""

import functools
from typing import NamedTuple

import jax

from sharding.processes import is_first
from v4jax.adapters.base import refuse_adapters
from v4jax.api import compute_dtype, load, place_on
from v4jax.checkpoint.load_drafter import check_drafter, drafter_config, load_drafter
from v4jax.config import ModelConfig
from v4jax.generate.choice import cache_tokens, model_and_choice
from v4jax.generate.decode import Completion, generate
from v4jax.generate.prefix import PrefixStore, check_store
from v4jax.generate.request import check_request
from v4jax.generate.steps import DecodeConfig
from v4jax.generate.text import TextStop
from v4jax.kernels.choice import interpreted
from v4jax.model.dspark import ROOT
from v4jax.stderr import say
from v4jax.storage import folder_of_checkpoint
from v4jax.tokenizer import Tokenizer, check_tokens, load_tokenizer, prompt_ids
from v4jax.tokenizer.checks import disagreement


class _Request(NamedTuple):
    """What the flags ask for.

    Attributes:
      tokenizer: None if the prompt is ids.
      labels: the name that the flags give to each prompt's adapter; None without names.
      adapters: the same, with None for the base.
      stop_tokens: None for the checkpoint's end tokens.
    """

    tokenizer: Tokenizer | None
    stop_tokens: list[int] | None
    labels: list[str] | None
    adapters: list[str | None] | None
    prompts: list[list[int]]
    seeds: list[int]
    max_new_tokens: int
    decoding: DecodeConfig


def run(flags) -> dict | None:
    """Continues the prompt.

    Returns:
      The result to print, or None if the text was streamed or another process prints.

    Raises:
      ValueError: anything that does not fit, before the checkpoint is read where that is possible.
    """
    request = _read(flags)
    tokenizer, given = request.tokenizer, request.stop_tokens
    if request.decoding.drafter is not None:
        check_drafter(flags.checkpoint)  # before the long work of reading the model
    cfg, params = load(
        flags.checkpoint, flags.dtype, flags.mesh, flags.layout, _folders(flags.adapter)
    )
    if request.decoding.drafter is not None:
        drafter = request.decoding.drafter
        place = (compute_dtype(flags.dtype), *place_on(flags.mesh, flags.layout))
        params = params | {ROOT: load_drafter(flags.checkpoint, cfg, drafter, *place)}
    one = flags.samples == 1 and request.labels is None
    stream = tokenizer is not None and is_first() and not flags.json and one
    write = functools.partial(print, end="", flush=True) if stream else None
    stop = TextStop(cfg.eos_token_ids if given is None else given, flags.stop, tokenizer, write)
    prefixes = _prefixes(flags, request, cfg, params)
    if write is not None:
        write(flags.prompt)
    completions = _continue(flags, request, cfg, params, prefixes, stop)
    if stream:
        stop.close(completions[0].tokens)
        print()
        if flags.speculative:
            say(_acceptance(completions[0]))
    if stream or not is_first():
        return None
    results = [_result(completion, stop, tokenizer is not None) for completion in completions]
    if request.labels is not None:
        named = zip(request.labels, results, strict=True)
        results = [{"adapter": label} | result for label, result in named]
    if tokenizer is not None and not flags.json:
        print("\n\n".join(_head(result) + flags.prompt + result["text"] for result in results))
        return None
    return results[0] if len(results) == 1 else {"samples": results}


def _read(flags) -> _Request:
    """The request, after all checks that need no weights; says what the checkpoint chose.

    Raises:
      ValueError: see run.
    """
    folder = folder_of_checkpoint(flags.checkpoint, "checkpoint")
    refuse_adapters(folder, "v4jax generate {base} --adapter {adapter} ...")
    tokenizer, prompt = _read_prompt(flags)
    given = None if flags.stop_tokens is None else _ids(flags.stop_tokens, "--stop-tokens")
    model, choice = model_and_choice(flags)
    if flags.samples < 1 or (flags.samples > 1 and choice.sampling.temperature == 0):
        rule = "must be 1 or more, and 1 without --temperature (all would be the same)"
        raise ValueError(f"--samples: got {flags.samples}; {rule}")
    decoding = DecodeConfig(
        dtype=compute_dtype(flags.dtype),
        quant=flags.quant,
        storage=flags.cache,
        sampling=choice.sampling,
        speculative=flags.speculative,
        kernels=flags.kernels,
        dspark=drafter_config(flags.checkpoint) if flags.speculative else None,
    )
    labels, adapters = _adapters(flags)
    rows = flags.samples if labels is None else len(labels)
    prompts, seeds = [prompt] * rows, [flags.seed + row % flags.samples for row in range(rows)]
    capacity = cache_tokens(flags, model, len(prompt))
    max_new_tokens = choice.new_tokens(len(prompt), capacity)
    check_request(model, prompts, seeds, max_new_tokens, flags.cache_tokens, decoding)
    if given is not None:
        check_tokens(given, model.vocab_size, "--stop-tokens")
    if flags.prefix_cache is not None:
        check_store(flags.prefix_cache, flags.prefix_cache_bytes)
    TextStop(given or [], flags.stop, tokenizer)
    say(choice.line, disagreement(model, tokenizer) if tokenizer else "")
    say(interpreted(flags.kernels, jax.default_backend()))
    return _Request(tokenizer, given, labels, adapters, prompts, seeds, max_new_tokens, decoding)


def _adapters(flags) -> tuple[list[str] | None, list[str | None] | None]:
    """(labels, adapters) as _Request has them: each name for all of its samples."""
    folders = flags.adapter
    if not isinstance(folders, dict):
        return None, None
    labels = [name for name in folders for _ in range(flags.samples)]
    return labels, [None if folders[label] is None else label for label in labels]


def _folders(adapter: dict[str, str | None] | str | None) -> dict[str, str] | str | None:
    """What `load` takes of --adapter: the base needs no folder."""
    if not isinstance(adapter, dict):
        return adapter
    return {name: folder for name, folder in adapter.items() if folder is not None}


def _head(result: dict) -> str:
    """The line over a text that names the adapter; "" without names."""
    return f"[{result['adapter']}]\n" if "adapter" in result else ""


def _acceptance(completion: Completion) -> str:
    """How many drafts stayed, and how often that of each position did.

    Example: 9 of 20 drafts accepted; by position 1.00, 0.75, 0.50, 0.00, 0.00; 3.25 a round.
    """
    said = f"{completion.accepted} of {completion.drafted} drafts accepted"
    if len(completion.accepted_at) < 2:
        return said
    shares = ", ".join(f"{count / completion.rounds:.2f}" for count in completion.accepted_at)
    tokens = 1 + completion.accepted / completion.rounds
    return f"{said}; by position {shares}; {tokens:.2f} a round"


def _prefixes(flags, request: _Request, cfg: ModelConfig, params) -> PrefixStore | None:
    """The prefix cache that the flags name, if they name one."""
    if flags.prefix_cache is None:
        return None
    formats = request.decoding.formats
    return PrefixStore(flags.prefix_cache, flags.prefix_cache_bytes, cfg, params, formats)


def _continue(
    flags, request: _Request, cfg: ModelConfig, params, prefixes: PrefixStore | None, stop: TextStop
) -> list[Completion]:
    """The continuations; says how much of the prompt the prefix cache had."""
    mesh, rules = place_on(flags.mesh, flags.layout)
    with jax.set_mesh(mesh):
        completions = generate(
            cfg,
            params,
            request.prompts,
            request.max_new_tokens,
            seeds=request.seeds,
            stop=stop,
            capacity=flags.cache_tokens,
            decoding=request.decoding._replace(rules=rules),
            prefixes=prefixes,
            adapters=request.adapters,
        )
    if prefixes is not None:
        say(f"prefix cache: {prefixes.reused} tokens read, {prefixes.kept} written")
    return completions


def _read_prompt(flags):
    """(tokenizer, or None if ids are given; ids of the prompt)."""
    if flags.prompt is None:
        return None, _ids(flags.tokens, "--tokens")
    tokenizer = load_tokenizer(flags.checkpoint)
    return tokenizer, prompt_ids(tokenizer, flags.prompt)


def _ids(text: str, flag: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"{flag}: got {text!r}; must be integers separated by commas") from None


def _result(completion: Completion, stop: TextStop, is_text: bool) -> dict:
    ids = stop.without_stop(completion.tokens)
    result = {
        "tokens": ids,
        "log_probs": completion.log_probs[: len(ids)],
        "ended": completion.ended,
    }
    if completion.drafted:
        result |= {"drafted": completion.drafted, "accepted": completion.accepted}
        result |= {"rounds": completion.rounds, "accepted_at": list(completion.accepted_at)}
    return result | ({"text": stop.text(completion.tokens)} if is_text else {})
