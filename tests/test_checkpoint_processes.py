"""Checkpoints of several processes: each writes what it holds, all agree, and any number of them reads it."""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest
from conftest import cpu_devices
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from orbax.checkpoint._src.multihost import multihost  # to shorten its wait for a process that failed

from altgrad_jax.run import checkpoint, processes

META = {"config": {"seed": 1}}
# "inside" is whole on each process, but in two pieces; "w", "h" and the moment lie on all devices of both.
SPECS = {
    "params": {"w": P("fsdp"), "h": P(None, "fsdp"), "bias": P(), "inside": P("device")},
    "mu": {"w": P("fsdp")},
    "step": P(),
    "empty": P(),
}


def values(step):
    rng = np.random.default_rng(step)
    return {
        "params": {
            "w": rng.normal(size=(8, 1000)).astype(np.float32),
            "h": rng.normal(size=(3, 8)).astype(ml_dtypes.bfloat16),
            "bias": np.asarray([1.5, np.nan, -0.0], np.float32),
            "inside": rng.normal(size=(4, 5)).astype(np.float32),
        },
        "mu": {"w": rng.normal(size=(8, 1000)).astype(np.float32)},
        "step": np.int32(step),
        "empty": np.zeros((0, 3), np.float32),
    }


def shardings():
    """On all devices of all processes."""
    devices = np.asarray(jax.devices())
    flat = Mesh(devices, ("fsdp",))
    square = Mesh(devices.reshape(jax.process_count(), -1), ("process", "device"))
    return jax.tree.map(lambda spec: NamedSharding(square if "device" in spec else flat, spec), SPECS)


def make_state(step):
    def place(array, sharding):
        array = np.asarray(array)
        return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])

    return jax.tree.map(place, values(step), shardings())


def abstract():
    return jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(np.shape(x), np.asarray(x).dtype, sharding=sharding),
        values(0),
        shardings(),
    )


def assert_holds(state, step):
    """Each shard that this process holds has the bits of `values(step)`, and lies where it should."""
    for (path, array), expected, sharding in zip(
        jax.tree_util.tree_leaves_with_path(state),
        jax.tree.leaves(values(step)),
        jax.tree.leaves(shardings()),
        strict=True,
    ):
        assert array.sharding.is_equivalent_to(sharding, array.ndim), path
        for shard in array.addressable_shards:
            part = np.asarray(expected)[shard.index]
            assert np.asarray(shard.data).tobytes() == part.tobytes() and array.dtype == part.dtype, path


def flip_a_byte(path, content):
    """Of the one file under `path` that holds the bytes `content`."""
    ((file, at),) = [(f, at) for f in path.rglob("*") if f.is_file() and (at := f.read_bytes().find(content)) >= 0]
    damaged = bytearray(file.read_bytes())
    damaged[at + 1] ^= 1
    file.write_bytes(damaged)


def no_damage(step, reason):
    raise AssertionError(f"checkpoint {step} was called damaged: {reason}")


# What runs in the processes.


def join(process, port):
    jax.distributed.initialize(f"127.0.0.1:{port}", num_processes=2, process_id=process, initialization_timeout=60)
    assert (jax.process_count(), jax.device_count(), jax.local_device_count()) == (2, 4, 2)


def outcomes(checkpoints):
    checkpoints.wait()
    return [(outcome.step, outcome.error) for outcome in checkpoints.check()]


