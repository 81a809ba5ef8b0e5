"""Before the first step: checks folders, mesh and data, then makes the cache and the run directory.

If one process finds a fault, all refuse (sharding.agreement.agreed), so none waits in vain.

Next file to read: v4jax/train/loop.py.
"""

import dataclasses
import math
from typing import NamedTuple

import jax
from jax.sharding import Mesh, NamedSharding

from sharding.agreement import agreed
from sharding.mesh import make_mesh, parse_mesh
from sharding.process_rows import local_rows
from sharding.processes import check_whole, is_first
from sharding.rules import AxisRules, check_has_mesh, layout_for
from v4jax import storage
from v4jax.adapters.base import BASE_FILE, Base, write_base
from v4jax.chat.release import ChatRelease, chat_release
from v4jax.checkpoint.atomic import write_text
from v4jax.checkpoint.bucket_clients import check_bucket
from v4jax.checkpoint.carried import CARRIED, said
from v4jax.checkpoint.carried_files import carried_files, copy_to
from v4jax.checkpoint.export import kinds_for
from v4jax.checkpoint.load import carried_of
from v4jax.checkpoint.run_config import check_config, write_config
from v4jax.checkpoint.tensor_files import carry
from v4jax.data.config import tokenizer_of
from v4jax.data.listing import Listings
from v4jax.data.rows import Batch
from v4jax.data.store import prepare_cache
from v4jax.data.summary import unread_lines, unused_lines
from v4jax.kernels.choice import interpreted
from v4jax.stderr import say
from v4jax.storage import (
    Claim,
    Place,
    Remote,
    checkpoint_name,
    checkpoint_path,
    folder_to_fill,
    is_remote,
    path_of_checkpoints,
    pinned,
    place,
)
from v4jax.tokenizer import Tokenizer
from v4jax.tokenizer.checks import disagreement
from v4jax.train.config import TrainConfig
from v4jax.train.data import train_batches
from v4jax.train.evaluation import evaluation_sets
from v4jax.train.initial import check_source_model, check_source_tokens
from v4jax.train.memories import check_memories
from v4jax.train.metrics_file import require_plots
from v4jax.train.same_data import check_data
from v4jax.train.stages import Batches, stage_at, starts
from v4jax.train.step import check_batch
from v4jax.train.trackers import require_trackers

INIT_FROM_FILE = "init_from.txt"
"""In a run that began from a model of the Hub: its name and commit."""


def as_read(cfg: TrainConfig) -> TrainConfig:
    """The configuration, without evaluation sets if the run never evaluates: nobody reads them."""
    if cfg.eval_batches or not cfg.data.evaluate_on:
        return cfg
    return dataclasses.replace(cfg, data=dataclasses.replace(cfg.data, evaluate_on=()))


def check_folders(cfg: TrainConfig) -> Place:
    """The run directory, after checks of all folders except the text's; creates nothing.

    Raises:
      ValueError: a folder that cannot be made or that Orbax cannot use, a run of another model, or
        a cache inside the run directory.
    """
    run = place(cfg.run_dir, "run_dir")
    if isinstance(run, Remote):
        check_bucket(run, "run_dir")
    else:
        folder_to_fill(run, "run_dir")
        path_of_checkpoints(run, "run_dir")
    check_config(run, cfg.model)
    begun = (run / "config.json").exists()
    if cfg.data.cache:
        cache = folder_to_fill(cfg.data.cache, "cache")
        if isinstance(run, Remote):
            return run
        if not begun and run.resolve() in (cache.resolve(), *cache.resolve().parents):
            raise ValueError(
                f"cache: got {cache}, inside run_dir {run}; a run begins in an empty folder, "
                "so the cache must lie outside of it"
            )
    return run


def with_chat_release(cfg: TrainConfig, run: Place) -> TrainConfig:
    """The configuration with data.chat.release named, if conversations are read; says which it is.

    It is the user's, else that of the run's or of init_from's checkpoint, else v4.

    Raises:
      ValueError: see check_source_model and chat_release; or an effort that this release does not
        have.
    """
    data, begun = cfg.data, (run / "config.json").exists()
    sources = (*data.sources, *data.evaluate_on)
    if not any(source.talks for source in sources):
        return cfg
    if data.chat.release:
        return cfg
    found = ChatRelease(data.chat.wording, "")
    if begun or cfg.init_from:
        if not begun:
            check_source_model(cfg)
        found = chat_release(run if begun else cfg.init_from)
        say(f"conversations in the format of {found}")
    chat = dataclasses.replace(data.chat, release=found.name)
    return dataclasses.replace(cfg, data=dataclasses.replace(data, chat=chat))


class Layout(NamedTuple):
    """Where the arrays of a run live: logical axes -> mesh axes, and the mesh."""

    rules: AxisRules
    mesh: Mesh


