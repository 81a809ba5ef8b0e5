"""Estimates a layout: memory, FLOPs, traffic and time of one step, and which resource binds.

Nothing is compiled. Time is a roofline (v4jax/planner/roofline.py). Exchanges run beside the parts
as far as the profile says (`overlap`); the rest adds to the step. The share of its peaks that a
chip reaches is an assumption of the profile unless it was measured, so ratios between layouts mean
more than seconds.

Next file to read: v4jax/planner/roofline.py.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any

from sharding.mesh import parse_mesh
from sharding.rules import AxisRules, layout_for
from v4jax.cost import cost
from v4jax.planner.decode import decode_terms
from v4jax.planner.hardware import Hardware
from v4jax.planner.host import copies_of, held_on_host, host_terms
from v4jax.planner.memory import held, largest_working_set, memory
from v4jax.planner.muon import product_rate
from v4jax.planner.reference import reference_terms
from v4jax.planner.roofline import bound_of, parts_of, sent_of
from v4jax.planner.terms import Term, bases, constants_of, repeated
from v4jax.planner.traffic import traffic
from v4jax.planner.weights import weights_of
from v4jax.planner.work import FP8, work
from v4jax.train.config import TrainConfig
from v4jax.train.objective import frozen_passes

USABLE = 0.97 / 1.07
"""Share of a device's memory that an estimate may fill.

libtpu keeps 3%. No program that was compiled took more than 7% more than estimated
(tests/test_memory_record.py).
"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Estimate:
    """One step in one layout on one kind of chip. Bytes and FLOPs are per device.

    Attributes:
      what: "train" or "decode".
      micro_batches: parts of the batch that run one after the other.
      memory: bytes by kind.
      working_set: the working set that the temporaries belong to.
      host: bytes in the host's memory for this device, "optimizer" or "streams".
      copies: the same -> (bytes copied to the device and back, seconds that this adds).
      parts: part of the model -> (FLOPs, bytes of memory traffic, seconds).
      sent: (axes, collective) -> (bytes, least bytes, seconds).
      step_seconds: of one step.
      bound: what takes most of a step (v4jax/planner/roofline.py).
      mfu: the model's FLOPs (none recomputed or masked) over what the chips could do.
      cost: money per million tokens, 0 without a price.
      remat: what the backward pass recomputes; "" for decoding.
    """

    what: str
    mesh: str
    layout: str
    hardware: str
    devices: int
    seq: int
    batch: int
    micro_batches: int
    memory: dict[str, float]
    hbm: float
    working_set: str
    host: dict[str, float]
    copies: dict[str, tuple[float, float]]
    parts: dict[str, tuple[float, float, float]]
    sent: dict[tuple[tuple[str, ...], str], tuple[float, float, float]]
    step_seconds: float
    exchange_seconds: float
    bound: str
    mfu: float
    tokens_per_second: float
    cost: float
    remat: str = ""

    @property
    def memory_bytes(self) -> float:
        return sum(self.memory.values())

    @property
    def fits(self) -> bool:
        return self.memory_bytes <= USABLE * self.hbm

    def to_dict(self) -> dict[str, Any]:
        plain = dataclasses.asdict(self) | {"memory_bytes": self.memory_bytes, "fits": self.fits}
        plain["sent"] = [
            ["+".join(axes), kind, *values] for (axes, kind), values in self.sent.items()
        ]
        return plain

    def rows(self) -> list[tuple[str, str, str, str]]:
        """A table for people."""
        rows = [
            ("estimate", self.what, f"{self.devices} devices", self.hardware),
            ("mesh", self.mesh, self.layout, _rows_at_once(self.batch, self.micro_batches)),
        ]
        rows += [
            ("memory", kind, gigabytes(size), "") for kind, size in self.memory.items() if size
        ]
        rows.append(
            (
                "memory",
                "in all",
                gigabytes(self.memory_bytes),
                f"{self.memory_bytes / self.hbm:.0%} of {gigabytes(self.hbm)}",
            )
        )
        rows += [("on the host", kind, gigabytes(size), "") for kind, size in self.host.items()]
        rows += [
            ("copied", kind, gigabytes(size), f"{seconds * 1e3:.1f} ms")
            for kind, (size, seconds) in self.copies.items()
        ]
        rows += [
            (
                "part",
                part,
                f"{flops / 1e12:.2f} TFLOP, {gigabytes(moved)}",
                f"{seconds * 1e3:.1f} ms",
            )
            for part, (flops, moved, seconds) in self.parts.items()
        ]
        rows += [
            (
                "sent",
                f"{'+'.join(axes)}: {kind}",
                f"{gigabytes(size)}, at least {gigabytes(least)}",
                f"{seconds * 1e3:.1f} ms",
            )
            for (axes, kind), (size, least, seconds) in self.sent.items()
        ]
        rows.append(
            (
                "step",
                f"{self.step_seconds:.3f} s",
                f"bound by {self.bound}",
                f"{self.tokens_per_second:,.0f} tokens/s",
            )
        )
        rows.append(
            (
                "MFU",
                f"{self.mfu:.1%}",
                "",
                f"{self.cost:.2f} per million tokens" if self.cost else "",
            )
        )
        return rows


