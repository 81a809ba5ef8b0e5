"""Packed weights: numbers, logits and tokens are those of the same checkpoint read as bfloat16."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from trees import random_params, small_config

import v4jax
from v4jax.api import place_on
from v4jax.checkpoint.pieces import place_in_pieces
from v4jax.checkpoint.store import CHECKPOINTS
from v4jax.generate.decode import generate
from v4jax.generate.steps import DecodeConfig
from v4jax.quant import fp8, mxfp4
from v4jax.quant.packed import Packed, as_numbers, bytes_by_halves, check_scales
from v4jax.quant.scales import to_ue8m0

CFG = small_config(
    vocab_size=96,
    hidden_size=256,
    moe_intermediate_size=256,
    num_hidden_layers=2,
    num_attention_heads=8,
    head_dim=64,
    qk_rope_head_dim=8,
    q_lora_rank=256,
    o_groups=2,
    o_lora_rank=128,
    n_routed_experts=8,
    compress_ratios=(4, 128, 0),
    index_n_heads=8,
    index_head_dim=32,
    num_hash_layers=1,
)
TOKENS = np.random.default_rng(0).integers(0, CFG.vocab_size, (8, 24))


@pytest.fixture(scope="module")
def releases(tmp_path_factory):
    """Format -> a checkpoint of random weights, scaled so that layers pass them on."""
    params = jax.tree.map(lambda w: 0.06 * w if w.ndim > 1 else w, random_params(CFG))
    params["router"] = random_params(CFG)["router"]
    folder = tmp_path_factory.mktemp("releases")
    for format in ("official", "fp8"):
        v4jax.save_safetensors(CFG, params, folder / format, dtype=format)
    return {format: folder / format for format in ("official", "fp8")}


@pytest.fixture(params=["official", "fp8"])
def release(request, releases):
    return releases[request.param]


def bits(x):
    x = np.asarray(x)
    return x.view(f"u{x.itemsize}")


def random_matrix(rows, columns, seed=0):
    rng = np.random.default_rng(seed)
    spread = np.exp2(rng.integers(-9, 9, (rows, columns)))
    return (rng.normal(size=(rows, columns)) * spread).astype(np.float32)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_mxfp4_numbers_are_those_of_the_file(dtype):
    packed, scale = mxfp4.quantise(random_matrix(40, 96))
    packed[0] = np.arange(48) * 5 + 8  # every code, -0 too
    w = Packed(jnp.asarray(bytes_by_halves(packed).T), jnp.asarray(to_ue8m0(scale).T), "mxfp4")
    assert w.shape == (96, 40)
    expected = mxfp4.dequantise(packed, scale).T.astype(jnp.dtype(dtype))
    np.testing.assert_array_equal(bits(jax.jit(lambda w: w.numbers(dtype))(w)), bits(expected))


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("shape", [(256, 128), (130, 300)])
def test_fp8_numbers_are_those_of_the_file_rounded_to_bfloat16(dtype, shape):
    """Scales that are no powers of two, as of -Base releases, need the rounding."""
    scale = np.random.default_rng(1).uniform(0.01, 30, fp8.scale_shape(shape)).astype(np.float32)
    codes, scale = fp8.quantise(random_matrix(*shape), scale)
    w = Packed(jnp.asarray(codes.view(np.uint8).T), jnp.asarray(scale.T), "fp8")
    rounded = fp8.dequantise(codes, scale).T.astype(jnp.bfloat16).astype(jnp.dtype(dtype))
    np.testing.assert_array_equal(bits(jax.jit(lambda w: w.numbers(dtype))(w)), bits(rounded))


def test_the_loaded_tree_holds_the_numbers_of_bfloat16(release):
    _, plain = v4jax.load(release, dtype="bfloat16")
    _, packed = v4jax.load(release, dtype="packed")
    held = jax.tree.leaves(packed, is_leaf=lambda leaf: isinstance(leaf, Packed))
    expected = jax.tree.leaves(plain)
    assert {leaf.format for leaf in held if isinstance(leaf, Packed)} == (
        {"fp8", "mxfp4"} if release.name == "official" else {"fp8"}
    )
    assert sum(leaf.nbytes for leaf in jax.tree.leaves(packed)) < 0.65 * sum(
        leaf.nbytes for leaf in expected
    )
    for one, other in zip(held, expected, strict=True):
        numbers = as_numbers(one, other.dtype)
        np.testing.assert_array_equal(bits(numbers), bits(other))


def test_logits_on_one_device_are_those_of_bfloat16(release):
    (cfg, plain), (_, packed) = (v4jax.load(release, dtype=one) for one in ("bfloat16", "packed"))
    quant = "official" if release.name == "official" else "none"
    expected = v4jax.forward(cfg, plain, TOKENS, quant=quant)
    got = v4jax.forward(cfg, packed, TOKENS, quant=quant)
    np.testing.assert_array_equal(got.logits, expected.logits)
    np.testing.assert_array_equal(got.mtp_logits, expected.mtp_logits)


@pytest.mark.parametrize(
    ("mesh", "layout"),
    [
        ("fsdp=2,expert=2,tensor=2", "full"),
        pytest.param("data=2,context=2,expert=2", "full", marks=pytest.mark.slow),
        ("data=2,expert=2", "pod"),
    ],
)
def test_logits_on_a_mesh_are_those_of_bfloat16(releases, mesh, layout):
    device_mesh, rules = place_on(mesh, layout)
    found = []
    for dtype in ("bfloat16", "packed"):
        cfg, params = v4jax.load(releases["official"], dtype=dtype, mesh=mesh, layout=layout)
        with jax.set_mesh(device_mesh):
            found.append(v4jax.forward(cfg, params, TOKENS, rules=rules).logits)
    np.testing.assert_array_equal(*found)


@pytest.mark.parametrize("mesh", [None, pytest.param("expert=4,tensor=2", marks=pytest.mark.slow)])
def test_generated_tokens_are_those_of_bfloat16(releases, mesh):
    device_mesh, rules = place_on(mesh, None)
    decoding = DecodeConfig(dtype="bfloat16", rules=rules, speculative=mesh is None)
    found = []
    for dtype in ("bfloat16", "packed"):
        cfg, params = v4jax.load(releases["official"], dtype=dtype, mesh=mesh)
        with jax.set_mesh(device_mesh):
            prompts = [[5, 17, 3], [8] * 9]
            completions = generate(cfg, params, prompts, 12, decoding=decoding)
        found.append([(one.tokens, one.log_probs) for one in completions])
    assert found[0] == found[1]


def test_an_array_is_placed_in_pieces_of_bounded_size():
    mesh = jax.make_mesh((2, 2), ("layers", "width"))
    place = jax.NamedSharding(mesh, jax.P("layers", None, None, "width"))
    whole = np.arange(4 * 3 * 5 * 6, dtype=np.float32).reshape(4, 3, 5, 6)
    sizes = []

    def read(block):
        part = whole[np.ix_(*block)]
        sizes.append(part.nbytes)
        return part

    matrix = 5 * 3 * 4  # one device's half of a matrix, in bytes
    array = place_in_pieces(whole.shape, np.float32, place, read, piece_bytes=2 * matrix)
    np.testing.assert_array_equal(array, whole)
    assert array.sharding == place
    assert max(sizes) == 2 * matrix
    assert sum(sizes) == whole.nbytes  # nothing twice


def test_devices_that_hold_the_same_part_get_it_from_one_reading():
    place = jax.NamedSharding(jax.make_mesh((2, 2), ("copies", "rows")), jax.P("rows"))
    whole, reads = np.arange(8.0, dtype=np.float32), []
    array = place_in_pieces((8,), np.float32, place, lambda b: reads.append(b) or whole[b[0]])
    np.testing.assert_array_equal(array, whole)
    assert reads == [(range(0, 4),), (range(4, 8),)]


# ---- what is refused -----------------------------------------------------------------------------


def test_a_layout_that_cuts_a_block_is_refused_by_name(releases):
    said = r"indexer/wq_b .*'q_lora_in' of size 256 over fsdp=4 would cut a block of 128"
    with pytest.raises(ValueError, match=said):
        v4jax.load(releases["official"], dtype="packed", mesh="fsdp=4")


def test_checkpoints_without_low_precision_are_refused(tmp_path):
    v4jax.save_safetensors(CFG, random_params(CFG), tmp_path / "plain", dtype="bfloat16")
    with pytest.raises(ValueError, match="plain, which holds no fp8 or MXFP4; allowed: 'float32'"):
        v4jax.load(tmp_path / "plain", dtype="packed")
    run = tmp_path / "run"
    (run / CHECKPOINTS).mkdir(parents=True)
    (run / "config.json").write_text((tmp_path / "plain" / "config.json").read_text())
    with pytest.raises(ValueError, match="run, a v4jax run, which holds no fp8"):
        v4jax.load(run, dtype="packed")
    with pytest.raises(ValueError, match="got 'int4'; allowed: 'float32', 'bfloat16', 'packed'"):
        v4jax.load(tmp_path / "plain", dtype="int4")


def test_scales_that_make_subnormal_numbers_are_refused():
    packed, scale = np.zeros((1, 32), np.int8), np.array([[1, 100]], np.uint8)
    check_scales(lambda: packed, scale)  # a block of zeros may have any scale
    packed[0, 3] = 0x10
    with pytest.raises(ValueError, match=r"got byte 1 of a block that is not all 0.* 2 to 252"):
        check_scales(lambda: packed, scale)


def test_packed_parameters_are_not_saved(releases, tmp_path):
    cfg, params = v4jax.load(releases["official"], dtype="packed")
    with pytest.raises(ValueError, match="packed .* convert"):
        v4jax.save_safetensors(cfg, params, tmp_path / "again")
    assert not (tmp_path / "again").exists()
