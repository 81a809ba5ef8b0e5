"""Which checkpoints of a run are kept, and what is left of others.

A deletion takes many requests to a bucket, or calls to a disk, in no order. Whoever is killed in
between leaves a checkpoint in part, and on a disk, or with COMMITTED still there, Orbax takes it
for a whole one. So the process that goes on begins with what the rule would have left.

Next file to read: v4jax/checkpoint/run_config.py.
"""

from collections.abc import Sequence
from typing import Any

from orbax.checkpoint import v1 as ocp

from v4jax import storage
from v4jax.storage import Place, Remote

COMMITTED = "commit_success.txt"
"""Orbax's file that makes a checkpoint in a bucket complete."""
_policies = ocp.training.preservation_policies


def rule(keep: int, keep_every: int, keep_best: int) -> Any:
    """Orbax's policy that keeps a checkpoint for any of the reasons that Store names."""
    kept: list[Any] = [_policies.LatestN(keep)]
    if keep_every:
        kept.append(_policies.EveryNSteps(keep_every))
    if keep_best:
        best = _policies.BestN(
            get_metric_fn=lambda metrics: metrics["loss"],
            reverse=True,
            n=keep_best,
            keep_checkpoints_without_metrics=False,
        )
        kept.append(best)
    return _policies.AnyPreservationPolicy(kept)


def leftovers(folder: Place, found: Sequence[Any], kept: Any) -> list[Place]:
    """Folders of checkpoints that go: those that the rule does not keep, and incomplete ones.

    On a disk Orbax removes incomplete ones itself, which have names of their own.

    Args:
      folder: of all checkpoints.
      found: the complete ones, as Orbax lists them: by step.
      kept: a `rule`.
    """
    keeps = kept.should_preserve(found, context=_policies.PreservationContext())
    gone = [folder / str(one.step) for one, stays in zip(found, keeps, strict=True) if not stays]
    if not isinstance(folder, Remote):
        return gone
    known = {str(one.step) for one in found}
    others = [one for one in folder.iterdir() if one.name.isdigit() and one.name not in known]
    return gone + [one for one in others if not storage.exists(one / COMMITTED)]
