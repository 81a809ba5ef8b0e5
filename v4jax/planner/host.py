"""Estimates what lies in the host's memory, and the time of its copies to a device and back.

Copies of the optimizer's state are a loop over slices that nothing runs beside, one way at a time
(sharding/host_memory.py). Those of streams run beside the layers, as far as exchanges do
(`overlap`). Both are assumptions: nothing was measured on a chip.

Next file to read: v4jax/planner/roofline.py.
"""

from collections.abc import Iterable, Mapping

from sharding.host_memory import SLICE
from sharding.rules import AxisRules
from v4jax.planner.hardware import Hardware
from v4jax.planner.muon import state_bytes
from v4jax.planner.terms import Term
from v4jax.planner.weights import cut_of, trained_weights
from v4jax.train.config import TrainConfig

SLICES = 4 * SLICE
"""Bytes of optimizer state on the device: slices of one array or two, before and after."""


def host_terms(cfg: TrainConfig, rules: AxisRules, sizes: Mapping[str, int]) -> list[Term]:
    """The terms of kind "host" (bytes held) and "copied" (bytes there and back in a step)."""
    held = []
    if cfg.optimizer_memory == "host":
        for weight in trained_weights(cfg):
            state = state_bytes(cfg, weight.optimizer) * weight.size
            held.append(Term("host", "optimizer", state / cut_of(weight, rules, sizes).devices))
    if cfg.remat == "offload":
        held.append(Term("host", "streams", stream_bytes(cfg) * patterns_of(cfg), "tokens"))
    copied = [term._replace(kind="copied", coefficient=2 * term.coefficient) for term in held]
    return held + copied


def stream_bytes(cfg: TrainConfig) -> int:
    """Bytes of a token's residual streams."""
    item = 4 if cfg.dtype == "float32" else 2
    return cfg.model.hc_mult * cfg.model.hidden_size * item


def patterns_of(cfg: TrainConfig) -> int:
    """How many patterns of layers keep the streams before them; an MTP module counts as two."""
    model = cfg.model
    return sum(group.repeats for group in model.layer_groups) + 2 * model.num_nextn_predict_layers


def held_on_host(terms: Iterable[Term], values: Mapping[str, float]) -> dict[str, float]:
    """Bytes in the host's memory for one device, of "optimizer" and "streams"."""
    found: dict[str, float] = {}
    for term in terms:
        if term.kind == "host":
            found[term.part] = found.get(term.part, 0) + term.value(values)
    return found


def copies_of(
    terms: Iterable[Term], values: Mapping[str, float], device: Hardware
) -> dict[str, tuple[float, float]]:
    """(bytes copied, seconds that they add to a step) of "optimizer" and "streams".

    They add 0 seconds where the profile does not know the rate of the link.
    """
    found: dict[str, float] = {}
    for term in terms:
        if term.kind == "copied":
            found[term.part] = found.get(term.part, 0) + term.value(values)
    rate = device.host_bandwidth * device.network
    shown = {"optimizer": 1.0, "streams": 1 - device.overlap}
    return {
        part: (size, shown[part] * size / rate if rate else 0.0) for part, size in found.items()
    }
