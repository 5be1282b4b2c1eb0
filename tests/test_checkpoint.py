"""Checkpoints: what is kept, what is refused, what survives a kill, a full disk and a flipped bit."""

import errno
import hashlib
import json
import math
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from altgrad_jax.errors import UserError
from altgrad_jax.run import checkpoint

META = {"config": {"seed": 42, "tags": ["a", "b"]}, "wandb_run_id": "x1", "rate": 0.1, "é": None}


class Monitor(NamedTuple):
    bad_steps: jax.Array
    losses_W: jax.Array
    streak: dict
    empty: jax.Array


class State(NamedTuple):
    step: jax.Array
    params: Any
    opt_state: Any
    monitor: Monitor


def make_state(step: int, width: int = 8) -> State:
    """A state with the kinds of leaves that a run has or might have: bfloat16, scalars, no elements, NaN."""
    rng = np.random.default_rng(step)
    params = {
        "block_0": {"mlp_up": {"kernel": rng.normal(size=(4, width)), "bias": rng.normal(size=(width,))}},
        "embed": {"embedding": rng.normal(size=(40, 8))},
    }
    params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), params)
    params["half"] = jnp.asarray(rng.normal(size=(3, 3)), jnp.bfloat16)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))
    monitor = Monitor(
        bad_steps=jnp.arange(3, dtype=jnp.int32) + step,
        losses_W=jnp.asarray([1.5, math.nan, -0.0, math.inf], jnp.float32),
        streak={"embed": jnp.zeros((2, 2), jnp.int32), "on": jnp.asarray([True, False])},
        empty=jnp.zeros((0, 3), jnp.float32),
    )
    state = State(jnp.int32(step), params, optimizer.init(params), monitor)
    mesh = jax.make_mesh((1,), ("data",))
    return jax.device_put(state, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec()))


def abstract(state: State) -> State:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)


def assert_same_bits(actual: Any, expected: Any) -> None:
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        a, b = np.asarray(a), np.asarray(b)
        assert (a.dtype, a.shape, a.tobytes()) == (b.dtype, b.shape, b.tobytes())


@pytest.fixture
def opened():
    """Opens run folders, and closes them after the test."""
    resources = []

    def open_(run_dir: Path, max_checkpoints: int = 3) -> checkpoint.Checkpoints:
        resources.append(checkpoint.open_checkpoints(run_dir, max_checkpoints))
        return resources[-1]

    yield open_
    for opened_one in resources:
        opened_one.close()


def save(checkpoints: checkpoint.Checkpoints, step: int, val_loss: float | None = None) -> checkpoint.SaveOutcome:
    assert checkpoints.save(step, make_state(step), META, val_loss)
    checkpoints.wait()
    (outcome,) = checkpoints.check()
    return outcome


def no_damage(step: int, reason: str) -> None:
    raise AssertionError(f"checkpoint {step} was called damaged: {reason}")


def files_of(path: Path) -> list[Path]:
    return sorted(file for file in path.rglob("*") if file.is_file())


def find_bytes(path: Path, array: jax.Array) -> tuple[Path, int]:
    """The file of the checkpoint that holds the bytes of `array`, and where in it; nothing is compressed."""
    content = np.asarray(array).tobytes()
    (found,) = [(file, at) for file in files_of(path) if (at := file.read_bytes().find(content)) >= 0]
    return found


def break_arrays(path: Path) -> None:
    """Flips one bit of one parameter."""
    file, at = find_bytes(path, make_state(int(path.name)).params["embed"]["embedding"])
    content = bytearray(file.read_bytes())
    content[at + 3] ^= 1
    file.write_bytes(content)


# Which are kept.


@pytest.mark.parametrize(
    "val_losses, max_checkpoints, expected",
    [
        ({}, 3, set()),
        ({1: 5.0, 2: 4.0}, 3, {1, 2}),
        ({1: 5.0, 2: 4.0, 3: 3.0, 4: 2.0}, 3, {2, 3, 4}),
        ({1: 1.0, 2: 4.0, 3: 3.0, 4: 2.0}, 3, {1, 3, 4}),
        ({1: 1.0, 2: 4.0, 3: 3.0, 4: 2.0}, 2, {1, 4}),
        ({1: 1.0, 2: 4.0, 3: 3.0, 4: 2.0}, 1, {4}),
        ({1: None, 2: None, 3: None, 4: None}, 3, {2, 3, 4}),
        ({1: math.nan, 2: 9.0, 3: None, 4: math.inf, 5: None}, 3, {2, 4, 5}),
        ({1: -math.inf, 2: math.nan, 3: None, 4: None}, 2, {3, 4}),
        ({1: 2.0, 2: 2.0, 3: 3.0, 4: 3.0}, 2, {2, 4}),
    ],
)
def test_best_and_newest_are_kept(val_losses, max_checkpoints, expected):
    standings = {step: checkpoint.Standing(val_loss) for step, val_loss in val_losses.items()}
    assert checkpoint.kept_steps(standings, max_checkpoints) == expected


