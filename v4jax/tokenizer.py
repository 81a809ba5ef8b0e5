"""Turns text into token ids and back, by bytes or by a Hugging Face tokenizer.json.

Both kinds have the same attributes and methods: vocab_size, bos_token, eos_token, bos_token_id,
eos_token_id, bytes_per_token, fingerprint, encode, decode, save. `encode` adds nothing; only
`document_ids` and `prompt_ids` add bos and eos.

Next file to read: v4jax/chat/tokens.py.
"""

import hashlib
import itertools
import json
import operator
import pathlib
import re
from collections.abc import Iterable, Sequence

import numpy as np

from v4jax.config import ModelConfig
from v4jax.storage import local_path
from v4jax.untrusted import file_in

BOS_TOKEN, EOS_TOKEN = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"
"""The special tokens of the DeepSeek tokenizers; ids 0 and 1 in the released config.json."""

_SPECIALS = 2
_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
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
        return _digest(self.json_text)

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
        for token in _whole_numbers(ids):
            if token >= self.vocab_size:
                data += _REPLACEMENT.encode()
            elif _SPECIALS <= token < _SPECIALS + 256:
                data.append(token - _SPECIALS)
        return data.decode("utf-8", errors="replace")

    def save(self, directory) -> None:
        """Writes tokenizer.json and tokenizer_config.json for `tokenizers` and transformers.

        They give the same ids there, but the literal text of BOS_TOKEN or EOS_TOKEN is always read
        as that token.
        """
        _write(directory, self.json_text, _config_json())

    @property
    def json_text(self) -> str:
        """The contents of its tokenizer.json."""
        return json.dumps(
            _byte_tokenizer_json(self._names[_SPECIALS:]), ensure_ascii=False, indent=1
        )


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
        path = local_path(path, "path")
        self._text = _read_text(path)
        config = path.with_name("tokenizer_config.json")
        self._config_text = _read_text(config) if config.is_file() else _config_json()
        self._tokenizer = _open_tokenizer(path, self._text)
        self._known = frozenset(self._tokenizer.get_vocab(with_added_tokens=True).values())
        self.vocab_size = 1 + max(self._known)
        names = _parse(config, self._config_text)
        self.bos_token, self.bos_token_id = self._special(path, names, "bos_token")
        self.eos_token, self.eos_token_id = self._special(path, names, "eos_token")

    @property
    def fingerprint(self) -> str:
        """A hash that is equal for tokenizers that give the same ids, bos and eos included."""
        marks = self.bos_token_id, self.eos_token_id
        names = [self._tokenizer.id_to_token(token) for token in marks]
        # Token caches depend on this. Older ones, made before names counted, stay valid if the
        # names are the usual ones.
        return _digest(self._text if names == [BOS_TOKEN, EOS_TOKEN] else f"{self._text}\n{names}")

    @property
    def json_text(self) -> str:
        """The contents of its tokenizer.json."""
        return self._text

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, without bos and eos. Raises ValueError like ByteTokenizer.encode."""
        _utf8(text)
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Iterable[int]) -> str:
        """The text of token ids; special tokens give nothing, unknown ids give U+FFFD."""
        parts = []
        for known, run in itertools.groupby(_whole_numbers(ids), key=self._known.__contains__):
            run = list(run)
            parts.append(
                self._tokenizer.decode(run, skip_special_tokens=True)
                if known
                else _REPLACEMENT * len(run)
            )
        return "".join(parts)

    def save(self, directory) -> None:
        """Writes tokenizer.json as it was read, and tokenizer_config.json."""
        _write(directory, self._text, self._config_text)

    def _special(self, path: pathlib.Path, names: dict, which: str) -> tuple[str, int]:
        name = names.get(which)
        name = name.get("content") if isinstance(name, dict) else name
        token = self._tokenizer.token_to_id(name) if isinstance(name, str) else None
        if token is None:
            raise ValueError(
                f"{path}: {which} {name!r} is not in its vocabulary; tokenizer_config.json beside "
                "it must name one"
            )
        return name, token


Tokenizer = ByteTokenizer | HuggingFaceTokenizer


def load_tokenizer(path) -> Tokenizer:
    """Opens a tokenizer.json, or the one in a directory.

    One that ByteTokenizer wrote needs no further package.

    Raises:
      ValueError: no such file, not a tokenizer, or the package `tokenizers` is missing; names the
        file.
    """
    path = local_path(path, "tokenizer")
    path = path / "tokenizer.json" if path.is_dir() else path
    raw = _parse(path, _read_text(path))
    return (
        ByteTokenizer(_further_specials(raw))
        if _is_byte_tokenizer(raw)
        else HuggingFaceTokenizer(path)
    )


def document_ids(
    tokenizer: Tokenizer, text: str, *, begins: bool = True, ends: bool = True
) -> list[int]:
    """Token ids of a document: one bos, its text, one eos, even if the text spells them out.

    Example: "<｜begin▁of▁sentence｜>a" and "a" give the same ids if the tokenizer reads special
    tokens.

    Args:
      begins: the text has the document's beginning, so bos is added.
      ends: the text has the document's end, so eos is added.
    """
    bos = [tokenizer.bos_token_id] if begins else []
    eos = [tokenizer.eos_token_id] if ends else []
    text = without_marks(tokenizer, text, begins=begins, ends=ends)
    return bos + tokenizer.encode(text) + eos


def prompt_ids(tokenizer: Tokenizer, text: str) -> list[int]:
    """Token ids of a text to continue: one bos, even if the text spells it out, and no eos."""
    return document_ids(tokenizer, text, ends=False)


def without_marks(
    tokenizer: Tokenizer, text: str, *, begins: bool = True, ends: bool = True
) -> str:
    """The text of a document without bos at its beginning and eos at its end, nor white space
    outside of them.

    If the tokenizer reads the names of special tokens as plain text, they stay.
    """
    bos, eos = tokenizer.bos_token, tokenizer.eos_token
    if begins and _begins(text, bos) and tokenizer.encode(bos) == [tokenizer.bos_token_id]:
        while _begins(text, bos):
            text = text.lstrip()[len(bos) :]
    if ends and _ends(text, eos) and tokenizer.encode(eos) == [tokenizer.eos_token_id]:
        while _ends(text, eos):
            text = text.rstrip()[: -len(eos)]
    return text


def _begins(text: str, token: str) -> bool:
    return text.lstrip().startswith(token)


def _ends(text: str, token: str) -> bool:
    return text.rstrip().endswith(token)


def token_table(text: str) -> dict[int, str]:
    """Id -> token of the text of a tokenizer.json.

    Raises:
      ValueError: not JSON, or not the contents of a tokenizer.json.
    """
    try:
        raw = json.loads(text)
    except (RecursionError, json.JSONDecodeError) as error:
        raise ValueError(f"not JSON: {error}") from None
    try:
        vocab = raw["model"]["vocab"]
        if isinstance(vocab, dict):
            tokens = vocab.items()
        else:  # the "Unigram" kind: pairs of token and score
            tokens = ((token, i) for i, (token, _) in enumerate(vocab))
        added = ((token["content"], token["id"]) for token in raw.get("added_tokens") or ())
        return {operator.index(i): token for token, i in itertools.chain(tokens, added)}
    except (AttributeError, KeyError, TypeError) as error:
        said = f"{type(error).__name__}: {error}"
        raise ValueError(
            "expected a JSON object with model.vocab, and added_tokens with content and id "
            f"({said})"
        ) from None


def tokens_in(directory: pathlib.Path) -> dict[int, str]:
    """`token_table` of an untrusted checkpoint; {} if it has no tokenizer.json.

    Raises:
      ValueError: a link that leads elsewhere, or a tokenizer.json that cannot be read; names the
        file.
    """
    path = directory / "tokenizer.json"
    try:
        return token_table(file_in(directory, path.name).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: {' '.join(str(error).split())}") from None


def disagreement(cfg: ModelConfig, tokenizer: Tokenizer) -> str:
    """Says how a tokenizer's special tokens differ from those of the config; "" if they do not."""
    said = []
    if tokenizer.eos_token_id not in cfg.eos_token_ids:
        ends = ", ".join(map(str, cfg.eos_token_ids)) or "nothing"
        said.append(
            f"the tokenizer's end token is {tokenizer.eos_token_id}, but rows end at {ends}"
        )
    begin = tokenizer.bos_token_id
    if cfg.bos_token_id is not None and begin != cfg.bos_token_id:
        own = cfg.bos_token_id
        said.append(f"the tokenizer's begin token is {begin}, but config.json has {own}")
    return "; ".join(said)


