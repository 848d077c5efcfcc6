"""What is read from the text of a compiled program: kernels, products, bytes, collectives, transfers."""
# ruff: noqa: E501  (lines of a program)

from __future__ import annotations

import pytest

from roofline.datasheets import datasheet
from roofline.executable import host_transfers, large_arrays, operators
from roofline.hlo import compiled_collectives, parse_module
from roofline.operators.model import operator_model
from roofline.rehearse.timing import collective_s, operator_s, time_program

PROGRAM = """\
HloModule jit_step, is_scheduled=true, input_output_alias={ {0}: (1, {}, may-alias) }, entry_computation_layout={(f32[8,16]{1,0}, f32[4,8]{1,0})->f32[4,8]{1,0}}

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%sliced (p0: f32[3,64,32], p1: s32[]) -> f32[64,32] {
  %p0 = f32[3,64,32]{2,1,0} parameter(0)
  %p1 = s32[] parameter(1)
  %zero = s32[] constant(0)
  %slice = f32[1,64,32]{2,1,0} dynamic-slice(%p0, %p1, %zero, %zero), dynamic_slice_sizes={1,64,32}
  ROOT %flat = f32[64,32]{1,0} bitcast(%slice)
}

%gemm (l: bf16[16,64], r: bf16[64,32]) -> bf16[16,32] {
  %l = bf16[16,64]{1,0} parameter(0)
  %r = bf16[64,32]{1,0} parameter(1)
  ROOT %dot.1 = bf16[16,32]{1,0} dot(%l, %r), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

%written (q0: f32[8,1024], q1: s32[8,1], q2: f32[8,1]) -> f32[8,1024] {
  %q0 = f32[8,1024]{1,0} parameter(0)
  %q1 = s32[8,1]{1,0} parameter(1)
  %q2 = f32[8,1]{1,0} parameter(2)
  ROOT %scatter = f32[8,1024]{1,0} scatter(%q0, %q1, %q2), update_window_dims={1}, inserted_window_dims={}, to_apply=%add
}

%body (s: (s32[], bf16[16,64], bf16[64,32], f32[3,64,32], f32[1024])) -> (s32[], bf16[16,64], bf16[64,32], f32[3,64,32], f32[1024]) {
  %s = (s32[], bf16[16,64]{1,0}, bf16[64,32]{1,0}, f32[3,64,32]{2,1,0}, f32[1024]{0}) parameter(0)
  %i = s32[] get-tuple-element(%s), index=0
  %x = bf16[16,64]{1,0} get-tuple-element(%s), index=1
  %w = bf16[64,32]{1,0} get-tuple-element(%s), index=2
  %stack = f32[3,64,32]{2,1,0} get-tuple-element(%s), index=3
  %part = f32[1024]{0} get-tuple-element(%s), index=4
  %gather = (f32[1024]{0}, f32[4096]{0}) all-gather-start(%part), channel_id=1, replica_groups=[2,4]<=[8], dimensions={0}, use_global_device_ids=true, backend_config={"collective_backend_config":{"is_sync":false}}
  %product = bf16[16,32]{1,0} fusion(%x, %w), kind=kCustom, calls=%gemm, metadata={op_name="jit(step)/while/body/mlp/dot_general"}
  %layer = f32[64,32]{1,0} fusion(%stack, %i), kind=kLoop, calls=%sliced
  %gathered = f32[4096]{0} all-gather-done(%gather)
  %waits = (f32[4096]{0}, f32[1024]{0}) reduce-scatter-start(%gathered), replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%add, backend_config={"collective_backend_config":{"is_sync":true}}
  %scattered = f32[1024]{0} reduce-scatter-done(%waits)
  ROOT %next = (s32[], bf16[16,64]{1,0}, bf16[64,32]{1,0}, f32[3,64,32]{2,1,0}, f32[1024]{0}) tuple(%i, %x, %w, %stack, %scattered)
}

%condition (c: (s32[], bf16[16,64], bf16[64,32], f32[3,64,32], f32[1024])) -> pred[] {
  %c = (s32[], bf16[16,64]{1,0}, bf16[64,32]{1,0}, f32[3,64,32]{2,1,0}, f32[1024]{0}) parameter(0)
  %at = s32[] get-tuple-element(%c), index=0
  %end = s32[] constant(3)
  ROOT %less = pred[] compare(%at, %end), direction=LT
}

ENTRY %main (a0: f32[8,16], a1: f32[4,8]) -> f32[4,8] {
  %a0 = f32[8,16]{1,0} parameter(0)
  %a1 = f32[4,8]{1,0} parameter(1)
  %start = (s32[], bf16[16,64]{1,0}, bf16[64,32]{1,0}, f32[3,64,32]{2,1,0}, f32[1024]{0}) custom-call(%a0), custom_call_target="make"
  %loop = (s32[], bf16[16,64]{1,0}, bf16[64,32]{1,0}, f32[3,64,32]{2,1,0}, f32[1024]{0}) while(%start), condition=%condition, body=%body TRIPS
  %called = f32[4,8]{1,0} custom-call(%a1), custom_call_target="xla_ffi_python_gpu_callback"
  %library = (f32[4,16]{1,0}, s8[64]{0}) custom-call(%called, %a0), custom_call_target="__cublas$gemm", backend_config={"gemm_backend_config":{"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"],"rhs_contracting_dimensions":["0"],"lhs_batch_dimensions":[],"rhs_batch_dimensions":[]}}}
  %cache = f32[8,1024]{1,0} custom-call(%a0), custom_call_target="make"
  %at = s32[8,1]{1,0} custom-call(%a0), custom_call_target="make"
  %new = f32[8,1]{1,0} custom-call(%a0), custom_call_target="make"
  %write = f32[8,1024]{1,0} fusion(%cache, %at, %new), kind=kInput, calls=%written
  ROOT %out = f32[4,8]{1,0} copy(%a1)
}
"""
KNOWN = PROGRAM.replace(" TRIPS", ', backend_config={"known_trip_count":{"n":"3"}}')
UNKNOWN = PROGRAM.replace(" TRIPS", "")


