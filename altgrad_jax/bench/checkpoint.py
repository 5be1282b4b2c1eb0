"""What parts, layouts and numbers of saves at once cost; `scripts/bench_checkpoint.py` says how to read it.

Beside `checkpoint` the only module that imports orbax: to write what `checkpoint` does not.
"""

import contextlib
import os
import random
import shutil
import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest import mock

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint._src.serialization import tensorstore_utils

from altgrad_jax.models.gpt2 import init_params
from altgrad_jax.run import checkpoint
from altgrad_jax.step.from_config import model_config

PRESENT = "present"
SAVES = 8


def make_state(config):
    """float32 parameters and two moments of the config's shape, of noise: nothing about them compresses."""

    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(lambda: init_params(model_config(config, jax.devices()[0]), 0))

    def noise():
        return jax.tree.map(lambda x: jax.device_put(rng.standard_normal(x.shape, np.float32)), shapes)

    return {"params": noise(), "mu": noise(), "nu": noise(), "step": jax.numpy.int32(1)}


def part_variants(state, arrays):
    leaves = jax.tree.leaves(state)

    def copy(path):
        copies = jax.device_put(leaves, [leaf.sharding for leaf in leaves], may_alias=False)
        for array in copies:
            np.asarray(array)

    def digest(n_threads):
        def run(path):
            with ThreadPoolExecutor(n_threads) as pool:
                list(pool.map(checkpoint._digest, arrays.values()))

        return run

    def plain_file(path, sync=True):
        path.mkdir()
        with open(path / "all", "wb", buffering=0) as file:
            for array in arrays.values():
                file.write(memoryview(np.ascontiguousarray(array).reshape(-1).view(np.uint8)))
            if sync:
                os.fsync(file.fileno())

    return {
        "copy on the device, then to the host": copy,
        "sha256, one thread": digest(1),
        "sha256, two threads": digest(2),
        "one plain file, fsync": plain_file,
        "one plain file, no fsync": lambda path: plain_file(path, sync=False),
    }


def layout_variants(arrays):
    """Orbax's writing alone, without sha256, in the present layout and in others."""

    def write(handler=(), context=(), **args):
        def array_handler():
            registry = ocp.type_handlers.create_type_handler_registry((np.ndarray, checkpoint._AllOrAnError()))
            options = {"use_ocdbt": True, "use_zarr3": True, "use_compression": False, **dict(handler)}
            return ocp.PyTreeCheckpointHandler(type_handler_registry=registry, **options)

        def run(path):
            save_args = {name: ocp.SaveArgs(chunk_byte_size=args.get("chunk")) for name in arrays}
            item = ocp.args.PyTreeSave(
                checkpoint._nest(arrays),
                save_args=checkpoint._nest(save_args),
                ocdbt_target_data_file_size=args.get("file_size"),
            )
            defaults = (tensorstore_utils._DEFAULT_OCDBT_TS_CONTEXT, tensorstore_utils._BASE_TS_CONTEXT)
            with contextlib.ExitStack() as patches:
                for default in defaults:
                    patches.enter_context(mock.patch.dict(default, dict(context)))
                handler, state = array_handler(), epath.Path(path) / "state"
                state.mkdir(parents=True)
                handler.save(state, args=item)
                handler.finalize(state)

        return run

    return {
        PRESENT: write(),
        "zstd": write({"use_compression": True}),
        "without OCDBT": write({"use_ocdbt": False}),
        "zarr2": write({"use_zarr3": False}),
        "data files of 64 MiB": write(file_size=2**26),
        "data files of 16 MiB": write(file_size=2**24),
        "chunks of 16 MiB": write(chunk=2**24),
        "at most 1 GB in writing": write({"save_concurrent_gb": 1}),
        "4 files in writing": write(context={"file_io_concurrency": {"limit": 4}}),
        "no fsync": write(context={"file_io_sync": False}),
    }


