"""The tokens that a tokenizer.json names, read without running it.

Next file to read: v4jax/tokenizer/checks.py.
"""

import itertools
import json
import operator

from v4jax.storage import Place
from v4jax.untrusted import file_in


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


def tokens_in(directory: Place) -> dict[int, str]:
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
