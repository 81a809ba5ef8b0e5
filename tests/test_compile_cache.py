"""With `compile_cache` a run that starts again compiles nothing, and entries are whole files."""

import collections
import contextlib
import dataclasses
import os
import pathlib

import jax
import jax.numpy as jnp
import pytest
from small_runs import small_run, write_text

from v4jax.checkpoint.store import Store
from v4jax.cli import main as cli
from v4jax.train.compile_cache import compile_cache
from v4jax.train.loop import train

HIT = "/jax/compilation_cache/cache_hits"
ASKED = "/jax/compilation_cache/compile_requests_use_cache"


@pytest.fixture
def cfg(tmp_path):
    return small_run(
        write_text(tmp_path / "text", documents=8),
        tmp_path / "run",
        eval_every=2,
        eval_batches=1,
        checkpoint_every=2,
        compile_cache=str(tmp_path / "programs"),
    )


@pytest.fixture
def counts():
    """How often JAX has asked its cache for a program, and found it."""
    found = collections.Counter()

    def note(event, **_):
        found[event] += 1

    jax.monitoring.register_event_listener(note)
    yield found
    jax.monitoring.unregister_event_listener(note)


def test_a_run_that_starts_again_compiles_nothing(cfg, counts):
    before = jax.config.jax_compilation_cache_dir
    jax.clear_caches()
    train(cfg)
    programs = set(os.listdir(cfg.compile_cache))
    assert programs and all(name.endswith("-cache") for name in programs)
    assert counts[ASKED] >= len(programs)

    jax.clear_caches()
    counts.clear()
    train(dataclasses.replace(cfg, run_dir=cfg.run_dir + "2"))
    assert counts[ASKED] > 5 and counts[HIT] == counts[ASKED]
    assert set(os.listdir(cfg.compile_cache)) == programs
    assert jax.config.jax_compilation_cache_dir == before != cfg.compile_cache


def test_a_killed_run_finds_the_programs_of_its_steps(cfg, counts, monkeypatch):
    save = Store.save

    def save_then_die(store, step, items, loss):
        save(store, step, items, loss)
        raise KeyboardInterrupt

    monkeypatch.setattr(Store, "save", save_then_die)
    jax.clear_caches()
    with pytest.raises(KeyboardInterrupt):
        train(cfg)
    monkeypatch.setattr(Store, "save", save)
    jax.clear_caches()
    counts.clear()
    summary = train(cfg)
    assert counts[ASKED] > 5 and counts[HIT] == counts[ASKED]
    assert summary["seconds_compile"] > 0  # tracing and reading


def test_a_write_that_is_cut_short_leaves_no_entry(tmp_path, monkeypatch):
    folder = tmp_path / "programs"

    def die(*_):
        raise OSError("killed")

    for cut in (True, False):
        with monkeypatch.context() as patch, compile_cache(str(folder)):
            if cut:
                patch.setattr(os, "replace", die)
            warned = pytest.warns(UserWarning, match="killed") if cut else contextlib.nullcontext()
            with warned:
                jax.jit(lambda x: x * 3 + 7)(jnp.zeros(3)).block_until_ready()
        entries = list(folder.glob("*-cache"))
        assert (not entries) == cut
        jax.clear_caches()


@pytest.mark.parametrize("kind", ["file", "read only"])
def test_a_folder_that_cannot_be_used_is_refused_before_any_work(cfg, kind, monkeypatch, capsys):
    folder = pathlib.Path(cfg.compile_cache)
    if kind == "file":
        folder.write_text("")
    else:
        folder.mkdir()
        monkeypatch.setattr(os, "access", lambda path, mode: pathlib.Path(path) != folder)
    words = "which is not a folder" if kind == "file" else "which may not be written to"
    with pytest.raises(ValueError, match=f"compile_cache: got .*, {words}"):
        train(cfg)
    assert not pathlib.Path(cfg.run_dir).exists()
    config = pathlib.Path(cfg.run_dir).parent / "config.py"
    config.write_text("from configs.demo import get_config\n")
    assert cli.main(["train", str(config), "--compile-cache", str(folder)]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and words in said


def test_a_bucket_is_refused(cfg):
    with pytest.raises(ValueError, match="compile_cache: got 'gs://b/c'"):
        dataclasses.replace(cfg, compile_cache="gs://b/c")
