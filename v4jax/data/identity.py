"""What a stream of batches depends on, so that no run goes on with other data unnoticed.

A file is identified by its size and a checksum of samples: reading a whole corpus takes hours.
Names are relative to the source, so a corpus may move between runs.

Next file to read: v4jax/data/pieces.py.
"""

import dataclasses
import json
from typing import Any, NamedTuple

from v4jax import storage
from v4jax.data.config import DataConfig
from v4jax.data.listing import Listing, Listings
from v4jax.storage import Place
from v4jax.tokenizer import Tokenizer

_BEFORE = {"packing": "split"}
"""Values of settings that older checkpoints do not list."""

_NONE = "no such file"
_LEFT_OUT_NOW = (
    "the documents are the same, but that version of v4jax also trained on conversations of which "
    "nothing is learned, and on last tokens that nothing predicts; this one leaves both out"
)


class Difference(NamedTuple):
    """A setting or file that has changed.

    Attributes:
      was, now: its saved and its current value.
      why: a possible innocent cause, or "".
    """

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
    """Everything that batches depend on, as JSON values, in the order in which messages name them.

    Args:
      listings: the run's; None: look the files up now.
    """
    listings = Listings() if listings is None else listings
    talks = any(source.talks for source in cfg.sources)
    chat = dataclasses.asdict(cfg.chat) | {"release": cfg.chat.wording} if talks else {}
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

    Args:
      saved: may come from an older v4jax; settings that it lacks are not compared.
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
            same = older and _documents_of(saved[name]) == _documents_of(now)
            found.append(Difference(name, saved[name], now, _LEFT_OUT_NOW if same else ""))
    return found


def _documents_of(marks: str) -> list[str]:
    """What marks of stores (pieces.Mark.documents) say of all documents, whichever are used."""
    return [mark.partition("-")[0] for mark in marks.split()]


def evaluation_differences(saved: dict[str, Any], ours: dict[str, Any]) -> list[Difference]:
    """Changes in evaluation sets that kept their name, which makes their losses incomparable.

    An added or removed set is no difference.
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


def saved_settings(directory: Place) -> dict[str, Any]:
    """The settings in a checkpoint's data positions; {} if an older v4jax wrote none.

    Raises:
      ValueError: names the file that is there and cannot be read.
    """
    names = [name for name in storage.listing(directory) if "/" not in name]
    for path in [directory / name for name in names if name.endswith(".json")][:1]:
        try:
            return dict(json.loads(path.read_text()).get("settings") or {})
        except (OSError, ValueError, AttributeError, TypeError) as error:
            raise ValueError(
                f"data position: {path} cannot be read ({error}); "
                f"remove {directory.parent} to resume from the checkpoint before it"
            ) from None
    return {}


def _evaluated(listing: Listing) -> dict[str, Any]:
    """What the loss on an evaluation set depends on."""
    source = listing.source
    return {"format": source.format, "column": source.column, "files": listing.marks}


def _file_differences(was: dict[str, Any], now: dict[str, Any]) -> list[Difference]:
    """The differing files of one source, from two `Listing.marks`."""
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
