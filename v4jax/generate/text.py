"""Finds where a text ends, and writes it to the terminal as it grows.

Next file to read: v4jax/generate/row.py.
"""

from collections.abc import Callable, Sequence
from typing import Protocol

UNFINISHED = "\N{REPLACEMENT CHARACTER}"
"""What decoding gives for a character whose last bytes are still missing."""


class Decoder(Protocol):
    """The half of a tokenizer that gives text."""

    def decode(self, ids: Sequence[int], /) -> str: ...


class TextStop:
    """Ends a sequence at a stop token, or where a stop string is complete.

    `write` gets the text of sequence 0 as it grows, but nothing that may turn out to be part of a
    stop string or half a character.

    Raises:
      ValueError: stop strings without a tokenizer, or an empty one.
    """

    def __init__(
        self,
        stop_tokens: Sequence[int],
        stop_strings: Sequence[str] = (),
        tokenizer: Decoder | None = None,
        write: Callable[[str], object] | None = None,
    ):
        if stop_strings and tokenizer is None:
            raise ValueError(
                "stop: got a text, but the checkpoint's tokenizer is not in use; give the prompt "
                "as text too"
            )
        if "" in stop_strings:
            raise ValueError("stop: got ''; must hold at least one character")
        self._tokens, self._strings = frozenset(stop_tokens), tuple(stop_strings)
        self._tokenizer, self._write, self._written = tokenizer, write, 0

    def __call__(self, sequence: int, tokens: Sequence[int]) -> bool:
        ends = tokens[-1] in self._tokens or self._completes(tokens)
        if sequence == 0:
            self._stream(tokens, ends=ends)
        return ends

    def without_stop(self, tokens: Sequence[int]) -> list[int]:
        """A sequence's tokens without the stop token at its end."""
        return list(tokens[:-1] if tokens and tokens[-1] in self._tokens else tokens)

    def text(self, tokens: Sequence[int]) -> str:
        """The text of a sequence up to the stop token or string."""
        text = self._decode(self.without_stop(tokens))
        places = [place for place in map(text.find, self._strings) if place >= 0]
        return text[: min(places)] if places else text

    def close(self, tokens: Sequence[int]) -> None:
        """Writes the text not yet written of a sequence that ended because of its length."""
        self._stream(tokens, ends=True)

    def _completes(self, tokens: Sequence[int]) -> bool:
        if not self._strings:
            return False
        # A token has at least one byte, so a longer tail cannot hold a new stop string.
        tail = self._decode(tokens[-max(len(text.encode()) for text in self._strings) - 4 :])
        return any(text in tail for text in self._strings)

    def _decode(self, tokens: Sequence[int]) -> str:
        assert self._tokenizer is not None, "without a tokenizer nobody asks for text"
        return self._tokenizer.decode(tokens)

    def _stream(self, tokens: Sequence[int], *, ends: bool) -> None:
        if self._write is None:
            return
        text = self.text(tokens)
        if not ends:
            text = text.rstrip(UNFINISHED)
            text = text[
                : len(text) - max((_overlap(text, stop) for stop in self._strings), default=0)
            ]
        if len(text) > self._written:
            self._write(text[self._written :])
            self._written = len(text)


def _overlap(text: str, stop: str) -> int:
    """Number of characters at the end of `text` that may be the beginning of `stop`."""
    return next(
        (n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0
    )
