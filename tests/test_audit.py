"""The audit sees every collective: kind, axes, bytes, and how often a loop runs it."""

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.sharding import PartitionSpec as P

from sharding.audit import Collective, _moved, collectives, totals
from sharding.mesh import make_mesh, parse_mesh
from sharding.replica_groups import groups_of


def compiled(f, mesh, spec, shape=(16, 8)):
    run = jax.shard_map(f, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)
    return jax.jit(run).lower(jax.ShapeDtypeStruct(shape, jnp.float32)).compile().as_text()


@pytest.mark.parametrize(
    "f, kind, axes, bytes_",
    [  # a device holds [4, 4] float32 = 64 bytes
        (lambda x: lax.psum(x, "expert"), "all-reduce", ("expert",), 64),
        (lambda x: lax.psum(x, ("data", "tensor")), "all-reduce", ("data", "tensor"), 96),
        (
            lambda x: lax.all_gather(x, "tensor", axis=1, tiled=True)[:, :4],
            "all-gather",
            ("tensor",),
            64,
        ),
        (
            lambda x: jnp.tile(lax.psum_scatter(x, "data", tiled=True), (2, 1)),
            "reduce-scatter",
            ("data",),
            32,
        ),
        (lambda x: lax.all_to_all(x, "expert", 0, 0, tiled=True), "all-to-all", ("expert",), 32),
        (lambda x: lax.ppermute(x, "expert", [(0, 1)]), "collective-permute", ("expert",), 64),
    ],
)
def test_kind_axes_and_bytes(f, kind, axes, bytes_):
    mesh = make_mesh(parse_mesh("data=2,expert=2,tensor=2"))
    (one,) = collectives(compiled(f, mesh, P(("data", "expert"), "tensor")), mesh)
    assert (one.kind, one.axes, one.calls, one.bytes) == (kind, axes, 1, bytes_)


def test_a_loop_counts_as_often_as_it_runs():
    mesh = make_mesh(parse_mesh("expert=8"))

    def f(x):
        def inner(x, _):
            return (lax.ppermute(x, "expert", [(i, (i + 1) % 8) for i in range(8)]) * 2, None)

        def outer(x, _):
            return (lax.scan(inner, jnp.sin(x), length=5)[0], None)

        return lax.scan(outer, x, length=3)[0]

    found = collectives(compiled(f, mesh, P("expert")), mesh)
    assert totals(found) == {("expert", "collective-permute"): (15, 15 * 2 * 8 * 4)}
    assert isinstance(found[0], Collective) and "ppermute" in found[0].source


def test_a_collective_spread_over_fusions_counts_once():
    """XLA:TPU writes so a gather that starts before a loop, runs beside it and ends after it."""
    gather = (
        "f32[8,4]{1,0} all-gather(%param_0), channel_id=1, replica_groups={{0,1,2,3,4,5,6,7}}, "
        "dimensions={0}, "
        'use_global_device_ids=true, frontend_attributes={chain_id="12"}'
    )
    text = f"""HloModule spread
%start (param_0: f32[1,4]) -> (f32[8,4]) {{
  %param_0 = f32[1,4]{{1,0}} parameter(0)
  %all-gather.1 = {gather}
  ROOT %custom-call.1 = (f32[8,4]{{1,0}}) custom-call(%all-gather.1), \
custom_call_target="AsyncCollectiveStart"
}}
%beside (param_0: f32[1,4]) -> f32[8,4] {{
  %param_0 = f32[1,4]{{1,0}} parameter(0)
  ROOT %all-gather.2 = {gather}
}}
%body (param: f32[1,4]) -> f32[1,4] {{
  %param = f32[1,4]{{1,0}} parameter(0)
  %fusion.2 = f32[8,4]{{1,0}} fusion(%param), kind=kOutput, calls=%beside
  ROOT %copy = f32[1,4]{{1,0}} copy(%param)
}}
%done (param_0: f32[1,4]) -> f32[8,4] {{
  %param_0 = f32[1,4]{{1,0}} parameter(0)
  %all-gather.3 = {gather}
  ROOT %custom-call.2 = f32[8,4]{{1,0}} custom-call(%all-gather.3), \
custom_call_target="AsyncCollectiveDone"
}}
ENTRY %main (x: f32[1,4]) -> f32[8,4] {{
  %x = f32[1,4]{{1,0}} parameter(0)
  %fusion.1 = (f32[8,4]{{1,0}}) fusion(%x), kind=kCustom, calls=%start
  %while.1 = f32[1,4]{{1,0}} while(%x), condition=%condition, body=%body, \
backend_config={{"known_trip_count":{{"n":"10"}}}}
  ROOT %fusion.3 = f32[8,4]{{1,0}} fusion(%while.1), kind=kCustom, calls=%done
}}
"""
    (one,) = collectives(text, make_mesh(parse_mesh("fsdp=8")))
    assert (one.kind, one.axes, one.calls, one.bytes) == ("all-gather", ("fsdp",), 1, 112)


