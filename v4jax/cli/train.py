"""`v4jax train`: trains, or resumes, and lets the finished run continue a prompt.

Next file to read: v4jax/cli/overrides.py.
"""

import argparse
import resource
import sys

from v4jax.cli.arguments import PATH, BadInput
from v4jax.cli.config_file import read_config_file
from v4jax.cli.overrides import override
from v4jax.cli.printing import print_rows
from v4jax.cli.start import start
from v4jax.train.config import TrainConfig


def declare(sub: argparse.ArgumentParser) -> None:
    """Declares CONFIG.py, and the flags that are none of its fields."""
    sub.add_argument(
        "config", nargs="?", type=PATH, help="CONFIG.py, a Python file with get_config()"
    )
    sub.add_argument(
        "--dry-run", action="store_true", help="print the plan, stage by stage, and run nothing"
    )
    sub.add_argument(
        "--target",
        metavar="CHIPS",
        help="with --dry-run: chips such as v5p:4x4x8, whose step time and MFU are estimated too",
    )


def run(arguments: argparse.Namespace, rest: list[str]) -> dict | None:
    """Trains the run of CONFIG.py with the overrides `rest`, or prints its plan."""
    if arguments.config is None:
        raise BadInput(
            "train needs a CONFIG.py; see v4jax train CONFIG.py --help for its overrides"
        )
    cfg = override(read_config_file(arguments.config), rest, f"v4jax train {arguments.config}")
    if arguments.dry_run:
        return _plan(cfg, arguments.target, arguments.json)
    if arguments.target is not None:
        raise BadInput(f"--target {arguments.target} goes with --dry-run; a run uses this machine")
    start(cfg.mesh, preemptible=True)
    from v4jax.planner.micro_batches import chosen_micro_batches
    from v4jax.train.compile_cache import compile_cache
    from v4jax.train.loop import train

    with compile_cache(cfg.compile_cache):
        cfg = chosen_micro_batches(cfg)
        summary = train(cfg)
        if cfg.sample_tokens and "stopped_at" not in summary:
            summary |= sample(cfg)
    if "run_dir" not in summary:  # this is not the first of several processes
        return None
    return summary | {"peak_memory": f"{_peak_memory() / 1e9:.1f} GB"}


def _plan(cfg: TrainConfig, target: str | None, as_json: bool) -> dict | None:
    """Prints the plan, once in a job of several processes."""
    from sharding import processes
    from v4jax.planner.plan import as_dict, head, plan

    processes.start()
    stages = as_dict(cfg, target) if as_json else plan(cfg, target)
    if processes.is_joined() and not processes.is_first():
        return None
    if isinstance(stages, dict):
        return stages
    print_rows([head(target), *(stage.row() for stage in stages)])
    return None


def _peak_memory() -> int:
    """The most bytes of memory that this process has had resident."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (
        1 if sys.platform == "darwin" else 1024
    )


def sample(cfg: TrainConfig) -> dict:
    """Lets the finished run continue cfg.sample_prompt; writes the text to sample.txt too."""
    import jax

    from sharding.processes import is_first
    from v4jax import storage
    from v4jax.adapters.base import ADAPTER
    from v4jax.api import load, place_on
    from v4jax.generate.decode import generate
    from v4jax.generate.sampling import Sampling
    from v4jax.generate.steps import DecodeConfig
    from v4jax.generate.text import TextStop
    from v4jax.storage import place
    from v4jax.tokenizer import load_tokenizer, prompt_ids

    tokenizer = load_tokenizer(cfg.run_dir)
    source: dict = {"path": cfg.run_dir}
    if cfg.lora is not None:
        adapter = place(cfg.run_dir, "run_dir") / ADAPTER
        source = {"path": cfg.init_from, "dtype": cfg.lora.base_dtype, "adapter": adapter}
    model, params = load(**source, mesh=cfg.mesh, layout=cfg.layout)
    mesh, rules = place_on(cfg.mesh, cfg.layout)
    prompt = prompt_ids(tokenizer, cfg.sample_prompt)
    with jax.set_mesh(mesh):
        (completion,) = generate(
            model,
            params,
            [prompt],
            cfg.sample_tokens,
            seeds=[cfg.seed],
            decoding=DecodeConfig(
                rules=rules,
                dtype=cfg.dtype,
                sampling=Sampling(temperature=0.7),
                kernels=cfg.kernels,
            ),
        )
    stop = TextStop(model.eos_token_ids, tokenizer=tokenizer)
    text = cfg.sample_prompt + stop.text(completion.tokens)
    if not is_first():
        return {}
    storage.write(place(cfg.run_dir, "run_dir") / "sample.txt", text.encode())
    return {"sample": text}