def require_tokens(tokenizer: Tokenizer, names: Iterable[str], purpose: str) -> None:
    """Raises ValueError unless each name is one token of the tokenizer.

    purpose: what needs the tokens, for the message.
    """
    for name in names:
        if len(tokenizer.encode(name)) != 1:
            raise ValueError(
                f"tokenizer: has no token {name}, which {purpose} needs; take that of a "
                "DeepSeek-V4 release, or 'byte-chat'"
            )


def check_tokens(tokens, vocab_size: int, name: str = "tokens") -> None:
    """Refuses token ids outside [0, vocab_size).

    An embedding lookup would silently clamp a bad id to a valid one.

    Args:
      tokens: integer array of any shape.

    Raises:
      ValueError: names the first bad id, its index and the allowed range.
    """
    tokens = np.asarray(tokens)
    if not np.issubdtype(tokens.dtype, np.integer):
        got = (
            f"dtype {tokens.dtype}"
            if tokens.dtype != object
            else f"{tokens.ravel()[0]!r} and others that are no 64-bit integers"
        )
        raise ValueError(f"{name}: got {got}; allowed: integers in [0, vocab_size={vocab_size})")
    bad = np.argwhere((tokens < 0) | (tokens >= vocab_size))
    if len(bad):
        place = tuple(int(i) for i in bad[0])
        where = ", ".join(map(str, place))
        raise ValueError(
            f"{name}: got id {tokens[place]} at [{where}]; allowed: [0, vocab_size={vocab_size})"
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


def _is_byte_tokenizer(raw: dict) -> bool:
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


def _further_specials(raw: dict) -> list[str]:
    return [token["content"] for token in _further(raw)]


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _byte_ids(text: str) -> list[int]:
    return (np.frombuffer(_utf8(text), np.uint8).astype(np.int32) + _SPECIALS).tolist()


def _config_json() -> str:
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS_TOKEN,
        "eos_token": EOS_TOKEN,
        "clean_up_tokenization_spaces": False,
    }
    return json.dumps(config, ensure_ascii=False, indent=1)


def _open_tokenizer(path: pathlib.Path, text: str):
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


def _read_text(path: pathlib.Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ValueError(
            f"{path}: no such file; expected a tokenizer.json or a directory that holds one"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: cannot be read: {error}") from None


def _parse(path: pathlib.Path, text: str) -> dict:
    try:
        raw = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: not JSON: {error}") from None
    if not isinstance(raw, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(raw).__name__}")
    return raw


def _write(directory, tokenizer_text: str, config_text: str) -> None:
    directory = local_path(directory, "directory")
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "tokenizer.json").write_text(tokenizer_text, encoding="utf-8")
    (directory / "tokenizer_config.json").write_text(config_text, encoding="utf-8")


def _whole_numbers(ids: Iterable[int]) -> list[int]:
    ids = [operator.index(token) for token in ids]
    if min(ids, default=0) < 0:
        raise ValueError(f"ids: got {min(ids)}; allowed: integers >= 0")
    return ids


def _utf8(text: str) -> bytes:
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(
            f"text: got half of a surrogate pair ({text[error.start]!r}) at character "
            f"{error.start}; "
            "allowed: text that UTF-8 can hold"
        ) from None
