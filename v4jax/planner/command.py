"""`v4jax layout`: an estimate, compiled report, comparison or search, as one printable result.

Next file to read: v4jax/planner/request.py.
"""

import dataclasses

from v4jax.planner.compiled import report_layout
from v4jax.planner.estimate import estimate, gigabytes
from v4jax.planner.hardware import target_of
from v4jax.planner.nearest import checked, nearest_fit
from v4jax.planner.notes import notes
from v4jax.planner.request import Request, devices_of, layout_and_mesh
from v4jax.planner.results import Comparison, Result, Searched
from v4jax.planner.search import as_estimated, search
from v4jax.planner.timing import check_estimate
from v4jax.python_files import read_layout
from v4jax.train.config import TrainConfig


def examine(cfg: TrainConfig, request: Request) -> Result:
    """The estimate of `cfg`, and a compiled report where JAX can compile for the target.

    Raises:
      ValueError: mesh, batch, target or layout do not fit together; names the nearest choice that
        does.
    """
    target = checked(cfg, request)
    if request.estimate == "compiler" and (request.paper or request.released):
        raise ValueError(
            "--estimate compiler: nothing is compiled; leave out --paper and --released"
        )
    check_estimate(request.estimate, request.target, request.lower_only, request.effort)
    found = estimate(cfg, target.hardware, request.what, request.fp8, request.released)
    compiled, compiles = (
        None,
        not request.paper and not request.released and (target.topology or target.hardware.shared),
    )
    if request.effort and (request.lower_only or not compiles):
        raise ValueError(
            f"--effort: got {request.effort!r}, but nothing is compiled; "
            "it is for a TPU topology such as v5p:4x4x8"
        )
    if compiles:
        if target.topology and not found.fits and not request.lower_only:
            raise ValueError(
                f"it does not fit: {gigabytes(found.memory_bytes)} of {gigabytes(found.hbm)} "
                f"on each device; {nearest_fit(cfg, request)}"
            )
        compiled = report_layout(
            cfg, request.target, request.lower_only, request.what, request.effort, request.estimate
        )
    lines = notes(cfg, found, target.hardware, compiled.collectives if compiled else ())
    if not found.fits:
        lines.insert(1, f"Nearest: {nearest_fit(cfg, request)}.")
    return Result(found, compiled, tuple(lines))


def compare(cfg: TrainConfig, request: Request, texts: list[str]) -> Comparison:
    """The estimates of two layouts, each given as LAYOUT:MESH or FILE.py:NAME:MESH.

    Raises:
      ValueError: the compiler's estimates are asked for; or as `examine`.
    """
    if request.estimate == "compiler":
        raise ValueError("--estimate compiler: not with --compare; show one layout at a time")
    pair = []
    for text in texts:
        layout, mesh = layout_and_mesh(text)
        one = dataclasses.replace(cfg, layout=read_layout(layout), mesh=mesh)
        pair.append(
            estimate(
                one, checked(one, request).hardware, request.what, request.fp8, request.released
            )
        )
    return Comparison(*pair)


def look_for(cfg: TrainConfig, request: Request, chips: int | None, confirm: int = 0) -> Searched:
    """Searches the layouts on `chips` chips of the target (default: as many as it names).

    Args:
      confirm: how many of the best layouts to compile.

    Raises:
      ValueError: nothing fits, or a flag that this target or search cannot use.
    """
    target = target_of(request.target)
    if confirm and not (target.topology or target.hardware.shared):
        raise ValueError(
            f"--confirm: JAX cannot compile for {request.target!r} here; "
            "give a TPU topology such as v5p:4x4x8, or leave it out"
        )
    if request.effort and not confirm:
        raise ValueError(
            f"--effort: got {request.effort!r}, but nothing is compiled; it goes with --confirm K"
        )
    if request.estimate == "compiler" and not confirm:
        raise ValueError("--estimate compiler: nothing is compiled; it goes with --confirm K")
    check_estimate(request.estimate, request.target, False, request.effort)
    found = search(
        cfg,
        target.hardware,
        devices_of(request.target, chips),
        request.what,
        request.fp8,
        request.released,
    )
    best = found.ranked[:confirm]
    cuts = (as_estimated(cfg, one) for one in best)
    return Searched(
        found,
        tuple(
            report_layout(
                cut,
                request.target,
                what=request.what,
                effort=request.effort,
                estimate=request.estimate,
            )
            for cut in cuts
        ),
    )
