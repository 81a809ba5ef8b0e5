"""One JAX job of several processes: joining it, leaving it on failure, rows in, whole arrays out.

Call `start` before JAX is used. The environment says what it does; nothing is guessed:

    V4JAX_COORDINATOR=host:port  V4JAX_PROCESSES=P  V4JAX_PROCESS=i
                                   this is process i of P; host is the machine of process 0
    V4JAX_CLUSTER=slurm | tpu      SLURM, or the TPU pod, knows these three
    none of them                   there is one process, and nothing is done

"Every process calls it" marks a collective: it waits until all processes have called it.

On CPU, gloo has one connection per group of devices, and two programs that run at once mix their
messages: the job hangs or dies. So a program that does not depend on the one before it starts only
once that one has ended (jax.block_until_ready). Steps that hand on their state need no care.

Next file to read: sharding/params.py.
"""

import contextlib
import logging
import os
import signal
import sys
import threading
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding

COORDINATOR, PROCESSES, PROCESS, CLUSTER = (
    "V4JAX_COORDINATOR",
    "V4JAX_PROCESSES",
    "V4JAX_PROCESS",
    "V4JAX_CLUSTER",
)

HEARTBEAT_SECONDS = 30
"""A process that is silent for this long counts as dead, and all others end with an error."""


# ---- joining and leaving -------------------------------------------------------------------------


def start(preemptible: bool = False) -> None:
    """Joins the job that the environment describes.

    It does nothing if the environment describes none, or if this process has joined already.

    Args:
      preemptible: SIGTERM then asks for an end (see stop_requests) and does not kill the process;
        JAX's preemption service catches it.

    Raises:
      ValueError: variables are incomplete, contradict one another or do not fit this machine.
      RuntimeError: the other processes did not come within JAX's 5 minutes.
    """
    settings = _settings(os.environ)
    if settings is None or jax.distributed.is_initialized():
        return
    jax.config.update("jax_enable_preemption_service", preemptible)
    try:
        jax.distributed.initialize(**settings, heartbeat_timeout_seconds=HEARTBEAT_SECONDS)
    # What JAX raises where the cluster's variables are missing.
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{CLUSTER}={os.environ.get(CLUSTER)}: this machine is not part of one ({error})"
        ) from None
    if jax.default_backend() == "cpu":
        _keep_stdout_clean()
    logging.getLogger("v4jax").info("process %d of %d", jax.process_index(), jax.process_count())


def _settings(environ: Mapping[str, str]) -> dict | None:
    """The arguments of jax.distributed.initialize; None for one process."""
    given = [name for name in (COORDINATOR, PROCESSES, PROCESS) if environ.get(name)]
    cluster = environ.get(CLUSTER)
    if cluster:
        if given:
            raise ValueError(f"{CLUSTER}={cluster} and {given[0]} are both set; set one of them")
        if cluster not in ("slurm", "tpu"):
            raise ValueError(f"{CLUSTER}: got {cluster!r}; allowed: slurm, tpu")
        on_gke = "TPU_WORKER_HOSTNAMES" in environ or "TPU_PROCESS_ADDRESSES" in environ
        return {
            "cluster_detection_method": "slurm"
            if cluster == "slurm"
            else "gketpu"
            if on_gke
            else "gcetpu"
        }
    if not given:
        return None
    if len(given) < 3:
        missing = [name for name in (COORDINATOR, PROCESSES, PROCESS) if name not in given]
        raise ValueError(
            f"{given[0]} is set, but {missing[0]} is not; "
            "a job of several processes needs all three"
        )
    address, count, index = (environ[name] for name in (COORDINATOR, PROCESSES, PROCESS))
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal():
        raise ValueError(f"{COORDINATOR}: got {address!r}; must be host:port")
    if not count.isdecimal() or int(count) < 1:
        raise ValueError(f"{PROCESSES}: got {count!r}; must be a positive integer")
    if not index.isdecimal() or int(index) >= int(count):
        raise ValueError(f"{PROCESS}: got {index!r}; must be in [0, {PROCESSES}={count})")
    settings = dict(coordinator_address=address, num_processes=int(count), process_id=int(index))
    if host in ("localhost", "127.0.0.1"):  # let nobody else connect
        settings["coordinator_bind_address"] = address
    return settings | {"cluster_detection_method": "deactivate"}


