"""Which devices take part in a collective, as HLO text writes it.

Next file to read: v4jax/planner/notes.py.
"""

import itertools
import math
import re

import numpy as np


def groups_of(line: str, devices: int) -> np.ndarray:
    """The devices of each group of one collective, [groups, members], numbered along the mesh.

    A permute gives pairs of source and target. XLA writes groups in four ways:

        {{0,1},{2,3}}                     a list
        {}                                one group of all devices
        [2,4]<=[4,2]T(1,0)                rows of a transposed iota
        mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'a','b':(2)2}
                                          along axes of a mesh over such an iota
    """
    pairs = re.search(r"source_target_pairs=\{(.*?)\}\}", line)
    if pairs:
        return np.array(
            [[int(i) for i in pair.split(",")] for pair in re.findall(r"(\d+,\d+)", pairs[1])]
        )
    iota = re.search(r"replica_groups=\[([\d,]+)\]<=(\[[\d,]+\](?:T\([\d,]+\))?)", line)
    if iota:
        return _iota(iota[2]).reshape(_numbers(iota[1]))
    along = re.search(
        r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\((.*?)\))? \{('[^}]*)\}", line
    )
    if along:
        return _along(along[1], _iota(along[2] or f"[{devices}]"), along[3])
    listed = re.search(r"replica_groups=\{((?:\{[\d,]+\},?)*)\}", line)
    if listed is None:
        raise ValueError(f"groups of devices in a form that is not known: {line.strip()[:400]}")
    rows = re.findall(r"\{([\d,]+)\}", listed[1])
    return np.array([_numbers(row) for row in rows]) if rows else np.arange(devices)[None]


def _along(mesh: str, places: np.ndarray, members: str) -> np.ndarray:
    """Groups along some axes of a mesh.

    'b':(2)2 is a part of axis b: the part of size 2 that follows a part of size 2.
    """
    names = re.findall(r"'(\w+)'=(\d+)", mesh)
    parts = [
        (name, int(before or 1), int(size or dict(names)[name]))
        for name, before, size in re.findall(r"'(\w+)'(?::\((\d+)\)(\d+))?", members)
    ]
    shape, place_of = [], {}
    for name, size in names:
        cuts = {1, int(size)} | {
            cut for part, before, here in parts if part == name for cut in (before, before * here)
        }
        for before, end in itertools.pairwise(sorted(cuts)):
            place_of[name, before] = len(shape)
            shape.append(end // before)
    inner = [place_of[name, before] for name, before, size in parts if size > 1]
    return np.moveaxis(places.reshape(shape), inner, range(-len(inner), 0)).reshape(
        -1, math.prod(size for _, _, size in parts)
    )


def _iota(text: str) -> np.ndarray:
    """The numbers 0, 1, ... as "[4,2]T(1,0)" orders them: shaped, then transposed."""
    found = re.fullmatch(r"\[([\d,]+)\](?:T\(([\d,]+)\))?", text)
    if found is None:
        raise ValueError(f"an order of devices in a form that is not known: {text[:400]}")
    dims, order = found.groups()
    places = np.arange(math.prod(_numbers(dims))).reshape(_numbers(dims))
    return places.transpose(_numbers(order)) if order else places


def _numbers(text: str) -> list[int]:
    return [int(i) for i in text.split(",")]
