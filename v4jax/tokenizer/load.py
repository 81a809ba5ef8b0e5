"""Opens the tokenizer of a file or a checkpoint, of either kind.

Next file to read: v4jax/tokenizer/files.py.
"""

from v4jax.storage import checkpoint_path
from v4jax.tokenizer.byte_tokenizer import ByteTokenizer, further_specials, is_byte_tokenizer
from v4jax.tokenizer.files import parse, read_text
from v4jax.tokenizer.hugging_face import HuggingFaceTokenizer

Tokenizer = ByteTokenizer | HuggingFaceTokenizer


def load_tokenizer(path) -> Tokenizer:
    """Opens a tokenizer.json, or the one in a directory.

    One that ByteTokenizer wrote needs no further package.

    Raises:
      ValueError: no such file, not a tokenizer, or the package `tokenizers` is missing; names the
        file.
    """
    path = checkpoint_path(path, "tokenizer")
    path = path / "tokenizer.json" if path.is_dir() else path
    raw = parse(path, read_text(path))
    return (
        ByteTokenizer(further_specials(raw))
        if is_byte_tokenizer(raw)
        else HuggingFaceTokenizer(path)
    )
