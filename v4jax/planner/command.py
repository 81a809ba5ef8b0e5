"""`v4jax layout`: an estimate, compiled report, comparison or search, as one printable result.

Next file to read: v4jax/planner/request.py.
"""

import dataclasses

from sharding.targets import check_target
from v4jax.planner.compiled import check_effort, report_layout
from v4jax.planner.estimate import estimate, gigabytes
from v4jax.planner.hardware import Target, target_of
from v4jax.planner.nearest import checked, nearest_fit
from v4jax.planner.notes import notes
from v4jax.planner.request import Request, devices_of, layout_and_mesh
from v4jax.planner.results import Comparison, Result, Searched
from v4jax.planner.search import as_estimated, policies_of, search
from v4jax.planner.timing import check_estimate
from v4jax.python_files import read_layout
from v4jax.train.config import TrainConfig


def examine(cfg: TrainConfig, request: Request) -> Result:
    """The estimate of `cfg`, and a compiled report where JAX can compile for the target.

    Raises:
      ValueError: mesh, batch, target or layout do not fit together; names the nearest choice that
        does. Or JAX cannot compile for the target as asked.
    """
    target = checked(cfg, request)
    compiles = not request.paper and target.compiles
    check_estimate(request.estimate, request.target, request.lower_only, request.effort)
    for option, given in (("--lower-only", request.lower_only), ("--effort", request.effort)):
        if given and not target.compiles:
            raise ValueError(f"{option}: {_estimated_only(request.target)}")
    check_effort(request.effort, request.target)
    if compiles:
        check_target(request.target)
    found = estimate(cfg, target.hardware, request.what, request.fp8, request.released)
    compiled = None
    if compiles:
        if target.topology and not found.fits and not request.lower_only:
            raise ValueError(
                f"it does not fit: {gigabytes(found.memory_bytes)} of {gigabytes(found.hbm)} "
                f"on each device; {nearest_fit(cfg, request)}"
            )
        compiled = report_layout(
            cfg,
            request.target,
            request.lower_only,
            request.what,
            request.effort,
            request.estimate,
            request.released,
        )
    lines = notes(cfg, found, target.hardware, compiled.collectives if compiled else ())
    if not found.fits:
        lines.insert(1, f"Nearest: {nearest_fit(cfg, request)}.")
    return Result(found, compiled, tuple(lines))


def compare(cfg: TrainConfig, request: Request, texts: list[str]) -> Comparison:
    """The estimates of two layouts, each given as LAYOUT:MESH or FILE.py:NAME:MESH.

    Raises:
      ValueError: as `examine`.
    """
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
    target, devices = target_of(request.target), devices_of(request.target, chips)
    if confirm:
        _check_confirm(target, devices, request)
    policies = policies_of(cfg, target.hardware, request.what) if request.any_remat else ()
    kind = (request.what, request.fp8, request.released)
    found = search(cfg, target.hardware, devices, *kind, policies)
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
                released=request.released,
            )
            for cut in cuts
        ),
    )


def _check_confirm(target: Target, devices: int, request: Request) -> None:
    """Refuses to compile the best of a search where JAX cannot, before the search."""
    if not target.compiles:
        raise ValueError(f"--confirm: {_estimated_only(request.target)}")
    if target.topology and devices != target.devices:
        raise ValueError(
            f"--confirm: target {request.target} has {target.devices} devices; --chips asks for "
            f"{devices}; leave out --chips"
        )
    check_estimate(request.estimate, request.target, request.lower_only, request.effort)
    check_effort(request.effort, request.target)
    check_target(request.target)


def _estimated_only(target: str) -> str:
    return (
        f"JAX cannot compile for {target!r}, which is estimated only; it can for cpu, a TPU "
        "topology such as v5p:4x4x8, h100:N and h200:N"
    )