def save_variants(state, told):
    """8 saves; `told` takes (name, seconds the caller was held, seconds a save took, error) of each."""

    def saves(name, at_once, **changes):
        def run(path):
            with contextlib.ExitStack() as patches:
                patches.enter_context(mock.patch.object(checkpoint, "SAVES_AT_ONCE", at_once))
                for attribute, value in changes.items():
                    patches.enter_context(mock.patch.object(checkpoint, attribute, value))
                checkpoints = checkpoint.open_checkpoints(path, 3)
                for step in range(1, SAVES + 1):
                    checkpoints.save(step, state, {}, 1.0)
                checkpoints.close()
                for outcome in checkpoints.check():
                    told(name, outcome.blocked_s, outcome.background_s, outcome.error)

        return run

    to_host = checkpoint._to_host

    def digest_first(copies):
        arrays, digests = to_host(copies)
        for digest in digests.values():
            digest.result()
        return arrays, digests

    variants = {PRESENT: saves(PRESENT, checkpoint.SAVES_AT_ONCE)}
    variants |= {f"{n} at once": saves(f"{n} at once", n) for n in (1, 2, 3, 4, 6)}
    variants["1 at once, sha256 before the writing"] = saves(
        "1 at once, sha256 before the writing", 1, _to_host=digest_first
    )
    return variants


def time_variants(variants, folder, rounds):
    """{name: seconds of each round}; {name: error} of those that failed."""
    seconds = {name: [] for name in variants}
    failed = {}
    deletions = []
    for number in range(rounds):
        for name in random.Random(number).sample(list(variants), len(variants)):
            run = variants[name]
            path = Path(folder) / "variant"
            os.sync()  # what the last one left in the page cache is not this one's to write
            started = time.perf_counter()
            try:
                run(path)
                seconds[name].append(time.perf_counter() - started)
            except Exception as error:
                failed[name] = f"{type(error).__name__}: {' '.join(str(error).split())[:150]}"
            started = time.perf_counter()
            shutil.rmtree(path, ignore_errors=True)
            deletions.append(time.perf_counter() - started)
    return seconds, failed, deletions


def table(seconds, failed, reference, scale=1):
    for name, all_s in seconds.items():
        if name in failed:
            print(f"| {name} | failed: {failed[name]} | | |")
            continue
        ratio = statistics.median(a / b for a, b in zip(all_s, reference, strict=True))
        low, high = min(all_s) / scale, max(all_s) / scale
        print(f"| {name} | {statistics.median(all_s) / scale:.3f} | {low:.3f}-{high:.3f} | {ratio:.2f} |")
    print(flush=True)


def bench_checkpoint(config, *, folder, rounds):
    """Prints the tables of docs/results/checkpoint-speed.md for a state of the shape of `config`'s."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    state = make_state(config)
    arrays = {name: np.array(leaf) for name, leaf in checkpoint._flatten(state).items()}
    n_bytes = sum(array.nbytes for array in arrays.values())
    print(
        f"{jax.devices()[0].device_kind}, {os.cpu_count()} cores, {n_bytes / 1e6:.0f} MB in {len(arrays)} arrays, "
        f"{rounds} rounds\n\n| one save | median s | range | to Orbax's writing |\n|---|---|---|---|"
    )
    layouts, parts = layout_variants(arrays), part_variants(state, arrays)
    seconds, failed, deletions = time_variants(parts | layouts, folder, rounds)
    reference = seconds[PRESENT]
    table({name: seconds[name] for name in (*parts, *layouts)}, failed, reference)
    print(f"deleting it: median {statistics.median(deletions):.3f} s, at most {max(deletions):.3f} s\n")

    blocked, background = {}, {}

    def told(name, blocked_s, background_s, error):
        if error:
            raise RuntimeError(error)
        blocked.setdefault(name, []).append(blocked_s)
        background.setdefault(name, []).append(background_s)

    print(f"| {SAVES} saves | s a save | range | to present |\n|---|---|---|---|")
    seconds, failed, _ = time_variants(save_variants(state, told), folder, rounds)
    table(seconds, failed, seconds[PRESENT], scale=SAVES)
    for name in blocked:
        print(
            f"{name}: the caller was held {statistics.mean(blocked[name]):.3f} s a save, one save took "
            f"{statistics.median(background[name]):.3f} s"
        )
