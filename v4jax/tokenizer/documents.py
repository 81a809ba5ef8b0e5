"""Token ids of documents and prompts, with one bos and one eos.

Next file to read: v4jax/tokenizer/table.py.
"""

from v4jax.tokenizer.load import Tokenizer


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
