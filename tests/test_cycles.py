"""The reader of XLA's estimates counts loops, the dearest branch, and what has no estimate."""

import pytest

from sharding.hlo_loops import computations, trips
from sharding.mesh import parse_mesh
from v4jax.planner.cycles import read_times
from v4jax.planner.hardware import hardware_of
from v4jax.planner.timing import check_estimate, part_of, timing_of

V5P = hardware_of("v5p")
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
  %kernel = (bf16[8,8]{1,0}, s32[4]{0}) custom-call(%x, %i), custom_call_target="tpu_custom_call", \
metadata={op_name="jit(step)/jvp()/ffn/experts/ragged_dot"}, backend_config={"custom_call_config": \
{"cost_estimate":{"flops":"918000000","transcendentals":"0","bytes_accessed":"2765"}}}
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
    reading = read_times(TEXT, clock=1.0)
    inner = 4 * 5 + 1 * 5  # the loop of unknown length counts once
    counted = {(op.family, op.calls, op.seconds) for op in reading.ops if op.seconds is not None}
    assert counted == {("fusion", 20, 100), ("fusion", 5, 100), ("copy", 1, 11), ("y", 1, 13)}
    assert reading.seconds == inner * 100 + 11 + 13
    assert reading.loops == ("jit(step)/while",)


def test_what_has_no_estimate_is_listed_with_its_bytes():
    """A copy writes 8 x 8 numbers; a kernel states its bytes; exchanges are listed elsewhere."""
    blind = [op for op in read_times(TEXT, clock=1.0).ops if op.seconds is None]
    assert {(op.kind, op.bytes) for op in blind} == {
        ("gather", 256),
        ("tpu_custom_call", 2765),
        ("copy-start", 128),
    }
    assert sum(op.calls for op in blind if op.kind == "gather") == 25


def test_a_kernel_that_states_nothing_reads_its_operands():
    """8 x 8 numbers and 16 indices in, 8 x 8 numbers and 4 indices out."""
    text = TEXT.replace('"cost_estimate"', '"none"')
    (kernel,) = (op for op in read_times(text, 1.0).ops if op.kind == "tpu_custom_call")
    assert (kernel.bytes, kernel.flops) == (128 + 64 + 128 + 16, 0)


def test_a_part_has_a_forward_and_a_backward_pass():
    """Cycles at v5p's 1.75 GHz; a kernel of 918 MFLOP takes 2 us of 459 TFLOP/s at least."""
    timing = timing_of(TEXT, {("fsdp", "all-gather"): (3, 6 * 10**9)}, V5P, parse_mesh("fsdp=4"))
    assert timing.parts["attention"] == (0.0, 25 * 100 / 1.75e9)
    assert timing.parts["other"] == (pytest.approx(24 / 1.75e9), 0.0)
    (kernel,) = (row for row in timing.unknown if row[1] == "tpu_custom_call")
    assert kernel == ("routed experts", "tpu_custom_call", 1, 2765, pytest.approx(2e-6))
    (exchange,) = timing.exchanges
    assert exchange[:4] == ("fsdp", "all-gather", 3, 6 * 10**9) and exchange[4] > 0.01
    assert timing.step_seconds > exchange[4] / 2
    rows = timing.rows({"attention": 0.5, "head": 0.25})
    assert all(len(row) == 4 for row in rows)
    assert ("head", "0.0 ms", "0.0 ms", "250.0 ms") in rows


@pytest.mark.parametrize(
    "source, part, backward",
    [
        ("jit(f)/jvp(T)/embed/gather", "embedding", False),
        ("jit(f)/transpose(jvp(T))/while/body/checkpoint/block_0/attention/mul", "mHC", True),
        ("jit(f)/jvp(T)/block_1/attention/hc_attn/dot_general", "mHC", False),
        ("jit(f)/jvp(T)/block_1/attention/attn/attn.rotate/mul", "attention", False),
        ("jit(f)/jvp(T)/block_1/attention/attn/scores/while/body/exp", "attention scores", False),
        ("jit(f)/jvp(T)/block_1/attention/attn/scores/choice/select", "indexers", False),
        ("jit(f)/jvp(T)/block_1/attention/attn/indexer/compressor/mul", "indexers", False),
        ("jit(f)/jvp(T)/block_1/attention/attn/q_norm/mul", "norms", False),
        ("jit(f)/jvp(T)/block_1/experts/ffn/shared_experts/dot", "shared experts", False),
        ("jit(f)/jvp(T)/block_1/experts/ffn/experts/gather", "routed experts", False),
        ("jit(f)/jvp(T)/block_1/experts/ffn/top_k", "gates", False),
        ("jit(f)/transpose(jvp(loss))/dot_general", "head", True),
        ("jit(f)/optimizer/transpose(x)/dot_general", "optimizer", False),
        ("jit(f)/convert_element_type", "other", False),
    ],
)
def test_scopes_tell_the_part(source, part, backward):
    assert part_of(source) == (part, backward)


def test_of_the_cost_models_for_gpus_one_counts():
    """A product counts as the best case, another fusion by the model that indexes its tiles."""
    costs = (
        '"reification_cost":[{"exec_time_us":9.5,"memory_access_time_us":0,"name":""},'
        '{"exec_time_us":7.0,"memory_access_time_us":0,"name":"indexing-cost-model"},'
        '{"exec_time_us":2.5,"memory_access_time_us":0,"name":"sol"}]'
    )
    text = f"""HloModule gpu
%fused (p: bf16[8]) -> bf16[8] {{
  ROOT %p = bf16[8]{{0}} parameter(0)
}}
ENTRY %main (x: bf16[8]) -> bf16[8] {{
  %x = bf16[8]{{0}} parameter(0)
  %a = bf16[8]{{0}} fusion(%x), calls=%fused, backend_config={{"kind":"__triton_gemm",{costs}}}
  %b = bf16[8]{{0}} fusion(%x), calls=%fused, backend_config={{"kind":"__triton",{costs}}}
  ROOT %c = bf16[8]{{0}} fusion(%a), calls=%fused, backend_config={{"reification_cost":[]}}
}}
"""
    found = [op.seconds for op in read_times(text, clock=0.0).ops]
    assert found == [pytest.approx(2.5e-6), pytest.approx(7e-6), None]


@pytest.mark.parametrize(
    "estimate, target, lower_only, effort, words",
    [
        ("guess", "cpu", False, None, "must be one of model, compiler"),
        ("compiler", "cpu", False, None, "XLA gives none for 'cpu'"),
        ("compiler", "b200:8", False, None, "XLA gives none for 'b200:8'"),
        ("compiler", "v5p:2x2x1", True, None, "leave out --lower-only"),
        ("compiler", "v5p:2x2x1", False, "quick", "picks other tiles"),
    ],
)
def test_an_estimate_that_cannot_be_had_is_refused(estimate, target, lower_only, effort, words):
    with pytest.raises(ValueError, match=words):
        check_estimate(estimate, target, lower_only, effort)


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