def _keep_stdout_clean() -> None:
    """Keeps gloo's announcements of its connections off stdout, where results go.

    gloo writes to descriptor 1, which leads nowhere from here on; sys.stdout gets a copy of it.
    """
    sys.stdout.flush()
    own, nowhere = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.close(nowhere)
    sys.stdout = open(own, "w", buffering=1, encoding=sys.stdout.encoding)  # noqa: SIM115


def leave(code: int) -> None:
    """Ends this process at once; an ordinary exit would wait minutes for the others to end."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def is_joined() -> bool:
    """Whether `start` has made this process part of a job."""
    return jax.distributed.is_initialized()


def is_first() -> bool:
    """Whether this is the process that writes and prints."""
    return jax.process_index() == 0


def wait_for_all(what: str) -> None:
    """Returns once every process has called it with the same text.

    Raises:
      RuntimeError: another process waits for something else.
    """
    if jax.process_count() > 1:
        said = np.uint32(zlib.crc32(what.encode()))
        total = _sum_of_bits(np.array([said]))[0]
        if total != np.uint32((int(said) * jax.process_count()) % 2**32):
            raise RuntimeError(
                f"processes do different things: this one waits for {what!r}, another does not"
            )


def anywhere(flag: bool) -> bool:
    """Whether `flag` is true on any process. Every process calls it."""
    if jax.process_count() == 1:
        return flag
    return bool(
        _sum_of_bits(
            np.array(
                [flag and i == jax.process_index() for i in range(jax.process_count())], np.uint8
            )
        ).any()
    )


def gather_text(text: str) -> list[str]:
    """The texts of all processes, process 0 first. Every process calls it."""
    count, index = jax.process_count(), jax.process_index()
    if count == 1:
        return [text]
    own = np.frombuffer(text.encode("utf-8", "surrogateescape"), np.uint8)
    sizes = np.zeros(count, np.uint32)
    sizes[index] = own.size
    ends = np.cumsum(_sum_of_bits(sizes), dtype=np.int64)
    if not ends[-1]:
        return [""] * count
    joined = np.zeros(ends[-1], np.uint8)
    joined[ends[index] - own.size : ends[index]] = own
    parts = np.split(_sum_of_bits(joined), ends[:-1])
    return [part.tobytes().decode("utf-8", "surrogateescape") for part in parts]


@contextlib.contextmanager
def agreed() -> Iterator[None]:
    """Raises in every process a ValueError that any process raises in the block.

    Its text is that of process 0, or else that of the first process that raised one, with the
    number of that process. Every process enters the block. The block calls no other collective,
    which a process that raises would never reach. Any other error ends this process alone, as a
    crash does.

    Raises:
      ValueError: a process raised one in the block.
    """
    if jax.process_count() == 1:
        yield
        return
    fault = None
    try:
        yield
    except ValueError as error:
        fault = error
    texts = gather_text("" if fault is None else str(fault) or repr(fault))
    for index, text in enumerate(texts):
        if text:
            raise ValueError(text if index == 0 else f"process {index}: {text}") from fault


@contextlib.contextmanager
def stop_requests() -> Iterator[Callable[[int], bool]]:
    """Gives a function that says after each step whether SIGTERM has told any process to end.

    It takes the number of the step; all processes get the same answer at the same step. Within the
    context SIGTERM has no other effect, so that the state can be saved. A job of several processes
    must have joined with start(preemptible=True). Without that, or off the main thread of a single
    process, the answer is always False.
    """
    if jax.process_count() > 1:
        if not jax.config.jax_enable_preemption_service:
            yield lambda step: False
            return
        yield multihost_utils.reached_preemption_sync_point
        return
    # Python allows signal handlers on the main thread only.
    if threading.current_thread() is not threading.main_thread():
        yield lambda step: False
        return
    asked = threading.Event()
    before = signal.signal(signal.SIGTERM, lambda number, frame: asked.set())
    try:
        yield lambda step: asked.is_set()
    finally:
        signal.signal(signal.SIGTERM, before)


def check_whole(mesh: Mesh) -> None:
    """Raises ValueError if a job of several processes has devices that `mesh` leaves out."""
    if jax.process_count() > 1 and mesh.size != jax.device_count():
        shown = (
            ",".join(f"{axis}={size}" for axis, size in mesh.shape.items() if size > 1)
            or "of one device"
        )
        raise ValueError(
            f"mesh {shown} uses {mesh.size} device(s); a job of {jax.process_count()} processes "
            f"must use all its {jax.device_count()}"
        )


# ---- rows in, whole arrays out -------------------------------------------------------------------


def local_rows(sharding: Sharding, shape: tuple[int, ...]) -> list[int]:
    """The rows of a global array that this process's devices hold, in order.

    Example: data=2, expert=2 and tensor=2 on 2 processes of 4 devices; data and expert split 8
    rows. Process 0 has data=0, so it holds rows 0 to 3, each twice, because devices along tensor
    hold the same rows. With tensor=8 alone both processes hold all 8 rows.
    """
    places = sharding.addressable_devices_indices_map(shape).values()
    return sorted({row for index in places for row in range(shape[0])[index[0]]})


def from_rows(sharding: Sharding, local: np.ndarray, rows: Sequence[int], count: int) -> jax.Array:
    """The global array [count, ...] of which `local` has this process's `rows` (see local_rows)."""
    where = {row: i for i, row in enumerate(rows)}

    def part(index):
        picked = [where[row] for row in range(count)[index[0]]]
        return local[picked][(slice(None), *index[1:])]

    return jax.make_array_from_callback((count, *local.shape[1:]), sharding, part)


