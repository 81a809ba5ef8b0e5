"""Warnings about a layout: copies, padding, unexpected gathers, and what imbalance costs.

Next file to read: v4jax/planner/command.py.
"""

import dataclasses
import math
from collections.abc import Iterable, Mapping

from sharding.exchange import HEADROOM
from sharding.mesh import parse_mesh
from sharding.rules import AxisRules, layout_for
from v4jax.kernels.tpu import LANES
from v4jax.planner.estimate import Estimate, estimate, gigabytes, platform_of
from v4jax.planner.hardware import Hardware
from v4jax.planner.weights import cut_of, trained_weights
from v4jax.train.config import TrainConfig

LARGE = 64e6
"""Bytes above which a copy on every device is worth a warning."""


def notes(
    cfg: TrainConfig,
    found: Estimate,
    hardware: Hardware,
    sent: Iterable[tuple[str, str, int, int]] = (),
) -> list[str]:
    """Warnings about `cfg`, the gravest first.

    Args:
      found: its estimate on `hardware`.
      sent: (axes, kind, calls, bytes) of a compiled program, if there is one.
    """
    sizes = parse_mesh(cfg.mesh)
    rules = layout_for(cfg.layout, sizes)
    lines = []
    if not found.fits:
        lines.append(
            f"It does not fit: {gigabytes(found.memory_bytes)} of {gigabytes(found.hbm)} "
            f"on each device, most of it {largest(found)}."
        )
    lines += _copies(cfg, rules, sizes, found.devices)
    lines += _padded(cfg, rules, sizes, platform_of(hardware))
    lines += _unexpected(found, sent)
    lines += _imbalance(cfg, rules, sizes, found)
    lines += _other_gather(cfg, found, hardware)
    if found.copies and not hardware.host_bandwidth:
        lines.append(
            f"The time of copies to the host's memory is left out: the rate of {hardware.name}'s "
            "link is not known."
        )
    share = (found.memory["temporaries"] + found.memory["activations"]) / found.memory_bytes
    if found.what == "train" and share > 0.5:
        lines.append(
            f"Activations and temporaries are {share:.0%} of the memory; "
            f"the largest working set is that of {found.working_set}: "
            f"fewer rows a device, or an axis that cuts it, would help more than cutting weights."
        )
    return lines


def largest(found: Estimate) -> str:
    kind = max(found.memory, key=lambda kind: found.memory[kind])
    return f"{kind} ({found.working_set})" if kind == "temporaries" else kind


def parameters(cfg: TrainConfig) -> list[tuple[str, str, str, str, int]]:
    """(name, shape, logical axes, spec, bytes per device) of each array, by bytes."""
    sizes = parse_mesh(cfg.mesh)
    rules = layout_for(cfg.layout, sizes)
    rows = []
    for weight in trained_weights(cfg):
        cut = cut_of(weight, rules, sizes)
        spec = ", ".join("+".join(part) or "-" for part in cut.parts)
        shape = " x ".join(map(str, weight.shape))
        rows.append(
            (
                weight.name,
                shape,
                ", ".join(str(name) for name in weight.axes),
                spec,
                int(weight.held * weight.size) // cut.devices,
            )
        )
    return sorted(rows, key=lambda row: -row[4])


