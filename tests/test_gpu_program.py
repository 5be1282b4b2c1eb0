"""The programs of a GPU, compiled for an H100 that need not exist and held to what the project says of them.

Those that compile carry the mark `gpu_program`: they need the extra of that name, and `make gpu-program` runs them.
Each program is compiled once. The tables are what is true today: a change that makes a program smaller lowers them.
"""

import functools
import importlib.metadata
from collections import Counter
from pathlib import Path

import pytest

from altgrad_jax import cli
from altgrad_jax.bench import gpu_program, gpu_report
from altgrad_jax.bench.cards import card
from altgrad_jax.bench.gpu_program import compile_for, devices_of, graphs_of, require_plugin, set_up_for
from altgrad_jax.bench.gpu_report import n_kernels, report_of
from altgrad_jax.bench.kernels import products_of, rounding_instructions
from altgrad_jax.errors import UserError

ROOT = Path(__file__).parent.parent
N_LAYERS = 2
QUANTIZED = 4 * N_LAYERS  # linear layers of the blocks
BASELINE, E4M3 = "bf16_baseline.py", "fp8.py:E4M3"
NATIVE = ["--config.formats=E4M3,block_*:G=E5M2", "--config.products=native"]
EIGHT = ["--config.batch_size=96"]
# name: config, flags, program, devices
PROGRAMS = {
    "baseline": (BASELINE, [], "run", 1),
    "emulated": (E4M3, [], "run", 1),
    "native": (E4M3, NATIVE, "run", 1),
    "data=8": (BASELINE, EIGHT, "run", 8),
    "fsdp=8": (BASELINE, [*EIGHT, "--config.fsdp=8"], "run", 8),
    "diagnosis": (BASELINE, [], "diagnose", 1),
    # That it compiles at all: with sums of many arrays in one reduction ptxas refused its shared memory.
    "nvfp4": ("recipe.py:nvfp4", [], "run", 1),
}
# Kernels of a step, copies included, with some room: 302, 494, 504, 958, 349 and 436 were found.
MOST_KERNELS = {"baseline": 315, "emulated": 520, "native": 520, "nvfp4": 1000, "data=8": 365, "fsdp=8": 460}
# CUDA graphs of the whole program. A collective ends one; what the entry does before and after its loop are others.
MOST_GRAPHS = {"baseline": 4, "emulated": 4, "native": 6, "nvfp4": 4, "data=8": 8, "fsdp=8": 16}
# {program: {kind: MB of all collectives of at least LARGE}}, and how many there are below.
LARGE = 1e6
MEGABYTES = {
    # 4P = 91.9 with two layers, and the tied table's 77.2 once more.
    "data=8": {"all-reduce": 169.05},
    # All parameters gathered, all gradients reduce-scattered; the lookup's rows go to where their columns are kept.
    "fsdp=8": {"all-gather": 91.84, "reduce-scatter": 91.82, "all-to-all": 4.72},
}
MOST_SMALL = {"data=8": 1, "fsdp=8": 6}


@functools.cache
def report(name):
    file, flags, program, n_devices = PROGRAMS[name]
    words = [f"--config={ROOT}/configs/{file}", f"--config.n_layer={N_LAYERS}", *flags]
    config, _ = cli.parse(words, cli.new_flags())
    setup = set_up_for(config, devices_of(card("h100"), n_devices))
    return report_of(compile_for(setup, program), card("h100"), n_devices=n_devices)


@pytest.mark.gpu_program
@pytest.mark.parametrize("name", MOST_KERNELS)
def test_a_step_has_no_more_kernels_than_today(name):
    found = report(name)
    assert found.looped and found.step.unknown_loops == 0
    assert n_kernels(found.step) <= MOST_KERNELS[name]


@pytest.mark.gpu_program
@pytest.mark.parametrize("name", MOST_GRAPHS)
def test_a_step_lies_in_few_cuda_graphs(name):
    found = report(name)
    assert len(found.compiled.graphs) <= MOST_GRAPHS[name]
    if not found.step.collectives:
        assert max(found.compiled.graphs) >= n_kernels(found.step)  # the whole step is one


@pytest.mark.gpu_program
def test_native_products_are_float8_three_a_layer_and_no_others():
    found = report("native")
    assert found.compiled.native_layers == QUANTIZED
    assert found.float8_products == 3 * QUANTIZED == n_kernels(found.step, "GEMM float8")
    assert not n_kernels(found.step, "fusion GEMM")  # Triton's
    pairs = Counter((p.lhs, p.rhs) for p in products_of(found.step) if p.lhs.startswith("f8"))
    # Forward W and A are E4M3; in the two products of the backward pass one operand is G, E5M2.
    assert pairs[("f8e4m3fn", "f8e4m3fn")] == QUANTIZED
    assert sum(n for pair, n in pairs.items() if sorted(pair) == ["f8e4m3fn", "f8e5m2"]) == 2 * QUANTIZED


