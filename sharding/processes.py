"""One JAX job of several processes: joining it, leaving it on failure, ending when asked to.

Call `start` before JAX is used. The environment says what it does; nothing is guessed:

    V4JAX_COORDINATOR=host:port  V4JAX_PROCESSES=P  V4JAX_PROCESS=i
                                   this is process i of P; host is the machine of process 0
    V4JAX_CLUSTER=slurm | tpu      SLURM, or the TPU pod, knows these three
    none of them                   there is one process, and nothing is done

"Every process calls it" marks a collective: it waits until all processes have called it.

On CPU, gloo has one connection per group of devices, and two programs that run at once mix their
messages: the job hangs or dies. So a program that does not depend on the one before it starts only
once that one has ended (jax.block_until_ready). Steps that hand on their state need no care.

Next file to read: sharding/agreement.py.
"""

import contextlib
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping

import jax
from jax.experimental import multihost_utils
from jax.sharding import Mesh

COORDINATOR, PROCESSES, PROCESS, CLUSTER = (
    "V4JAX_COORDINATOR",
    "V4JAX_PROCESSES",
    "V4JAX_PROCESS",
    "V4JAX_CLUSTER",
)

HEARTBEAT_SECONDS = 30
"""A process that is silent for this long counts as dead, and all others end with an error."""


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


@contextlib.contextmanager
def stop_requests() -> Iterator[Callable[[int], bool]]:
    """Gives a function that says after each step whether SIGTERM has told any process to end.

    It takes the number of the step; all processes get the same answer at the same step. Within the
    context SIGTERM has no other effect, so that the state can be saved. A job of several processes
    must have joined with start(preemptible=True). Without that, or off the main thread of a single
    process, the answer is always False.
    """
    if jax.process_count() > 1:
        # JAX makes its options at run time, unseen by pyright.
        enabled = jax.config.jax_enable_preemption_service  # pyright: ignore[reportAttributeAccessIssue]
        if not enabled:
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