def estimate(
    cfg: TrainConfig,
    hardware: Hardware,
    what: str = "train",
    fp8: bool = False,
    released: bool = False,
) -> Estimate:
    """The estimate of `cfg` (its mesh, layout, lengths) on `hardware`.

    Args:
      what: "train", or "decode": one new token for each of batch_size rows of seq_len tokens.
      fp8: whether products of experts, and of attention with its weights, run at the fp8 rate;
        scores do not. In training, making their operands is counted.
      released: whether decoding reads the released formats.

    Raises:
      ValueError: mesh, layout or batch do not fit together.
    """
    sizes = parse_mesh(cfg.mesh)
    rules = layout_for(cfg.layout, sizes)
    devices = math.prod(sizes.values())
    terms = terms_of(cfg, rules, sizes, platform_of(hardware), what, released, fp8)
    k = constants_of(cfg.model, rules, sizes, micro_batches_of(cfg, what))
    values = bases(k, cfg.seq_len, cfg.batch_size)
    device = hardware.of_a_device(devices)
    parts = parts_of(terms, values, device, rates_of(cfg, device, fp8))
    copies = copies_of(terms, values, device)
    copying = sum(seconds for _, seconds in copies.values())
    sent = sent_of(terms, values, device, sizes)
    exchanging = sum(row[2] for row in sent.values())
    seconds = _exposed(parts, exchanging, device.overlap) + copying
    tokens = cfg.batch_size * (cfg.seq_len if what == "train" else 1)
    counted = _model_flops(cfg.model, cfg.seq_len, what, cfg.lora is not None)
    if what == "train":
        counted += frozen_passes(cfg) * cost(cfg.model, cfg.seq_len).train_flops / 3
    chips = 1 if hardware.shared else devices / hardware.devices_per_chip
    rate = tokens / seconds
    return Estimate(
        what=what,
        mesh=cfg.mesh,
        layout=str(cfg.layout),
        hardware=hardware.name,
        devices=devices,
        seq=cfg.seq_len,
        batch=cfg.batch_size,
        micro_batches=k.micro_batches,
        memory=held(terms, values),
        hbm=device.hbm_bytes,
        working_set=largest_working_set(terms, values),
        host=held_on_host(terms, values),
        copies=copies,
        parts=parts,
        sent=sent,
        step_seconds=seconds,
        exchange_seconds=exchanging,
        bound=bound_of(parts, device, exchanging, copying),
        mfu=counted * tokens / (seconds * hardware.bf16_flops * chips),
        tokens_per_second=rate,
        cost=hardware.price * chips / 3600 / rate * 1e6,
        remat=cfg.remat if what == "train" else "",
    )


def _exposed(parts: Mapping[str, Any], exchanging: float, overlap: float) -> float:
    """Seconds of computing, and of exchanges what does not hide behind it."""
    computing = sum(row[2] for row in parts.values())
    return computing + max(exchanging * (1 - overlap), exchanging - computing)


def rates_of(cfg: TrainConfig, device: Hardware, fp8: bool) -> dict[str, float]:
    """Part -> FLOPs per second of its products, where it is not the bfloat16 rate."""
    rates = dict.fromkeys(FP8, device.fp8_flops) if fp8 else {}
    return rates | {"optimizer": product_rate(cfg, device)}


def memory_of(
    cfg: TrainConfig, hardware: Hardware, what: str = "train", released: bool = False
) -> float:
    """Bytes that one device needs; the rest of the estimate is not computed."""
    sizes = parse_mesh(cfg.mesh)
    rules = layout_for(cfg.layout, sizes)
    k = constants_of(cfg.model, rules, sizes, micro_batches_of(cfg, what))
    values = bases(k, cfg.seq_len, cfg.batch_size)
    if what == "decode":
        return sum(
            held(decode_terms(cfg, rules, sizes, platform_of(hardware), released), values).values()
        )
    return sum(held(memory(cfg, rules, sizes, platform_of(hardware)), values).values())


def platform_of(hardware: Hardware) -> str:
    """The platform whose rules apply: "cpu", "tpu" or "gpu" (any chip with switched links)."""
    return "cpu" if hardware.shared else "tpu" if hardware.tiers[0].torus else "gpu"


def terms_of(
    cfg: TrainConfig,
    rules: AxisRules,
    sizes: Mapping[str, int],
    platform: str,
    what: str = "train",
    released: bool = False,
    fp8: bool = False,
) -> list[Term]:
    """All terms of one step of training or decoding."""
    if what == "decode":
        return decode_terms(cfg, rules, sizes, platform, released)

    def step(one: TrainConfig) -> list[Term]:
        return work(one, rules, sizes, platform, fp8) + traffic(one, rules, sizes, platform)

    terms = step(cfg) + reference_terms(cfg, step)
    terms += host_terms(cfg, rules, sizes)
    return repeated(terms, cfg.micro_batches) + memory(cfg, rules, sizes, platform)


def micro_batches_of(cfg: TrainConfig, what: str) -> int:
    """How many parts a step works on one after the other; decoding has one."""
    return cfg.micro_batches if what == "train" else 1


@functools.cache
def _model_flops(model, seq: int, what: str, constant: bool) -> float:
    """FLOPs of a token; `constant` weights have no gradient, which is a product each."""
    found = cost(model, seq)
    if what == "decode":
        return found.total.flops
    left_out = sum(w.size * w.uses for w in weights_of(model) if w.optimizer in ("muon", "adamw"))
    return found.train_flops - 2 * left_out * constant


def _rows_at_once(batch: int, micro_batches: int) -> str:
    return f"{micro_batches} x {batch // micro_batches} rows" if micro_batches > 1 else ""


def gigabytes(size: float) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"
