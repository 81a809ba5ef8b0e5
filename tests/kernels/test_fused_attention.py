"""The fused kernel has the values and gradients of norm, rotation, attention and rotation back."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from trees import close, small_config

from v4jax.kernels import attention, rotate
from v4jax.kernels.fused_attention import op
from v4jax.kernels.fused_attention.operands import LayerKeys, RawQueries
from v4jax.kernels.norm import rms_norm
from v4jax.kernels.queries import cut, window_keys
from v4jax.model.rotary import rotation

WINDOW, HEADS, DIM, RATIO = 8, 6, 24, 4
CFG = small_config()
CASES = {
    "window": dict(),
    "entries": dict(ratio=RATIO),
    "chosen entries": dict(ratio=RATIO, chosen=True),
    "documents": dict(ratio=RATIO, packed=True),
    "documents, window": dict(packed=True),
    "second shard": dict(ratio=RATIO, start=24),
    "one block": dict(ratio=RATIO, seq=WINDOW, start=16),
    "gathered entries": dict(ratio=RATIO, gathered=True),
    "documents, gathered": dict(ratio=RATIO, packed=True, gathered=True, seq=21),
    "rows that fill no block": dict(ratio=RATIO, seq=21, packed=True),
}


def inputs(dtype, seq=24, start=0, ratio=None, packed=False, chosen=False, gathered=False):
    """(queries, keys) of two rows, of which a shard begins at `start`."""
    rng = np.random.default_rng(seq + start)

    def normal(*shape):
        return jnp.asarray(rng.standard_normal(shape), dtype)

    kv = normal(2, WINDOW + seq, DIM)
    kv = kv if start else kv.at[:, :WINDOW].set(0)
    position = start + jnp.arange(seq, dtype=jnp.int32)[None]
    queries = RawQueries(
        3 * normal(2, seq, HEADS, DIM), rotation(CFG, position, compressed=True), CFG.rms_norm_eps
    )
    sink = jnp.asarray(rng.standard_normal(HEADS), jnp.float32)
    keys = LayerKeys(kv, sink, jnp.array([start], jnp.int32))
    if packed:
        # Documents of several lengths, one of them a single token, and padding.
        cuts = np.array([[3, 4, 13, seq - 2], [0, 9, 10, seq]])
        segment = jnp.asarray([np.searchsorted(c, np.arange(seq), side="right") for c in cuts])
        segment = jnp.where(segment == 4, 0, segment + 1).astype(jnp.int32)
        before = jnp.zeros((2, WINDOW), jnp.int32)
        keys = keys._replace(
            segment_BS=segment, segment_BY=jnp.concatenate((before, segment), axis=1)
        )
    if ratio is None:
        return queries, keys
    count = (start + seq) // ratio
    last = jnp.arange(ratio - 1, start + seq, ratio, dtype=jnp.int32)[:count]
    last = jnp.concatenate((last, jnp.array([start + seq], jnp.int32)))[None]  # an empty slot
    keys = keys._replace(entry_BCH=normal(2, count + 1, DIM), last_BC=last)
    if packed:
        owner = jnp.take_along_axis(keys.segment_BS, jnp.minimum(last, seq - 1), axis=1)
        keys = keys._replace(segment_BC=owner, last_BC=jnp.broadcast_to(last, owner.shape))
    if chosen or gathered:
        pick = jnp.asarray(rng.random((2, seq, count + 1)) < 0.5)
        keys = keys._replace(chosen_BSC=pick & (last[:, None] <= position[..., None]))
    if gathered:
        # A list of 6 in any order, of which some are none.
        slots = np.arange(count + 1)
        slot = np.where(keys.chosen_BSC, slots, -1).astype(np.int32)
        slot = rng.permuted(slot, axis=2)[:, :, :6]
        among = jnp.asarray((slot[..., None] == slots).any(2))
        keys = keys._replace(chosen_BSC=among, slot_BSK=jnp.asarray(slot))
    return queries, keys


def chunk_of(keys, q):
    """(all queries as one chunk, the entries that they attend to or None)."""
    seq = q.shape[1]
    position = keys.start_B[:, None] + jnp.arange(-WINDOW, seq, dtype=jnp.int32)[None]
    chunks = cut(
        q,
        keys.kv_BYH,
        keys.start_B,
        position,
        keys.segment_BS,
        keys.segment_BY,
        None,
        WINDOW,
        -(-seq // WINDOW),
        1,
    )
    chunk = jax.tree.map(lambda x: x[0], chunks)
    if keys.entry_BCH is None:
        return chunk, None
    if keys.chosen_BSC is not None:
        more = ((0, 0), (0, chunk.q_BTNH.shape[1] - seq), (0, 0))
        return chunk, attention.EntryKeys(keys.entry_BCH, jnp.pad(keys.chosen_BSC, more))
    seen = keys.last_BC[:, None] <= chunk.position_BT[..., None]
    if keys.segment_BC is not None:
        seen &= keys.segment_BC[:, None] == chunk.segment_BT[..., None]
    return chunk, attention.EntryKeys(keys.entry_BCH, seen)


def composed(queries, keys):
    """The output by `reference`, of the reference of each op."""

    def attended(q):
        chunk, entries = chunk_of(keys, q)
        window = window_keys(chunk, WINDOW)
        out, _ = attention.reference(chunk.q_BTNH, window, entries, keys.sink_N)
        return out[:, : q.shape[1]].astype(q.dtype), None

    return op.reference(queries, attended, "reference")[0]


def gradients(function, queries, keys):
    """(output, gradients of queries, window keys, entries and sinks)."""

    def run(q, kv, entry, sink):
        raw, seen = queries._replace(q_BSNH=q), keys._replace(kv_BYH=kv, entry_BCH=entry)
        return function(raw, seen._replace(sink_N=sink))

    out, pull = jax.vjp(run, queries.q_BSNH, keys.kv_BYH, keys.entry_BCH, keys.sink_N)
    ct = jnp.cos(jnp.arange(out.size, dtype=jnp.float32)).reshape(out.shape)
    return out, pull(ct.astype(out.dtype))


def fused(queries, keys):
    return op.pallas_tpu(queries, keys, WINDOW)[0]


@pytest.mark.parametrize("case", CASES)
def test_the_kernel_has_values_and_gradients_of_the_reference(case):
    queries, keys = inputs(jnp.float32, **CASES[case])
    # Sums over keys, heads and queries, in another order.
    close(gradients(fused, queries, keys), gradients(composed, queries, keys), 1e-5)


@pytest.mark.parametrize("case", ["chosen entries", "gathered entries"])
def test_queries_of_zeros_have_the_gradient_of_the_reference(case):
    """One head of some tokens, at an eps whose derivative rsqrt(eps) would hide all others."""
    queries, keys = inputs(jnp.float32, **CASES[case])
    q = queries.q_BSNH.at[:, 3:11, 1].set(0)
    queries = queries._replace(q_BSNH=q, eps=1e-20)
    got, want = (gradients(function, queries, keys) for function in (fused, composed))
    assert 0 < jnp.abs(want[1][0][:, 3:11, 1]).max() < 100
    close(got, want, 1e-5)  # sums in another order


def test_blocks_of_an_odd_number_of_queries_gather_for_the_last_one_too(monkeypatch):
    monkeypatch.setitem(globals(), "WINDOW", 7)
    queries, keys = inputs(jnp.float32, seq=14, ratio=RATIO, gathered=True)
    close(fused(queries, keys), composed(queries, keys), 1e-5)  # sums in another order


@pytest.mark.parametrize("case", ["entries", "chosen entries", "rows that fill no block"])
def test_the_mass_is_what_all_heads_give_to_an_entry(case):
    queries, keys = inputs(jnp.float32, **CASES[case])
    mass = op.pallas_tpu(queries, keys, WINDOW, with_mass=True)[1]
    rope = queries.rope.heads()
    q = rotate.reference(rms_norm(queries.q_BSNH, queries.eps), rope, False)
    chunk, entries = chunk_of(keys, q)
    _, lse = attention.reference(chunk.q_BTNH, window_keys(chunk, WINDOW), entries, keys.sink_N)
    want = attention.entry_mass(chunk.q_BTNH, entries, lse)[:, : mass.shape[1]]
    close(mass, want, 1e-5)  # sums over heads and head dims, in another order


def test_bfloat16_keeps_as_much_as_the_reference():
    """Each differs from float32 by rounding queries, shares and outputs to 8 bits.

    The kernel rounds queries once, after rotation and scaling; the reference after each step.
    """
    narrow = inputs(jnp.bfloat16, **CASES["documents"])
    wide = jax.tree.map(
        lambda x: x.astype(jnp.float32) if jnp.result_type(x) == jnp.bfloat16 else x, narrow
    )
    exact = gradients(composed, *wide)
    for got, by_reference, want in zip(
        *(
            jax.tree.leaves(found)
            for found in (gradients(fused, *narrow), gradients(composed, *narrow), exact)
        ),
        strict=True,
    ):
        fault, allowed = (
            np.linalg.norm(np.asarray(x, np.float32) - want) for x in (got, by_reference)
        )
        assert fault <= 1.1 * allowed + 1e-6


def test_the_fault_of_a_shape_is_named_on_tpu(monkeypatch):
    monkeypatch.setattr(op, "on_tpu", lambda: True)
    queries, keys = inputs(jnp.float32, **CASES["entries"])
    fault = op.unfit(queries, keys, WINDOW)
    assert fault.startswith("head dim 24, window 8 and 8 rope dims; on TPU")
    with pytest.raises(ValueError, match="kernels: fused_attention: got 'pallas_tpu' for head dim"):
        op.implementation_of("pallas_tpu", fault)
    assert op.implementation_of(None, fault) == "reference"
    assert op.implementation_of(None, "") == "pallas_tpu"
    large = jax.ShapeDtypeStruct((1, 2**15, 512), jnp.bfloat16)
    raw = queries._replace(q_BSNH=jax.ShapeDtypeStruct((1, 4096, 64, 512), jnp.bfloat16))
    fault = op.unfit(raw, keys._replace(entry_BCH=large), 128)
    assert fault.startswith("32768 entries of 512: a step needs")