def two_processes(process, port, folder):
    process, folder = int(process), Path(folder)
    join(process, port)
    run_dir = folder / "two"

    # What one process wrote.
    step, state, meta = checkpoint.open_checkpoints(folder / "one", 3).restore_newest(abstract(), no_damage)
    assert (step, meta) == (7, META)
    assert_holds(state, 7)

    # Saves in a row, more than may be under way; the rotation.
    checkpoints = checkpoint.open_checkpoints(run_dir, 2)
    assert checkpoints.restore_newest(abstract(), no_damage) is None
    for step, val_loss in ((1, 1.0), (2, 3.0), (3, 2.0), (4, None), (5, None)):
        assert checkpoints.save(step, make_state(step), META, val_loss)
    assert not checkpoints.save(5, make_state(5), META)
    assert outcomes(checkpoints) == [(step, None) for step in (1, 2, 3, 4, 5)]
    assert checkpoints.steps() == [1, 5]
    assert_holds(checkpoints.restore(5, abstract())[0], 5)

    # What fails in one process fails in both, leaves nothing, and the next save works.
    describe = checkpoint._describe
    multihost._DEFAULT_BARRIER_TIMEOUT = 1
    for failing in (1, 1, 0):
        if process == failing:
            checkpoint._describe = full_disk
        checkpoints.save(6, make_state(6), META)
        ((_, error),) = outcomes(checkpoints)
        checkpoint._describe = describe
        reason = "No space left on device" if process == failing else "another process failed or did not answer"
        assert error.startswith(f"checkpoint 6 was not saved to {run_dir / '6'}: {reason}"), error
        assert checkpoints.steps() == [1, 5]
    multihost._DEFAULT_BARRIER_TIMEOUT = 60
    checkpoints.save(6, make_state(6), META)
    assert outcomes(checkpoints) == [(6, None)]
    assert not list(run_dir.glob("*tmp*"))

    # Damage, whoever sees it, is everyone's.
    read, said = checkpoint._read_arrays, []
    if process == 1:
        checkpoint._read_arrays = see_damage
    with pytest.raises(checkpoint.DamagedCheckpoint, match="seen by one"):
        checkpoints.restore(6, abstract())
    checkpoint._read_arrays = read
    processes.from_lead(lambda: flip_a_byte(run_dir / "6", values(6)["params"]["w"][6:8].tobytes()))
    step, state, _ = checkpoints.restore_newest(abstract(), lambda *args: said.append(args))
    assert_holds(state, 1)
    assert (step, [s for s, _ in said]) == (1, [6]) and "state/ocdbt.process_1/d/" in said[0][1]
    assert checkpoints.steps() == [1] and (run_dir / "damaged" / "6-1").is_dir()

    # Back, and on.
    for step in (8, 9):
        checkpoints.save(step, make_state(step), META)
    assert checkpoints.set_aside_newer_than(8) == [9] and checkpoints.steps() == [1]
    checkpoints.save(8, make_state(8), META)
    outcome = checkpoint.save_anomaly(run_dir, 9, make_state(9), META)
    assert outcome.error is None
    assert_holds(checkpoint.restore_path(outcome.path, abstract())[0], 9)
    checkpoints.close()
    assert checkpoints.steps() == [1, 8]
    print("done", flush=True)


def full_disk(array):
    raise OSError(28, "No space left on device")


def see_damage(path, document, names):
    raise checkpoint.DamagedCheckpoint(path, "seen by one")


def four_devices(folder):
    assert (jax.process_count(), jax.device_count()) == (1, 4)
    for step in (1, 8):
        assert_holds(checkpoint.restore_path(Path(folder) / "two" / str(step), abstract())[0], step)
    checkpoints = checkpoint.open_checkpoints(Path(folder) / "four", 3)
    checkpoints.save(7, make_state(7), META)
    checkpoints.close()
    print("done", flush=True)


def start(function, *args, n_devices):
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
        "PYTHONWARNINGS": "error",
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": cpu_devices(n_devices),
    }
    code = f"import test_checkpoint_processes as t; t.{function}(*{[str(arg) for arg in args]!r})"
    return subprocess.Popen(
        [sys.executable, "-c", code],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parent,
    )


def finish(*children):
    """Waits until all have ended well, or one has not."""
    deadline = time.monotonic() + 90
    while any(child.poll() is None for child in children) and time.monotonic() < deadline:
        if any(child.poll() for child in children):
            break
        time.sleep(0.02)
    for child in children:
        child.kill()
    told = [child.communicate() for child in children]
    for child, (out, error) in zip(children, told, strict=True):
        assert child.returncode == 0 and out.endswith("done\n"), "\n".join(error for _, error in told)


def test_two_processes_save_and_any_number_restores(tmp_path):
    checkpoints = checkpoint.open_checkpoints(tmp_path / "one", 3)
    checkpoints.save(7, jax.tree.map(jax.numpy.asarray, values(7)), META)
    assert outcomes(checkpoints) == [(7, None)]

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    finish(*(start("two_processes", process, port, tmp_path, n_devices=2) for process in (0, 1)))
    four = start("four_devices", tmp_path, n_devices=4)

    # One process with one device, beside it.
    for step in (1, 8):
        state, meta = checkpoint.restore_path(tmp_path / "two" / str(step), abstract())
        assert meta == META
        assert_holds(state, step)
    arrays, _ = checkpoint.load_arrays(tmp_path / "two", 8, ("params/w",))
    assert arrays["params"]["w"].tobytes() == values(8)["params"]["w"].tobytes()
    with ocp.CheckpointManager(tmp_path / "two") as manager:
        plain = manager.restore(8, args=ocp.args.Composite(state=ocp.args.StandardRestore(abstract())))
    assert np.asarray(plain.state["mu"]["w"]).tobytes() == values(8)["mu"]["w"].tobytes()
    described = checkpoint.read_document(tmp_path / "two" / "8")["arrays"]
    assert sorted(shard["index"] for shard in described["params/h"]["shards"]) == [
        [[0, 3], [k, k + 2]] for k in (0, 2, 4, 6)
    ]
    spread = {name for name, array in described.items() if "shards" in array}
    assert spread == {"params/w", "params/h", "params/inside", "mu/w"}
    finish(four)
    assert_holds(checkpoint.restore_path(tmp_path / "four" / "7", abstract())[0], 7)
