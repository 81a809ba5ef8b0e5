"""What adapters are used for: loading, decoding, merging into other formats, a whole run."""

import jax.numpy as jnp
import numpy as np
import pytest
from reference.weights import random_weights
from small_runs import small_run, write_text
from test_adapter_files import LORA, pairs
from test_mesh import SMALL

import v4jax
from v4jax.adapters.base import base_at
from v4jax.adapters.config import Lora
from v4jax.adapters.files import save_adapter
from v4jax.adapters.tree import merged
from v4jax.api import load
from v4jax.checkpoint.export import save_safetensors
from v4jax.checkpoint.names import from_official, to_official
from v4jax.convert.conversion import convert
from v4jax.convert.info import describe
from v4jax.generate.decode import generate
from v4jax.train.loop import train

TREE = pairs()
TOKENS = np.random.default_rng(0).integers(0, 96, (1, 12)).astype(np.int32)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A base in float32 and an adapter of all its matrices."""
    folder = tmp_path_factory.mktemp("use")
    params = from_official(SMALL, random_weights(SMALL, 0))
    save_safetensors(SMALL, params, folder / "base", dtype="float32")
    save_adapter(SMALL, TREE, folder / "adapter", LORA, base_at(str(folder / "base")))
    return folder


def whole(place):
    """The parameters with the adapter merged."""
    _, params = load(place / "base")
    return merged(params | {"lora": TREE})


def test_merging_a_file_is_merging_in_memory(place):
    convert(place / "base", place / "merged", adapter=place / "adapter")
    _, got = load(place / "merged")
    got, want = to_official(SMALL, got), to_official(SMALL, whole(place))
    for name, value in want.items():
        np.testing.assert_allclose(got[name], value, atol=1e-6 * np.abs(value).max())


def test_merging_into_the_released_formats_rounds_once(place):
    """Numbers are those of the merged model exported; one in a thousand lies on a border."""
    cfg = SMALL.replace(hidden_size=64, moe_intermediate_size=32)
    params = from_official(cfg, random_weights(cfg, 0))
    tree = pairs(LORA, cfg)
    save_adapter(cfg, tree, place / "wide", LORA)
    for source, dtype in (("float32", "official"), ("official", "bfloat16"), ("official", "fp8")):
        base, out, want = (place / f"{source}-{dtype}-{name}" for name in ("base", "out", "want"))
        save_safetensors(cfg, params, base, dtype=source)
        convert(base, out, dtype=dtype, adapter=place / "wide")
        _, known = load(base)
        save_safetensors(cfg, merged(known | {"lora": tree}), want, dtype=dtype)
        got, expected = (to_official(cfg, load(folder)[1]) for folder in (out, want))
        for name, value in expected.items():
            assert np.mean(got[name] != value) < 2e-3, (source, dtype, name)


def test_a_store_of_low_precision_is_refused(place):
    cfg = SMALL.replace(hidden_size=64, moe_intermediate_size=32)
    params = from_official(cfg, random_weights(cfg, 0))
    save_safetensors(cfg, params, place / "low", dtype="official")
    adapter, lora = place / "unnamed", Lora(rank=2, targets=("wq_b",))
    save_adapter(cfg, pairs(lora, cfg), adapter, lora)
    with pytest.raises(ValueError, match="a store of official files keeps their scales"):
        convert(place / "low", place / "store", "orbax", adapter=adapter)


def test_decoding_with_an_adapter_is_decoding_merged_weights(place):
    cfg, params = load(place / "base", adapter=place / "adapter")
    got, want = (generate(cfg, one, TOKENS.tolist(), 6)[0] for one in (params, whole(place)))
    assert got.tokens == want.tokens
    np.testing.assert_allclose(got.log_probs, want.log_probs, atol=1e-4)


def test_an_adapter_on_a_mesh_is_cut(place):
    """Each device has its part of the pairs."""
    mesh = "fsdp=2,expert=2,tensor=2"
    cfg, params = load(place / "base", mesh=mesh, adapter=place / "adapter")
    leaf = params["lora"]["layers_1_2"]["block_0"]["ffn"]["experts"]["w1"]["a"]
    assert leaf.addressable_shards[0].data.shape == (2, 4, 16, 2)
    np.testing.assert_array_equal(leaf, TREE["layers_1_2"]["block_0"]["ffn"]["experts"]["w1"]["a"])


@pytest.mark.slow
def test_a_run_writes_its_adapter_and_names_it(tmp_path):
    from small_runs import MODEL
    from trees import random_params

    write_text(tmp_path / "text")
    save_safetensors(MODEL, random_params(MODEL), tmp_path / "base", dtype="float32")
    lora = Lora(rank=2, targets=("wq_b", "experts.*"))
    fields = dict(lora=lora, init_from=str(tmp_path / "base"), steps=2, export="bfloat16")
    cfg = small_run(tmp_path / "text", tmp_path / "run", **fields)
    assert train(cfg)["adapter"] == str(tmp_path / "run/adapter")
    model, params = load(tmp_path / "base", adapter=tmp_path / "run/adapter")
    tokens = jnp.asarray(TOKENS)
    moved = v4jax.forward(model, params, tokens).logits
    still = v4jax.forward(model, {k: v for k, v in params.items() if k != "lora"}, tokens).logits
    assert jnp.abs(moved - still).max() > 1e-4
    again = small_run(tmp_path / "text", tmp_path / "again", init_from=str(tmp_path / "run"))
    said = "a run of adapters, which has no weights of its own; use its base: .*base"
    for use in (
        lambda: load(tmp_path / "run"),
        lambda: convert(tmp_path / "run", tmp_path / "out"),
        lambda: describe(tmp_path / "run"),
        lambda: train(again),
    ):
        with pytest.raises(ValueError, match=said):
            use()
    assert not (tmp_path / "out").exists() and not (tmp_path / "again").exists()
    with pytest.raises(ValueError, match="an adapter, which has no weights of its own"):
        describe(tmp_path / "run/adapter")