def gather(x, index: tuple[int, ...] = ()) -> np.ndarray:
    """x[index] as a NumPy array, bit for bit, wherever its parts lie. Every process calls it.

    Every process gets all of it. Only what is asked for moves: shards of this process are copied,
    and the bits of other processes are added to zeros.
    """
    if not isinstance(x, jax.Array):
        return np.asarray(x[index] if index else x)
    jax.block_until_ready(x)  # also parts that are not read here, as the head of this file says
    shape = x.shape[len(index) :]
    whole = np.zeros(shape, x.dtype)
    for shard in x.addressable_shards:
        lead = [
            range(size)[part]
            for size, part in zip(x.shape, shard.index[: len(index)], strict=False)
        ]
        mine = shard.replica_id == 0 or x.is_fully_replicated
        if mine and all(i in held for i, held in zip(index, lead, strict=True)):
            data = np.asarray(shard.data)[
                tuple(i - held.start for i, held in zip(index, lead, strict=True))
            ]
            whole[shard.index[len(index) :]] = data
    return whole if x.is_fully_addressable or x.is_fully_replicated else _sum_of_bits(whole)


def _sum_of_bits(part: np.ndarray) -> np.ndarray:
    """Sum over processes of arrays that are zero wherever another process has something.

    It adds bits as integers, so it is exact for -0.0 and NaN too.
    """
    bits = np.atleast_1d(part).view(f"u{part.dtype.itemsize}")
    first_devices = {device.process_index: device for device in reversed(jax.devices())}
    mesh = Mesh(np.array([first_devices[i] for i in range(jax.process_count())]), ("process",))
    split, everywhere = (
        NamedSharding(mesh, PartitionSpec("process")),
        NamedSharding(mesh, PartitionSpec()),
    )
    shape = (jax.process_count(), *bits.shape)
    parts = jax.make_array_from_callback(shape, split, lambda _: bits[None])
    with jax.set_mesh(mesh):
        total = jax.jit(_add, out_shardings=everywhere)(parts)
    return np.asarray(total.addressable_data(0)).view(part.dtype).reshape(part.shape)


def _add(parts: jax.Array) -> jax.Array:
    return parts.sum(0, dtype=parts.dtype)
