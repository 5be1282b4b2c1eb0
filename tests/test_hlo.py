"""The reader of compiled programs, on a program small enough to count by hand."""

import json

import pytest

from altgrad_jax.bench.cards import CARDS, Assumptions, card
from altgrad_jax.bench.gpu_report import Compiled, as_dict, as_json, lines, report_of
from altgrad_jax.bench.hlo import Array, arrays_of, executed, loop_body, parse
from altgrad_jax.bench.kernels import _groups, modelled_seconds, products_of, rounding_instructions, step_of
from altgrad_jax.errors import UserError

TEXT = """HloModule jit_run, is_scheduled=true

FileNames
1 "/somewhere/altgrad_jax/step/update.py"
2 "/site-packages/optax/update.py"
3 "/somewhere/altgrad_jax/step/program.py"

FunctionNames
1 "train_step"
2 "apply"
3 "run.<locals>.body"

FileLocations
1 {file_name_id=1 function_name_id=1 line=7 end_line=7 column=1 end_column=2}
2 {file_name_id=2 function_name_id=2 line=8 end_line=8 column=1 end_column=2}
3 {file_name_id=3 function_name_id=3 line=9 end_line=9 column=1 end_column=2}

StackFrames
1 {file_location_id=3 parent_frame_id=1}
2 {file_location_id=1 parent_frame_id=1}
3 {file_location_id=2 parent_frame_id=2}
4 {file_location_id=2 parent_frame_id=4}

%rounds (p.0: f32[1000], p.1: s32[]) -> f32[10] {
  %p.0 = f32[1000]{0} parameter(0)
  %p.1 = s32[] parameter(1)
  %slice = f32[10]{0} dynamic-slice(%p.0, %p.1), dynamic_slice_sizes={10}
  ROOT %round = f32[10]{0} round-nearest-even(%slice)
}

%sums (q.0: f32[64,32]) -> f32[64] {
  %q.0 = f32[64,32]{1,0} parameter(0)
  %zero = f32[] constant(0)
  ROOT %sum = f32[64]{0} reduce(%q.0, %zero), dimensions={1}, to_apply=%add, metadata={stack_frame_id=3}
}

%writes (r.0: f32[100,10], r.1: f32[1,10], r.2: s32[]) -> f32[100,10] {
  %r.0 = f32[100,10]{1,0} parameter(0)
  %r.1 = f32[1,10]{1,0} parameter(1)
  %r.2 = s32[] parameter(2)
  ROOT %dus = f32[100,10]{1,0} dynamic-update-slice(%r.0, %r.1, %r.2, %r.2)
}

%inner_body (t: (s32[], f32[10])) -> (s32[], f32[10]) {
  %t = (s32[], f32[10]{0}) parameter(0)
  %t.1 = f32[10]{0} get-tuple-element(%t), index=1
  %again = f32[10]{0} copy(%t.1)
  ROOT %t.2 = (s32[], f32[10]{0}) tuple(%t.1, %again)
}

%inner_condition (u: (s32[], f32[10])) -> pred[] {
  %u = (s32[], f32[10]{0}) parameter(0)
  ROOT %u.1 = pred[] constant(true)
}

%body (s: (s32[], f32[1000], bf16[64,32], bf16[32,16], f32[64,32], f32[100,10], f32[1,10])) -> (s32[]) {
  %s = (s32[], f32[1000]{0}, bf16[64,32]{1,0}, /*index=3*/bf16[32,16]{1,0}, f32[64,32]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%s), index=0
  %x = f32[1000]{0} get-tuple-element(%s), index=1
  %a = bf16[64,32]{1,0} get-tuple-element(%s), index=2
  %b = bf16[32,16]{1,0} get-tuple-element(%s), index=3
  %c = f32[64,32]{1,0} get-tuple-element(%s), index=4
  %d = f32[100,10]{1,0} get-tuple-element(%s), index=5
  %e = f32[1,10]{1,0} get-tuple-element(%s), index=6
  %rounded = f32[10]{0} fusion(%x, %i), kind=kLoop, calls=%rounds, metadata={op_name="x" stack_frame_id=2}
  %reduce-start = f32[64,32]{1,0} all-reduce-start(%c), channel_id=1, replica_groups=[1,16]<=[16], to_apply=%add
  %gemm = (f32[64,16]{1,0}, s8[4096]{0}) custom-call(%a, %b), custom_call_target="__cublas$lt$matmul", metadata={stack_frame_id=4}, backend_config={"gemm_backend_config":{"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"],"rhs_contracting_dimensions":["0"]},"precision_config":{"operand_precision":["DEFAULT","HIGHEST"]}}}
  %reduce-done = f32[64,32]{1,0} all-reduce-done(%reduce-start)
  %summed = f32[64]{0} fusion(%reduce-done), kind=kInput, calls=%sums
  %written = f32[100,10]{1,0} fusion(%d, %e, %i), kind=kLoop, calls=%writes
  %loop = (s32[], f32[10]{0}) while(%s), condition=%inner_condition, body=%inner_body, backend_config={"known_trip_count":{"n":"5"}}
  ROOT %out = (s32[]) tuple(%i)
}

%condition (v: (s32[])) -> pred[] {
  %v = (s32[]) parameter(0)
  ROOT %w = pred[] constant(true)
}

ENTRY %main (m: f32[1000]) -> (s32[]) {
  %m = f32[1000]{0} parameter(0)
  ROOT %steps = (s32[]) while(%m), condition=%condition, body=%body
}
"""  # noqa: E501
MODULE = parse(TEXT)
STEP = step_of(MODULE, "body")
KERNELS = {kernel.name: kernel for kernel in STEP.kernels}