@pytest.mark.parametrize(
    "regular, interim, max_checkpoints, expected",
    [
        ({}, [3, 7], 3, {7}),
        ({10: 1.0}, [3, 7], 3, {10}),
        ({10: 1.0, 20: 2.0, 30: 3.0}, [33, 36], 2, {10, 30, 36}),
        ({10: 1.0, 20: 2.0, 30: 3.0}, [33], 1, {30, 33}),
        ({10: None, 20: None, 40: None}, [33], 2, {20, 40}),
    ],
)
def test_an_interim_one_is_kept_until_the_next_regular_one_and_displaces_none(
    regular, interim, max_checkpoints, expected
):
    standings = {step: checkpoint.Standing(val_loss) for step, val_loss in regular.items()}
    standings |= {step: checkpoint.Standing(0.5, interim=True) for step in interim}
    assert checkpoint.kept_steps(standings, max_checkpoints) == expected


def test_interim_ones_are_known_after_a_restart(tmp_path, opened):
    def saved(checkpoints, step, interim):
        assert checkpoints.save(step, make_state(step), META, interim=interim)
        checkpoints.wait()
        return checkpoints.steps()

    checkpoints = opened(tmp_path, max_checkpoints=2)
    assert [saved(checkpoints, step, step % 10 > 0) for step in (10, 14, 18, 20)][1:] == [[10, 14], [10, 18], [10, 20]]
    assert saved(checkpoints, 25, interim=True) == [10, 20, 25]
    checkpoints = opened(tmp_path, max_checkpoints=2)
    assert saved(checkpoints, 30, interim=False) == [20, 30]


def test_rotation_on_disk_continues_after_a_restart(tmp_path, opened):
    (tmp_path / "anomaly" / "1").mkdir(parents=True)
    for name in ("manifest.json", "metrics.jsonl", "7.txt"):
        (tmp_path / name).write_text("{}")
    first = opened(tmp_path)
    for step, val_loss in ((1, 1.0), (2, 3.0), (3, math.nan), (4, None)):
        assert save(first, step, val_loss).error is None
    assert first.steps() == [1, 3, 4] and first.best() == 1 and first.latest() == 4
    first.close()

    second = opened(tmp_path)
    assert second.best() == 1
    save(second, 5, 2.0)
    assert second.steps() == [1, 4, 5]
    save(second, 6, 0.5)
    assert second.best() == 6
    save(second, 7, 0.7)
    assert second.steps() == [5, 6, 7]
    expected = {"5", "6", "7", "anomaly", "manifest.json", "metrics.jsonl", "7.txt"}
    assert {entry.name for entry in tmp_path.iterdir()} == expected


def test_one_checkpoint_is_the_newest(tmp_path, opened):
    checkpoints = opened(tmp_path, max_checkpoints=1)
    for step in (1, 2, 3):
        save(checkpoints, step, float(step))
        assert checkpoints.steps() == [step]


def test_a_folder_opens_for_saving_whatever_its_files_hold(tmp_path, opened):
    checkpoints = opened(tmp_path)
    for step in (1, 2):
        save(checkpoints, step, 1.0)
    checkpoints.close()
    for file in files_of(tmp_path / "1"):
        file.write_bytes(b"\xff{]")
    (tmp_path / "3").mkdir()
    checkpoints = opened(tmp_path)
    assert checkpoints.best() == 2
    assert save(checkpoints, 4).error is None
    assert checkpoints.steps() == [2, 3, 4]


# Round trip.


