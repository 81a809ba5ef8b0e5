"""How much asynchronous saves slow training: the time that a save takes from the steps beside it.

    python benchmarks/save_stall.py [--steps 12] [--rounds 5] [--into disk,gs,s3] [--megabytes 20]
    python benchmarks/save_stall.py --calls --into disk,gs,s3      # saves alone, of 100 MB

Each round saves the whole state (weights, router, Muon and AdamW state), which Orbax writes while
further steps run. The cost of a save is its call, plus what the steps until it is on the disk take
above the median of the later steps of the same round. So the drift of the machine from minute to
minute does not drown it. A save must be on the disk before the last third of its round. On a
machine without accelerators the writing threads take cores from the steps: the worst case.

gs and s3 are servers on loopback (tests/stores.py; extra buckets-tests) behind a link of so many
megabytes a second. They are a process of their own and take cores too. Rounds into several places
take turns, so that all of them meet the same machine; the ratio to the first one is the median of
those of the turns. `CPU` is what the process itself computed for a save, in seconds of one core:
a busy machine changes it least.
"""

import argparse
import contextlib
import dataclasses
import functools
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

EVERY = 20
"""Steps between two saves, for the stall."""
TESTS = pathlib.Path(__file__).parent.parent / "tests"


@dataclasses.dataclass(frozen=True)
class Round:
    """What one save took.

    Attributes:
      call: seconds of the call, and CPU seconds.
      steps: the same of each step after it.
      beside: how many steps began before the save was complete.
    """

    call: tuple[float, float]
    steps: tuple[tuple[float, float], ...]
    beside: int

    def usual(self, clock: int = 0) -> float:
        """Seconds of a step that runs beside no save; clock 1: CPU seconds."""
        return float(np.median([one[clock] for one in self.steps[self.beside :]]))

    def cost(self, clock: int = 0) -> float:
        """Seconds that the save took from training; clock 1: CPU seconds."""
        beside = sum(one[clock] for one in self.steps[: self.beside])
        return self.call[clock] + beside - self.beside * self.usual(clock)


def now() -> tuple[float, float]:
    """(seconds, CPU seconds of this process)."""
    return time.perf_counter(), time.process_time()


def since(begin: tuple[float, float]) -> tuple[float, float]:
    """What has passed by both clocks."""
    seconds, computed = now()
    return seconds - begin[0], computed - begin[1]


def last_core() -> int:
    return (os.cpu_count() or 1) - 1


