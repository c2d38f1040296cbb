"""What a program's cycles add up to."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))
import step_schedule

from pallas_kernels.quantized_matmul.block_sizes import Problem

PROGRAM = """
%body (arg: (s32[], f32[8])) -> (s32[], f32[8]) {
  %w = f32[8] fusion(%a), calls=%f, {"convolution_algorithm_config":{},"estimated_cycles":"5000"}
  %ragged_paged_attention.3 = (s32[8], f32[8]) custom-call(%w), custom_call_target="tpu_custom_call"
  %quantized_matmul.5 = bf16[64,32] custom-call(%n, %w, %m, %s), OPERANDS
}
%condition (arg: (s32[], f32[8])) -> pred[] {
  %n = s32[] constant(4), metadata={}
  %lt = pred[] compare(%i, %n), direction=LT, backend_config={"estimated_cycles":"0"}
}
%costly (arg: f32[8]) -> f32[8] {
  %x = f32[8] fusion(%arg), calls=%f, backend_config={"estimated_cycles":"90000"}
}
%cheap (arg: f32[8]) -> f32[8] {
  %g = f32[8] gather(%arg, %i)
}
ENTRY %main (p: f32[8]) -> f32[8] {
  %p = f32[8] parameter(0)
  %loop = (s32[], f32[8]) while(%t), condition=%condition, body=%body
  %c = f32[8] conditional(%i, %p, %p), branch_computations={%costly, %cheap}
  %y = f32[8] fusion(%p), calls=%f, backend_config={"estimated_cycles":"3000"}
}
"""

OPERANDS = (
    "operand_layout_constraints={s32[1]{0}, bf16[64,128]{1,0}, s8[4,128,32]{2,1,0}, f32[4,1,32]}"
)


def test_loops_count_as_often_as_they_run_and_conditions_as_their_cheapest_branch() -> None:
    computations, entry = step_schedule.read_program(
        PROGRAM.replace("OPERANDS", OPERANDS), {"attention": 700, Problem(64, 128, 32, 8, 16): 300}
    )
    assert step_schedule.cycles(computations, entry) == {
        "products": 4 * (5000 + 300),
        "attention": 4 * 700,
        "other": 3000 + step_schedule.LEAST,
    }