def test_kernels_are_counted_as_often_as_their_loop_runs() -> None:
    times = {one.name: one.times for one in operators(parse_module(KNOWN))}
    assert times["product"] == times["layer"] == 3
    assert times["out"] == times["library"] == 1
    assert "slice" not in times  # inside a kernel


def test_products_are_found_in_fusions_and_library_calls() -> None:
    found = {one.name: one for one in operators(parse_module(KNOWN))}
    (inside,), (library,) = found["product"].products, found["library"].products
    assert (inside.m, inside.n, inside.k, inside.batch, inside.dtype) == (16, 32, 64, 1, "bfloat16")
    assert (library.m, library.n, library.k, library.dtype) == (4, 16, 8, "float32")
    assert found["product"].flops == 2 * 16 * 32 * 64
    assert found["product"].scope.endswith("mlp/dot_general")


def test_a_fusion_reads_only_the_slice_that_it_takes() -> None:
    found = {one.name: one for one in operators(parse_module(KNOWN))}
    assert (
        found["layer"].moved_bytes == 4 + 2 * 4 * 64 * 32
    )  # the index, one slice read and written
    assert found["product"].moved_bytes == 2 * (16 * 64 + 64 * 32 + 16 * 32)


def test_a_fusion_that_writes_into_an_array_moves_only_what_it_writes() -> None:
    found = {one.name: one for one in operators(parse_module(KNOWN))}
    assert found["write"].moved_bytes == 3 * 4 * 8  # where, what, and the same written


def test_a_collective_is_asynchronous_only_where_the_compiler_lets_work_run_beside_it() -> None:
    gather, scatter = compiled_collectives(KNOWN)
    assert (gather.kind, gather.times, gather.array_bytes, gather.group) == (
        "all-gather", 3, 4 * 4096, (0, 1, 2, 3),
    )  # fmt: skip
    assert (gather.is_async, gather.hidden_by) == (True, 2)
    assert (scatter.kind, scatter.is_async) == ("reduce-scatter", False)
    assert (scatter.array_bytes, scatter.whole_bytes) == (4 * 1024, 4 * 4096)


def test_a_loop_without_known_length_is_counted_as_told_or_refused() -> None:
    assert {c.times for c in compiled_collectives(UNKNOWN, unknown_trips=7)} == {7}
    with pytest.raises(ValueError, match="unknown length"):
        compiled_collectives(UNKNOWN)


def test_calls_into_python_are_transfers_to_the_host() -> None:
    assert host_transfers(parse_module(KNOWN)) == ("called",)


def test_large_arrays_are_those_in_memory_not_those_inside_a_kernel() -> None:
    module = parse_module(KNOWN)
    assert {name for name, _ in large_arrays(module, dtype="f32", size=64 * 32)} == {
        "start", "layer", "gather", "gathered", "waits", "cache", "write",
    }  # fmt: skip
    assert not large_arrays(module, dtype="f32", size=64 * 32, dim=33)


def test_taken_over_memory_is_read_from_the_header() -> None:
    assert parse_module(KNOWN).aliased_parameters == {1}


def test_seconds_add_up_and_kernels_hide_what_is_asynchronous() -> None:
    hardware = datasheet("h200")
    module, model = parse_module(KNOWN), operator_model(hardware)
    kernels, collectives = operators(module), compiled_collectives(KNOWN)
    timing = time_program(module, kernels, collectives, hardware)
    gather, scatter = (collective_s(one, model) for one in collectives)
    beside = sum(operator_s(k, model) for k in kernels if k.name in ("product", "layer"))
    assert timing.hidden_s == pytest.approx(3 * min(gather, beside))
    assert timing.exposed_s == pytest.approx(3 * (gather + scatter) - timing.hidden_s)
    alone = sum(k.times * operator_s(k, model) for k in kernels)
    assert timing.seconds == pytest.approx(alone + timing.exposed_s + hardware.dispatch_s)


def test_what_is_no_program_is_refused() -> None:
    with pytest.raises(ValueError, match="no ENTRY"):
        parse_module("not a program")