def test_types():
    found = arrays_of("(f32[50257,384]{1,0}, /*index=1*/f8e4m3fn[8]{0}, pred[], bf16[2,3]{1,0}, s4[4]{0})")
    assert found[0] == Array("f32", (50257, 384)) and found[2] == Array("pred", ())
    assert [array.n_bytes for array in found] == [50257 * 384 * 4, 8, 1, 12, 2]


def test_the_longest_loop_is_the_step_and_inner_loops_count_their_turns():
    assert loop_body(MODULE) == "body"
    times = {found.instruction.name: found.times for found in executed(MODULE, "body")}
    assert times["again"] == 5 and times["gemm"] == 1 and "i" not in times
    assert STEP.unknown_loops == 0
    assert step_of(MODULE, "main").unknown_loops == 1  # the loop over steps has no known number of turns


def test_kernels_are_told_apart_and_weighed():
    assert {name: (kernel.kind, kernel.n_bytes) for name, kernel in KERNELS.items()} == {
        "rounded": ("fusion loop", 40 + 4 + 40),  # ten of the thousand numbers, and where
        "gemm": ("GEMM", 2 * 64 * 32 + 2 * 32 * 16 + 4 * 64 * 16),  # without work space
        "summed": ("fusion reduce", 4 * 64 * 32 + 4 * 64),
        "written": ("fusion loop", 40 + 4 + 40),  # a row of the array, not the array
        "again": ("copy", 80),
    }
    assert KERNELS["gemm"].flops == 2 * 64 * 32 * 16
    (product,) = products_of(STEP)
    assert (product.lhs, product.rhs, product.out, product.precision) == ("bf16", "bf16", "f32", "DEFAULT/HIGHEST")
    assert rounding_instructions(STEP) == 1


def test_a_place_is_the_projects_innermost_line():
    assert KERNELS["rounded"].place == "step/update.py:7 train_step"
    assert KERNELS["summed"].place == "step/update.py:7 train_step"  # optax, called from there; told by what is inside
    assert KERNELS["gemm"].place == "(library)"
    assert KERNELS["again"].place == "(none)"


def test_a_collective_has_its_bytes_its_group_and_what_runs_beside_it():
    (found,) = STEP.collectives
    assert (found.kind, found.n_bytes, found.n_arrays, found.group) == ("all-reduce", 4 * 64 * 32, 1, 16)
    assert found.hosts and found.beside == 1  # 16 devices are two hosts of 8; the product runs meanwhile
    assert not step_of(MODULE, "body", per_host=16).collectives[0].hosts
    ring = 2 * 15 / 16 * found.n_bytes / (0.8 * 50e9)
    assert found.seconds(card("h100"), Assumptions()) == pytest.approx(10e-6 + ring)


