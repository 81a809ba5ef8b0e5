"""Beginnings of prompts on disk: what is read gives what is computed.

The store survives damage, broken writes, limits and other weights.
"""

import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference.weights import random_weights
from test_generate import SMALL, never
from trees import small_config

from v4jax.checkpoint.names import from_official
from v4jax.generate import prefix, steps
from v4jax.generate.decode import generate
from v4jax.generate.prefix import PrefixStore
from v4jax.generate.steps import DecodeConfig

SETTING = DecodeConfig(
    speculative=True
)  # MTP's window is kept too: the drafts that stay are the same ones


@pytest.fixture(scope="module")
def model():
    cfg = small_config(**SMALL | dict(num_hash_layers=0))
    return cfg, jax.tree.map(jnp.asarray, from_official(cfg, random_weights(cfg, 0)))


@pytest.fixture(autouse=True)
def short(monkeypatch):
    monkeypatch.setattr(prefix, "STRETCH", 128)
    monkeypatch.setattr(steps, "PREFILL_CHUNK", 128)


@pytest.fixture(scope="module")
def expected(model):
    """Prompts and what follows them without a store; the second shares 150 tokens of the first."""
    first = np.random.default_rng(3).integers(0, 97, 300).tolist()
    prompts = [first, [*first[:150], *first[:60]], first[:128]]
    chunk, steps.PREFILL_CHUNK = steps.PREFILL_CHUNK, 128
    found = [run(model, prompt) for prompt in prompts]
    steps.PREFILL_CHUNK = chunk
    return list(zip(prompts, found, strict=True))


def run(model, prompt, store=None):
    return generate(
        *model, [prompt], 6, stop=never, capacity=384, decoding=SETTING, prefixes=store
    )[0]


def open_store(model, folder, limit=10**9):
    return PrefixStore(folder, limit, *model, SETTING.formats)


def same(got, expected):
    assert (got.tokens, got.drafted, got.accepted) == (
        expected.tokens,
        expected.drafted,
        expected.accepted,
    )
    np.testing.assert_allclose(
        got.log_probs, expected.log_probs, atol=2e-4
    )  # as logits of a cache, issue 6


def test_what_is_shared_is_computed_once(model, expected, tmp_path):
    """300 tokens are two spans; 150 shared ones are one.

    128 alone are none, since what follows them is not known.
    """
    store = open_store(model, tmp_path)
    for (prompt, completion), reused, kept in zip(
        [*expected, expected[0]], (0, 128, 0, 256), (256, 0, 0, 0), strict=True
    ):
        before = store.reused, store.kept
        same(run(model, prompt, store), completion)
        assert (store.reused - before[0], store.kept - before[1]) == (reused, kept)
    again = open_store(model, tmp_path)  # another process
    prompts = [prompt for prompt, _ in expected]
    together = generate(
        *model, prompts, 6, stop=never, capacity=384, decoding=SETTING, prefixes=again
    )
    assert again.reused == 256 + 128
    for got, (_, completion) in zip(together, expected, strict=True):
        assert got.tokens == completion.tokens
    other = (model[0], model[1] | {"norm": {"weight": model[1]["norm"]["weight"] * 1.001}})
    assert open_store(other, tmp_path).begin(None, prompts)[1] == [0, 0, 0]
    assert PrefixStore(tmp_path, 1, *model, DecodeConfig().formats).begin(None, prompts)[1] == [
        0,
        0,
        0,
    ]


def test_damage_is_noticed_and_mended(model, expected, tmp_path, capsys):
    (prompt, completion), *_ = expected
    run(model, prompt, open_store(model, tmp_path))
    files = sorted(tmp_path.iterdir(), key=os.path.getmtime)
    for harm in (
        lambda content: content[:-1],
        lambda content: content[:99] + bytes([content[99] ^ 1]) + content[100:],
        lambda content: b"",
    ):
        files[0].write_bytes(harm(files[0].read_bytes()))
        store = open_store(model, tmp_path)
        same(run(model, prompt, store), completion)
        assert "is damaged" in capsys.readouterr().err and store.reused + store.kept in (128, 256)
    assert open_store(model, tmp_path)._chain(prompt) and len(list(tmp_path.iterdir())) == 2


def test_a_killed_or_failed_write_leaves_nothing_to_read(
    model, expected, tmp_path, monkeypatch, capsys
):
    (prompt, completion), *_ = expected

    def killed(*_):
        raise KeyboardInterrupt

    def full(*_):
        raise OSError("No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(prefix.os, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            run(model, prompt, open_store(model, tmp_path))
    store = open_store(model, tmp_path)
    assert [path.suffix for path in tmp_path.iterdir()] == [".tmp"] and not store._chain(prompt)
    with monkeypatch.context() as patch:
        patch.setattr(prefix.os, "fsync", full)
        same(run(model, prompt, store), completion)
    assert (
        store.kept == 0
        and "No space left" in capsys.readouterr().err
        and len(list(tmp_path.iterdir())) == 1
    ), "only what the kill left"


def test_what_cannot_be_read_is_computed_again(model, expected, tmp_path, monkeypatch, capsys):
    (prompt, completion), *_ = expected
    run(model, prompt, open_store(model, tmp_path))

    def unreadable(path):
        raise OSError("Input/output error")

    store = open_store(model, tmp_path)
    monkeypatch.setattr(prefix.pathlib.Path, "read_bytes", unreadable)
    same(run(model, prompt, store), completion)
    assert (
        store.reused == 0
        and ".stretch: Input/output error; it is computed again" in capsys.readouterr().err
    )


def test_the_least_recently_used_go_first(model, expected, tmp_path):
    """The limit is two files: the first span of a chain in use outlives its second and old ones."""
    (prompt, _), (other, _), *_ = expected
    run(model, prompt, open_store(model, tmp_path))
    size = next(tmp_path.iterdir()).stat().st_size
    left, thesis = tmp_path / "left.stretch.tmp", tmp_path / "thesis.txt"
    for path, content in (
        (left, b"x" * size),
        (thesis, b"not of the store"),
    ):  # one of a killed run, one of somebody
        path.write_bytes(content)
        os.utime(path, (1, 1))
    (tmp_path / "folder").mkdir()
    store = open_store(model, tmp_path, 2 * size)
    changed = [prompt[0] + 1, *prompt[1:]]
    assert len(store._chain(prompt)) == 2
    run(model, changed[:140], store)
    assert store.kept == 128 and len(store._chain(prompt)) == 1 and len(store._chain(changed)) == 1
    assert (
        sorted(path.suffix for path in tmp_path.iterdir()) == ["", ".stretch", ".stretch", ".txt"]
        and not left.exists()
    )
    assert thesis.read_bytes() == b"not of the store"
    with pytest.raises(ValueError, match="limit of 0 bytes"):
        open_store(model, tmp_path, 0)
    with pytest.raises(ValueError, match="thesis.txt is not a folder"):
        open_store(model, thesis / "in", 1)