@contextlib.contextmanager
def target(kind: str, megabytes: float, apart: bool) -> Iterator[Place]:
    """An empty folder on a disk, or in a bucket behind a link of so many megabytes a second.

    apart: its server runs on the last core.
    """
    if kind == "disk":
        with tempfile.TemporaryDirectory(prefix="v4jax-stall-") as folder:
            yield pathlib.Path(folder)
        return
    sys.path.append(str(TESTS))
    import stores  # pyright: ignore[reportMissingImports]

    command = [sys.executable, str(TESTS / "stores.py"), kind, str(megabytes * 1e6)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    there = functools.partial(os.sched_setaffinity, 0, {last_core()}) if apart else None
    with subprocess.Popen(command, preexec_fn=there, **pipes) as server:
        assert server.stdout is not None
        url = server.stdout.readline().strip()
        of_s3, of_gs = (url, None) if kind == "s3" else (None, url)
        os.environ.update(stores.environment(of_s3, of_gs))  # adds one store to the other
        yield place(f"{kind}://bucket/stall")
        server.communicate("")


def rounds(folders: list[Place], steps: int, count: int) -> tuple[int, list[list[Round]]]:
    """(bytes of the state, for each folder what the save of each round of `steps` steps took)."""
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
    found: list[list[Round]] = [[] for _ in folders]
    with jax.set_mesh(mesh), contextlib.ExitStack() as stack:
        opened = [stack.enter_context(Store(one, keep=1, writes=True)) for one in folders]
        shardings = state_shardings(cfg, rules, mesh)
        step, state = compile_step(cfg, rules, shardings, mesh), init_state(cfg, shardings)
        size = (cfg.batch_size, cfg.seq_len)
        tokens = np.random.default_rng(0).integers(2, model.vocab_size, size, np.int32)
        batch = {"tokens": jax.numpy.asarray(tokens), "segment_ids": jax.numpy.ones_like(tokens)}
        state, metrics = step(state, batch)  # compiles
        jax.block_until_ready(metrics)
        for i in range(1, count + 2):
            for store, own in zip(opened, found, strict=True):
                begin = now()
                store.save(i, {"params": state.public, "optimizer": state.optimizer})
                call, times, beside = since(begin), [], 0
                for _ in range(steps):
                    begin = now()
                    state, metrics = step(state, batch)
                    jax.block_until_ready(metrics)
                    times.append(since(begin))
                    # A step that began before the save was done runs beside it.
                    is_done = beside or (store.path(i) / "checksums.json").exists()
                    beside = beside or (len(times) if is_done else 0)
                if not 0 < beside <= steps * 2 / 3:
                    sys.exit(f"save {i} took more than two thirds of {steps} steps: more --steps")
                one = Round(call, tuple(times), beside)
                print(f"{store.path(i)}: {one.cost():.2f} s of {one.usual():.2f}", file=sys.stderr)
                if i > 1:  # the first save imports and opens clients
                    own.append(one)
        return sum(leaf.nbytes for leaf in jax.tree.leaves(state)), found


def calls(folder: Place, count: int) -> str:
    """A row of `count` saves of 100 MB: the call, until it is complete, and who computed for it."""
    sizes = np.random.default_rng(0)
    arrays = {
        str(i): jax.numpy.asarray(sizes.integers(0, 2**32, (1, 5 * 10**6), np.uint32))
        for i in range(5)
    }
    called, whole, served = [], [], []
    with Store(folder, keep=1, writes=True) as store:
        for i in range(count + 1):
            begin, before = now(), of_children(os.getpid())
            store.save(i + 1, {"params": arrays})
            called.append(since(begin)[0] * 1e3)
            store.wait()
            whole.append(since(begin))
            served.append(of_children(os.getpid()) - before)
    del called[0], whole[0], served[0]  # Orbax imports and opens its clients
    spread = f"{min(called):.0f} to {max(called):.0f}"
    seconds, own = np.median(whole, axis=0)
    return (
        f"{np.median(called):.0f} ms ({spread}) | {seconds:.1f} s | {own:.2f} s "
        f"| {np.median(served):.2f} s |"
    )


def of_children(pid: int) -> float:
    """CPU seconds of the processes that a process has started, and those that they have; Linux."""
    total = 0.0
    for path in pathlib.Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it ended meanwhile
            fields = path.read_text().rpartition(")")[2].split()
            if int(fields[1]) == pid:
                total += (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
                total += of_children(int(path.parent.name))
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--steps", type=int, default=12, help="steps of a round: beside a save, and after it"
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--into", default="disk", help="some of disk, gs and s3")
    parser.add_argument("--megabytes", type=float, default=20, help="a second, to gs and s3")
    parser.add_argument(
        "--apart",
        action="store_true",
        help="steps on all cores but the last, servers on the last; Linux",
    )
    parser.add_argument(
        "--calls",
        action="store_true",
        help="saves without steps: the call, until complete, CPU of this process and of servers",
    )
    arguments = parser.parse_args()
    if arguments.apart:  # before XLA makes its threads
        os.sched_setaffinity(0, set(range(last_core())))
    simulate_devices(1)
    if arguments.calls:
        for kind in arguments.into.split(","):
            with target(kind, arguments.megabytes, arguments.apart) as folder:
                print(f"| {kind} | {calls(folder, arguments.rounds)}", flush=True)
        return
    kinds = arguments.into.split(",")
    with contextlib.ExitStack() as stack:
        where = (arguments.megabytes, arguments.apart)
        folders = [stack.enter_context(target(kind, *where)) for kind in kinds]
        size, found = rounds(folders, arguments.steps, arguments.rounds)
    print(
        f"| into | state | save call | steps beside it | a save costs (least to most) | CPU | to "
        f"{kinds[0]} | step | stall, saving every {EVERY} steps | bar |\n{'|---' * 10}|"
    )
    for kind, own in zip(kinds, found, strict=True):
        print(row(kind, size, own, found[0]), flush=True)


def row(kind: str, size: int, own: list[Round], first: list[Round]) -> str:
    """What a table says of one place, and in ratio to the first one."""
    costs = [one.cost() for one in own]
    cost, usual = float(np.median(costs)), float(np.median([one.usual() for one in own]))
    ratio = np.median([one.cost() / other.cost() for one, other in zip(own, first, strict=True)])
    return (
        f"| {kind} | {size / 1e6:.0f} MB | {np.median([one.call[0] for one in own]) * 1e3:.0f} ms "
        f"| {max(one.beside for one in own)} "
        f"| {cost * 1e3:.0f} ms ({min(costs) * 1e3:.0f} to {max(costs) * 1e3:.0f}) "
        f"| {np.median([one.cost(1) for one in own]):.1f} s | {ratio:.2f} "
        f"| {usual * 1e3:.0f} ms | {cost / (usual * EVERY):+.1%} | 5% |"
    )


if __name__ == "__main__":
    main()
