"""Bundles of a kernel are counted loop by loop, as often as the loops run."""

from v4jax.planner.bundles import kernel_cycles, kernel_loops

CODE = """= control target key start
LB: loop body
= control target key end
     0   :  { %s1_s0 = smov 0 }
   0x1   :  { %s2_s1 = smov 0 }
   0x2 LB: > { %s3_s15 = sphi %s1_s0, %s9_s15 /* iteration index, stage = 0 */ }
   0x3   : > { %v4_v0 = vld [vmem:[%s5_s2]] }
   0x4 LB: >> { %s6_s28 = sphi %s1_s0, %s7_s28  ;;  %10 = vmatmul.bf16.gmra.mxu0 %v4_v0 }
   0x5   : >> { %s7_s28 = sadd.s32 1, %s6_s28  ;;  %11 = vmatmul.bf16.gmra.mxu1 %v4_v0 }
   0x6   : >> { %p1_p9 = scmp.ge.s32.totalorder %s7_s28, 16 /* loop exit test */ }
   0x7   : > { %1450 = sbr.rel (!%p1_p9) target = $region164 }
   0x8   : > { %p2_p8 = scmp.ge.s32.totalorder %s9_s15, 18 /* loop exit test */ }
   0x9   :  { %42 = sbr.rel (!%p2_p8) target = $region175 }
   0xa   :  {}
   0xb   :  { %16 = vsyncpa [#allocation11], 1 } /* exit bundle: %attend.1 = custom-call(%q) */
"""


def test_a_grid_of_16_steps_and_a_loop_of_16_in_each():
    """The grid's loop runs 18 times, twice of them to copy in and out only."""
    found = [(loop.runs, loop.bundles, loop.products) for loop in kernel_loops(CODE)]
    assert found == [(1, 5, 0), (16, 4, 0), (256, 3, 2)]


def test_the_units_of_products_bound_a_loop():
    """Two products share four units: 8 cycles where there are 3 bundles."""
    assert [loop.cycles for loop in kernel_loops(CODE)] == [5, 16 * 4, 256 * 8]


def test_a_loop_whose_length_the_code_does_not_say_counts_once(tmp_path):
    """The loop around it still runs 16 times."""
    file = tmp_path / "1-attend.1-01-final_bundles.txt"
    file.write_text(CODE)
    assert kernel_cycles(tmp_path) == {"attend.1": (5 + 64 + 2048, True)}
    file.write_text(CODE.replace(", 16 /*", ", %s8_s1 /*"))
    assert kernel_cycles(tmp_path) == {"attend.1": (5 + 64 + 16 * 8, False)}
    assert kernel_cycles(tmp_path, unknown_runs=3) == {"attend.1": (5 + 64 + 3 * 16 * 8, False)}
