"""What is asked of a layout, and the configuration and devices that it means.

Next file to read: v4jax/planner/results.py.
"""

import dataclasses
import math
from typing import NamedTuple

from sharding.mesh import parse_mesh
from v4jax.adapters.config import Lora
from v4jax.config import ModelConfig
from v4jax.planner.estimate import USABLE
from v4jax.planner.hardware import target_of
from v4jax.planner.micro_batches import chosen_micro_batches
from v4jax.train.config import TrainConfig

_RELEASED = "the released weights"
"""Stands for the base of adapters, which nothing here reads."""


class Request(NamedTuple):
    """What is asked of a layout.

    Attributes:
      target: chips, as target_of reads them.
      what: "train" or "decode".
      paper: compile nothing.
      lower_only: stop before compiling.
      effort: of the compiler for TPUs (planner/compiled.py).
      fp8: products run at the fp8 rate.
      released: decode from packed weights, with caches in the released formats.
      estimate: "model", or "compiler": XLA's own estimate of a step's time too.
      any_remat: search every remat policy, not the configuration's alone.
    """

    target: str = "cpu"
    what: str = "train"
    paper: bool = False
    lower_only: bool = False
    effort: str | None = None
    fp8: bool = False
    released: bool = False
    estimate: str = "model"
    any_remat: bool = False


def config_of(config: TrainConfig | str, options) -> TrainConfig:
    """`config`, or one for a config.json, with the command line's mesh, layout, seq and batch.

    Without a batch on the command line, training takes the batch of a CONFIG.py; decoding, a
    config.json, and adapters of a CONFIG.py that has none take one row per device.
    """
    theirs = isinstance(config, str) or options.what == "decode"
    if isinstance(config, str):
        model = ModelConfig.from_json(config)
        config = TrainConfig(
            model=model,
            run_dir="",
            steps=1,
            batch_size=1,
            seq_len=4096,
            learning_rate=1e-4,
            warmup_steps=0,
        )
    if options.what == "lora" and config.lora is None:
        config, theirs = _with_adapters(config), True
    own_batch = None if theirs else config.batch_size
    # The micro-batches of CONFIG.py belong to its own batch.
    kept = own_batch is not None and options.batch is None
    accumulation = options.gradient_accumulation
    if accumulation is None and not kept:
        accumulation = 1
    changes = {
        "mesh": options.mesh,
        "layout": options.layout,
        "seq_len": options.seq,
        "remat": options.remat,
        "batch_size": own_batch if options.batch is None else options.batch,
        "gradient_accumulation": accumulation,
        "stages": (),
    }
    config = dataclasses.replace(
        config, **{name: value for name, value in changes.items() if value is not None}
    )
    meshes = [layout_and_mesh(text)[1] for text in options.compare or ()] or [config.mesh]
    devices = math.lcm(*(math.prod(parse_mesh(mesh).values()) for mesh in meshes))
    if options.search:
        devices = devices_of(options.target, options.chips)
    if options.batch is not None or own_batch is not None:
        return config if options.search else _numbered(config, options.target)
    return dataclasses.replace(config, batch_size=devices)


def _with_adapters(config: TrainConfig) -> TrainConfig:
    """`config` with pairs on all matrices of the packed released weights."""
    return dataclasses.replace(
        config,
        lora=Lora(base_dtype="packed"),
        init_from=config.init_from or _RELEASED,
        gather="micro_batch",
        sample_tokens=0,
        index_learning_rate=0.0,
        gradient_accumulation=1,
        stages=(),
    )


def _numbered(config: TrainConfig, target: str) -> TrainConfig:
    """`config` with a number of micro-batches, the fewest that fit a device of the target."""
    devices = math.prod(parse_mesh(config.mesh).values())
    hardware = target_of(target, devices).hardware
    has = USABLE * hardware.of_a_device(devices).hbm_bytes
    return chosen_micro_batches(config, has, hardware)


def layout_and_mesh(text: str) -> tuple[str, str]:
    layout, colon, mesh = text.rpartition(":")
    if not colon or (mesh and "=" not in mesh):
        raise ValueError(
            f"--compare: got {text!r}; must be LAYOUT:MESH, as pod:fsdp=8,expert=16 "
            "or FILE.py:NAME:fsdp=8"
        )
    return layout, mesh


def devices_of(target: str, chips: int | None) -> int:
    """The number of JAX devices to search on: `chips` chips, or as many as the target names."""
    found = target_of(target)
    if chips is None and ":" not in target:
        raise ValueError(
            f"--search needs --chips N, or a target with a size such as v5p:4x4x8; got {target!r}"
        )
    if chips is not None and chips < 1:
        raise ValueError(f"--chips: got {chips}; must be 1 or more")
    return (
        found.devices
        if chips is None
        else chips * (1 if found.hardware.shared else found.hardware.devices_per_chip)
    )
