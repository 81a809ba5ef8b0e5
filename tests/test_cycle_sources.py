"""An operation that XLA made itself counts for the part of the model that it serves."""

import pytest

from sharding.hlo_loops import computations
from v4jax.planner.cycle_sources import REACH, sources_of
from v4jax.planner.timing import part_of

SCOPE = "jit(step)/jvp()/block_0"
TEXT = f"""HloModule step
%made (p: bf16[8,8]) -> bf16[8,8] {{
  %p = bf16[8,8]{{1,0}} parameter(0)
  %inside = bf16[8,8]{{1,0}} negate(%p), metadata={{op_name="{SCOPE}/ffn/experts/neg"}}
  ROOT %result = bf16[8,8]{{0,1}} copy(%inside)
}}
ENTRY %main (x: bf16[8,8]) -> bf16[8,8] {{
  %x = bf16[8,8]{{1,0}} parameter(0), metadata={{op_name="params['attn']"}}
  %copy.1 = bf16[8,8]{{0,1}} copy(%x)
  %bitcast.1 = bf16[64]{{0}} bitcast(%copy.1)
  %pair = (bf16[64]{{0}}, /*index=1*/bf16[64]{{0}}) tuple(%bitcast.1, %bitcast.1)
  %element = bf16[64]{{0}} get-tuple-element(%pair), index=1
  %used = bf16[8,8]{{1,0}} fusion(%element), kind=kLoop, calls=%other, \
metadata={{op_name="{SCOPE}/attention/attn/mul"}}
  %fusion.1 = bf16[8,8]{{0,1}} fusion(%x), kind=kLoop, calls=%made
  %last = bf16[8,8]{{0,1}} copy(%used), backend_config={{"a":"%fusion.1"}}
  %alone = bf16[8,8]{{0,1}} copy(%x), control-predecessors={{%used}}
  ROOT %out = (bf16[8,8]{{0,1}}) tuple(%last)
}}
"""


def entry() -> dict[str, str]:
    bodies = computations(TEXT)
    return sources_of(bodies["ENTRY"], bodies)


@pytest.mark.parametrize(
    ("label", "source"),
    [
        pytest.param("copy.1", f"{SCOPE}/attention/attn/mul", id="what it serves, over bitcasts"),
        pytest.param("fusion.1", f"{SCOPE}/ffn/experts/neg", id="what is inside it"),
        pytest.param("last", f"{SCOPE}/attention/attn/mul", id="what it reads; nothing uses it"),
        pytest.param("alone", "", id="the name of an argument is no source"),
    ],
)
def test_an_instruction_without_a_source_has_that_of_what_it_serves(label, source):
    assert entry()[label] == source


def test_parts_count_what_serves_them():
    assert part_of(entry()["copy.1"]) == ("attention", False)
    assert part_of(entry()["fusion.1"]) == ("routed experts", False)
    assert part_of(entry()["alone"]) == ("other", False)


def test_the_search_ends():
    """A chain of copies longer than REACH names nobody far away; a ring of them ends."""
    names = [f"c{n}" for n in range(REACH + 1)]
    chain = [
        f"  %{name} = f32[8]{{0}} copy(%{before})"
        for before, name in zip(["x", *names], names, strict=False)
    ]
    user = f'  %y = f32[8]{{0}} add(%{names[-1]}), metadata={{op_name="{SCOPE}/attention/add"}}'
    found = sources_of([*chain, user], {})
    assert found["c1"].endswith("/add")
    assert found["c0"] == ""
