"""What a stream of batches depends on: a run must not go on with other data in silence.

Files go by size and a checksum of samples of their content: reading all of a corpus takes hours.
Their names count relative to the source, so a corpus may lie elsewhere when a run goes on.

Next file to read: v4jax/data/pieces.py.
"""

import dataclasses
import json
import pathlib
from typing import Any, NamedTuple

from v4jax.data.config import DataConfig
from v4jax.data.listing import Listing, Listings
from v4jax.tokenizer import Tokenizer

_BEFORE = {"packing": "split"}
"""What older checkpoints leave out where it was so."""

_NONE = "no such file"
_LEFT_OUT_NOW = (
    "that version of v4jax also trained on conversations of which nothing is learned, and on last "
    "tokens that nothing predicts; this one leaves both out, so the files may be the same"
)


class Difference(NamedTuple):
    """A setting or file that is not as it was; why: how that may have come about, or ""."""

    name: str
    was: Any
    now: Any
    why: str = ""

    def __str__(self) -> str:
        why = f" ({self.why})" if self.why else ""
        return f"was saved with {self.name} {self.was}, this run has {self.now}{why}"


def settings_of(
    cfg: DataConfig,
    tokenizer: Tokenizer,
    seq_len: int,
    batch_size: int,
    listings: Listings | None = None,
) -> dict[str, Any]:
    """What batches depend on, in configuration and files: JSON values in the order to name them.

    listings: the run's; None: files are looked up now.
    """
    listings = Listings() if listings is None else listings
    talks = any(source.format == "chat" for source in cfg.sources)
    chat = dataclasses.asdict(cfg.chat) if talks else {}
    return {
        "tokenizer": f"{type(tokenizer).__name__} of {tokenizer.vocab_size}",
        "tokenizer content": tokenizer.fingerprint,
        "seed": cfg.seed,
        "seq_len": seq_len,
        "batch_size": batch_size,
        "packing": cfg.packing,
        "weights": [source.weight for source in cfg.sources],
        "formats": [source.format for source in cfg.sources],
        "columns": [source.column for source in cfg.sources if source.format != "text"],
        "held_out": cfg.held_out,
        "fim_rate": cfg.fim_rate,
        "masked": cfg.masked,
        **{f"chat.{name}": value for name, value in chat.items()},
        "files": [listings[source].marks for source in cfg.sources],
        "evaluate_on": {source.label: _evaluated(listings[source]) for source in cfg.evaluate_on},
    }


def differences(saved: dict[str, Any], ours: dict[str, Any]) -> list[Difference]:
    """The settings and files of training data that differ between two results of `settings_of`.

    saved: may be of an older v4jax; what it does not have is not compared.
    """
    saved = _BEFORE | saved
    found = []
    for name, now in ours.items():
        if name == "evaluate_on" or name not in saved:
            continue
        if name == "files":
            pairs = zip(saved[name], now, strict=False)
            found += [one for was, is_now in pairs for one in _file_differences(was, is_now)]
        elif saved[name] != now:
            older = name == "documents" and "files" not in saved and ours["masked"]
            found.append(Difference(name, saved[name], now, _LEFT_OUT_NOW if older else ""))
    return found


def evaluation_differences(saved: dict[str, Any], ours: dict[str, Any]) -> list[Difference]:
    """Differences of sets to evaluate on that kept their name; losses cannot be compared over them.

    A set that is added or removed is no difference.
    """
    found = []
    for label, now in ours["evaluate_on"].items():
        was = saved.get("evaluate_on", {}).get(label, now)
        for name in ("format", "column"):
            if was[name] != now[name]:
                found.append(Difference(f"evaluate_on {label}: {name}", was[name], now[name]))
        files = _file_differences(was["files"], now["files"])
        found += [one._replace(name=f"evaluate_on {one.name}") for one in files]
    return found


def saved_settings(directory: pathlib.Path) -> dict[str, Any]:
    """The settings in a checkpoint's item of data positions; {} where an older v4jax wrote none.

    Raises:
      ValueError: names the file that is there and cannot be read.
    """
    for path in sorted(directory.glob("*.json"))[:1]:
        try:
            return dict(json.loads(path.read_text()).get("settings") or {})
        except (OSError, ValueError, AttributeError, TypeError) as error:
            raise ValueError(
                f"data position: {path} cannot be read ({error}); "
                f"remove {directory.parent} to resume from the checkpoint before it"
            ) from None
    return {}


def _evaluated(listing: Listing) -> dict[str, Any]:
    source = listing.source
    return {"format": source.format, "column": source.column, "files": listing.marks}


def _file_differences(was: dict[str, Any], now: dict[str, Any]) -> list[Difference]:
    if was["digest"] == now["digest"]:
        return []
    before, after, label = was["listed"], now["listed"], now["label"]
    if not before or not after:
        counts = (f"{one['count']} with digest {one['digest']}" for one in (was, now))
        return [Difference(f"files of {label}", *counts)]
    return [
        Difference(
            label if name == "." else f"{label}/{name}",
            before.get(name, _NONE),
            after.get(name, _NONE),
        )
        for name in sorted(before.keys() | after.keys())
        if before.get(name) != after.get(name)
    ]
