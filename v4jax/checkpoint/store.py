"""A run's directory: config, tokenizer, and Orbax checkpoints to resume from or to load weights of.

    RUN/config.json            architecture, official style
    RUN/tokenizer.json         how text becomes tokens
    RUN/checkpoints/STEP/      params (the public dict), optimizer, data position,
                               record (train/stability.py), a checksum of every file
    RUN/damaged/STEP/          checkpoints that were damaged when the run was resumed
    RUN/abandoned/STEP/        checkpoints newer than the one a run went back to after a loss spike
    RUN/metrics.jsonl, ...     written by the training loop

A checkpoint appears under its name only when it is complete, since Orbax renames it, or in a bucket
writes a file that says so at the end. So a crash leaves nothing half-written. One whose files are
not what was written (checkpoint/checksums.py) is skipped, with a warning.

Next file to read: v4jax/checkpoint/orbax_settings.py.
"""

import concurrent.futures
import contextlib
import logging
import uuid
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
from orbax.checkpoint import v1 as ocp

from sharding.agreement import anywhere, wait_for_all
from sharding.processes import is_first
from v4jax import storage
from v4jax.checkpoint.bucket_clients import prepare
from v4jax.checkpoint.checksums import NOT_NOTED, damage, write_sums
from v4jax.checkpoint.keeping import COMMITTED, leftovers, rule
from v4jax.checkpoint.orbax_settings import context_for
from v4jax.storage import Place, Remote, checkpoint_path, place_of_checkpoints

CHECKPOINTS, DAMAGED, ABANDONED = "checkpoints", "damaged", "abandoned"
logging.getLogger("absl").setLevel(logging.WARNING)  # Orbax reports every file it touches at INFO


