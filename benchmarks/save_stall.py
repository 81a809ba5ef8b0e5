"""How much asynchronous saves slow training: the time that a save takes from the steps beside it.

    python benchmarks/save_stall.py [--steps 20] [--rounds 5] [--into disk,gs,s3] [--megabytes 20]
    python benchmarks/save_stall.py --calls --into disk,gs,s3      # the call alone, 100 MB

Each round saves the whole state (weights, router, Muon and AdamW state), which Orbax writes while
further steps run. The cost of a save is its call, plus what the steps until it is on the disk take
above the median of the later steps of the same round. So the drift of the machine from minute to
minute does not drown it. A save must be on the disk before the last third of its round. On a
machine without accelerators the writing threads take cores from the steps: the worst case.

gs and s3 are servers on loopback (tests/stores.py; extra buckets-tests) behind a link of so many
megabytes a second. They are a process of their own and take cores too.
"""

import argparse
import contextlib
import dataclasses
import os
import pathlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator

import jax
import numpy as np
from train_step import MODEL

from sharding.mesh import make_mesh, parse_mesh, simulate_devices
from sharding.rules import AxisRules
from v4jax.checkpoint.store import Store
from v4jax.storage import Place, place
from v4jax.train.config import TrainConfig
from v4jax.train.step import compile_step, init_state, state_shardings

TESTS = pathlib.Path(__file__).parent.parent / "tests"


@dataclasses.dataclass(frozen=True)
class Round:
    """What one save took.

    Attributes:
      call: seconds of the call.
      steps: seconds of each step after it.
      beside: how many steps began before the save was complete.
    """

    call: float
    steps: tuple[float, ...]
    beside: int

    @property
    def usual(self) -> float:
        """Seconds of a step that runs beside no save."""
        return float(np.median(self.steps[self.beside :]))

    @property
    def cost(self) -> float:
        """Seconds that the save took from training."""
        return self.call + sum(self.steps[: self.beside]) - self.beside * self.usual


@contextlib.contextmanager
def target(kind: str, megabytes: float) -> Iterator[Place]:
    """An empty folder on a disk, or in a bucket behind a link of so many megabytes a second."""
    if kind == "disk":
        with tempfile.TemporaryDirectory(prefix="v4jax-stall-") as folder:
            yield pathlib.Path(folder)
        return
    sys.path.append(str(TESTS))
    import stores  # pyright: ignore[reportMissingImports]

    command = [sys.executable, str(TESTS / "stores.py"), kind, str(megabytes * 1e6)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, **pipes) as server:
        assert server.stdout is not None
        url = server.stdout.readline().strip()
        of_s3, of_gs = (url, None) if kind == "s3" else (None, url)
        os.environ.update(stores.environment(of_s3, of_gs))
        yield place(f"{kind}://bucket/stall")
        server.communicate("")


def rounds(folder: Place, steps: int, count: int) -> tuple[int, list[Round]]:
    """(bytes of the state, what the save of each of `count` rounds of `steps` steps took)."""
    model = dataclasses.replace(
        MODEL, num_nextn_predict_layers=1, compress_ratios=(*MODEL.compress_ratios, 0)
    )
    cfg = TrainConfig(
        model=model,
        run_dir="",
        steps=10**6,
        batch_size=8,
        seq_len=256,
        learning_rate=1e-4,
        warmup_steps=0,
    )
    mesh, rules = make_mesh(parse_mesh("")), AxisRules()
    found = []
    with jax.set_mesh(mesh), Store(folder, keep=1, writes=True) as store:
        shardings = state_shardings(cfg, rules, mesh)
        step, state = compile_step(cfg, rules, shardings, mesh), init_state(cfg, shardings)
        size = (cfg.batch_size, cfg.seq_len)
        tokens = np.random.default_rng(0).integers(2, model.vocab_size, size, np.int32)
        batch = {"tokens": jax.numpy.asarray(tokens), "segment_ids": jax.numpy.ones_like(tokens)}
        for i in range(count + 1):
            start = begin = time.perf_counter()
            if i:  # the first round compiles
                store.save(i, {"params": state.public, "optimizer": state.optimizer})
            call, times, beside = time.perf_counter() - begin, [], 0
            for _ in range(steps):
                begin = time.perf_counter()
                state, metrics = step(state, batch)
                jax.block_until_ready(metrics)
                times.append(time.perf_counter() - begin)
                # A step that began before the save was done runs beside it.
                is_done = beside or (store.path(i) / "checksums.json").exists()
                beside = beside or (len(times) if is_done else 0)
            seconds = time.perf_counter() - start
            print(f"{folder}: round {i} of {count}, {seconds:.0f} s", file=sys.stderr)
            if i and not 0 < beside <= steps * 2 / 3:
                sys.exit(f"save {i} took more than two thirds of {steps} steps: give more --steps")
            if i:
                found.append(Round(call, tuple(times), beside))
        return sum(leaf.nbytes for leaf in jax.tree.leaves(state)), found


def calls(folder: Place, count: int) -> str:
    """A row: milliseconds of `count` calls that save 100 MB, and seconds until it is complete."""
    sizes = np.random.default_rng(0)
    arrays = {
        str(i): jax.numpy.asarray(sizes.integers(0, 2**32, (1, 5 * 10**6), np.uint32))
        for i in range(5)
    }
    times, whole = [], []
    with Store(folder, keep=1, writes=True) as store:
        for i in range(count + 1):
            begin = time.perf_counter()
            store.save(i + 1, {"params": arrays})
            times.append((time.perf_counter() - begin) * 1e3)
            store.wait()
            whole.append(time.perf_counter() - begin)
    del times[0], whole[0]  # Orbax imports and opens its clients
    spread = f"{min(times):.0f} to {max(times):.0f}"
    return f"{np.median(times):.0f} ms ({spread}) | {np.median(whole):.1f} s |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--steps", type=int, default=20, help="steps of a round: what lies between two saves"
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--into", default="disk", help="some of disk, gs and s3")
    parser.add_argument("--megabytes", type=float, default=20, help="a second, to gs and s3")
    parser.add_argument("--calls", action="store_true", help="time only the call, without steps")
    arguments = parser.parse_args()
    simulate_devices(1)
    if arguments.calls:
        for kind in arguments.into.split(","):
            with target(kind, arguments.megabytes) as folder:
                print(f"| {kind} | {calls(folder, arguments.rounds)}", flush=True)
        return
    print(
        "| into | state | save call | steps beside it | a save costs (least to most) | step | "
        "stall, saving every so many steps | bar |\n|---|---|---|---|---|---|---|---|"
    )
    for kind in arguments.into.split(","):
        with target(kind, arguments.megabytes) as folder:
            size, found = rounds(folder, arguments.steps, arguments.rounds)
        costs = [one.cost for one in found]
        cost = float(np.median(costs))
        call = float(np.median([one.call for one in found]))
        usual = float(np.median([one.usual for one in found]))
        print(
            f"| {kind} | {size / 1e6:.0f} MB | {call * 1e3:.0f} ms | "
            f"{max(one.beside for one in found)} | "
            f"{cost * 1e3:.0f} ms ({min(costs) * 1e3:.0f} to {max(costs) * 1e3:.0f}) | "
            f"{usual * 1e3:.0f} ms | {arguments.steps}: "
            f"{cost / (usual * arguments.steps):+.1%} | 5% |",
            flush=True,
        )


if __name__ == "__main__":
    main()
