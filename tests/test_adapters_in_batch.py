"""Several adapters in one batch: each row is what it is alone with its own adapter."""

import functools
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference.weights import random_weights
from test_mesh import MODEL

import v4jax
from sharding.mesh import make_mesh, parse_mesh
from sharding.rules import AxisRules, layout_for
from v4jax.adapters.base import base_at
from v4jax.adapters.config import Lora
from v4jax.adapters.files import save_adapter
from v4jax.adapters.several import only, with_choice
from v4jax.adapters.tree import abstract_adapters, merged
from v4jax.api import load
from v4jax.cache.layer import ChunkSpan
from v4jax.checkpoint.export import save_safetensors
from v4jax.checkpoint.names import from_official
from v4jax.cli import main as cli
from v4jax.context import Context
from v4jax.generate import cache, command, prefix, steps
from v4jax.generate.decode import Completion, generate
from v4jax.generate.prefix import PrefixStore
from v4jax.generate.rollout import Plan, rollout
from v4jax.generate.row import Row
from v4jax.generate.steps import DecodeConfig
from v4jax.model.adapted import Adapted, product
from v4jax.tokenizer import ByteTokenizer

SMALL = MODEL.replace(num_hidden_layers=2, compress_ratios=(128, 4, 0))
"""Hash and score routing, both kinds of compression, and MTP."""
LORAS = {
    "all": Lora(rank=2, targets=("*", "indexer.*")),
    "few": Lora(rank=3, alpha=6, targets=("wq_b", "wo_a", "experts.*", "head", "e_proj")),
}
"""Different ranks, and matrices that only one adapts."""
NAMES = ["few", None, "all", "few", None, "all", "all", "few"]
TOKENS = np.random.default_rng(0).integers(0, 96, (8, 40)).astype(np.int32)
CLOSE = dict(rtol=1e-5, atol=1e-5)
"""Of log probabilities: merged matrices, and other rows in an expert's block, round otherwise."""


def pairs(lora, cfg=SMALL):
    """Random numbers, by NumPy: nothing is compiled."""
    rng = np.random.default_rng(lora.rank)

    def one(leaf):
        return rng.normal(size=leaf.shape).astype(np.float32) * 0.3 / leaf.shape[-2] ** 0.5

    return jax.tree.map(one, abstract_adapters(cfg, lora))


@pytest.fixture
def scanned(monkeypatch):
    """Layers are scanned over."""
    monkeypatch.setattr(cache, "APART", 0)


@pytest.fixture(autouse=True)
def short(monkeypatch):
    """One program for prompts of any length."""
    monkeypatch.setattr(steps, "PREFILL_CHUNK", 8)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A base in float32 and two adapters."""
    folder = tmp_path_factory.mktemp("several")
    params = from_official(SMALL, random_weights(SMALL, 0))
    save_safetensors(SMALL, params, folder / "base", dtype="float32")
    for name, lora in LORAS.items():
        save_adapter(SMALL, pairs(lora), folder / name, lora, base_at(str(folder / "base")))
    return folder


def load_all(place, **options):
    return load(place / "base", adapter={name: place / name for name in LORAS}, **options)


@pytest.fixture(scope="module")
def model(place):
    return load_all(place)


@functools.partial(jax.jit, static_argnums=(0, 1))
def continued(cfg, rules: AxisRules, params, tokens_BT):
    """Log probabilities of the next token, and of MTP for the one after, of rows from a cache."""
    ctx, batch, size = Context(rules=rules), len(tokens_BT), tokens_BT.shape[1] - 1
    whole_B = jnp.full(batch, size, jnp.int32)
    empty = cache.empty_cache(cfg, batch, size, rules=rules)
    chunk, filled = cache.extend(cfg, params, empty, tokens_BT[:, :-1], whole_B, ctx)
    span = ChunkSpan(jnp.zeros_like(whole_B), whole_B)
    streams = chunk.streams_BTXD
    drafted, _ = cache.draft(cfg, params, filled, streams, tokens_BT[:, 1:], span, ctx)
    found = [cache.logits_of(params, x, ctx) for x in (chunk.x_BTD, drafted)]
    return [jax.nn.log_softmax(logits) for logits in found]


def chosen(params):
    return with_choice(params, NAMES, len(NAMES), len(NAMES))


def of_several(params, rules=AxisRules(), cfg=SMALL):
    return continued(cfg, rules, cache.split_layers(cfg, chosen(params), rules), TOKENS)


def whole(cfg, params):
    """The same by a whole forward pass."""
    output = v4jax.forward(cfg, params, jnp.asarray(TOKENS), dtype="float32")
    both = (output.logits, output.mtp_logits)
    return [np.asarray(jax.nn.log_softmax(one))[:, :-1] for one in both]


@pytest.fixture(scope="module")
def alone(model):
    """name -> what merged weights give all rows."""
    found = {None: whole(SMALL, only(model[1], None))}
    return found | {name: whole(SMALL, merged(only(model[1], name))) for name in LORAS}


def check(got, alone):
    for kind in range(2):
        for row, name in enumerate(NAMES):
            np.testing.assert_allclose(got[kind][row], alone[name][kind][row], **CLOSE)
    apart = [np.abs(alone[name][0] - alone[None][0]).max() for name in LORAS]
    assert min(apart) > 0.1, "the adapters change little"


def test_every_row_of_a_mixed_batch_is_that_of_its_own_merged_weights(model, alone, scanned):
    """MTP too; base rows are the base's."""
    check(of_several(model[1]), alone)


