"""What a chip can do: peak rates, memory and links, from hardware.json, which cites its sources.

A target is a profile and a number of chips, "v5p:4x4x8" or "h100:64". The profile may also be the
path of a JSON file with the form of one entry of hardware.json, "my-chip.json:64". "cpu" is this
machine, which all simulated devices share; `v4jax layout --measure` writes its profile.

Links form tiers, the fastest first: the devices of one tier reach each other at its rate, and the
next tier joins those beyond. In a torus a device's rate is split evenly over the dimensions.

Next file to read: v4jax/planner/weights.py.
"""

import dataclasses
import json
import math
import pathlib
import re
from typing import Any

from sharding.targets import gpu_of
from v4jax.storage import local_path

HERE = pathlib.Path(__file__).parent
MEASURED = HERE / "cpu.json"
"""The profile that `v4jax layout --measure` wrote on the machine of the repository's figures."""

_FIGURES = ("bf16_flops", "fp8_flops", "hbm_bytes", "hbm_bandwidth", "tiers")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tier:
    """Links among some devices.

    Attributes:
      bandwidth: bytes per second that one device sends.
      size: how many devices it joins; 0: any number.
      torus: dimensions of the torus; 0: a switch.
    """

    bandwidth: float
    size: int = 0
    torus: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Hardware:
    """The figures of one chip, in bytes, FLOPs and seconds; peaks are as published.

    Attributes:
      tiers: links, fastest first.
      tf32_flops: of products whose float32 factors are rounded to TF32, JAX's default on NVIDIA
        GPUs; 0: such factors are rounded to bfloat16, as on TPUs, or the rate is unknown.
      host_bandwidth: bytes per second between a chip and its host's memory, each way; 0: unknown.
      devices_per_chip: devices that JAX shows for one chip; the figures are of the chip.
      matmul, memory, network: share of the peak that large products, reads and exchanges reach; an
        assumption unless measured.
      rates: part of the model -> the shares of the peaks that its products and its reads reach, in
        place of `matmul` and `memory`; fitted to XLA's own estimate.
      overlap: share of an exchange that other work hides.
      latency: seconds to start one collective.
      shared: whether all devices share one chip's rates, as simulated devices do.
      clock: cycles per second of a core, by which a compiler's estimate in cycles becomes seconds;
        0 where it is unknown.
      price: money per chip and hour; 0 where none is given.
      sources: figure -> where it is from.
    """

    name: str
    bf16_flops: float
    fp8_flops: float
    hbm_bytes: float
    hbm_bandwidth: float
    tiers: tuple[Tier, ...]
    tf32_flops: float = 0.0
    host_bandwidth: float = 0.0
    devices_per_chip: int = 1
    matmul: float = 0.7
    memory: float = 0.8
    network: float = 0.8
    rates: dict[str, tuple[float, float]] = dataclasses.field(default_factory=dict, hash=False)
    overlap: float = 0.5
    latency: float = 5e-6
    shared: bool = False
    clock: float = 0.0
    price: float = 0.0
    sources: dict[str, str] = dataclasses.field(default_factory=dict, hash=False)

    def shares(self, part: str) -> tuple[float, float]:
        """The shares of the peaks that a part's products and reads reach."""
        return self.rates.get(part, (self.matmul, self.memory))

    def of_a_device(self, devices: int) -> "Hardware":
        """The figures of one JAX device, for a program on `devices` devices."""
        parts = devices if self.shared else self.devices_per_chip
        tiers = tuple(
            dataclasses.replace(tier, bandwidth=tier.bandwidth / parts) for tier in self.tiers
        )
        shared = (*_FIGURES[:-1], "tf32_flops", "host_bandwidth")
        rates = {name: getattr(self, name) / parts for name in shared}
        return dataclasses.replace(self, tiers=tiers, **rates)


@dataclasses.dataclass(frozen=True)
class Target:
    """A chip, and a number of its devices.

    Attributes:
      topology: what JAX is asked for; "" for CPUs, and where JAX cannot compile for it.
      compiles: whether JAX can compile for it; for CPUs, only for "cpu" itself.
    """

    hardware: Hardware
    devices: int
    topology: str = ""
    compiles: bool = False


def known() -> dict[str, dict[str, Any]]:
    """Profile name -> its entry of the data file."""
    return json.loads((HERE / "hardware.json").read_text()) | {
        "cpu": json.loads(MEASURED.read_text())
    }


def hardware_of(name: str) -> Hardware:
    """The profile called `name`, or that of the JSON file at this path.

    Raises:
      ValueError: an unknown name, or a file that cannot be read or lacks a figure.
    """
    if name.endswith(".json"):
        try:
            return _read(json.loads(local_path(name, "target").read_text()), name)
        except (OSError, json.JSONDecodeError) as error:
            raise ValueError(f"target: {name}: {error}") from None
    table = known()
    if name not in table:
        raise ValueError(
            f"target: got {name!r}; known: {', '.join(table)}, or a JSON file "
            f"(nearest: {nearest(name, table)})"
        )
    return _read(table[name], name)


def target_of(text: str, devices: int | None = None) -> Target:
    """The target that `text` names.

    Example: "v5p:4x4x8" has 128 chips, "h100:64" has 64, and "cpu" has `devices` devices.

    Raises:
      ValueError: an unknown chip, a file that is not on this machine, or a size that is no
        product of positive numbers.
    """
    # First, since the colon of gs:// must not be taken for that of a size.
    local_path(text, "target")
    name, colon, size = text.rpartition(":") if ":" in text else (text, "", "")
    hardware = hardware_of(name)
    if not colon:
        return Target(hardware, devices or 1, compiles=name == "cpu")
    if not re.fullmatch(r"\d+(x\d+)*", size) or math.prod(map(int, size.split("x"))) < 1:
        raise ValueError(f"target: got size {size!r} in {text!r}; must be chips, as 64 or 4x4x8")
    chips = math.prod(map(int, size.split("x")))
    is_tpu = bool(hardware.tiers[0].torus) and not name.endswith(".json") and "x" in size
    compiles = is_tpu or bool(gpu_of(text))
    return Target(hardware, chips * hardware.devices_per_chip, text if compiles else "", compiles)


def nearest(word: str, words) -> str:
    """The known word that is most like `word`."""
    import difflib

    return difflib.get_close_matches(word, list(words), 1, 0.0)[0]


def _read(entry: dict[str, Any], where: str) -> Hardware:
    missing = [name for name in _FIGURES if name not in entry]
    if missing:
        raise ValueError(
            f"target: {where} lacks {', '.join(missing)}; see v4jax/planner/hardware.json"
        )
    fields = {field.name for field in dataclasses.fields(Hardware)}
    if unknown := sorted(set(entry) - fields):
        raise ValueError(
            f"target: {where} has {unknown[0]!r}; allowed: {', '.join(sorted(fields))}"
        )
    tiers = tuple(Tier(**tier) for tier in entry["tiers"])
    rates = {part: (products, reads) for part, (products, reads) in entry.get("rates", {}).items()}
    figures: dict[str, Any] = {"name": where} | entry | {"tiers": tiers, "rates": rates}
    return Hardware(**figures)
