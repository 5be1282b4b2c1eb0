"""Training on a mesh of eight devices equals that on one but for the order of sums; and two processes train one run.

A process has the devices it began with, so what needs eight is measured in one process of its own (`on_eight_devices`,
which prints JSON) and judged here.
"""

import json
import math
import os
import re
import signal
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import numpy as np
import pytest
from conftest import cpu_devices
from test_training import command, make_data, rows_of, wait_for_rows

from altgrad_jax.errors import UserError
from altgrad_jax.models.gpt2 import GPTConfig
from altgrad_jax.numerics.rules import resolve_rules
from altgrad_jax.run import processes
from altgrad_jax.run.checkpoint import list_steps
from altgrad_jax.run.lock import locked
from altgrad_jax.step import mesh, stability
from altgrad_jax.step.mesh import data_mesh, over_fsdp, place, replicated, shard_bytes, split_axis
from altgrad_jax.step.program import make_step_functions
from altgrad_jax.step.quantization import QuantOptions
from altgrad_jax.step.update import StepOptions

ROOT = Path(__file__).parent.parent
# 61 rows of the table: a prime, as it were GPT-2's vocabulary. Arrays from 256 elements on are split.
MODEL = dict(n_layer=1, n_head=2, n_embd=16, block_size=8, vocab_size=61)
SPLIT_FROM = 256
N_STEPS = 10
THRESHOLDS = stability.Thresholds(
    nan_patience=3,
    bit_stall_threshold=0.5,
    dead_neuron_threshold=1e-8,
    dead_neuron_window=5,
    spike_window=30,
    spike_threshold=8.0,
    stall_window=5,
)
E4M3 = QuantOptions(resolve_rules(("block_0/mlp_up=E4M3",), 1), weights_at_rest="error_feedback")
PROGRAMS = {
    "float32": dict(compute_dtype="float32"),
    "bfloat16": dict(compute_dtype="bfloat16"),
    "E4M3": dict(compute_dtype="bfloat16", quant=E4M3, grad_accum_steps=2, metric_groups=("ledger",)),
}
# (program, devices, fsdp)
CASES = [("float32", 1, 1), ("float32", 8, 1), ("bfloat16", 1, 1), ("bfloat16", 8, 4), ("E4M3", 1, 1), ("E4M3", 8, 8)]
# What sums in another order may do to the losses of N_STEPS steps, relative. Seen: 4e-7, 4e-6 and 2e-5.
TOLERANCE = {"float32": 1e-5, "bfloat16": 2e-4, "E4M3": 1e-3}


def on_eight_devices():
    """Trains every case and prints what is to be judged as JSON, one line."""
    mesh.MIN_SPLIT_ELEMENTS = SPLIT_FROM
    tokens_T = np.tile(np.arange(61, dtype=np.uint16), 30)
    lowered, fresh, out, compiles = [], {}, {}, []
    for program, n_devices, fsdp in CASES:
        options = dict(PROGRAMS[program])
        config = GPTConfig(**MODEL, compute_dtype=options.pop("compute_dtype"))
        options = StepOptions(
            **{
                "batch_size": 16,
                "steps_per_dispatch": N_STEPS,
                "learning_rate": 1e-2,
                "max_steps": 100,
                "warmup_steps": 5,
                "thresholds": THRESHOLDS,
                "metric_groups": (),
                **options,
            }
        )
        where = data_mesh(jax.devices()[:n_devices], fsdp)
        functions = make_step_functions(config, options, where, n_train_windows=200, eval_batch_size=1, seed=3)
        tokens = place(tokens_T, replicated(where))
        lowered.append(
            (
                functions,
                tokens,
                functions.run.lower(
                    functions.abstract_state,
                    jax.ShapeDtypeStruct(tokens.shape, tokens.dtype, sharding=tokens.sharding),
                    jax.ShapeDtypeStruct((), np.int32),
                    functions.inputs,
                ),
            )
        )
        if program not in fresh:
            fresh[program] = jax.device_get(functions.init(42, functions.inputs.formats))
    with ThreadPoolExecutor(2) as pool:
        compiled = list(pool.map(lambda case: case[-1].compile(), lowered))
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, seconds, **_: compiles.append(event) if "backend_compile" in event else None
    )
    for (program, n_devices, fsdp), (functions, tokens, _), run in zip(CASES, lowered, compiled, strict=True):
        abstract = functions.abstract_state
        state = jax.tree.map(lambda array, leaf: place(array, leaf.sharding), fresh[program], abstract)
        before = state
        state, first = run(state, tokens, np.int32(4), functions.inputs)
        donated = [leaf.is_deleted() for leaf in jax.tree.leaves(before)]
        state, second = run(state, tokens, np.int32(N_STEPS - 4), functions.inputs)
        rows = np.concatenate([np.asarray(first)[:4], np.asarray(second)[: N_STEPS - 4]])
        shards = [leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(state)]
        out[f"{program} {n_devices} {fsdp}"] = {
            "loss": rows[:, functions.metric_names.index("loss")].tolist(),
            "compiles": len(compiles),
            "donated": all(donated),
            "as_asked": all(
                leaf.sharding.is_equivalent_to(want.sharding, leaf.ndim)
                for leaf, want in zip(jax.tree.leaves(state), jax.tree.leaves(abstract), strict=True)
            ),
            "specs": {
                jax.tree_util.keystr(path): [list(leaf.shape), list(leaf.sharding.spec)]
                for path, leaf in jax.tree_util.tree_flatten_with_path(state)[0]
            },
            "bytes_on_a_device": sum(shards),
            "shard_bytes": shard_bytes(abstract),
            "program": run.as_text(),
        }
    print(json.dumps(out))


