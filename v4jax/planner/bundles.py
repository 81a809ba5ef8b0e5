"""Cycles of a Pallas TPU kernel, counted in the VLIW code that libtpu prints for it.

XLA gives no estimate of kernels. libtpu prints the code of each operation into a folder when

    LIBTPU_INIT_ARGS="--xla_jf_dump_to=FOLDER --xla_jf_dump_llo_text=true \
--xla_jf_dump_llo_pass_label_regex=final_bundles"

is set before JAX starts. A bundle of instructions takes a cycle unless a unit stalls, so the count
is a lower bound: waits for memory are not in it (compare with bytes over bandwidth). The code is
that of one core, which on a chip of two runs half of a parallel grid.

Next file to read: v4jax/planner/timing.py.
"""

import pathlib
import re
from typing import NamedTuple

_BUNDLE = re.compile(r"\s*(?:0|0x[0-9a-f]+)\s+(LH|LB|LE|PB|PF|CT)?\s*: *((?:> *)*)(\{\})?")
_EXIT = re.compile(r"= scmp\.(\w\w)\.\w+\S* %s\w+, (\d+) /\* loop exit test \*/")
_PRODUCT_CYCLES = 4
"""Cycles of a product of 16 rows on one of four MXUs, which share them."""


class Loop(NamedTuple):
    """A loop of a kernel, or the code outside of loops.

    Attributes:
      runs: how often it runs in one call of the kernel.
      known: whether the code says so.
      bundles: its own, without those of loops in it.
      products: its vmatmul instructions.
    """

    runs: int
    known: bool
    bundles: int
    products: int

    @property
    def cycles(self) -> int:
        return self.runs * max(self.bundles, _PRODUCT_CYCLES * self.products)


def kernel_loops(text: str, unknown_runs: int = 1) -> list[Loop]:
    """The loops of a kernel's final bundles, in the order of their first bundle.

    Args:
      unknown_runs: how often a loop counts whose length the code does not say.
    """
    bundles, products, parents, pipelined = [0], [0], [0], [False]
    ends: list[int | None] = [None]
    latest, place = {0: 0}, 0  # the last loop of each depth, and the one of the line
    for line in text.splitlines():
        bundle = _BUNDLE.match(line)
        if bundle is None:
            continue
        depth = bundle[2].count(">")
        if bundle[1] == "LB":
            latest[depth] = len(bundles)
            parents.append(latest.get(depth - 1, 0))
            bundles.append(0)
            products.append(0)
            ends.append(None)
            # A pipelined grid runs two more times, for its first copy in and its last copy out.
            pipelined.append("iteration index, stage" in line)
        # Empty bundles after a branch are printed without a depth.
        if bundle[3] is None or depth:
            place = latest.get(depth, place)
        bundles[place] += 1
        products[place] += len(re.findall(r"= vmatmul|vmatmul\.", line))
        if exit_ := _EXIT.search(line):
            ends[place] = int(exit_[2]) + (exit_[1] == "gt")
    return [
        Loop(
            _runs(i, ends, parents, pipelined, unknown_runs),
            end is not None or i == 0,
            bundles[i],
            products[i],
        )
        for i, end in enumerate(ends)
    ]


def _runs(
    i: int, ends: list[int | None], parents: list[int], pipelined: list[bool], unknown_runs: int
) -> int:
    """How often loop `i` runs, with the loops around it."""
    if i == 0:
        return 1
    end = ends[i]
    runs = unknown_runs if end is None else max(1, end - 2 * pipelined[i])
    return runs * _runs(parents[i], ends, parents, pipelined, unknown_runs)


def kernel_cycles(folder: pathlib.Path, unknown_runs: int = 1) -> dict[str, tuple[int, bool]]:
    """Kernel -> (its cycles, whether all its loops say how long they are), from libtpu's folder."""
    found = {}
    for file in folder.glob("*-final_bundles.txt"):
        text = file.read_text(errors="replace")
        name = re.search(r"exit bundle: %([\w.\-]+) = custom-call", text)
        if name is not None:
            loops = kernel_loops(text, unknown_runs)
            cycles = sum(loop.cycles for loop in loops)
            found[name[1]] = cycles, all(loop.known for loop in loops)
    return found
