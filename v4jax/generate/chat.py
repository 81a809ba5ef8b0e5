"""Runs `v4jax chat`: reads lines, encodes the conversation as released, streams the answers.

Each answer is parsed back into a message of the history.

Next file to read: v4jax/cli/main.py.
"""

import functools
import itertools
import sys
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import jax

from v4jax.adapters.base import refuse_adapters
from v4jax.api import compute_dtype, load, place_on
from v4jax.chat.encoding import Message, encode_messages
from v4jax.chat.parse import parse_message
from v4jax.chat.release import chat_release
from v4jax.chat.tokens import BOS, CHAT_TOKENS, END_THINK, EOS
from v4jax.generate.choice import Choice, cache_tokens, model_and_choice
from v4jax.generate.request import check_request
from v4jax.generate.row import Row
from v4jax.generate.steps import DecodeConfig
from v4jax.generate.text import TextStop
from v4jax.kernels.choice import interpreted
from v4jax.stderr import say
from v4jax.storage import folder_of_checkpoint
from v4jax.tokenizer import Tokenizer, load_tokenizer, prompt_ids
from v4jax.tokenizer.checks import check_no_image, disagreement, require_tokens

REASONING, ANSWER = "[reasoning]\n", "\n[answer]\n"
"""Headings on the terminal in thinking mode."""


def run(flags) -> dict | None:
    """Talks until the end of the input.

    Returns:
      The conversation if flags.json asks for it; otherwise None, since it was streamed.

    Raises:
      ValueError: anything that does not fit, before the checkpoint is read.
    """
    if jax.process_count() > 1:
        raise ValueError("chat: reads one terminal; it must run in one process")
    if flags.effort is not None and flags.thinking != "thinking":
        raise ValueError(
            f"--effort: got {flags.effort!r} with --thinking {flags.thinking}; only --thinking "
            "thinking has an effort"
        )
    folder = folder_of_checkpoint(flags.checkpoint, "checkpoint")
    refuse_adapters(folder, "v4jax chat {base} --adapter {adapter}")
    release = chat_release(flags.checkpoint, flags.release)
    flags.release = release.name
    tokenizer = load_tokenizer(flags.checkpoint)
    require_tokens(tokenizer, (BOS, EOS, *CHAT_TOKENS), "a chat")
    history: list[Message] = []
    if flags.system is not None:
        history.append({"role": "system", "content": flags.system})
    cfg, choice = model_and_choice(flags)
    decoding = DecodeConfig(
        dtype=compute_dtype(flags.dtype),
        quant=flags.quant,
        storage=flags.cache,
        sampling=choice.sampling,
        kernels=flags.kernels,
    )
    capacity = cache_tokens(flags, cfg)
    shortest = _ids(flags, tokenizer, [*history, {"role": "user", "content": ""}])
    check_request(
        cfg,
        [shortest],
        [flags.seed],
        choice.new_tokens(len(shortest), capacity),
        capacity,
        decoding,
    )
    say(f"chat of {release}, {_mode(flags)}")
    say(choice.line, disagreement(cfg, tokenizer))
    say(interpreted(flags.kernels, jax.default_backend()))
    cfg, params = load(flags.checkpoint, flags.dtype, flags.mesh, flags.layout, flags.adapter)
    mesh, rules = place_on(flags.mesh, flags.layout)
    with jax.set_mesh(mesh):
        row = Row(cfg, params, decoding._replace(rules=rules), capacity)
        ends = (*tokenizer.encode(EOS), *cfg.eos_token_ids)
        chat = _Chat(flags, tokenizer, row, capacity, choice, ends)
        for line in _lines("" if flags.json else "> "):
            _turn(chat, history, line)
    return {"messages": history} if flags.json else None


def _mode(flags) -> str:
    if flags.thinking != "thinking":
        return "no thinking"
    return "thinking" if flags.effort is None else f"thinking, effort {flags.effort}"


class _Chat(NamedTuple):
    """The parts of a chat that stay the same from turn to turn.

    Attributes:
      capacity: tokens that fit in the row's cache.
      ends: tokens that end an answer.
    """

    flags: Any
    tokenizer: Tokenizer
    row: Row
    capacity: int
    choice: Choice
    ends: tuple[int, ...]


def _turn(chat: _Chat, history: list[Message], line: str) -> None:
    """Adds the line and its answer to the history; neither, if the cache may lack room for them."""
    flags, tokenizer = chat.flags, chat.tokenizer
    turns = [*history, {"role": "user", "content": line}]
    write = (lambda _: None) if flags.json else functools.partial(print, end="", flush=True)
    shown = (
        _AllText(tokenizer, REASONING, {END_THINK: ANSWER})
        if flags.thinking == "thinking"
        else _AllText(tokenizer)
    )
    stop = TextStop(chat.ends, (), shown, write)
    try:
        prompt = _ids(flags, tokenizer, turns)
        max_new_tokens = chat.choice.new_tokens(len(prompt), chat.capacity)
        completion = chat.row.answer(prompt, max_new_tokens, flags.seed, stop)
    except ValueError as error:
        say(f"this turn is left out: {error}")
        return
    stop.close(completion.tokens)
    write("\n")
    answer = _AllText(tokenizer).decode(stop.without_stop(completion.tokens))
    if completion.ended == "stop":  # several tokens may end a row; the format has only EOS
        answer += EOS
    history[:] = [*turns, _read(answer, flags.thinking)]


class _AllText:
    """Decodes special tokens of the format too, as their text or as a text given for them.

    A tokenizer's own `decode` leaves them out.

    Example: with names {"</think>": "|"} and head ">", the tokens of "Easy.</think>4" give
    ">Easy.|4".
    """

    def __init__(
        self, tokenizer: Tokenizer, head: str = "", names: Mapping[str, str] | None = None
    ):
        texts = {name: name for name in (BOS, EOS, *CHAT_TOKENS)} | dict(names or {})
        self._texts = {tokenizer.encode(name)[0]: text for name, text in texts.items()}
        self._tokenizer, self._head = tokenizer, head

    def decode(self, ids: Iterable[int]) -> str:
        runs = itertools.groupby(ids, key=self._texts.get)
        return self._head + "".join(
            self._tokenizer.decode(run) if text is None else text * len(list(run))
            for text, run in runs
        )


def _ids(flags, tokenizer: Tokenizer, messages: list[Message]) -> list[int]:
    text = encode_messages(
        messages, flags.thinking, reasoning_effort=flags.effort, release=flags.release
    )
    check_no_image(tokenizer, text)
    return prompt_ids(tokenizer, text)


def _read(text: str, mode: str) -> Message:
    """Parses the answer to a message; keeps it as plain text if it does not fit the format."""
    try:
        return parse_message(text, mode)
    except ValueError as error:
        say(f"kept as plain text: {' '.join(str(error).split())}")
        return {"role": "assistant", "content": text.removesuffix(EOS)}


def _lines(mark: str) -> Iterator[str]:
    """Yields the user's lines that are not empty; on a terminal, `mark` asks for each."""
    mark = mark if sys.stdin.isatty() else ""
    while True:
        try:
            line = input(mark)
        except EOFError:
            if mark:
                print()
            return
        if line.strip():
            yield line