def test_a_loop_of_unknown_length_is_refused():
    mesh = make_mesh(parse_mesh("expert=8"))

    def f(x):
        return lax.while_loop(
            lambda x: x.sum() < 100, lambda x: lax.psum(jnp.abs(x) + 1, "expert"), x
        )

    with pytest.raises(ValueError, match="unknown length"):
        collectives(compiled(f, mesh, P("expert")), mesh)


@pytest.mark.parametrize(
    "written, groups",
    [
        ("{{0,2},{1,3}}", [[0, 2], [1, 3]]),
        ("{}", [[0, 1, 2, 3, 4, 5, 6, 7]]),
        ("[4,2]<=[8]", [[0, 1], [2, 3], [4, 5], [6, 7]]),
        ("[2,4]<=[4,2]T(1,0)", [[0, 2, 4, 6], [1, 3, 5, 7]]),
        ("mesh['a'=2,'b'=1,'c'=4] {'a'}", [[0, 4], [1, 5], [2, 6], [3, 7]]),
        (
            "mesh['a'=2,'b'=1,'c'=4], device_ids=([2,2,2]T(1,0,2)) {'a'}",
            [[0, 2], [1, 3], [4, 6], [5, 7]],
        ),
        ("mesh['a'=2,'b'=2,'c'=2] {'a','c'}", [[0, 1, 4, 5], [2, 3, 6, 7]]),
        ("mesh['a'=2,'b'=4] {'b':(1)2}", [[0, 2], [1, 3], [4, 6], [5, 7]]),
        ("mesh['a'=2,'b'=4] {'a','b':(2)2}", [[0, 1, 4, 5], [2, 3, 6, 7]]),
        ("mesh['a'=8,'b'=1] {'a'}", [[0, 1, 2, 3, 4, 5, 6, 7]]),
        ("mesh['a'=8,'b'=1] {'b'}", [[0], [1], [2], [3], [4], [5], [6], [7]]),
    ],
)
def test_groups_in_every_form_that_xla_writes(written, groups):
    line = (
        f"  %x = f32[8]{{0}} all-gather(%y), channel_id=1, replica_groups={written}, "
        f"dimensions={{0}}"
    )
    assert groups_of(line, 8).tolist() == groups


def test_groups_in_another_form_are_refused():
    with pytest.raises(ValueError, match="not known"):
        groups_of("  %x = f32[8]{0} all-gather(%y), replica_groups=<new form>, dimensions={0}", 8)


@pytest.mark.parametrize(
    "type_, kind, moved",
    [
        ("f32[8,4]{1,0}", "all-gather", [("f32", (8, 4))]),
        ("(f32[8]{0}, bf16[2,2]{1,0})", "all-to-all", [("f32", (8,)), ("bf16", (2, 2))]),
        ("(s32[2]{0}, s32[8]{0})", "all-gather-start", [("s32", (8,))]),
        (
            "((bf16[8,16]{1,0}, /*index=1*/f32[4]{0}), (bf16[16,16]{1,0}, f32[8]{0}))",
            "all-gather-start",
            [("bf16", (16, 16)), ("f32", (8,))],
        ),
        ("(f32[8]{0}, f32[3]{0})", "all-reduce-start", [("f32", (8,)), ("f32", (3,))]),
        (
            "(f32[8,2]{1,0:T(8,128)}, f32[8,2]{1,0}, u32[]{:S(2)}, u32[]{:S(2)})",
            "collective-permute-start",
            [("f32", (8, 2))],
        ),
        (
            "((bf16[5,2]{1,0}, bf16[8,2]{1,0}, s64[2]{0}), bf16[8,2]{1,0})",
            "ragged-all-to-all-start",
            [("bf16", (8, 2))],
        ),
    ],
)
def test_what_moves_in_every_form_that_xla_writes(type_, kind, moved):
    assert _moved(type_, f"  %x = {type_} {kind}(%y)") == moved
