"""A tokenizer whose tokens are bytes, and its tokenizer.json.

Next file to read: v4jax/tokenizer/hugging_face.py.
"""

import itertools
import json
import operator
import re
from collections.abc import Iterable, Sequence

import numpy as np

from v4jax.tokenizer.files import BOS_TOKEN, EOS_TOKEN, config_json, digest, write

_SPECIALS = 2
REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
_TEXT_PRE_TOKENIZER = {
    "type": "ByteLevel",
    "add_prefix_space": False,
    "trim_offsets": False,
    "use_regex": False,
}


class ByteTokenizer:
    """One token per UTF-8 byte: id 0 is bos, id 1 is eos, id 2 + b is byte b.

    Special tokens, if given, follow. Then their literal text, and that of bos and eos, encodes to
    them; without any, all text is bytes.

    Example: "é!" is the bytes C3 A9 21, so encode("é!") == [197, 171, 35];
    ByteTokenizer(["<a>"]).encode("<a>") == [258].
    """

    bos_token, eos_token = BOS_TOKEN, EOS_TOKEN
    bos_token_id = 0
    eos_token_id = 1
    bytes_per_token = 1

    def __init__(self, special_tokens: Sequence[str] = ()):
        self._names = (BOS_TOKEN, EOS_TOKEN, *special_tokens)
        self.vocab_size = _SPECIALS + 256 + len(special_tokens)
        ids = [0, 1, *range(_SPECIALS + 256, self.vocab_size)]
        self._ids = dict(zip(self._names, ids, strict=True)) if special_tokens else {}
        self._split = re.compile(
            "("
            + "|".join(re.escape(name) for name in sorted(self._ids, key=len, reverse=True))
            + ")"
        )

    @property
    def fingerprint(self) -> str:
        """A hash that is equal for tokenizers that give the same ids."""
        return digest(self.json_text)

    def encode(self, text: str) -> list[int]:
        """Token ids of the UTF-8 bytes of `text`, without bos and eos added.

        `decode` gives text without special tokens back exactly.

        Raises:
          ValueError: half of a surrogate pair, which UTF-8 cannot express.
        """
        if not self._ids:
            return _byte_ids(text)
        parts = [
            [self._ids[part]] if part in self._ids else _byte_ids(part)
            for part in self._split.split(text)
        ]
        return list(itertools.chain.from_iterable(parts))

    def decode(self, ids: Iterable[int]) -> str:
        """The text of token ids.

        Special tokens give nothing; broken UTF-8 and unknown ids give U+FFFD. A model's vocabulary
        may be wider than the tokenizer's, so a sampled id without a token is not an error.
        """
        data = bytearray()
        for token in whole_numbers(ids):
            if token >= self.vocab_size:
                data += REPLACEMENT.encode()
            elif _SPECIALS <= token < _SPECIALS + 256:
                data.append(token - _SPECIALS)
        return data.decode("utf-8", errors="replace")

    def save(self, directory) -> None:
        """Writes tokenizer.json and tokenizer_config.json for `tokenizers` and transformers.

        They give the same ids there, but the literal text of BOS_TOKEN or EOS_TOKEN is always read
        as that token.
        """
        write(directory, self.json_text, config_json())

    @property
    def json_text(self) -> str:
        """The contents of its tokenizer.json."""
        return json.dumps(
            _byte_tokenizer_json(self._names[_SPECIALS:]), ensure_ascii=False, indent=1
        )


# ---- files ---------------------------------------------------------------------------------------


def _byte_alphabet() -> list[str]:
    """The printable character of each byte in byte-level vocabularies (GPT-2's bytes_to_unicode).

    Printable bytes keep their Latin-1 character; the other 68 get the code points from 256 on, in
    order.
    """
    prints = [
        *range(ord("!"), ord("~") + 1),
        *range(ord("¡"), ord("¬") + 1),
        *range(ord("®"), ord("ÿ") + 1),
    ]
    spare = itertools.count(256)
    return [chr(byte) if byte in prints else chr(next(spare)) for byte in range(256)]


def _byte_tokenizer_json(further: Sequence[str] = ()) -> dict:
    """ByteTokenizer in the format of tokenizer.json: byte-pair encoding without merges."""
    flags = {
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        "normalized": False,
        "special": True,
    }
    tokens = [BOS_TOKEN, EOS_TOKEN, *_byte_alphabet()]
    specials = list(enumerate(tokens[:_SPECIALS])) + list(enumerate(further, len(tokens)))
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": i, "content": name} | flags for i, name in specials],
        "normalizer": None,
        "pre_tokenizer": _TEXT_PRE_TOKENIZER,
        "post_processor": None,
        "decoder": _TEXT_PRE_TOKENIZER,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {token: i for i, token in enumerate(tokens)},
            "merges": [],
        },
    }


def is_byte_tokenizer(raw: dict) -> bool:
    """Whether a tokenizer.json maps bytes like ByteTokenizer, whoever wrote it.

    transformers rewrites the parts that are not compared here.
    """
    ours, model = _byte_tokenizer_json(), raw.get("model")
    split = raw.get("pre_tokenizer")
    return (
        isinstance(model, dict)
        and isinstance(split, dict)
        and all(model.get(key) == ours["model"][key] for key in ("type", "vocab", "merges"))
        and all(
            split.get(key) == _TEXT_PRE_TOKENIZER[key]
            for key in ("type", "add_prefix_space", "use_regex")
        )
        and raw.get("normalizer") is None
        and [token.get("id") for token in raw.get("added_tokens") or ()][:_SPECIALS]
        == list(range(_SPECIALS))
        and all(
            token.get("special") and token.get("id") == i
            for i, token in enumerate(_further(raw), _SPECIALS + 256)
        )
    )


def _further(raw: dict) -> list[dict]:
    return (raw.get("added_tokens") or [])[_SPECIALS:]


def further_specials(raw: dict) -> list[str]:
    return [token["content"] for token in _further(raw)]


def _byte_ids(text: str) -> list[int]:
    return (np.frombuffer(utf8(text), np.uint8).astype(np.int32) + _SPECIALS).tolist()


def whole_numbers(ids: Iterable[int]) -> list[int]:
    ids = [operator.index(token) for token in ids]
    if min(ids, default=0) < 0:
        raise ValueError(f"ids: got {min(ids)}; allowed: integers >= 0")
    return ids


def utf8(text: str) -> bytes:
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(
            f"text: got half of a surrogate pair ({text[error.start]!r}) at character "
            f"{error.start}; "
            "allowed: text that UTF-8 can hold"
        ) from None