def run(model, rows, names, speculative=False, **options):
    decoding = DecodeConfig(speculative=speculative)
    prompts = [TOKENS[row, : 9 + 2 * row].tolist() for row in rows]
    options = dict(stop=lambda *_: False, capacity=40, rows=4, decoding=decoding) | options
    return generate(*model, prompts, 5, adapters=names, **options)


@pytest.mark.parametrize("speculative", [False, pytest.param(True, marks=pytest.mark.long)])
def test_generating_together_is_generating_alone(model, alone, speculative):
    """By one program, whichever row has which adapter."""
    names = NAMES[:4]
    together = run(model, range(4), names, speculative)
    programs = [program._cache_size() for program in (steps._continue, steps._first, steps.advance)]
    for row, name in enumerate(names):
        (one,) = run(model, [row], [name], speculative)
        assert one.tokens == together[row].tokens and len(one.tokens) == 5
        np.testing.assert_allclose(one.log_probs, together[row].log_probs, **CLOSE)
        # The prompt's last token, of the same row as in `alone`, gives the first new one.
        first = alone[name][0][row, 8 + 2 * row]
        assert one.tokens[0] == first.argmax()
        np.testing.assert_allclose(one.log_probs[0], first.max(), **CLOSE)
    after = [program._cache_size() for program in (steps._continue, steps._first, steps.advance)]
    assert after == programs


@pytest.mark.parametrize(
    ("mesh", "layout"),
    [
        pytest.param("fsdp=2,expert=4", "pod", marks=pytest.mark.slow),
        pytest.param("fsdp=2,expert=2,tensor=2", "full", marks=pytest.mark.long),
        pytest.param("context=2,expert=4", "pod", marks=pytest.mark.long),
    ],
)
def test_a_mixed_batch_on_eight_devices_is_that_on_one(place, alone, mesh, layout):
    """Rows of an expert come from other devices, each with its adapter."""
    sizes = parse_mesh(mesh)
    _, params = load_all(place, mesh=mesh, layout=layout)
    with jax.set_mesh(make_mesh(sizes)):
        rules = cache.decoding_rules(layout_for(layout, sizes))
        check(of_several(params, rules=rules), alone)
        # A few tokens: each row has its own pair beside it.
        few = continued(
            SMALL, rules, cache.split_layers(SMALL, chosen(params), rules), TOKENS[:, :3]
        )
        for row, name in enumerate(NAMES):
            np.testing.assert_allclose(few[0][row], alone[name][0][row, :2], **CLOSE)


@pytest.mark.long
def test_on_a_packed_base_too(tmp_path):
    """The products are float32 here, so its numbers are exact; matrices are not merged."""
    cfg = SMALL.replace(hidden_size=64, moe_intermediate_size=32)
    save_safetensors(cfg, from_official(cfg, random_weights(cfg, 0)), tmp_path / "base", "official")
    for name, lora in LORAS.items():
        save_adapter(cfg, pairs(lora, cfg), tmp_path / name, lora)
    named = {name: tmp_path / name for name in LORAS}
    _, params = load(tmp_path / "base", dtype="packed", adapter=named)
    alone = {name: whole(cfg, only(params, name)) for name in (None, *LORAS)}
    check(of_several(params, cfg=cfg), alone)


