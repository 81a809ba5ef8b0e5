"""Documents as tokens, made once and kept in memory or in a memory-mapped cache on disk.

Next file to read: v4jax/data/tokenised.py.
"""

import dataclasses
import functools
import hashlib
import io
import json

import numpy as np

from v4jax.chat.tokens import CHAT_TOKENS, FIM_TOKENS
from v4jax.data.config import DataConfig, Source
from v4jax.data.listing import Listing, Listings
from v4jax.data.token_cache import fault_in, mapped, put_aside, write
from v4jax.data.tokenised import FILES, TokenStore, fill
from v4jax.storage import local_path
from v4jax.tokenizer import Tokenizer
from v4jax.tokenizer.checks import require_tokens

_VERSION = 2


def open_store(
    cfg: DataConfig, source: Source, tokenizer: Tokenizer, listings: Listings | None = None
) -> TokenStore:
    """The source's tokens, from an intact cache in cfg.cache, or else made now (and put there).

    A cache is identified by everything its tokens depend on: names, sizes and times of the files,
    tokenizer, settings. A damaged cache is put aside with a line on stderr and made again. So is an
    outdated one, whose files have other content at the same size and time. A cache is always
    complete.

    Args:
      listings: the run's, which opens each store once; None: look the files up now.

    Raises:
      ValueError: anything wrong with the source, or a tokenizer without the special tokens that the
        source needs.
    """
    listing = (Listings() if listings is None else listings)[source]
    if source.talks:
        require_tokens(tokenizer, CHAT_TOKENS, "a conversation")
    if cfg.fim_rate > 0 and not source.talks:
        require_tokens(tokenizer, FIM_TOKENS, "fim_rate")
    key = _key(cfg, listing, tokenizer)
    known = cfg.cache, key
    if known not in listing.stores:
        listing.stores[known] = _opened(cfg, listing, tokenizer, key)
    return listing.stores[known]


def prepare_cache(cfg: DataConfig, tokenizer: Tokenizer, listings: Listings | None = None) -> None:
    """Makes the caches of all sources that have none."""
    for source in (*cfg.sources, *cfg.evaluate_on):
        open_store(cfg, source, tokenizer, listings)


def _key(cfg: DataConfig, listing: Listing, tokenizer: Tokenizer) -> str:
    """A hash that changes with everything the tokens depend on."""
    source, found = listing.source, listing.found.files
    files = [path for _, path in (sorted(found) if source.format == "text" else found)]
    states = [listing.states[path] for path in files]
    about = [
        _VERSION,
        source.format,
        source.column,
        tokenizer.fingerprint,
        list(zip(map(str, files), states, strict=True)),
    ]
    if source.talks:
        about.append(dataclasses.asdict(cfg.chat) | {"release": cfg.chat.wording})
    elif cfg.fim_rate:
        about += [cfg.fim_rate, cfg.seed]
    return hashlib.sha256(json.dumps(about).encode("utf-8", "surrogateescape")).hexdigest()[:16]


def _opened(cfg: DataConfig, listing: Listing, tokenizer: Tokenizer, key: str) -> TokenStore:
    """The tokens of a source, from its cache or made now."""
    if not cfg.cache:
        return _in_memory(cfg, listing, tokenizer, f"{key} {listing.marks['digest']}")
    folder = local_path(cfg.cache, "cache") / f"{listing.source.label}-{key}"
    if folder.is_dir():
        fault = fault_in(folder, listing)
        if fault is None:
            return mapped(folder)
        put_aside(folder, fault, listing)
    if not folder.is_dir():
        write(folder, cfg, listing, tokenizer)
    return mapped(folder)


@functools.lru_cache(maxsize=8)
def _in_memory(cfg: DataConfig, listing: Listing, tokenizer: Tokenizer, key: str) -> TokenStore:
    """The tokens of a source, made now and kept in memory."""
    files = {name: io.BytesIO() for name in FILES}
    filled = fill(files, cfg, listing, tokenizer)
    arrays = {name: np.frombuffer(file.getvalue(), FILES[name]) for name, file in files.items()}
    return TokenStore(**arrays, **filled._asdict())
