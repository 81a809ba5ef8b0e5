"""Seconds of a step: each part of the model takes the longer of its FLOPs and its memory traffic.

Next file to read: v4jax/planner/search.py.
"""

import collections
import math
from collections.abc import Mapping
from typing import Any

from sharding.rules import MESH_AXES
from v4jax.planner.hardware import Hardware, Tier
from v4jax.planner.terms import Term


def parts_of(
    terms: list[Term], values: Mapping[str, float], device: Hardware, rates: Mapping[str, float]
) -> dict[str, tuple[float, float, float]]:
    """Part -> FLOPs, bytes of memory traffic, seconds; the longest first.

    Args:
      rates: part -> FLOPs per second of its products, where it is not the bfloat16 rate.
    """
    counted: dict[str, dict[str, float]] = {"flops": {}, "hbm": {}}
    for term in terms:
        if term.kind in counted:
            found = counted[term.kind]
            found[term.part] = found.get(term.part, 0) + term.value(values)
    rows = {}
    for part in {*counted["flops"], *counted["hbm"]}:
        flops, moved = (counted[kind].get(part, 0) for kind in ("flops", "hbm"))
        rate = rates.get(part, device.bf16_flops)
        products, reads = device.shares(part)
        seconds = max(flops / (rate * products), moved / (device.hbm_bandwidth * reads))
        rows[part] = (flops, moved, seconds)
    return dict(sorted(rows.items(), key=lambda row: -row[1][2]))


def sent_of(
    terms: list[Term], values: Mapping[str, float], device: Hardware, sizes: Mapping[str, int]
) -> dict[tuple[tuple[str, ...], str], tuple[float, float, float]]:
    """(axes, collective) -> bytes, least bytes, seconds; most bytes first."""
    rows: dict[Any, list[float]] = collections.defaultdict(lambda: [0.0, 0.0, 0.0])
    for term in terms:
        if term.kind == "sent":
            row, size = rows[term.axes, term.collective], term.value(values)
            row[0] += size
            row[1] += size * term.least
            row[2] += exchange_time(size, term.calls, term.axes, term.collective, device, sizes)
    most_first = sorted(rows.items(), key=lambda item: -item[1][0])
    return {key: (size, least, seconds) for key, (size, least, seconds) in most_first}


def exchange_time(
    size: float,
    calls: float,
    axes: tuple[str, ...],
    kind: str,
    device: Hardware,
    sizes: Mapping[str, int],
) -> float:
    """Seconds that a device takes to send `size` bytes along mesh axes.

    Devices are numbered along the mesh, its last axis fastest, and a tier holds consecutive ones.
    The fastest tier carries what stays inside it, the last tier the rest. Over g tiers of m devices
    each (n = g*m), a gather or sum sends (g-1)/(gm) of the whole between tiers and (m-1)/m inside;
    an exchange of all with all sends (n-m)/n between.
    """
    tier, n = device.tiers[0], math.prod(sizes[axis] for axis in axes)
    near = 1
    for axis in axes:
        stride = math.prod(sizes[inner] for inner in MESH_AXES[MESH_AXES.index(axis) + 1 :])
        reach = tier.size // stride if tier.size else sizes[axis]
        near *= min(sizes[axis], max(1, reach)) if axis != "slice" else 1
    whole, far = size * n / (n - 1), n / near
    mixed = kind in ("all-to-all", "ragged-all-to-all")
    inside = whole * (near - 1) / (n if mixed else near)
    outside = whole * ((n - near) / n if mixed else (far - 1) / n)
    seconds = inside / _rate(tier, near, math.prod(sizes.values()), mixed) + (
        outside / device.tiers[-1].bandwidth if far > 1 else 0
    )
    return seconds / device.network + calls * device.latency


def _rate(tier: Tier, members: int, devices: int, mixed: bool) -> float:
    """Bytes per second that one device sends to `members` devices of its tier.

    In a torus they span as many dimensions as they need. Where all send to all, data crosses a
    quarter of each ring.
    """
    if not tier.torus or members < 2:
        return tier.bandwidth
    side = max(2.0, devices ** (1 / tier.torus))
    spanned = min(tier.torus, max(1, math.ceil(math.log(members) / math.log(side) - 1e-9)))
    rate = tier.bandwidth / tier.torus * spanned
    return rate / max(1.0, members ** (1 / spanned) / 4) if mixed else rate


def bound_of(
    parts: Mapping[str, tuple[float, float, float]],
    device: Hardware,
    exchanging: float,
    copying: float,
) -> str:
    """What takes most of a step: "FLOPs", "memory traffic", "exchanges" or "copies to the host".

    Args:
      exchanging: seconds of all exchanges.
      copying: seconds that copies to the host and back add.
    """
    computing = sum(
        seconds
        for part, (_, moved, seconds) in parts.items()
        if moved / (device.hbm_bandwidth * device.shares(part)[1]) < seconds
    )
    moving = sum(seconds for _, _, seconds in parts.values()) - computing
    return max(
        (computing, "FLOPs"),
        (moving, "memory traffic"),
        (exchanging * (1 - device.overlap), "exchanges"),
        (copying, "copies to the host"),
    )[1]