@pytest.mark.parametrize(
    "text, groups",
    [
        ("replica_groups={{0,1},{2,3}}", [[0, 1], [2, 3]]),
        ("replica_groups=[2,2]<=[4]", [[0, 1], [2, 3]]),
        ("replica_groups=[2,2]<=[2,2]T(1,0)", [[0, 2], [1, 3]]),
        ("replica_groups=mesh['data'=2,'fsdp'=3] {'fsdp'}", [[0, 1, 2], [3, 4, 5]]),
        ("replica_groups=mesh['data'=2,'fsdp'=3] {'data'}", [[0, 3], [1, 4], [2, 5]]),
        ("replica_groups=mesh['axis_0'=2,'axis_1'=2] {'axis_0','axis_1'}", [[0, 1, 2, 3]]),
        ("replica_groups=mesh['a'=4,'b'=2] {'a':(1)2}", [[0, 4], [1, 5], [2, 6], [3, 7]]),
        ("replica_groups=mesh['a'=4,'b'=2] {'a':(2)2,'b'}", [[0, 1, 2, 3], [4, 5, 6, 7]]),
        ("replica_groups=mesh['a'=2,'b'=2], device_ids=([2,2]T(1,0)) {'a'}", [[0, 1], [2, 3]]),
        ("replica_groups=mesh['a'=2,'b'=3], device_ids=([3,2]T(1,0)) {'b'}", [[0, 2, 4], [1, 3, 5]]),
        ("dimensions={0}", []),
    ],
)
def test_groups_of_devices(text, groups):
    assert _groups(f"channel_id=1, {text}, use_global_device_ids=true") == groups


def test_a_kernel_takes_the_longest_of_launch_bytes_and_flops():
    h100, assumed = card("h100"), Assumptions()
    gemm = KERNELS["gemm"]
    assert gemm.seconds(h100, 2.5e-6, assumed) == 2.5e-6
    large = gemm._replace(flops=1e12)
    assert large.seconds(h100, 1e-6, assumed) == pytest.approx(1e12 / (0.55 * 989e12))
    assert large._replace(dtype="f8e4m3fn").seconds(h100, 1e-6, assumed) == pytest.approx(1e12 / (0.5 * 1979e12))
    assert large._replace(dtype="f8e4m3fn").seconds(card("a100"), 1e-6, assumed) == pytest.approx(
        1e12 / (0.55 * 312e12)
    )
    moved = gemm._replace(n_bytes=10**9)
    assert moved.seconds(h100, 1e-6, assumed) == pytest.approx(1e9 / (0.8 * 3.352e12))
    assert modelled_seconds([gemm._replace(times=3)], h100, 1e-6, assumed) == pytest.approx(3e-6)


def test_what_is_said_of_a_program():
    compiled = Compiled("run", TEXT, {"temp": 2**20}, (7,), {}, 1.0, native_layers=1)
    report = report_of(compiled, card("h100"), n_devices=16)
    found = json.loads(as_json(report))
    assert found == json.loads(json.dumps(as_dict(report)))
    assert (found["kernels"], found["small_kernels"], found["copies"], found["unit"]) == (9, 9, 5, "training step")
    assert sum(group["kernels"] for group in found["by_kind"].values()) == found["kernels"]
    assert sum(group["bytes"] for group in found["by_line"].values()) == found["bytes"]
    said = "\n".join(lines(report))
    for words in (
        "one training step on h100, on each of 16 devices; compiled, not run",
        "kernels 9 (9 move less than 2 MB, 5 are copies, 0 lie in branches)",
        "CUDA graphs of the whole program: 1; operations in each: 7",
        "float8 products 0 of 3 in the whole program",
        "16 devices of several hosts",
        "assumed, not measured: 80% of 3.352 TB/s",
    ):
        assert words in said
    whole = report_of(compiled._replace(program="diagnose"), card("h100"))
    assert whole.unit == "diagnosis" and whole.step.unknown_loops == 1


def test_every_card_has_its_description_and_a_wrong_name_is_refused():
    for name, found in CARDS.items():
        bandwidth = next(line.split()[1] for line in found.target.splitlines() if "memory_bandwidth" in line)
        assert float(bandwidth) == pytest.approx(found.bandwidth, rel=0.001), name
    with pytest.raises(UserError, match="^there is no card 'v100' to compile for: give one of h100, h200, b200, a100$"):
        card("v100")


def test_a_text_without_an_entry_is_no_program():
    with pytest.raises(ValueError, match="no entry"):
        parse("HloModule x\n")