def loops_on_eight_devices():
    """Prints how many loops the lowered step has on 1 and on 8 devices, where the logits of a batch are 8 times what
    one device may hold at once, and where they are not cut."""
    batch_bytes, found = 16 * MODEL["block_size"] * MODEL["vocab_size"] * 4, []
    for n_devices, tile_bytes in (
        (1, batch_bytes // 8),
        (8, batch_bytes // 8),
        (8, batch_bytes // 16),
        (8, batch_bytes),
    ):
        functions = make_step_functions(
            GPTConfig(**MODEL, loss_tile_bytes=tile_bytes),
            StepOptions(16, N_STEPS, 1e-2, 100, 5, THRESHOLDS, metric_groups=(), data_on_device=False),
            data_mesh(jax.devices()[:n_devices]),
            n_train_windows=200,
            eval_batch_size=16,
            seed=3,
        )
        batches = jax.ShapeDtypeStruct((N_STEPS, 16, MODEL["block_size"] + 1), np.uint16)
        windows = jax.ShapeDtypeStruct((16, MODEL["block_size"] + 1), np.uint16)
        state = functions.abstract_state
        lowered = functions.run.lower(state, batches, np.int32(1), functions.inputs)
        evaluation = functions.evaluate.lower(state.params, windows, None)
        found.append([text.as_text().count("stablehlo.while") for text in (lowered, evaluation)])
    print(json.dumps(found))


def environment(n_devices=1, **more):
    return {**os.environ, "PYTHONPATH": str(ROOT), "XLA_FLAGS": cpu_devices(n_devices), **more}


@pytest.fixture(scope="module")
def trained():
    return printed_by("on_eight_devices")


def printed_by(function):
    """What a function of this file prints last, in a process with eight devices."""
    process = subprocess.run(
        [sys.executable, "-c", f"import test_mesh; test_mesh.{function}()"],
        capture_output=True,
        text=True,
        timeout=600,
        env=environment(8, PYTHONPATH=f"{ROOT}:{ROOT / 'tests'}", PYTHONWARNINGS="error::UserWarning"),
    )
    assert process.returncode == 0, process.stderr
    return json.loads(process.stdout.splitlines()[-1])


@pytest.mark.parametrize("program, n_devices, fsdp", [case for case in CASES if case[1] > 1])
def test_a_mesh_trains_as_one_device(trained, program, n_devices, fsdp):
    alone, there = (trained[f"{program} {n} {split}"]["loss"] for n, split in ((1, 1), (n_devices, fsdp)))
    assert alone[-1] < alone[0] and alone != there  # it learns, and really sums otherwise
    np.testing.assert_allclose(there, alone, rtol=TOLERANCE[program])


def test_nothing_is_compiled_again_and_the_state_is_updated_in_place(trained):
    for name, found in trained.items():
        assert found["compiles"] == 0 and found["donated"] and found["as_asked"], name


def test_parameters_and_moments_are_split_over_fsdp_and_the_rest_is_whole(trained):
    axes = {(61, 16): 1, (16, 48): 1, (16, 16): 0, (16, 64): 1, (64, 16): 0}
    for name, copies in (("bfloat16 8 4", 3), ("E4M3 8 8", 3)):
        split = []
        for path, (shape, spec) in trained[name]["specs"].items():
            of_parameters = re.match(r"\.(params|opt_state|quant\.(age|residual))", path)
            axis = axes.get(tuple(shape)) if of_parameters else None
            assert spec == {None: [], 0: ["fsdp"], 1: [None, "fsdp"]}[axis], path
            split += [shape] if axis is not None else []
        assert len(split) == copies * 5 + (2 if "E4M3" in name else 0)  # residual and age of one layer


def test_bytes_on_a_device_fall_by_the_factor(trained):
    split = 3 * 4 * sum([61 * 16, 16 * 48, 16 * 16, 2 * 16 * 64])  # of parameters and both moments
    e4m3 = (2 + 2) * 16 * 64  # residual and age
    for name, n, n_bytes in (("float32 8 1", 1, split), ("bfloat16 8 4", 4, split), ("E4M3 8 8", 8, split + e4m3)):
        whole = trained[name.split()[0] + " 1 1"]["bytes_on_a_device"]
        assert trained[name]["bytes_on_a_device"] == trained[name]["shard_bytes"] == whole - n_bytes * (n - 1) // n


def test_a_step_gathers_the_parameters_once_and_no_moments(trained):
    """By the compiled program: what its collectives move, other than sums, of arrays as large as parameters."""

    def gathered(text):
        sizes = [
            math.prod(map(int, shape.split(",")))
            for shape in re.findall(r"= \w+\[([\d,]+)\]\S* (?:all-gather|all-to-all|collective-permute)\(", text)
        ]
        return sorted(size for size in sizes if size >= SPLIT_FROM)

    parameters = sorted([61 * 16, 16 * 48, 16 * 16, 16 * 64, 16 * 64])
    assert gathered(trained["float32 8 1"]["program"]) == []
    for name in ("bfloat16 8 4", "E4M3 8 8"):
        assert gathered(trained[name]["program"]) == parameters


def test_the_loss_is_cut_into_tiles_by_what_one_device_holds():
    alone, of_eight, cut, whole = printed_by("loops_on_eight_devices")
    assert of_eight == whole
    assert [a - b for a, b in zip(alone, whole)] == [a - b for a, b in zip(cut, whole)] == [1, 1]


# -------------------------------------------------------------------------------------------------- what is refused


def test_arrays_are_split_along_their_largest_divisible_axis():
    assert split_axis((50257, 384), 8) == 1 and split_axis((384, 1536), 8) == 1 and split_axis((1536, 384), 8) == 0
    assert split_axis((256, 256), 4) == 0
    assert split_axis((1536,), 8) is None and split_axis((128, 64), 8) is None and split_axis((50257, 384), 1) is None
    with pytest.raises(UserError, match=r"fsdp=5 divides no axis of a parameter of shape \[384, 384\]"):
        split_axis((384, 384), 5)


def test_a_mesh_that_does_not_come_out_even_is_refused():
    with pytest.raises(UserError, match="fsdp=3 does not divide the 1 devices that are visible"):
        data_mesh(jax.devices()[:1], 3)
    assert data_mesh(jax.devices()[:1]).shape == {"data": 1, "fsdp": 1}
    assert over_fsdp(data_mesh(jax.devices()[:1]), (512, 512)).is_fully_replicated


@pytest.mark.parametrize(
    "flags, words",
    [
        (("auto", "a:1", None, None), "--distributed=auto finds out by itself what --coordinator says"),
        (("off", "a:1", 2, None), "--coordinator is given without --process_id"),
        (("off", "a", 2, 0), "--coordinator=a cannot be used"),
        (("off", "a:1", 2, 2), "--process_id=2 is not one of --num_processes=2"),
    ],
)
def test_flags_that_do_not_say_which_process_this_is_are_refused(flags, words):
    with pytest.raises(UserError, match=words), processes.joined(*flags):
        raise AssertionError


def test_one_process_decides_by_itself():
    assert processes.gather([1]) == [[1]] and processes.is_lead() and processes.n_processes() == 1
    value = object()  # nothing passes through JSON
    assert processes.from_lead(lambda: value) is value and processes.everywhere(lambda: value) is value
    processes.require_equal("data", "a", "")


# ---------------------------------------------------------------------------------------------------- two processes

RUN = dict(
    n_embd=64,
    n_layer=1,
    max_steps=60,
    checkpoint_interval=20,
    eval_interval=30,
    diagnostic_interval=60,
    steps_per_dispatch=1,
    metrics="none",
    learning_rate=1e-3,
)  # at 3e-3 this model spikes


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp("data"))


def start_two(data_dirs, run_dir, n_devices=1, **changes):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    return [
        subprocess.Popen(
            [
                *command(data_dir, run_dir, **RUN | changes),
                f"--coordinator=localhost:{port}",
                "--num_processes=2",
                f"--process_id={i}",
            ],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment(n_devices),
        )
        for i, data_dir in enumerate(data_dirs)
    ]


def outputs(processes):
    return [process.communicate(timeout=240) for process in processes]


def test_processes_with_different_data_or_a_locked_folder_all_end_with_a_sentence(data_dir, tmp_path):
    other = make_data(tmp_path, seed=1)
    with locked(tmp_path / "locked"):
        pairs = {
            "has data with the fingerprint": start_two([data_dir, other], tmp_path / "run"),
            "is being trained into by another process": start_two([data_dir] * 2, tmp_path / "locked"),
        }
        for words, processes in pairs.items():
            told = outputs(processes)
            assert [process.returncode for process in processes] == [2, 2], told
            assert all(err.count("error: ") == 1 and words in err for _, err in told), told
    assert not (tmp_path / "run").exists()


def test_two_processes_stop_together_and_one_goes_on_after_a_kill(data_dir, tmp_path):
    """SIGTERM to one of two stops both at one step, saved; after SIGKILL one process finishes the run."""
    run_dir, alone = tmp_path / "two", tmp_path / "alone"
    processes = start_two([data_dir] * 2, run_dir, fsdp=2)
    wait_for_rows(processes[0], run_dir, 8)
    processes[1].send_signal(signal.SIGTERM)
    told = outputs(processes)
    assert [process.returncode for process in processes] == [143, 143], told
    (stopped,) = list_steps(run_dir)[-1:]
    assert rows_of(run_dir)[-1]["step"] == stopped < 60
    assert "SIGTERM: stopped after step" in told[0][0] and "device: 2 x cpu (cpu) of 2 processes" in told[0][0]
    assert all(line.startswith("[Gloo]") for line in told[1][0].splitlines())

    processes = start_two([data_dir] * 2, run_dir, fsdp=2)
    wait_for_rows(processes[0], run_dir, stopped + 12)
    for process in processes:  # one would do, but the other learns of it only after 100 s
        process.kill()
        process.communicate()

    for folder in (run_dir, alone):
        finished = subprocess.run(
            command(data_dir, folder, **RUN), capture_output=True, text=True, timeout=240, env=environment()
        )
        assert finished.returncode == 0, finished.stderr
    starts = json.loads((run_dir / "manifest.json").read_text())["starts"]
    assert [(start["mesh"], start["processes"]) for start in starts] == [
        ({"data": 1, "fsdp": 2}, 2),
        ({"data": 1, "fsdp": 2}, 2),
        ({"data": 1, "fsdp": 1}, 1),
    ]
    losses = [[row["loss"] for row in rows_of(folder)[1:]] for folder in (run_dir, alone)]
    assert len(losses[0]) == 60
    np.testing.assert_allclose(*losses, rtol=1e-2)