class Store:
    """The checkpoints of one directory. Leaving the context waits for saves under way."""

    def __init__(
        self,
        directory,
        keep: int = 2,
        keep_every: int = 0,
        keep_best: int = 0,
        writes: bool = False,
        before_save: Callable[[], Callable[[], Any]] = lambda: lambda: None,
    ):
        """Opens or makes the directory.

        Args:
          keep: number of newest checkpoints to keep.
          keep_every: also keep those of every `keep_every`-th step; 0: none.
          keep_best: also keep this number of checkpoints, those of the least loss.
          writes: this process trains here, so leftovers of killed saves are its own.
          before_save: called when a save begins. Only after the function that it returns has
            returned, in the background, does the checkpoint get its checksums.
        """
        self._directory = place_of_checkpoints(directory, "directory")
        if isinstance(self._directory, Remote):
            prepare(self._directory.scheme)
        # The default policy skips a save, silently, while another one runs. The caller decides.
        self._kept = rule(keep, keep_every, keep_best)
        every_step = ocp.training.save_decision_policies.FixedIntervalPolicy(1)
        self._checkpointer = ocp.training.Checkpointer(
            str(self._directory / CHECKPOINTS),
            context=context_for(self._directory),
            save_decision_policy=every_step,  # pyright: ignore[reportArgumentType] (Orbax's own)
            preservation_policy=self._kept,
            # A reader must not touch a save under way. In a bucket `remove_leftovers` cleans up:
            # Orbax would do it in a thread, for which only another save waits.
            cleanup_tmp_directories=writes and not isinstance(self._directory, Remote),
        )
        self._before_save = before_save
        self._summing = concurrent.futures.ThreadPoolExecutor(1)
        self._summed: list[concurrent.futures.Future] = []
        self._tries_again = False

    def __enter__(self) -> "Store":
        return self

    def __exit__(self, *error) -> None:
        self._summing.shutdown()
        with self._writing():
            self._checkpointer.close()
        self._raise_failed()

    @property
    def latest(self) -> int | None:
        """Step of the newest complete checkpoint."""
        newest = self._checkpointer.latest
        return None if newest is None else newest.step

    def latest_intact(
        self,
        items: Sequence[str] | None = None,
        strict: bool = False,
        newest: int | None = None,
        once: bool = False,
    ) -> int | None:
        """Step of the newest checkpoint whose files are what was written; None if there is none.

        The log names the checkpoints that were skipped.

        Args:
          items: parts that matter, such as "params"; None: all.
          strict: refuse a damaged checkpoint instead of skipping it.
          newest: look only at this step and those before it.
          once: the files will not be read again soon (checkpoint/disk.py).

        Raises:
          ValueError: all are damaged; with `strict`, the newest is damaged or has no checksums.
            Names the file.
        """
        steps = sorted(
            (
                one.step
                for one in self._checkpointer.checkpoints
                if newest is None or one.step <= newest
            ),
            reverse=True,
        )
        unproven = None
        for step in steps:
            last = step == steps[-1]
            wrong = damage(self.path(step), items, jax.process_index(), jax.process_count(), once)
            if not anywhere(wrong is not None):
                return step
            error = f"{self.path(step)} is damaged: {wrong or 'another process has found it so'}"
            if strict:
                raise ValueError(error)
            logging.getLogger("v4jax").warning(
                "%s; %s", error, "there is none before it" if last else "trying the one before it"
            )
            if unproven is None and not anywhere(wrong not in (None, NOT_NOTED)):
                unproven = step
        if unproven is not None:
            logging.getLogger("v4jax").warning(
                "%s is used all the same, as there is no better one", self.path(unproven)
            )
        elif steps:
            raise ValueError(error)
        return unproven

    def put_aside_after(self, step: int, folder: str) -> None:
        """Moves checkpoints newer than `step` to `folder`, DAMAGED or ABANDONED."""
        newer = [one.step for one in self._checkpointer.checkpoints if one.step > step]
        for one in newer if is_first() else ():
            aside = self._directory / folder / f"{one}-{uuid.uuid4().hex[:8]}"
            storage.move_folder(self.path(one), aside, first=COMMITTED)
        wait_for_all("checkpoints are out of the way")
        self._checkpointer.reload()

    def remove_leftovers(self) -> None:
        """Removes checkpoints that the rule does not keep, and in a bucket incomplete ones.

        A process that was killed while it saved or deleted a checkpoint leaves them. Every process
        calls it, before the first save and once the state is loaded.
        """
        folder = self._directory / CHECKPOINTS
        found = self._checkpointer.checkpoints
        for one in leftovers(folder, found, self._kept) if is_first() else ():
            storage.remove_folder(one, first=COMMITTED)
        wait_for_all("leftovers are removed")
        self._checkpointer.reload()

    def path(self, step: int) -> Place:
        """The directory of a step's checkpoint."""
        return self._directory / CHECKPOINTS / str(step)

    def save(self, step: int, items: dict[str, Any], loss: float | None = None) -> None:
        """Starts an asynchronous save of named trees and iterators.

        Every process calls it, at the same step.

        Args:
          loss: the value by which the best checkpoints are chosen.

        Raises:
          RuntimeError: Orbax declined to save.
          OSError: the previous save failed, for example on a full disk, or in a bucket the two
            before. Earlier checkpoints are intact.
        """
        if isinstance(self._directory, Remote):
            self._settle()
        self._raise_failed()
        sent = self._before_save()
        metrics: dict[str, Any] | None = None if loss is None else {"loss": loss}
        with self._writing():
            own = dict(items)  # Orbax adds the metrics to it
            saving = self._checkpointer.save_checkpointables_async(step, own, metrics=metrics)
        if saving is None:
            raise RuntimeError(f"checkpoint {step} was not saved to {self._checkpointer.directory}")
        self._summed.append(self._summing.submit(self._sum, saving, step, sent))

    def needs_another(self, wait: bool = False) -> bool:
        """Whether the newest save to a bucket failed in any process, so that one is due.

        On a disk no save is tried again: `save` and `wait` raise. Every process calls it.

        Args:
          wait: wait for a save under way.

        Raises:
          OSError: the save before it failed too.
        """
        if not isinstance(self._directory, Remote):
            return False
        if wait:
            concurrent.futures.wait(self._summed)
        failed = anywhere(any(one.done() and one.exception() is not None for one in self._summed))
        if failed and self._tries_again:
            self._raise_failed()
            raise OSError(f"another process could not write to {self._checkpointer.directory}")
        return failed

    def _settle(self) -> None:
        """Waits for the save before; forgets that it failed if the one before it did not.

        A store may do what it is asked and its answer get lost; Orbax then finds what it wants to
        create, and gives up. Orbax also raises the error of a save at the next call.
        """
        if not self._summed:
            return
        self._tries_again = self.needs_another(wait=True)
        self._summed.clear()
        if self._tries_again:
            with contextlib.suppress(Exception):
                self._checkpointer.wait()

    def wait(self) -> None:
        """Returns when no process has a save under way. Every process must call it.

        Raises:
          OSError: a save failed.
        """
        with self._writing():
            self._checkpointer.wait()
        concurrent.futures.wait(self._summed)
        self._raise_failed()
        wait_for_all("checkpoints are written")

    def _raise_failed(self) -> None:
        for one in [one for one in self._summed if one.done()]:
            self._summed.remove(one)
            one.result()

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """Turns the errors of TensorStore and Orbax, which have many types, into OSError."""
        try:
            yield
        except Exception as error:
            said = " ".join(str(error).split())
            raise OSError(
                f"a checkpoint could not be written to {self._checkpointer.directory} ({said}); "
                "those before it are intact"
            ) from error

    def _sum(self, saving, step: int, sent: Callable[[], Any]) -> None:
        try:
            with self._writing():
                saving.result()
            sent()  # a proven checkpoint has the lines of metrics that lead to it
            with contextlib.suppress(FileNotFoundError):  # a newer save has removed it meanwhile
                write_sums(self.path(step), jax.process_index(), jax.process_count())
        except OSError as error:
            if isinstance(self._directory, Remote):
                logging.getLogger("v4jax").warning("step %d is not saved: %s", step, error)
            raise

    def load(self, step: int, items: dict[str, Any]) -> dict[str, Any]:
        """The named items of a checkpoint.

        Trees of jax.ShapeDtypeStruct give the shapes, dtypes and shardings of what is loaded.
        """
        return self._checkpointer.load_checkpointables(step, items)


def is_run(directory) -> bool:
    """Whether `directory` is a v4jax run or store, and not a directory of safetensors."""
    return (checkpoint_path(directory, "directory") / CHECKPOINTS).is_dir()


def newest_step(directory) -> int | None:
    """Step of a run's newest complete checkpoint, or None. Every process must call it."""
    if not anywhere(is_run(directory)):
        return None
    with Store(directory) as store:
        return store.latest
