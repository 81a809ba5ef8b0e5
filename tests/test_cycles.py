"""The reader of XLA's estimates counts loops, the dearest branch, and what has no estimate."""

import pytest

from sharding.hlo_loops import computations, trips
from v4jax.planner.cycles import read_cycles

TEXT = """HloModule step
%product (p: bf16[8,8]) -> bf16[8,8] {
  %p = bf16[8,8]{1,0} parameter(0)
  ROOT %dot = bf16[8,8]{1,0} dot(%p, %p), backend_config={"window_config":{"estimated_cycles":"9"}}
}
%inner_condition (s: (s32[], s32[])) -> pred[] {
  %s = (s32[], s32[]) parameter(0)
  %counter = s32[] get-tuple-element(%s), index=0
  %limit = s32[] get-tuple-element(%s), index=1
  ROOT %less = pred[] compare(%counter, %limit), direction=LT
}
%inner_body (s: (s32[], s32[])) -> (s32[], s32[]) {
  %s = (s32[], s32[]) parameter(0)
  %counter = s32[] get-tuple-element(%s), index=0
  %limit = s32[] get-tuple-element(%s), index=1
  %two = s32[] constant(2)
  %next = s32[] add(%counter, %two)
  %fusion.1 = bf16[8,8]{1,0} fusion(%x), kind=kOutput, calls=%product, \
metadata={op_name="jit(step)/transpose(jvp())/block_0/attention/attn/dot_general"}, \
backend_config={"window_config":{"kernel_window_bounds":[],"estimated_cycles":"100"}, \
"bundle_analysis_data":{"estimated_cycles":"7"}}
  %rows = bf16[16,8]{1,0} gather(%x, %i), metadata={op_name="jit(step)/jvp()/experts/gather"}
  ROOT %after = (s32[], s32[]) tuple(%next, %limit)
}
%both (a: s32[], b: s32[]) -> pred[] {
  %a = s32[] parameter(0)
  %b = s32[] parameter(1)
  ROOT %compare = pred[] compare(%b, %a), direction=GE
}
%outer_condition (s: (s32[])) -> pred[] {
  %s = (s32[]) parameter(0)
  %counter = s32[] get-tuple-element(%s), index=0
  %zero = s32[] constant(0)
  ROOT %fusion.2 = pred[] fusion(%zero, %counter), kind=kLoop, calls=%both
}
%outer_body (s: (s32[])) -> (s32[]) {
  %s = (s32[]) parameter(0)
  %counter = s32[] get-tuple-element(%s), index=0
  %one = s32[] constant(1)
  %next = s32[] subtract(%counter, %one)
  %start = s32[] constant(1)
  %end = s32[] constant(10)
  %end.1 = s32[] copy(%end)
  %state = (s32[], s32[]) tuple(%start, /*index=1*/%end.1)
  %while.2 = (s32[], s32[]) while(%state), condition=%inner_condition, body=%inner_body
  ROOT %after = (s32[]) tuple(%next)
}
%cheap (x: bf16[8,8]) -> bf16[8,8] {
  ROOT %x = bf16[8,8]{1,0} parameter(0)
}
%dear (x: bf16[8,8]) -> bf16[8,8] {
  %x = bf16[8,8]{1,0} parameter(0)
  ROOT %copy = bf16[8,8]{0,1} copy(%x), backend_config={"window_config":{"estimated_cycles":"11"}}
}
%endless (s: (s32[])) -> pred[] {
  ROOT %go = pred[] custom-call(), custom_call_target="AllocateBuffer"
}
ENTRY %main (x: bf16[8,8], i: s32[16]) -> bf16[8,8] {
  %x = bf16[8,8]{1,0} parameter(0)
  %i = s32[16]{0} parameter(1)
  %three = s32[] constant(3)
  %outer = (s32[]) tuple(%three)
  %while.1 = (s32[]) while(%outer), condition=%outer_condition, body=%outer_body
  %cond = bf16[8,8]{1,0} conditional(%p, %x, %x), branch_computations={%cheap, %dear}
  %kernel = (bf16[8,8]{1,0}, s32[4]{0}) custom-call(%x, %i), custom_call_target="tpu_custom_call"
  %copy-start = (bf16[8,8]{1,0:S(1)}, bf16[8,8]{1,0}, u32[]) copy-start(%x)
  %copy-done = bf16[8,8]{1,0:S(1)} copy-done(%copy-start)
  %all-reduce = bf16[8,8]{1,0} all-reduce(%x), replica_groups={{0,1}}, to_apply=%add
  %while.3 = (s32[]) while(%outer), condition=%endless, body=%outer_body, \
metadata={op_name="jit(step)/while"}
  ROOT %y = bf16[8,8]{1,0} copy(%x), backend_config={"window_config":{"estimated_cycles":"13"}}
}
"""


def test_loops_are_multiplied_and_the_dearest_branch_counts():
    """The outer loop runs 4 times (3 to 0), the inner one 5 times (1, 3, 5, 7, 9)."""
    reading = read_cycles(TEXT)
    inner = 4 * 5 + 1 * 5  # the loop of unknown length counts once
    counted = {(op.name, op.calls, op.cycles) for op in reading.ops if op.cycles is not None}
    assert counted == {("fusion", 20, 100), ("fusion", 5, 100), ("copy", 1, 11), ("y", 1, 13)}
    assert reading.cycles == inner * 100 + 11 + 13
    assert reading.loops == ("jit(step)/while",)


def test_what_has_no_estimate_is_listed_with_its_bytes():
    """A copy writes 8 x 8 numbers; a kernel also reads them and 16 indices; exchanges are apart."""
    blind = [op for op in read_cycles(TEXT).ops if op.cycles is None]
    assert {(op.kind, op.bytes) for op in blind} == {
        ("gather", 256),
        ("tpu_custom_call", 128 + 16 + 128 + 64),
        ("copy-start", 128),
    }
    assert sum(op.calls for op in blind if op.kind == "gather") == 25


@pytest.mark.parametrize(
    "start, limit, direction, change, runs",
    [
        (0, 32, "LT", "add(%counter, %by)", 32),
        (2, 10, "LE", "add(%counter, %by)", 9),
        (7, 0, "GT", "subtract(%counter, %by)", 7),
        (7, 0, "GE", "add(%counter, %by)", 8),
        (5, 5, "LT", "add(%counter, %by)", 0),
    ],
)
def test_the_length_of_a_loop_follows_from_its_condition(start, limit, direction, change, runs):
    step = -1 if start > limit else 1
    text = f"""
%condition (s: (s32[])) -> pred[] {{
  %s = (s32[]) parameter(0)
  %counter = s32[] get-tuple-element(%s), index=0
  %limit = s32[] constant({limit})
  ROOT %compare = pred[] compare(%counter, %limit), direction={direction}
}}
%body (s: (s32[])) -> (s32[]) {{
  %s = (s32[]) parameter(0)
  %counter = s32[] get-tuple-element(%s), index=0
  %by = s32[] constant({1 if "subtract" in change else step})
  %next = s32[] {change}
  ROOT %after = (s32[]) tuple(%next)
}}
ENTRY %main () -> (s32[]) {{
  %start = s32[] constant({start})
  %state = (s32[]) tuple(%start)
  ROOT %while = (s32[]) while(%state), condition=%condition, body=%body
}}
"""
    bodies = computations(text)
    assert trips(bodies["ENTRY"][-2], bodies, bodies["ENTRY"]) == runs