def test_beginnings_on_disk_are_of_one_adapter(model, tmp_path, monkeypatch):
    monkeypatch.setattr(prefix, "STRETCH", 8)
    formats = DecodeConfig().formats
    expected = {name: run(model, [4], [name])[0] for name in (None, "few")}
    store = PrefixStore(tmp_path, 10**9, *model, formats)
    for name, reused, kept in ((None, 0, 16), ("few", 0, 16), ("few", 16, 0), (None, 16, 0)):
        before = store.reused, store.kept
        (got,) = run(model, [4], [name], prefixes=store)
        assert (store.reused - before[0], store.kept - before[1]) == (reused, kept)
        assert got.tokens == expected[name].tokens
        np.testing.assert_allclose(got.log_probs, expected[name].log_probs, **CLOSE)
    # The base's own are those of a base that was loaded alone.
    base = PrefixStore(tmp_path, 10**9, SMALL, only(model[1], None), formats)
    assert base._chain(TOKENS[4, :17].tolist())


def test_a_row_without_an_adapter_gets_the_same_bits():
    rng = np.random.default_rng(0)
    x, w, a, b = (
        rng.normal(size=s).astype(np.float32) for s in ((2, 3, 8), (8, 6), (8, 4), (4, 6))
    )
    kept = jnp.array([[False] * 4, [True, True, False, False]])
    ctx = Context(frozen=True)
    got = product(ctx, x, Adapted(w, a, b, None, kept))
    np.testing.assert_array_equal(got[0], product(ctx, x, w)[0])
    want = product(ctx, x, Adapted(w, a[:, :2], b[:2]))
    np.testing.assert_allclose(got[1], want[1], rtol=1e-6, atol=1e-6)


def test_a_choice_that_cannot_be_is_refused_in_one_line(place, model):
    cfg, params = model
    tokens = jnp.asarray(TOKENS)
    a_run = place / "run"
    a_run.mkdir()
    (a_run / "adapter").symlink_to(place / "few")
    one = load(place / "base", adapter=place / "few")
    plain = {name: tree for name, tree in params.items() if name != "adapters"}
    for said, use in (
        (
            "adapters: got none; the parameters have 'all', 'few': name",
            lambda: run(model, [0], None),
        ),
        ("adapters: got 'sql'; allowed: 'all', 'few', or None", lambda: run(model, [0], ["sql"])),
        ("adapters: got 2 names; must be one for each of 1", lambda: run(model, [0], ["few"] * 2)),
        ("adapters: got 'few'; must be one for each", lambda: run(model, [0], "few")),
        ("adapters: got 3; must be one for each of 1", lambda: run(model, [0], 3)),
        ("adapters: got .*'few'.*; must be one for each", lambda: run(model, [0], {"few": 0})),
        (r"adapters: got \['few'\]; allowed: 'all'", lambda: run(model, [0], [["few"]])),
        ("have no named ones; load them with", lambda: run(one, [0], ["few"])),
        ("have the adapters 'all', 'few', of which", lambda: v4jax.forward(cfg, params, tokens)),
        ("have the adapters 'all', 'few'", lambda: v4jax.loss(cfg, params, {"tokens": tokens})),
        ("of several adapters, and no row says", lambda: v4jax.forward(cfg, plain, tokens)),
        ("merged: takes one adapter", lambda: merged(params)),
        ("Row: takes one adapter", lambda: Row(cfg, params, DecodeConfig(), 40)),
        (
            "rollout: takes one",
            lambda: rollout(cfg, params, [[1]], Plan(samples=1, max_new_tokens=1), "x"),
        ),
        ("adapter: got no adapter; must be", lambda: load(place / "base", adapter={})),
        (
            "adapter: got the name 1; must be",
            lambda: load(place / "base", adapter={1: place / "few"}),
        ),
        (
            "no adapter_config.json there",
            lambda: load(place / "base", adapter={"a": place / "base"}),
        ),
        (
            "adapter: .*run: a run, not an adapter; its adapter is .*run/adapter$",
            lambda: load(place / "base", adapter=a_run),
        ),
    ):
        with pytest.raises(ValueError, match=said) as refused:
            use()
        assert "\n" not in str(refused.value), said


