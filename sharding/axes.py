"""The words of a layout: mesh axes, logical axes, and the checks of what may split what.

Next file to read: sharding/rules.py.
"""

import difflib
from collections.abc import Mapping, Sequence

MESH_AXES = ("slice", "data", "fsdp", "context", "expert", "tensor")
"""The axes of every mesh, outermost (slowest links) first; one that is not named has size 1."""

# Weight axes, then activation axes. Their names differ; otherwise a table for FSDP would shard
# activations too.
LOGICAL_AXES = tuple(
    [
        "layers",
        "vocab",
        "embed",
        "norm",
        "streams_embed",
        "mix",
        "q_lora",
        "q_lora_in",
        "heads",
        "head_dim",
        "sinks",
        "group_in",
        "groups",
        "index_heads",
        "entry",
        "ape_rows",
        "expert_embed",
        "experts",
        "expert_hidden",
        "hidden",
        "routes",
        "table_rows",
        "table_slots",
        "embed_out",
        "act_batch",
        "act_seq",
        "act_streams",
        "act_embed",
        "act_heads",
        "act_hidden",
        "act_vocab",
        "cache_slots",
    ]
)

ARRAYS = tuple(
    tuple(line.split())
    for line in """
    vocab embed
    layers embed q_lora
    layers q_lora_in heads
    layers embed head_dim
    layers group_in groups
    layers groups embed
    layers sinks
    layers norm
    layers embed entry
    layers ape_rows entry
    layers embed index_heads
    layers q_lora_in index_heads
    layers streams_embed mix
    layers embed routes
    layers embed hidden
    layers experts expert_embed expert_hidden
    layers table_rows table_slots
    embed embed_out
    act_batch act_seq act_streams act_embed
    act_batch act_seq act_heads
    act_batch act_seq index_heads
    act_batch act_seq act_hidden
    act_batch act_seq act_vocab
    """.strip().splitlines()
)
"""The logical axes of every array of the model: weights, then activations."""

Where = Mapping[str, tuple[str, ...]]
"""Logical axis -> the mesh axes that split it."""


def axes_of(name: str, value: str | Sequence[str] | None) -> tuple[str, ...]:
    """The mesh axes that split `name`, from "data expert", ("data", "expert") or None.

    Raises:
      ValueError: an unknown logical or mesh axis, or a mesh axis given twice.
    """
    if name not in LOGICAL_AXES:
        known = ", ".join(LOGICAL_AXES)
        raise ValueError(
            f"layout: got logical axis {name!r}{close(name, LOGICAL_AXES)}; known: {known}"
        )
    listed = isinstance(value, (tuple, list)) and all(isinstance(axis, str) for axis in value)
    if not (value is None or listed or isinstance(value, str)):
        raise ValueError(
            f'layout: {name}: got {value!r}; must be mesh axes as "data expert", a tuple, or None'
        )
    axes = tuple(value.split() if isinstance(value, str) else value or ())
    for axis in axes:
        if axis not in MESH_AXES:
            allowed = ", ".join(MESH_AXES)
            raise ValueError(
                f"layout: {name}: got mesh axis {axis!r}{close(axis, MESH_AXES)}; "
                f"allowed: {allowed}"
            )
        if axes.count(axis) > 1:
            raise ValueError(f"layout: {name}: mesh axis {axis!r} is twice in {value!r}")
    return axes


def close(word: str, words: Sequence[str]) -> str:
    """A hint at the known words that resemble `word`, or ""."""
    found = difflib.get_close_matches(str(word), words, n=3, cutoff=0.6)
    return f" (did you mean {' or '.join(map(repr, found))}?)" if found else ""


def check_table(where: Where, exchange: bool) -> None:
    """Raises ValueError for a layout that an array cannot have or the model cannot compute with."""
    for names in ARRAYS:
        _check_array(names, where)
    tokens = where["act_batch"] + where["act_seq"]
    if len(where["act_seq"]) > 1:
        shown = _shown(where["act_seq"])
        raise ValueError(f"layout: act_seq: got {shown}; a sequence is split over one mesh axis")
    if where["cache_slots"]:
        raise ValueError(
            "layout: cache_slots: leave it out; decoding splits the cache over the axis of act_seq"
        )
    # These are sent or gathered among devices that hold different tokens.
    for name in ("experts", "expert_embed", "embed"):
        if rest := [axis for axis in where[name] if axis not in tokens]:
            raise ValueError(
                f"layout: {name}: got mesh axis {rest[0]!r}, which must split tokens too; "
                f"add it to act_batch or act_seq, which are over {_shown(tokens)}"
            )
    # Partial results of these are summed over devices that hold the same tokens.
    for name in ("vocab", "expert_hidden"):
        if both := [axis for axis in where[name] if axis in tokens]:
            raise ValueError(
                f"layout: {name}: got mesh axis {both[0]!r}, which splits tokens; allowed: axes "
                f"outside act_batch and act_seq, which are over {_shown(tokens)}"
            )
    if exchange and not where["experts"]:
        raise ValueError(
            "layout: exchange=True sends tokens to the devices of their experts; "
            "experts is not split"
        )


def _check_array(names: Sequence[str], where: Where) -> None:
    flat = [axis for name in names for axis in where[name]]
    for axis in flat:
        if flat.count(axis) > 1:
            users = " and ".join(name for name in names if axis in where[name])
            raise ValueError(
                f"layout: mesh axis {axis!r} is used twice by an array with axes "
                f"{', '.join(names)}: by {users}"
            )


def _shown(axes: Sequence[str]) -> str:
    return repr(" ".join(axes)) if axes else "nothing"