def check_layout(cfg: TrainConfig) -> Layout:
    """The mesh and its rules, after checks that every stage's batch, the plots and the export fit.

    Says on stderr which kernels this platform only interprets.

    Raises:
      ValueError: names what does not fit.
    """
    check_has_mesh(cfg.layout, cfg.mesh)
    sizes = parse_mesh(cfg.mesh)
    rules = layout_for(cfg.layout, sizes) if math.prod(sizes.values()) > 1 else AxisRules()
    mesh = make_mesh(sizes)
    check_whole(mesh)
    check_memories(cfg, mesh)
    say(interpreted(cfg.kernels, jax.default_backend()))
    require_plots()
    if is_first():  # the others write to no tracker
        require_trackers(cfg.trackers)
    for done in starts(cfg):
        check_batch(stage_at(cfg, done), rules, sizes)
    if cfg.export != "none":
        kinds_for(cfg.model, cfg.export)
    return Layout(rules, mesh)


def check_text(cfg: TrainConfig, newest: int | None, listings: Listings) -> Tokenizer:
    """The tokenizer, after checks of tokens and data against the run's or its first weights'.

    Says on stderr which parts of the sources are not read, and where tokenizer and model disagree.

    Args:
      newest: step of the run's newest checkpoint; None for none.

    Raises:
      ValueError: names what differs, or first weights of another model; the same in every process.
    """
    begins = newest is None and cfg.init_from != ""
    with agreed():
        if begins:
            check_source_model(cfg)
        tokenizer = tokenizer_of(cfg.data)
        if begins:
            check_source_tokens(cfg, tokenizer)
    say(disagreement(cfg.model, tokenizer))
    if newest is not None:
        check_data(cfg, tokenizer, listings)
    with agreed():
        lines = unread_lines(cfg.data, listings)
    say(*lines)
    return tokenizer


def make_cache(cfg: TrainConfig, tokenizer: Tokenizer, listings: Listings) -> None:
    """Makes the token cache in the first process.

    The others then find it, or make one on their own disk.
    """
    if cfg.data.cache:
        with agreed():
            if is_first():
                prepare_cache(cfg.data, tokenizer, listings)


def open_batches(
    cfg: TrainConfig, tokenizer: Tokenizer, place: NamedSharding, listings: Listings
) -> tuple[Batches, dict[str, list[Batch]]]:
    """(batches of every stage, evaluation sets); of each batch, the rows that `place` puts here.

    Opens the data of later stages too, so that a fault in it shows now and not in the middle of the
    run.

    Raises:
      ValueError: anything wrong with the data; the same in every process.
    """

    def read(view: TrainConfig):
        rows = local_rows(place, (view.batch_size, view.seq_len))
        return stage_batches(view, tokenizer, rows, listings)

    with agreed():
        data = Batches(cfg, read)
        rows = local_rows(place, (cfg.batch_size, cfg.seq_len))
        held_out = evaluation_sets(cfg, tokenizer, rows, listings)
        for done in starts(cfg)[1:]:
            read(stage_at(cfg, done))
    return data, held_out


def stage_batches(
    view: TrainConfig,
    tokenizer: Tokenizer,
    rows: list[int] | None,
    listings: Listings | None = None,
):
    """Endless batches of one stage; the given rows of them (None: all)."""
    return train_batches(
        view.data,
        tokenizer,
        view.seq_len,
        view.batch_size,
        vocab_size=view.model.vocab_size,
        rows=rows,
        listings=listings,
    )


def say_unused(cfg: TrainConfig, tokenizer: Tokenizer, listings: Listings) -> None:
    """Says on stderr how many records of each source are empty, left out or cut, and why.

    Raises:
      ValueError: a conversation is too long and data.chat.too_long is "error"; the same in every
        process.
    """
    seq_lens = [stage_at(cfg, done).seq_len for done in starts(cfg)]
    with agreed():
        lines = unused_lines(cfg.data, tokenizer, seq_lens, cfg.seq_len, listings)
    say(*lines)


def _carry(source: str, run: Place) -> None:
    """Copies what its source has beside the trunk into a run, in place of what is there."""
    for name in storage.listing(run / CARRIED):
        storage.remove(run / CARRIED / name)
    if not source:
        return
    carried = carried_of(source)
    carry(carried, run)
    if carried:
        say(f"carried as it is, not trained: {said(carried)}")


def write_run(
    run: Place,
    cfg: TrainConfig,
    tokenizer: Tokenizer,
    claim: Claim,
    newest: int | None = None,
    base: Base | None = None,
) -> None:
    """Writes the run directory in the first process, once check_folders has passed in all.

    From then on this job is the one that writes there. A run without a checkpoint begins anew,
    perhaps from other weights, so config.json and what is carried are written anew too.

    Args:
      newest: step of the run's newest checkpoint; None for none.
      base: of a run of adapters (check_base).
    """
    with agreed():
        if not is_first():
            return
        anew = newest is None
        source = cfg.init_from if anew else ""
        if anew:
            _carry("" if cfg.lora else source, run)
        write_config(run, cfg.model, source, anew)
        if source and is_remote(checkpoint_name(source)):
            write_text(run / INIT_FROM_FILE, f"{pinned(source)}\n")
        if source:
            origin = checkpoint_path(source, "init_from", weights=True)
            copy_to(carried_files(origin), run, is_run=True)
        tokenizer.save(run)
        if base is not None:
            write_base(run, base)
        elif anew:
            storage.remove(run / BASE_FILE)
        claim.take()


def still_ours(claim: Claim) -> None:
    """Ends every process of a job whose run another has taken over (storage/claim.py).

    Raises:
      ValueError: see Claim.check.
    """
    with agreed():
        if is_first():
            claim.check()
