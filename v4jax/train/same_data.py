"""Whether a run goes on with the data of its checkpoint, and what it says where it does not.

Next file to read: v4jax/train/rollback.py.
"""

import json
from collections.abc import Callable
from typing import Any

from sharding.agreement import agreed, anywhere, gather_text
from v4jax.checkpoint.store import Store
from v4jax.data.identity import differences, evaluation_differences, saved_settings, settings_of
from v4jax.data.listing import Listings
from v4jax.stderr import say
from v4jax.storage import Place
from v4jax.tokenizer import Tokenizer
from v4jax.train.config import TrainConfig
from v4jax.train.stages import number_at, saved_streams, stream_at, stream_view


def check_data(cfg: TrainConfig, tokenizer: Tokenizer, listings: Listings | None = None) -> None:
    """Refuses data other than the checkpoint's, before any long work or writing.

    It looks only at the data position of the newest checkpoint. If that one is refused, it looks
    for the checkpoint that `start` will take, which means reading all of the newest one.

    Raises:
      ValueError: names the first setting or file that differs; the same in every process.
    """
    with Store(cfg.run_dir) as store:
        newest = store.latest
        assert newest is not None, "the caller has seen a checkpoint"
        try:
            _check_position(cfg, tokenizer, store.path(newest), newest, listings)
        except ValueError:
            intact = store.latest_intact(strict=cfg.strict)
            if intact is None or intact == newest:
                raise
            _check_position(cfg, tokenizer, store.path(intact), intact, listings)


def _check_position(
    cfg: TrainConfig, tokenizer: Tokenizer, path: Place, step: int, listings: Listings | None
) -> None:
    """Refuses data other than that of the checkpoint at `path`, of step number `step`."""

    def ours(done: int) -> dict[str, Any]:
        view = stream_view(cfg, done)
        return settings_of(view.data, tokenizer, view.seq_len, view.batch_size, listings)

    with agreed():
        _changes(cfg, saved_settings(path / "data"), ours(step - 1))
        _other_changes(cfg, path / "data", step, ours)


def place_in_data(cfg: TrainConfig, path: Place, data, step: int) -> tuple[bool, tuple[str, ...]]:
    """(whether the saved position is useless, what differs in words), over all processes.

    Turns `data` to the stream of the checkpoint, and says on stderr what changed.

    Raises:
      ValueError: see _changes; the same in every process.
    """
    with agreed():
        saved = saved_settings(path / "data")
        moved, changed = _changes(cfg, saved, data.at(step - 1).settings)
        others = _other_changes(cfg, path / "data", step, lambda done: data.at(done).settings)
        data.at(step - 1)
    anew = [number for number, found in others.items() if found]
    data.skip(number for text in gather_text(json.dumps(anew)) for number in json.loads(text))
    moved = anywhere(moved)
    if not moved:
        changed += tuple(one for found in others.values() for one in found)
    changed = _found_anywhere(changed)
    _say_on_resume(path, saved, moved, changed)
    return moved, changed


def _found_anywhere(changed: tuple[str, ...]) -> tuple[str, ...]:
    """The differences that any process found; those unknown to the first name their process."""
    every = [json.loads(text) for text in gather_text(json.dumps(changed))]
    found = list(every[0])
    for index, theirs in enumerate(every):
        found += [f"process {index}: {one}" for one in theirs if one not in every[0]]
    return tuple(found)


def _changes(
    cfg: TrainConfig, saved: dict[str, Any], ours: dict[str, Any]
) -> tuple[bool, tuple[str, ...]]:
    """(whether the saved position is useless, what differs in words).

    Raises:
      ValueError: something differs, and cfg.data.allow_change is off.
    """
    trained = differences(saved, ours)
    evaluated = evaluation_differences(saved, ours)
    if trained and not cfg.data.allow_change:
        raise ValueError(
            f"data position: {trained[0]}; only the same can go on "
            "(--data.allow-change: from a fresh position)"
        )
    if evaluated and not cfg.data.allow_change:
        raise ValueError(
            f"{evaluated[0]}; its loss cannot be compared any more: "
            "give it another name (or --data.allow-change)"
        )
    return bool(trained), tuple(map(str, trained + evaluated))


def _other_changes(
    cfg: TrainConfig, directory: Place, step: int, ours: Callable[[int], dict[str, Any]]
) -> dict[int, tuple[str, ...]]:
    """Number of each saved stream that is not in use -> how it differs, in words.

    Args:
      directory: the checkpoint's item of data positions.
      ours: maps the number of steps done to this run's settings of the stream read then.

    Raises:
      ValueError: something differs, and not cfg.data.allow_change.
    """
    others = {}
    for number, done, path in saved_streams(cfg, directory, stream_at(cfg, step - 1)):
        found = differences(saved_settings(path), ours(done))
        stage = f"stage {number_at(cfg, done)}"
        anew = f"{stage} from a fresh position, should the run go back to it"
        if found and not cfg.data.allow_change:
            raise ValueError(
                f"data position of {stage}: {found[0]}; only the same can go on "
                f"(--data.allow-change: {anew})"
            )
        others[number] = tuple(f"{one} ({anew})" for one in found)
    return others


def _say_on_resume(
    path: Place, saved: dict[str, Any], moved: bool, changed: tuple[str, ...]
) -> None:
    """Says on stderr that data changed, or how little an older checkpoint lets it check."""
    if "files" not in saved:
        say(
            f"{path} is of an older v4jax: whether data and tokenizer are the same is checked by "
            f"{', '.join(saved) or 'nothing'} alone"
        )
    if not changed:
        return
    where = "where it was"
    if moved:
        where = (
            "from a fresh position in the data; documents that were trained on may be held out "
            "now, and the other way round"
        )
    first, *others = changed
    more = f" (and {len(others)} other difference(s))" if others else ""
    say(f"data changed: {path} {first}{more}; allow_change: going on {where}")