# ---- the command line ----------------------------------------------------------------------------


@pytest.fixture
def asked(place, monkeypatch):
    """Calls of `generate`, which answers each prompt with one token: 67, or 66 without a name."""
    calls = []

    def answer(cfg, params, prompts, max_new_tokens, *, adapters=None, seeds, **options):
        calls.append((adapters, seeds, len(prompts), sorted(params.get("adapters", {}))))
        named = adapters or [None] * len(prompts)
        return [Completion([66 + (name is not None)], [0.0], "length") for name in named]

    monkeypatch.chdir(place)
    monkeypatch.setattr(command, "generate", answer)
    return calls


def test_the_command_continues_the_prompt_by_each_adapter(asked, capsys):
    line = "generate --tokens 1,2 --json --seed 5 --temperature 1 --adapter a=all b=few plain="
    assert cli.main([*line.split(), "base"]) == 0
    found = json.loads(capsys.readouterr().out)["samples"]
    assert [(one["adapter"], one["tokens"]) for one in found] == [
        ("a", [67]),
        ("b", [67]),
        ("plain", [66]),
    ]
    assert asked == [(["a", "b", None], [5, 5, 5], 3, ["a", "b"])]
    assert cli.main([*line.split(), "base", "--samples", "2"]) == 0
    found = json.loads(capsys.readouterr().out)["samples"]
    assert [one["adapter"] for one in found] == ["a", "a", "b", "b", "plain", "plain"]
    assert asked[-1] == (["a", "a", "b", "b", None, None], [5, 6] * 3, 6, ["a", "b"])
    assert (
        cli.main(["generate", "--tokens", "1", "--json", "--adapter=a=all", "b=few", "base"]) == 0
    )
    assert asked[-1] == (["a", "b"], [0, 0], 2, ["a", "b"])
    capsys.readouterr()
    assert cli.main(["generate", "--tokens", "1", "--json", "--adapter", "all", "base"]) == 0
    assert asked[-1] == (None, [0], 1, [])
    assert "adapter" not in json.loads(capsys.readouterr().out)


def test_texts_are_headed_by_their_adapters(asked, place, capsys):
    ByteTokenizer().save(place / "base")
    assert cli.main(["generate", "base", "--prompt", "Q", "--adapter", "a=all", "plain="]) == 0
    assert capsys.readouterr().out == "[a]\nQA\n\n[plain]\nQ@\n"


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("generate base --tokens 1 --adapter a=all --adapter few", "got few among several; name"),
        ("generate base --tokens 1 --adapter ?=all b=few", "got .=all among .* letters, digits"),
        ("generate base --tokens 1 --adapter a=all a=few", "got the name a twice"),
        ("generate base --tokens 1 --adapter plain=", "got plain= alone, which is the base"),
        ("generate base --tokens 1 --adapter a=all few", "unknown argument 'few'"),
        ("chat base --adapter a=all b=few", "got a=all b=few; chat takes one folder"),
        ("score base --tokens t.npy --out o.npz --adapter all --adapter few", "score takes one"),
        ("score base --tokens t.npy --out o.npz --adapter plain=", "got plain=; score takes one"),
        ("generate all --tokens 1", "use its base: v4jax generate {base} --adapter all ..."),
        ("chat all", "use its base: v4jax chat {base} --adapter all"),
        ("score all --tokens t.npy --out o.npz", "v4jax score {base} --adapter all ..."),
        ("info all", "all: an adapter, .*; use its base: v4jax info {base}"),
        ("convert all out", "use its base: v4jax convert {base} TARGET --adapter all"),
    ],
)
def test_a_bad_command_line_is_refused_in_one_line(line, said, asked, place, capsys):
    assert cli.main(line.split()) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and re.search(said.format(base=f"{place}/base"), err), err
    assert asked == []


def test_a_folder_may_have_an_equals_sign(asked, place):
    (place / "lr=1").symlink_to(place / "few")
    assert cli.main(["generate", "base", "--tokens", "1", "--adapter", "lr=1"]) == 0
    assert asked == [(None, [0], 1, [])]
