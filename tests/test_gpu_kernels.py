"""Counting a GPU program's kernels: loops by their turns, and nothing that is no kernel."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import gpu_kernels

ROOT = Path(__file__).resolve().parents[1]

# As XLA prints a compiled program: three updates, each with an inner loop of five turns.
PROGRAM = """HloModule jit_train_chunk, is_scheduled=true, entry_computation_layout={(f32[8,8]{1,0})->f32[8,8]{1,0}}

%fused_add (param_0: f32[8,8], param_1: f32[8,8]) -> f32[8,8] {
  %param_0 = f32[8,8]{1,0} parameter(0)
  %param_1 = f32[8,8]{1,0} parameter(1)
  ROOT %add.1 = f32[8,8]{1,0} add(%param_0, %param_1)
}

%inner_body (carry.1: (s32[], f32[8,8])) -> (s32[], f32[8,8]) {
  %carry.1 = (s32[], f32[8,8]{1,0}) parameter(0)
  %x.1 = f32[8,8]{1,0} get-tuple-element(%carry.1), index=1
  %gemm_fusion_dot.1 = f32[8,8]{1,0} fusion(%x.1, %x.1), kind=kCustom, calls=%gemm, backend_config={"fusion_backend_config":{"kind":"__triton_nested_gemm_fusion"}}
  %fusion.2 = f32[8,8]{1,0} fusion(%gemm_fusion_dot.1), kind=kCustom, calls=%norm, backend_config={"fusion_backend_config":{"kind":"__triton"}}
  %loop_add_fusion.3 = s32[] fusion(%carry.1), kind=kLoop, calls=%fused_add
  ROOT %tuple.1 = (s32[], f32[8,8]{1,0}) tuple(%loop_add_fusion.3, %fusion.2)
}

%condition (carry.2: (s32[], f32[8,8])) -> pred[] {
  %carry.2 = (s32[], f32[8,8]{1,0}) parameter(0)
  ROOT %wrapped_compare = pred[] fusion(%carry.2), kind=kLoop, calls=%fused_compare
}

%outer_body (carry.3: (s32[], f32[8,8])) -> (s32[], f32[8,8]) {
  %carry.3 = (s32[], f32[8,8]{1,0}) parameter(0)
  %while.1 = (s32[], f32[8,8]{1,0}) while(%carry.3), condition=%condition, body=%inner_body, backend_config={"known_trip_count":{"n":"5"},"known_init_step":{"init":"0","step":"1"}}
  %y = f32[8,8]{1,0} get-tuple-element(%while.1), index=1
  %custom-call.1 = (f32[8,8]{1,0}, s8[64]{0}) custom-call(%y, %y), custom_call_target="__cublas$gemm"
  %z = f32[8,8]{1,0} get-tuple-element(%custom-call.1), index=0
  %input_reduce_fusion = f32[8]{0} fusion(%z), kind=kInput, calls=%sums
  ROOT %tuple.2 = (s32[], f32[8,8]{1,0}) tuple(%carry.3, %z)
}

ENTRY %main (x: f32[8,8]) -> f32[8,8] {
  %x = f32[8,8]{1,0} parameter(0)
  %copy.1 = f32[8,8]{1,0} copy(%x)
  %zero = s32[] constant(0)
  %tuple.3 = (s32[], f32[8,8]{1,0}) tuple(%zero, %copy.1)
  %while.2 = (s32[], f32[8,8]{1,0}) while(%tuple.3), condition=%condition, body=%outer_body, backend_config={"known_trip_count":{"n":"3"}}
  ROOT %out = f32[8,8]{1,0} get-tuple-element(%while.2), index=1
}
"""  # noqa: E501


def test_kernels_are_counted_by_kind_and_turns():
    inside, outside = gpu_kernels.count_kernels(PROGRAM)
    assert inside == {'products': 3 * 5 + 3, 'rows': 3 * 5, 'elementwise': 3 * 5, 'sums': 3}
    assert outside == {'other': 1}


def test_a_loop_of_unknown_length_is_no_guess():
    with pytest.raises(ValueError, match='without a known number of turns'):
        gpu_kernels.count_kernels(PROGRAM.replace('"known_trip_count":{"n":"5"},', ''))


@pytest.mark.skipif(importlib.util.find_spec('jax_plugins') is not None, reason='JAX may have a compiler for GPUs')
def test_without_a_compiler_for_gpus_there_is_one_line():
    command = [sys.executable, '-m', 'benchmarks.gpu_kernels', '--preset=smoke']
    refused = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert refused.returncode == 2 and 'jax[cuda12]' in refused.stderr and 'Traceback' not in refused.stderr
