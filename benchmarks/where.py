"""Where a step's time goes: every operation of a jax.profiler trace, by part of the model.

    python benchmarks/where.py train [--top 30]          the step of train_step.py
    python benchmarks/where.py decode [--batch 8]        a step of decode.py
    python benchmarks/where.py length [--rows 4096]      the forward pass of length.py

A time is that of the thread that ran the operation, without the operations inside it. Two threads
may work at once, and the threads that a product shares its work with are not counted. So the sum is
neither wall time nor processor time; large entries are worth a look.
"""

import argparse
import collections
import os
import pathlib
import re
import tempfile

PARTS = {
    "shared expert": "shared_experts",
    "routed experts": "ffn/experts",
    "mHC": r"hc_(attn|ffn|head)|HyperHead|block_\d+/(attention|experts)/(?!attn|ffn)",
    "router": "ffn/",
    "indexer": "indexer",
    "compressor": "compressor",
    "attention": "/attn",
    "norms": "norm",
    "embedding": "embed",
    "head, loss": r"head|logit|loss|choose_token|jvp\(\)",
}
"""Part -> a pattern for an operation's op_name; the first that matches counts."""


def op_names(text: str) -> dict[str, str]:
    """HLO operation -> its op_name, from a compiled program's text."""
    found = re.finditer(
        r'^\s*(?:ROOT )?%?([\w.\-]+) = .*?(?:op_name="([^"]*)"|$)', text, re.MULTILINE
    )
    return {match[1]: match[2] or "" for match in found}


def part_of(op_name: str) -> str:
    part = next((part for part, pattern in PARTS.items() if re.search(pattern, op_name)), "rest")
    return part + (", backward" if "transpose(" in op_name else "")


def self_times(folder) -> dict[str, list]:
    """HLO operation -> [milliseconds, number of runs] of the trace in `folder`.

    Time of operations inside it on the same thread does not count.
    """
    import jax

    (file,) = pathlib.Path(folder).glob("**/*.xplane.pb")
    total = collections.defaultdict(lambda: [0.0, 0])
    for plane in jax.profiler.ProfileData.from_file(str(file)).planes:
        for line in plane.lines if "CPU" in plane.name else ():
            events = (
                (e.start_ns, -e.duration_ns, dict(e.stats).get("hlo_op")) for e in line.events
            )
            open_ = []  # (operation, end) around the event
            for start, minus, name in sorted(event for event in events if event[2]):
                while open_ and open_[-1][1] <= start:
                    open_.pop()
                if open_:
                    total[open_[-1][0]][0] += minus / 1e6
                total[name][0] -= minus / 1e6
                total[name][1] += 1
                open_.append((name, start - minus))
    return total


def print_trace(run, text: str, steps: int, top: int) -> None:
    """Traces run(), `steps` steps of the program `text`, and prints milliseconds a step."""
    import jax

    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            run()
        times, names = self_times(folder), op_names(text)
    parts = collections.defaultdict(lambda: [0.0, 0])
    for name, (milliseconds, count) in times.items():
        mine = parts[part_of(names.get(name, ""))]
        mine[0], mine[1] = mine[0] + milliseconds, mine[1] + count
    print(f"{'part':32s}  ms a step   operations")
    for name, (milliseconds, count) in sorted(parts.items(), key=lambda item: -item[1][0]):
        print(f"{name:32s} {milliseconds / steps:10.2f} {count / steps:12.1f}")
    print(
        f"{'sum':32s} {sum(v[0] for v in parts.values()) / steps:10.2f} "
        f"{sum(v[1] for v in parts.values()) / steps:12.1f}"
    )
    for name, (milliseconds, count) in sorted(times.items(), key=lambda item: -item[1][0])[:top]:
        print(
            f"{milliseconds / steps:10.3f} {count / steps:7.1f}  {name:36s} "
            f"{names.get(name, '')[-110:]}"
        )


def train(arguments) -> None:
    import numpy as np
    from train_step import BATCH, MODEL, SEQ, program

    step, state, batch = program(
        np.random.default_rng(0).integers(0, MODEL.vocab_size, (BATCH, SEQ)), ""
    )
    compiled = step.lower(*state, batch).compile()
    state = compiled(*state, batch)[:2]
    print_trace(lambda: float(compiled(*state, batch)[2]), compiled.as_text(), 1, arguments.top)


def decode(arguments) -> None:
    import numpy as np
    from decode import make_checkpoint, models

    import v4jax
    from v4jax.generate.cache import split_layers
    from v4jax.generate.steps import STEPS, DecodeConfig, advance, prefill

    with tempfile.TemporaryDirectory() as folder:
        make_checkpoint(folder, models()["small"])
        cfg, params = v4jax.load(folder)
    params, decoding, rows = split_layers(cfg, params), DecodeConfig(), arguments.batch
    prompts = np.random.default_rng(0).integers(2, cfg.vocab_size, (rows, 64)).tolist()
    seed_B, active_B = np.arange(rows, dtype=np.uint32), np.ones(rows, bool)
    state, _ = prefill(cfg, decoding, params, prompts, seed_B, 128)
    compiled = advance.lower(cfg, decoding, params, state, active_B, seed_B).compile()
    state, _ = compiled(params, state, active_B, seed_B)
    print_trace(
        lambda: np.asarray(compiled(params, state, active_B, seed_B)[1].token_PBN),
        compiled.as_text(),
        STEPS,
        arguments.top,
    )


def length(arguments) -> None:
    from length import program

    run, params, tokens = program(arguments.rows)
    compiled = run.lower(params, tokens).compile()
    compiled(params, tokens).block_until_ready()
    print_trace(
        lambda: compiled(params, tokens).block_until_ready(), compiled.as_text(), 1, arguments.top
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("train", "decode", "length"))
    parser.add_argument("--batch", type=int, default=8, help="rows that are decoded")
    parser.add_argument("--rows", type=int, default=4096, help="tokens of length.py's row")
    parser.add_argument(
        "--top", type=int, default=20, help="operations that are printed one by one"
    )
    arguments = parser.parse_args()
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    from sharding.mesh import simulate_devices

    simulate_devices(1)
    {"train": train, "decode": decode, "length": length}[arguments.what](arguments)


if __name__ == "__main__":
    main()