def _copies(
    cfg: TrainConfig, rules: AxisRules, sizes: Mapping[str, int], devices: int
) -> list[str]:
    found = []
    for weight in trained_weights(cfg):
        cut = cut_of(weight, rules, sizes)
        if devices // cut.devices > 1 and weight.held * weight.size / cut.devices > LARGE:
            found.append(
                (weight.held * weight.size / cut.devices, devices // cut.devices, weight.name)
            )
    found.sort(reverse=True)
    if not found:
        return []
    size, copies, name = found[0]
    more = f", and {len(found) - 1} more over {LARGE / 1e6:.0f} MB" if len(found) > 1 else ""
    return [
        f"{name} is held {copies} times ({gigabytes(size)} on each device){more}: "
        "an axis that cuts it would free that."
    ]


def _padded(
    cfg: TrainConfig, rules: AxisRules, sizes: Mapping[str, int], platform: str
) -> list[str]:
    lines = []
    if platform == "tpu":
        narrow = {}
        for weight in trained_weights(cfg):
            shares = [
                size // math.prod(sizes[a] for a in part)
                for size, part in zip(weight.shape, cut_of(weight, rules, sizes).parts, strict=True)
            ]
            if (
                weight.optimizer == "muon"
                and cut_of(weight, rules, sizes).parts[-1]
                and shares[-1] % LANES
            ):
                narrow[weight.name.split("/")[-1]] = shares[-1]
        by_share = {
            share: [name for name, other in narrow.items() if other == share]
            for share in narrow.values()
        }
        pads = f"which a TPU pads to a multiple of {LANES}"
        lines += [
            f"The last axis of {' and '.join(names)} is cut to {share}, {pads}."
            for share, names in by_share.items()
        ]
    shards = math.prod(sizes[axis] for axis in rules.mesh_axes("act_seq"))
    uneven = sorted(
        {ratio for ratio in cfg.model.compress_ratios if ratio and cfg.seq_len // shards % ratio}
    )
    if shards > 1 and uneven:
        lines.append(
            f"A stretch of {cfg.seq_len // shards} tokens is no multiple of {uneven[0]}: "
            "every device keeps a slot for an entry that may not be there."
        )
    return lines


def _unexpected(found: Estimate, sent: Iterable[tuple[str, str, int, int]]) -> list[str]:
    sent = list(sent)
    whole = sum(row[3] for row in sent)
    known = {"+".join(axes) for axes, _ in found.sent}
    odd = [
        (axes, kind, size)
        for axes, kind, _, size in sent
        if kind == "all-gather" and axes not in known and size > 0.02 * whole
    ]
    return [
        f"The compiled program gathers {gigabytes(size)} over {axes}, "
        "which nothing in the layout asks for."
        for axes, kind, size in odd
    ]


def _other_gather(cfg: TrainConfig, found: Estimate, hardware: Hardware) -> list[str]:
    """What the other choice of `gather` would need and send, where the two differ."""
    if found.what != "train" or found.micro_batches == 1 or cfg.lora is not None:
        return []
    name = "step" if cfg.gather == "micro_batch" else "micro_batch"
    other = estimate(dataclasses.replace(cfg, gather=name), hardware)
    sent = [sum(size for size, _, _ in one.sent.values()) for one in (found, other)]
    if sent[0] == sent[1]:
        return []
    fits = "" if other.fits else ", which does not fit"
    return [
        f"With gather={name} a device would hold {gigabytes(other.memory_bytes)} instead of "
        f"{gigabytes(found.memory_bytes)}{fits}, send {gigabytes(sent[1])} a step instead of "
        f"{gigabytes(sent[0])}, and a step would take {other.step_seconds:.3g} s instead of "
        f"{found.step_seconds:.3g}."
    ]


def _imbalance(
    cfg: TrainConfig, rules: AxisRules, sizes: Mapping[str, int], found: Estimate
) -> list[str]:
    holders = math.prod(sizes[axis] for axis in rules.mesh_axes("experts"))
    if holders == 1 or "routed experts" not in found.parts:
        return []
    seconds = found.parts["routed experts"][2]
    if rules.exchange:
        return [
            f"A device whose experts get more than {HEADROOM} times their share makes its whole "
            f"group exchange a second time; at twice the share a step takes about "
            f"{seconds * 1e3:.0f} ms longer ({seconds / found.step_seconds:.0%})."
        ]
    return [
        f"All {holders} devices of an expert group wait for the busiest: at twice its share a step "
        f"takes about {seconds * 1e3:.0f} ms longer ({seconds / found.step_seconds:.0%})."
    ]