@pytest.mark.gpu_program
@pytest.mark.parametrize("name", ["baseline", "emulated"])
def test_other_products_are_bfloat16_with_float32_sums(name):
    found = report(name)
    # Three a linear layer and three for the head.
    assert Counter((p.lhs, p.rhs, p.out) for p in products_of(found.step)) == {
        ("bf16", "bf16", "f32"): 3 * (QUANTIZED + 1)
    }
    assert n_kernels(found.step, "attention") == 2 * N_LAYERS


@pytest.mark.gpu_program
@pytest.mark.parametrize("name", ["emulated", "native"])
def test_rounding_is_not_optimized_away(name):
    step = report(name).step
    # W, A and G of every layer are rounded by instructions of their own, and every W once more by the ledger.
    assert rounding_instructions(step) >= (3 + 1) * QUANTIZED
    assert rounding_instructions(report("baseline").step) == 0
    for kernel in step.kernels:
        if "round-nearest-even" in kernel.opcodes:
            # The other branch, normal numbers: half of the last kept bit is added and the bits below it cut off.
            assert {"and", "or", "add", "compare", "select"} <= set(kernel.opcodes), kernel.name


@pytest.mark.gpu_program
@pytest.mark.parametrize("name", PROGRAMS)
def test_float32_products_are_float32(name):
    found = [p for p in products_of(report(name).step) if "f32" in (p.lhs, p.rhs)]
    assert {p.precision for p in found} <= {"HIGHEST"}  # less would be TF32
    assert bool(found) == (name in ("diagnosis", "nvfp4"))  # ranks, and Hadamard transforms


@pytest.mark.gpu_program
@pytest.mark.parametrize("name", MEGABYTES)
def test_collectives_are_those_of_the_page(name):
    found = report(name).step.collectives
    large = Counter()
    assert all(kernel.times == 1 for kernel in report(name).step.kernels)  # the loss is one tile, as on one device
    for collective in found:
        assert collective.group == 8 and not collective.hosts
        if collective.n_bytes >= LARGE:
            large[collective.kind] += collective.times * collective.n_bytes / 1e6
    assert dict(large) == pytest.approx(MEGABYTES[name], abs=0.1)
    assert sum(c.times for c in found if c.n_bytes < LARGE) <= MOST_SMALL[name]


# ------------------------------------------------------------------------------------------------- without a compiler


def test_a_missing_plugin_is_one_sentence(monkeypatch):
    def version(name):
        if name == "jax-cuda12-pjrt":
            raise importlib.metadata.PackageNotFoundError(name)
        return "1.0"

    monkeypatch.setattr(importlib.metadata, "version", version)
    with pytest.raises(UserError, match=r'^jax-cuda12-pjrt is not installed, .*: pip install -e "\.\[gpu-program\]"$'):
        require_plugin()


def test_plugins_of_another_version_are_one_sentence(monkeypatch):
    versions = {"jax-cuda12-plugin": "1.1", "nvidia-cuda-nvcc-cu12": "12.9"}
    monkeypatch.setattr(importlib.metadata, "version", lambda name: versions.get(name, "1.0"))
    with pytest.raises(UserError, match=r'^jax-cuda12-plugin has version 1\.1 and jax 1\.0, .*"jax==1\.0"'):
        require_plugin()
    versions["jax-cuda12-plugin"] = "1.0"
    require_plugin()


def test_devices_that_cannot_share_the_work_are_refused():
    with pytest.raises(UserError, match="^--devices=12 are no whole hosts of 8"):
        devices_of(card("h100"), 12)
    config, _ = cli.parse([f"--config={ROOT}/configs/{BASELINE}"], cli.new_flags())
    with pytest.raises(UserError, match=r"^--devices=8 cannot share 12 sequences .* such as 96$"):
        set_up_for(config, [None] * 8)


def test_graphs_are_counted_with_what_is_in_them():
    thunks = """001: kCustomKernel [source] a
002: kWhile        [prev=001]
condition:
    003: kCustomKernel [source | sink] b
  body:
    000: kCommandBuffer [source | sink]
        010: kCustomKernel   [source] c
        011: kGemm   [prev=010] d
    012: kCopy [sink] e
000: kCommandBuffer [source | sink]
    020: kCustomKernel [source] f
"""
    assert graphs_of(thunks) == (2, 1)
    assert graphs_of("") == ()


def test_the_programs_are_those_that_a_run_compiles():
    assert gpu_program.PROGRAMS == tuple(gpu_report.UNITS) == ("run", "evaluate", "diagnose")
