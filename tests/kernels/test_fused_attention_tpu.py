"""The kernels of fused attention compiled for a TPU that is not there (extra `tpu`)."""

import functools
import importlib.util
import re

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding

from configs import models
from sharding.mesh import parse_mesh
from sharding.rules import layout_for
from sharding.targets import topology_mesh
from v4jax.cache.attention_inputs import AttentionInputs, Entries, IndexInputs
from v4jax.context import Context, SparseMode
from v4jax.kernels.choice import Kernels
from v4jax.kernels.top_k import top_k_mask
from v4jax.model.attend import attend
from v4jax.model.rotary import rotation

pytestmark = [
    pytest.mark.tpu,
    pytest.mark.skipif(
        importlib.util.find_spec("libtpu") is None,
        reason="needs the extra `tpu`: pip install -e '.[tpu]'",
    ),
]
long = functools.partial(pytest.param, marks=pytest.mark.long)
WHOLE = "data=4"
"""A row of its own for each chip."""
CUT = "fsdp=2,context=2,tensor=2"


def compiled(cfg, mesh, batch, seq, ratio, dtype="bfloat16", name=None, packed=False, taught=False):
    """A gradient's program, from the product that makes queries to the one after attention."""
    sizes = parse_mesh(mesh)
    rules = layout_for("full", sizes)
    target = "v5p:2x2x2" if mesh == CUT else "v5p:2x2x1"
    devices = topology_mesh(target, sizes)
    sparse, kernels = SparseMode(train_indexer=taught), Kernels(fused_attention=name)
    ctx = Context(rules=rules, dtype=dtype, kernels=kernels, sparse=sparse)
    heads, dim, slots = cfg.num_attention_heads, cfg.head_dim, seq // ratio if ratio else 0

    def of(shape, names, dtype=dtype):
        place = NamedSharding(devices, rules.spec(names))
        return jax.ShapeDtypeStruct(shape, dtype, sharding=place)

    rows = ("act_batch", "act_seq")
    x = of((batch, seq, 256), (*rows, None))
    wq, wo = (
        of((256, heads * dim), (None, "heads")),
        of((heads * dim // 8, 8, 64), (None, "groups", None)),
    )
    kv, sink = of((batch, seq, dim), (*rows, None)), of((heads,), ("act_heads",), "float32")
    entry = of((batch, slots, dim), ("act_batch", None, None)) if ratio else None
    segment = of((batch, seq), rows, "int32") if packed else None
    index = None
    if ratio == 4:
        index = IndexInputs(
            of((batch, seq, 8, 128), (*rows, "index_heads", None)),
            of((batch, seq, 8), (*rows, "index_heads"), "float32"),
            of((batch, slots, 128), ("act_batch", None, None)),
        )

    def total(arrays, segment_BS, index):
        x_BSD, wq, wo, kv_BSH, sink_N, entry_BCH = arrays
        position_BS = jnp.broadcast_to(jnp.arange(seq)[None], (batch, seq))
        rope = rotation(cfg, position_BS, compressed=ratio > 0)
        last_BC = ratio - 1 + ratio * jnp.arange(slots, dtype=jnp.int32)[None]
        segment_BC = None if segment_BS is None else segment_BS[:, :: ratio or 1]
        entries = Entries(entry_BCH, jnp.broadcast_to(last_BC, (batch, slots)), segment_BC)
        inputs = AttentionInputs(
            (x_BSD @ wq).reshape(batch, seq, heads, dim),
            rope,
            kv_BSH,
            sink_N,
            segment_BS,
            entries if ratio else None,
            index,
        )
        out, loss = attend(ctx, cfg, inputs)
        out = out.reshape(batch, seq, 8, -1)
        found = jnp.sum(jnp.einsum("BSGI,IGO->BSGO", out, wo).astype(jnp.float32) ** 2)
        return found if loss is None else found + loss.kl

    with jax.set_mesh(devices):
        arguments = (x, wq, wo, kv, sink, entry), segment, index
        return jax.jit(jax.value_and_grad(total)).lower(*arguments).compile().as_text()


def kernels_in(text):
    return len(re.findall(r"custom_call_target=\"tpu_custom_call\"", text))


@pytest.mark.parametrize(("ratio", "kernels"), [long(0, 2), long(128, 2), (4, 3)])
def test_a_layer_of_flash_is_two_kernels(ratio, kernels):
    """At S 4096, documents packed; nothing but products and kernels goes over all heads."""
    text = compiled(models.flash(), WHOLE, 4, 4096, ratio, packed=True)
    assert kernels_in(text) == kernels  # CSA's choice is the third
    wide = 4096 * 64 * 512
    for line in text.splitlines():
        found = re.match(r"\s*(?:ROOT )?%\S+ = \w+\[([\d,]+)\]\S* (copy|transpose|convert)\(", line)
        if found:
            size = 1
            for axis in found[1].split(","):
                size *= int(axis)
            assert size < wide, line


def test_long_rows_gather_entries_in_a_kernel():
    """4,096 entries: two kernels for the choice, and each way one for window keys, one for entries.

    No array has a copy of the entries for each query.
    """
    text = compiled(models.flash(), WHOLE, 4, 16_384, 4, packed=True)
    assert kernels_in(text) == 6
    assert not re.search(r"\[(1,)?(16384|128|4096),512,512\]", text)


@pytest.mark.parametrize("model", [long("flash"), "pro"])
def test_as_many_entries_as_hca_has_at_64k(model):
    """The last 4,096 queries of 65,536 would be a shard; here all entries fit beside the heads."""
    cfg = getattr(models, model)()
    text = compiled(cfg, WHOLE, 4, 8192, 16)  # 512 entries
    assert kernels_in(text) == 2


def test_float32_takes_full_precision():
    assert kernels_in(compiled(models.flash(), WHOLE, 4, 512, 128, dtype="float32")) == 2


@pytest.mark.parametrize(("ratio", "kernels"), [long(128, 2), (4, 3)])
def test_devices_that_cut_rows_positions_and_heads(ratio, kernels):
    """The kernel of a device's share, inside shard_map."""
    assert kernels_in(compiled(models.flash(), CUT, 2, 4096, ratio, packed=True)) == kernels


def test_an_indexer_that_trains_takes_two_kernels_more():
    cfg = models.flash().replace(num_attention_heads=8)
    assert kernels_in(compiled(cfg, CUT, 2, 4096, 4, packed=True, taught=True)) == 4


@pytest.mark.parametrize("shape", [long((1, 128, 1024)), (3, 1, 2**16)])
def test_the_choice_of_a_chunk_and_of_decoding(shape):
    devices = topology_mesh("v5p:2x2x1", {"data": 4})
    place = NamedSharding(devices, jax.sharding.PartitionSpec())
    score = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=place)
    with jax.set_mesh(devices):

        def mask(score_BTC):
            local = jax.shard_map(
                lambda score_BTC: top_k_mask(score_BTC, 512),
                in_specs=jax.sharding.PartitionSpec(),
                out_specs=jax.sharding.PartitionSpec(),
            )
            return local(score_BTC)

        assert kernels_in(jax.jit(mask).lower(score).compile().as_text()) == 1


def test_what_is_named_is_what_runs():
    cfg = models.flash().replace(num_attention_heads=8)
    assert kernels_in(compiled(cfg, WHOLE, 4, 512, 128, name="reference")) == 0
    with pytest.raises(ValueError, match="fused_attention: got 'pallas_tpu' for head dim 64"):
        compiled(cfg.replace(head_dim=64), WHOLE, 4, 512, 128, name="pallas_tpu")
    assert kernels_in(compiled(cfg.replace(head_dim=64), WHOLE, 4, 512, 128)) == 0
