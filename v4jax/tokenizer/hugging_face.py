"""A tokenizer that the package `tokenizers` runs, from a tokenizer.json.

Next file to read: v4jax/tokenizer/documents.py.
"""

import itertools
from collections.abc import Iterable

from v4jax.storage import Place, place
from v4jax.tokenizer.byte_tokenizer import REPLACEMENT, utf8, whole_numbers
from v4jax.tokenizer.files import BOS_TOKEN, EOS_TOKEN, config_json, digest, parse, read_text, write


class HuggingFaceTokenizer:
    """A Hugging Face tokenizer.json, run by the optional package `tokenizers`.

    The extra v4jax[tokenizers] installs it. bos and eos are those that tokenizer_config.json beside
    the file names, otherwise those of DeepSeek. The literal text of a special token encodes to that
    token, as in transformers.

    Raises:
      ValueError: the package is missing, the file is no tokenizer, or it has no bos or eos token.
    """

    bytes_per_token = 4
    """Rough bytes per token of English text in a byte-pair vocabulary of this size. It only decides
    how much text to read at once."""

    def __init__(self, path):
        path = place(path, "path")
        self._text = read_text(path)
        config = path.with_name("tokenizer_config.json")
        self._config_text = read_text(config) if config.is_file() else config_json()
        self._tokenizer = _open_tokenizer(path, self._text)
        self._known = frozenset(self._tokenizer.get_vocab(with_added_tokens=True).values())
        self.vocab_size = 1 + max(self._known)
        names = parse(config, self._config_text)
        self.bos_token, self.bos_token_id = self._special(path, names, "bos_token")
        self.eos_token, self.eos_token_id = self._special(path, names, "eos_token")

    @property
    def fingerprint(self) -> str:
        """A hash that is equal for tokenizers that give the same ids, bos and eos included."""
        marks = self.bos_token_id, self.eos_token_id
        names = [self._tokenizer.id_to_token(token) for token in marks]
        # Token caches depend on this. Older ones, made before names counted, stay valid if the
        # names are the usual ones.
        return digest(self._text if names == [BOS_TOKEN, EOS_TOKEN] else f"{self._text}\n{names}")

    @property
    def json_text(self) -> str:
        """The contents of its tokenizer.json."""
        return self._text

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, without bos and eos. Raises ValueError like ByteTokenizer.encode."""
        utf8(text)
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Iterable[int]) -> str:
        """The text of token ids; special tokens give nothing, unknown ids give U+FFFD."""
        parts = []
        for known, run in itertools.groupby(whole_numbers(ids), key=self._known.__contains__):
            run = list(run)
            parts.append(
                self._tokenizer.decode(run, skip_special_tokens=True)
                if known
                else REPLACEMENT * len(run)
            )
        return "".join(parts)

    def save(self, directory) -> None:
        """Writes tokenizer.json as it was read, and tokenizer_config.json."""
        write(directory, self._text, self._config_text)

    def _special(self, path: Place, names: dict, which: str) -> tuple[str, int]:
        name = names.get(which)
        name = name.get("content") if isinstance(name, dict) else name
        token = self._tokenizer.token_to_id(name) if isinstance(name, str) else None
        if not isinstance(name, str) or token is None:
            raise ValueError(
                f"{path}: {which} {name!r} is not in its vocabulary; tokenizer_config.json beside "
                "it must name one"
            )
        return name, token


def _open_tokenizer(path: Place, text: str):
    try:
        import tokenizers
    except ImportError:
        raise ValueError(
            f"{path}: reading a Hugging Face tokenizer needs the package tokenizers; pip install "
            "'v4jax[tokenizers]'"
        ) from None
    try:
        tokenizer = tokenizers.Tokenizer.from_str(text)
    except Exception as error:  # the package raises bare Exception for any fault of the file
        raise ValueError(
            f"{path}: not a Hugging Face tokenizer: {' '.join(str(error).split())}"
        ) from None
    # A file may contain the truncation of its last use, which would silently cut documents.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer
