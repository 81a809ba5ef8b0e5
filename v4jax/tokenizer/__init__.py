"""Turns text into token ids and back, by bytes or by a Hugging Face tokenizer.json.

Both kinds have the same attributes and methods: vocab_size, bos_token, eos_token, bos_token_id,
eos_token_id, bytes_per_token, fingerprint, encode, decode, save. `encode` adds nothing; only
`document_ids` and `prompt_ids` add bos and eos.

Next file to read: v4jax/tokenizer/load.py.
"""

from v4jax.tokenizer.byte_tokenizer import ByteTokenizer
from v4jax.tokenizer.checks import check_tokens
from v4jax.tokenizer.documents import document_ids, prompt_ids
from v4jax.tokenizer.files import BOS_TOKEN, EOS_TOKEN
from v4jax.tokenizer.hugging_face import HuggingFaceTokenizer
from v4jax.tokenizer.load import Tokenizer, load_tokenizer

__all__ = [
    "BOS_TOKEN",
    "EOS_TOKEN",
    "ByteTokenizer",
    "HuggingFaceTokenizer",
    "Tokenizer",
    "check_tokens",
    "document_ids",
    "load_tokenizer",
    "prompt_ids",
]