def test_the_state_comes_back_bit_for_bit_although_it_was_donated(tmp_path, opened, monkeypatch):
    checkpoints = opened(tmp_path)
    state, expected = make_state(5), make_state(5)
    donated = threading.Event()
    # The worker looks at the copy only when the original has been overwritten.
    monkeypatch.setattr(checkpoint, "_refuse_a_full_disk", lambda *_: donated.wait(60))
    assert checkpoints.save(5, state, META, val_loss=2.5)
    overwrite = jax.jit(lambda s: jax.tree.map(lambda x: (x + 1).astype(x.dtype), s), donate_argnums=0)
    for _ in range(3):
        before, state = state, overwrite(state)
        assert before.params["half"].is_deleted()
    jax.block_until_ready(state)
    donated.set()

    restored, meta = checkpoints.restore(5, abstract(expected))
    assert meta == META
    assert_same_bits(restored, expected)
    kernel = restored.params["block_0"]["mlp_up"]["kernel"]
    assert kernel.sharding == expected.params["block_0"]["mlp_up"]["kernel"].sharding


def test_without_shardings_a_plain_eval_shape_is_enough(tmp_path, opened):
    checkpoints = opened(tmp_path)
    save(checkpoints, 5)
    restored, _ = checkpoints.restore(5, jax.eval_shape(lambda state: state, make_state(5)))
    assert_same_bits(restored, make_state(5))


def test_meta_and_losses_are_those_of_the_moment_of_the_save(tmp_path, opened):
    checkpoints = opened(tmp_path)
    meta = {"alerts": [1]}
    checkpoints.save(1, make_state(1), meta)
    meta["alerts"].append(2)
    assert checkpoints.restore(1, abstract(make_state(1)))[1] == {"alerts": [1]}


def test_a_device_without_room_for_a_copy_is_left_alone(tmp_path, opened, monkeypatch):
    monkeypatch.setattr(checkpoint, "_has_room_for_a_copy", lambda leaves: False)
    checkpoints = opened(tmp_path)
    assert save(checkpoints, 5).error is None
    assert_same_bits(checkpoints.restore(5, abstract(make_state(5)))[0], make_state(5))


def test_room_is_what_the_device_never_used():
    class Device:
        def __init__(self, memory):
            self.memory_stats = lambda: memory

    class Shard:
        def __init__(self, memory, n_bytes):
            self.device, self.data = Device(memory), np.zeros(n_bytes, np.uint8)

    class Leaf:
        def __init__(self, *shards):
            self.addressable_shards = shards

    room = checkpoint._has_room_for_a_copy
    assert room([Leaf(Shard(None, 100))])
    assert room([Leaf(Shard({"bytes_limit": 1000, "peak_bytes_in_use": 800, "bytes_in_use": 10}, 100))])
    assert not room([Leaf(Shard({"bytes_limit": 1000, "peak_bytes_in_use": 900, "bytes_in_use": 10}, 100))])


def test_the_digests_are_plain_sha256_of_dtype_shape_and_bytes(tmp_path, opened):
    checkpoints = opened(tmp_path)
    save(checkpoints, 3, val_loss=math.nan)
    document = json.loads((tmp_path / "3" / "meta" / "meta.json").read_text())
    assert (document["step"], document["val_loss"], document["meta"]) == (3, None, META)
    half = np.asarray(make_state(3).params["half"])
    expected = hashlib.sha256(b"bfloat16[3, 3]" + half.tobytes()).hexdigest()
    assert document["arrays"]["params/half"] == {"dtype": "bfloat16", "shape": [3, 3], "sha256": expected}
    assert len(document["arrays"]) == len(jax.tree.leaves(make_state(3)))


def test_a_step_is_saved_once(tmp_path, opened):
    checkpoints = opened(tmp_path)
    save(checkpoints, 1)
    assert not checkpoints.save(1, make_state(9), META)
    assert_same_bits(checkpoints.restore(1, abstract(make_state(1)))[0], make_state(1))


# Refusals.


def change(state: State, **changes: Any) -> State:
    return abstract(state._replace(**changes))


@pytest.mark.parametrize(
    "wanted, expected",
    [
        (lambda s: change(s, step=jnp.float32(1)), "step is int32[], wanted is float32[]"),
        (
            lambda s: change(s, params={**s.params, "half": s.params["half"].astype(jnp.float32)}),
            "params/half is bfloat16[3, 3], wanted is float32[3, 3]",
        ),
        (
            lambda s: change(s, params=make_state(1, width=9).params),
            "params/block_0/mlp_up/kernel is float32[4, 8], wanted is float32[4, 9]",
        ),
        (lambda s: change(s, params={**s.params, "more": s.step}), "params/more is missing in it"),
        (lambda s: change(s, params={"half": s.params["half"]}), "params/embed/embedding is only in it"),
        (lambda s: change(s, opt_state=()), "opt_state/1/0/count is only in it"),
        (
            lambda s: change(s, monitor=s.monitor._replace(empty=jnp.zeros((3, 0)))),
            "monitor/empty is float32[0, 3], wanted is float32[3, 0]",
        ),
    ],
)
def test_another_state_is_refused_by_the_names_of_its_leaves(tmp_path, opened, wanted, expected):
    checkpoints = opened(tmp_path)
    save(checkpoints, 1)
    for attempt in (
        lambda state: checkpoints.restore(1, state),
        lambda state: checkpoints.restore_newest(state, no_damage),
    ):
        with pytest.raises(UserError) as error:
            attempt(wanted(make_state(1)))
        assert expected in str(error.value)
        assert not isinstance(error.value, checkpoint.DamagedCheckpoint)
    assert checkpoints.steps() == [1]


def test_impossible_requests_name_what_is_possible(tmp_path, opened):
    checkpoints = opened(tmp_path)
    assert checkpoints.restore_newest(abstract(make_state(1)), no_damage) is None
    assert checkpoints.latest() is None and checkpoints.best() is None
    with pytest.raises(UserError, match="holds no checkpoint"):
        checkpoint.load_params(tmp_path)
    for step in (1, 2):
        save(checkpoints, step)
    with pytest.raises(UserError, match="no checkpoint of step 3: it has 1, 2"):
        checkpoints.restore(3, abstract(make_state(1)))
    with pytest.raises(UserError, match="there is no checkpoint folder"):
        checkpoint.load_params(tmp_path / "absent")
    with pytest.raises(UserError, match="step 2 was asked for"):
        checkpoint.load_params(tmp_path / "1", step=2)
    with pytest.raises(UserError, match="max_checkpoints is 0"):
        checkpoint.open_checkpoints(tmp_path, 0)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written to"):
        checkpoint.open_checkpoints(tmp_path / "file", 3)


# Damage.


def test_every_flipped_bit_of_every_file_is_detected(tmp_path, opened):
    checkpoints = opened(tmp_path)
    save(checkpoints, 1)
    expected, rng = make_state(1), random.Random(0)
    files = files_of(tmp_path / "1")
    assert len(files) >= 4
    for file in files:
        content = file.read_bytes()
        for _ in range(6):
            damaged = bytearray(content)
            damaged[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
            file.write_bytes(damaged)
            with pytest.raises(checkpoint.DamagedCheckpoint) as caught:
                checkpoints.restore(1, abstract(expected))
            assert str(tmp_path / "1") in str(caught.value) and "\n" not in str(caught.value)
            assert file.name in str(caught.value)
        file.write_bytes(content)
    assert_same_bits(checkpoints.restore(1, abstract(expected))[0], expected)


def test_what_is_as_it_was_written_is_never_called_damaged(tmp_path, opened, monkeypatch):
    """A reader that fails says nothing about the files: nothing may be set aside for it."""
    checkpoints = opened(tmp_path)
    save(checkpoints, 1)

    class Newer:
        def restore(self, *args, **kwargs):
            raise ValueError("unknown layout")

    monkeypatch.setattr(checkpoint, "_array_handler", Newer)
    with pytest.raises(UserError, match="its files are as they were written .*unknown layout.*: use the versions"):
        checkpoints.restore_newest(abstract(make_state(1)), no_damage)
    assert checkpoints.steps() == [1]


@pytest.mark.parametrize("version", [1, 2])
def test_checkpoints_of_earlier_versions_are_read(tmp_path, opened, version):
    checkpoints = opened(tmp_path)
    save(checkpoints, 1, 2.5)
    file = tmp_path / "1" / "meta" / "meta.json"
    document = json.loads(file.read_text())
    for name in ("sha256", "files", "interim"):
        del document[name]
    document["schema_version"] = version
    embedding = document["arrays"]["params/embed/embedding"]
    if version == 2:
        array = np.asarray(make_state(1).params["embed"]["embedding"])
        embedding["shards"] = [
            {"index": [[a, b], [0, 8]], "sha256": checkpoint._digest(array[a:b])} for a, b in ((0, 15), (15, 40))
        ]
        del embedding["sha256"]
    digest = hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()
    file.write_text(json.dumps({**document, "sha256": digest}))
    state, meta = checkpoints.restore(1, abstract(make_state(1)))
    assert_same_bits(state, make_state(1))
    assert meta == META and opened(tmp_path).best() == 1
    break_arrays(tmp_path / "1")
    with pytest.raises(checkpoint.DamagedCheckpoint, match="params/embed/embedding"):
        checkpoints.restore(1, abstract(make_state(1)))


@pytest.mark.parametrize("kind", ["flipped", "truncated", "zeroed", "missing", "emptied", "no meta", "false meta"])
def test_a_damaged_newest_is_named_set_aside_and_the_next_is_used(tmp_path, opened, kind):
    checkpoints = opened(tmp_path)
    for step in (1, 2, 3):
        save(checkpoints, step)
    path = tmp_path / "3"
    file, _ = find_bytes(path, make_state(3).params["embed"]["embedding"])
    meta = path / "meta" / "meta.json"
    if kind == "flipped":
        break_arrays(path)
    elif kind == "truncated":
        os.truncate(file, file.stat().st_size // 2)
    elif kind == "zeroed":
        file.write_bytes(bytes(file.stat().st_size))
    elif kind == "missing":
        file.unlink()
    elif kind == "emptied":
        for file in files_of(path):
            file.unlink()
    elif kind == "no meta":
        meta.unlink()
    elif kind == "false meta":
        meta.write_text(meta.read_text().replace('"step": 3', '"step": 2'))
    said = []
    step, state, _ = checkpoints.restore_newest(abstract(make_state(2)), lambda *args: said.append(args))
    assert step == 2
    assert_same_bits(state, make_state(2))
    assert [s for s, _ in said] == [3] and said[0][1]
    assert checkpoints.steps() == [1, 2] and (tmp_path / "damaged" / "3-1").is_dir()
    # The step is reached again, and the rotation counts right.
    assert save(checkpoints, 3).error is None
    assert save(checkpoints, 4).error is None
    assert checkpoints.steps() == [2, 3, 4]


def test_the_same_step_damaged_twice_is_set_aside_twice(tmp_path, opened):
    checkpoints = opened(tmp_path)
    save(checkpoints, 1)
    for k in (1, 2):
        save(checkpoints, 2)
        break_arrays(tmp_path / "2")
        assert checkpoints.restore_newest(abstract(make_state(1)), lambda *_: None)[0] == 1
        assert (tmp_path / "damaged" / f"2-{k}").is_dir()


def test_only_damaged_ones_is_an_error_each_time_and_moves_nothing(tmp_path, opened):
    checkpoints = opened(tmp_path)
    for step in (1, 2):
        save(checkpoints, step)
        break_arrays(tmp_path / str(step))
    before = files_of(tmp_path)
    for _ in range(2):
        said = []
        with pytest.raises(UserError, match=r"every checkpoint in .* is damaged \(steps 1, 2\)"):
            checkpoints.restore_newest(abstract(make_state(1)), lambda step, reason: said.append(step))
        assert said == [2, 1] and files_of(tmp_path) == before
    # Nor does a folder whose last ones are all set aside look like a new one.
    (tmp_path / "damaged").mkdir()
    for step in (1, 2):
        (tmp_path / str(step)).rename(tmp_path / "damaged" / f"{step}-1")
    with pytest.raises(UserError, match="set aside as damaged"):
        checkpoints.restore_newest(abstract(make_state(1)), no_damage)


def test_going_back_to_a_step_keeps_the_later_ones_aside(tmp_path, opened):
    checkpoints = opened(tmp_path)
    for step, val_loss in ((1, 3.0), (2, 2.0), (3, 1.0)):
        save(checkpoints, step, val_loss)
    assert checkpoints.set_aside_newer_than(1) == [2, 3]
    assert checkpoints.steps() == [1] and checkpoints.best() == 1
    for step in (2, 3, 4):
        save(checkpoints, step)
    assert checkpoints.steps() == [1, 3, 4]
    aside = tmp_path / "superseded" / "3-1"
    assert_same_bits(checkpoint.restore_path(aside, abstract(make_state(3)))[0], make_state(3))


# Failing saves.


def test_a_failed_save_is_told_cleaned_up_and_the_next_one_works(tmp_path, opened, capfd):
    checkpoints = opened(tmp_path, max_checkpoints=2)
    for step in (1, 2):
        save(checkpoints, step)
    # Writes fail as they do on a full disk; but those of meta.json and of the smaller arrays do not.
    arrays = np.random.default_rng(0).normal(size=(20, 50_000)).astype(np.float32)
    state = {"small": jnp.ones(3), "params": {f"w{i}": jnp.asarray(array) for i, array in enumerate(arrays)}}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        checkpoints.save(3, state, META)
        checkpoints.wait()
        (outcome,) = checkpoints.check()
        anomaly = checkpoint.save_anomaly(tmp_path, 3, state, META)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    reason = os.strerror(errno.EFBIG)
    assert outcome.error == f"checkpoint 3 was not saved to {tmp_path / '3'}: {reason}"
    aside = tmp_path / "anomaly" / "3"
    assert anomaly.error == f"the anomaly checkpoint of step 3 was not saved to {aside}: {reason}"
    assert checkpoints.steps() == [1, 2]
    assert {entry.name for entry in tmp_path.rglob("*") if "tmp" in entry.name} == set()
    # Those that the failed save would have replaced are still rotated out by the next.
    assert save(checkpoints, 3).error is None
    assert checkpoints.steps() == [2, 3]
    assert capfd.readouterr() == ("", "")


def test_what_is_rotated_out_is_renamed_whole_before_it_is_deleted(tmp_path, opened, monkeypatch):
    checkpoints = opened(tmp_path, max_checkpoints=1)
    save(checkpoints, 1)
    monkeypatch.setattr(checkpoint.shutil, "rmtree", lambda *args, **kwargs: None)
    save(checkpoints, 2)
    assert checkpoints.steps() == [2]
    renamed = tmp_path / ".deleted" / "1"
    assert_same_bits(checkpoint.restore_path(renamed, abstract(make_state(1)))[0], make_state(1))


def test_a_rotation_that_fails_is_told_and_made_up_for(tmp_path, opened):
    checkpoints = opened(tmp_path, max_checkpoints=2)
    for step, val_loss in ((1, 3.0), (2, 2.0)):
        save(checkpoints, step, val_loss)
    (tmp_path / ".deleted").write_text("in the way")
    outcome = save(checkpoints, 3, 1.0)
    assert outcome.error.startswith("checkpoint 3 was saved, but older ones were not removed: ")
    assert checkpoints.steps() == [1, 2, 3] and checkpoints.best() == 3
    (tmp_path / ".deleted").unlink()
    assert save(checkpoints, 4, 4.0).error is None
    assert checkpoints.steps() == [3, 4]


def test_a_disk_without_room_is_told_before_anything_is_written(tmp_path, opened, monkeypatch):
    checkpoints = opened(tmp_path)
    n_bytes = sum(x.nbytes for x in jax.tree.leaves(make_state(1)))
    usage = shutil.disk_usage(tmp_path)
    for free, error in ((n_bytes - 1, "checkpoint 1 was not saved"), (n_bytes, None)):
        monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda path: usage._replace(free=free))
        outcome = save(checkpoints, 1)
        assert (error is None) == (outcome.error is None)
        if error:
            assert outcome.error.startswith(error) and "0 MB are free" in outcome.error
            assert list(tmp_path.iterdir()) == []


def test_a_save_that_cannot_be_described_is_an_outcome_too(tmp_path, opened):
    checkpoints = opened(tmp_path)
    for state, meta in ((make_state(1), {"set": {1}}), ({"a/b": jnp.zeros(2)}, {}), ({"a": "text"}, {})):
        assert checkpoints.save(1, state, meta)
        (outcome,) = checkpoints.check()
        assert outcome.error and checkpoints.steps() == []


def test_check_does_not_wait_and_save_does_when_enough_are_under_way(tmp_path, opened, monkeypatch):
    monkeypatch.setattr(checkpoint, "SAVES_AT_ONCE", 1)
    checkpoints = opened(tmp_path)
    describe = checkpoint._describe

    def slow(*args):
        time.sleep(0.3)
        return describe(*args)

    monkeypatch.setattr(checkpoint, "_describe", slow)
    started = time.perf_counter()
    checkpoints.save(1, make_state(1), META)
    assert checkpoints.check() == [] and checkpoints.steps() == []
    checkpoints.save(2, make_state(2), META)
    assert time.perf_counter() - started > 0.3
    checkpoints.wait()
    assert [outcome.step for outcome in checkpoints.check()] == [1, 2]
    assert checkpoints.check() == []


# Several saves under way.


@pytest.fixture
def gates(monkeypatch):
    """Holds each save before it writes until its step's gate is opened."""
    held = {step: threading.Event() for step in range(1, 7)}
    write = checkpoint._write

    def gated(agreement, path, step, *args):
        assert held[step].wait(60)
        return write(agreement, path, step, *args)

    monkeypatch.setattr(checkpoint, "_write", gated)
    yield held
    for gate in held.values():
        gate.set()


def wait_until(condition) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


@pytest.mark.parametrize("order", [(1, 2, 3), (3, 2, 1), (2, 3, 1), (3, 1, 2)])
@pytest.mark.parametrize("best", [1, 2, 3])
def test_in_whatever_order_saves_end_the_same_remain(tmp_path, opened, gates, order, best):
    checkpoints = opened(tmp_path, max_checkpoints=2)
    val_losses = {step: 1.0 if step == best else 2.0 + step for step in (1, 2, 3)}
    for step, val_loss in val_losses.items():
        assert checkpoints.save(step, make_state(step), META, val_loss)
    complete = {}
    for step in order:
        gates[step].set()
        complete[step] = val_losses[step]
        told = []
        wait_until(lambda told=told: told.extend(checkpoints.check()) or told)
        assert [(outcome.step, outcome.error) for outcome in told] == [(step, None)]
        # Whatever is on the disk now is what a resume after a kill would find.
        standings = {step: checkpoint.Standing(val_loss) for step, val_loss in complete.items()}
        assert checkpoints.steps() == sorted(checkpoint.kept_steps(standings, 2))
        assert checkpoints.latest() == max(complete)
    assert_same_bits(checkpoints.restore(best, abstract(make_state(best)))[0], make_state(best))
    assert {entry.name for entry in tmp_path.iterdir()} == {str(step) for step in checkpoints.steps()}


def test_a_save_waits_for_a_free_place_only_and_says_so(tmp_path, opened, gates, monkeypatch):
    monkeypatch.setattr(checkpoint, "SAVES_AT_ONCE", 2)
    checkpoints = opened(tmp_path)
    for step in (1, 2):
        checkpoints.save(step, make_state(step), META)
    assert checkpoints.check() == []
    threading.Timer(0.3, gates[2].set).start()
    checkpoints.save(3, make_state(3), META)  # goes on when the second has ended, though not the first
    assert [outcome.step for outcome in checkpoints.check()] == [2] and checkpoints.steps() == [2]
    for gate in gates.values():
        gate.set()
    checkpoints.wait()
    first, third = checkpoints.check()
    assert (first.step, third.step) == (1, 3)
    assert first.blocked_s < 0.2 < third.blocked_s
    assert checkpoints.steps() == [1, 2, 3]


def test_a_failed_save_leaves_the_one_beside_it_alone(tmp_path, opened, monkeypatch):
    checkpoints = opened(tmp_path)
    describe, failed = checkpoint._describe, threading.Event()

    def one_fails(step, *args):
        if step == 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        assert failed.wait(60)
        return describe(step, *args)

    monkeypatch.setattr(checkpoint, "_describe", one_fails)
    checkpoints.save(1, make_state(1), META)
    wait_until(lambda: list(tmp_path.glob("1.*")))
    checkpoints.save(2, make_state(2), META)
    told = []
    wait_until(lambda: told.extend(checkpoints.check()) or told)
    assert "checkpoint 2 was not saved" in told[0].error and "No space left" in told[0].error
    assert [entry.name for entry in tmp_path.iterdir()] == ["1.orbax-checkpoint-tmp"]
    failed.set()
    checkpoints.wait()
    assert [(outcome.step, outcome.error) for outcome in checkpoints.check()] == [(1, None)]
    assert_same_bits(checkpoints.restore(1, abstract(make_state(1)))[0], make_state(1))


def test_a_step_that_is_under_way_is_not_saved_again(tmp_path, opened, gates):
    checkpoints = opened(tmp_path)
    checkpoints.save(1, make_state(1), META)
    threading.Timer(0.1, gates[1].set).start()
    assert not checkpoints.save(1, make_state(9), META)
    assert_same_bits(checkpoints.restore(1, abstract(make_state(1)))[0], make_state(1))


def test_what_saves_hold_on_the_host_is_bounded(tmp_path, opened, gates, monkeypatch):
    n_bytes = sum(x.nbytes for x in jax.tree.leaves(make_state(1)))
    memory = checkpoint._HostMemory(1.5 * n_bytes)
    monkeypatch.setattr(checkpoint, "_HOST_MEMORY", memory)
    first, second = opened(tmp_path / "a"), opened(tmp_path / "b")
    first.save(1, make_state(1), META)
    threading.Timer(0.3, gates[1].set).start()
    second.save(2, make_state(2), META)  # waits for the memory of the other folder's save
    assert first.check()[0].step == 1
    gates[2].set()
    second.wait()
    assert second.check()[0].blocked_s > 0.2
    # Nothing stays taken after failures; and one larger than the bound is let through alone.
    gates[3].set()
    gates[4].set()
    second.save(3, {"a": "text"}, META)
    memory.limit = n_bytes / 2
    assert second.save(4, make_state(4), META)
    second.wait()
    failed, saved = second.check()
    assert "AttributeError" in failed.error and saved.error is None


# Beside the rotation.


def test_an_anomaly_stays_and_is_read_like_any_other(tmp_path, opened):
    outcome = checkpoint.save_anomaly(tmp_path, 7, make_state(7), META)
    assert outcome.error is None and outcome.path == tmp_path / "anomaly" / "7"
    assert checkpoint.save_anomaly(tmp_path, 7, make_state(8), META).error is None  # the first one stays
    checkpoints = opened(tmp_path, max_checkpoints=1)
    for step in (8, 9):
        save(checkpoints, step)
    state, meta = checkpoint.restore_path(outcome.path, abstract(make_state(7)))
    assert meta == META
    assert_same_bits(state, make_state(7))
    assert_same_bits(checkpoint.load_params(outcome.path)[0], make_state(7).params)


def test_parameters_are_read_without_a_model(tmp_path, opened, monkeypatch):
    checkpoints = opened(tmp_path)
    for step in (1, 2):
        save(checkpoints, step)
    monkeypatch.chdir(tmp_path.parent)
    for path, step, expected in (
        (tmp_path, None, 2),
        (tmp_path, 1, 1),
        (tmp_path / "1", None, 1),
        (tmp_path.name, 2, 2),
        (str(tmp_path / "2"), 2, 2),
    ):
        params, meta = checkpoint.load_params(path, step)
        assert meta == META
        assert_same_bits(params, make_state(expected).params)
    break_arrays(tmp_path / "2")
    with pytest.raises(checkpoint.DamagedCheckpoint):
        checkpoint.load_params(tmp_path)
    assert checkpoints.steps() == [1, 2]  # reading moves nothing


# Kills.


def test_opening_purges_only_the_remains_of_killed_runs(tmp_path, opened):
    checkpoints = opened(tmp_path)
    save(checkpoints, 1)
    checkpoints.close()
    unfinished = "orbax-checkpoint-tmp/state"
    for remains in (f"2.{unfinished}", ".deleted/0/state", f"anomaly/3.{unfinished}"):
        (tmp_path / remains).mkdir(parents=True)
        (tmp_path / remains / "data").write_text("half")
    (tmp_path / "notes").mkdir()
    checkpoints = opened(tmp_path)
    assert {str(p.relative_to(tmp_path)) for p in tmp_path.glob("*")} == {"1", "anomaly", "notes"}
    assert list((tmp_path / "anomaly").iterdir()) == []
    assert checkpoints.steps() == [1]


def train_until_killed(run_dir: str) -> None:
    """Resumes, then saves without pause. Run in a process of its own."""
    checkpoints = checkpoint.open_checkpoints(run_dir, 2)
    newest = checkpoints.restore_newest(abstract(make_state(0)), no_damage)
    step = newest[0] if newest else 0
    print("ready", flush=True)
    while True:
        step += 1
        checkpoints.save(step, make_state(step), META, val_loss=float(step % 5))
        for outcome in checkpoints.check():
            if outcome.error:
                print(outcome.error, flush=True)


def test_whatever_is_listed_after_kill_9_is_whole(tmp_path):
    rng = random.Random(0)
    python_path = os.pathsep.join(filter(None, sys.path))
    environment = {**os.environ, "PYTHONPATH": python_path, "PYTHONWARNINGS": "error"}
    code = f"import test_checkpoint; test_checkpoint.train_until_killed({str(tmp_path)!r})"
    newest = 0
    for _ in range(3):
        child = subprocess.Popen(
            [sys.executable, "-c", code],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).parent,
        )
        assert child.stdout.readline() == "ready\n", child.communicate()[1]
        time.sleep(rng.uniform(0.3, 1.0))
        child.send_signal(signal.SIGKILL)
        assert child.communicate() == ("", "")  # no failed save, and not a word from Orbax
        steps = checkpoint.list_steps(tmp_path)
        assert steps and steps[-1] >= newest and len(steps) <= 2 + checkpoint.SAVES_AT_ONCE
        newest = steps[-1]
        for step in steps:
            state, _ = checkpoint.restore_path(tmp_path / str(step), abstract(make_state(step)))
            assert_same_bits(state, make_state(step))
