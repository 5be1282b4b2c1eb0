"""Checkpoints: what is kept, what is refused, what survives a kill, a full disk and a flipped bit; plain Orbax."""

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
import orbax.checkpoint as ocp
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from altgrad_jax.errors import UserError
from altgrad_jax.run import checkpoint
from altgrad_jax.run.checkpoint import Standing

META = {"config": {"seed": 42, "tags": ["a", "b"]}, "wandb_run_id": "x1", "rate": 0.1, "é": None}
V3 = Path(__file__).parent / "fixtures" / "checkpoint_v3"  # written by the program of that version


class Monitor(NamedTuple):
    bad_steps: Any
    losses_W: Any
    streak: Any
    empty: Any
    nothing: Any = None


class State(NamedTuple):
    step: Any
    params: Any
    opt_state: Any
    monitor: Any


def make_state(step: int, width: int = 8) -> State:
    """A state with the kinds of leaves that a run has or might have: bfloat16, scalars, no elements, NaN, None."""
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


def abstract(state: Any) -> Any:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)


def assert_same_bits(actual: Any, expected: Any) -> None:
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        a, b = np.asarray(a), np.asarray(b)
        assert (a.dtype, a.shape, a.tobytes()) == (b.dtype, b.shape, b.tobytes())


def save(checkpoints, step, val_loss=None, state=None, **kwargs) -> checkpoint.SaveOutcome:
    assert checkpoints.save(step, make_state(step) if state is None else state, META, val_loss, **kwargs)
    checkpoints.wait()
    (outcome,) = checkpoints.check()
    return outcome


def folder_with(run_dir, *steps, max_checkpoints=3, **kwargs) -> checkpoint.Checkpoints:
    checkpoints = checkpoint.open_checkpoints(run_dir, max_checkpoints)
    for step in steps:
        assert save(checkpoints, step, **kwargs).error is None
    return checkpoints


def no_damage(step: int, reason: str) -> None:
    raise AssertionError(f"checkpoint {step} was called damaged: {reason}")


def verified_files(path: Path) -> list[Path]:
    """All files but Orbax's own notes, which it writes after the seal and nobody reads."""
    notes = ("_CHECKPOINT_METADATA", "commit_success.txt")
    files = [file for file in path.rglob("*") if file.is_file()]
    return sorted(f for f in files if f.name not in notes or f.parent.name == "state")


def flip(path: Path, at: int, bit: int = 0) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1 << bit
    path.write_bytes(content)


def break_arrays(path: Path) -> None:
    """Flips one bit of one parameter; nothing is compressed."""
    content = np.asarray(make_state(int(path.name)).params["embed"]["embedding"]).tobytes()
    ((file, at),) = [(f, at) for f in verified_files(path) if (at := f.read_bytes().find(content)) >= 0]
    flip(file, at + 3)


# Which are kept.


def kept_by_brute_force(standings, n):
    """The definition, read slowly."""
    regular = sorted(step for step, standing in standings.items() if not standing.interim)
    finite = [s for s in regular if standings[s].val_loss is not None and math.isfinite(standings[s].val_loss)]
    best = [s for s in finite if all(standings[s].val_loss <= standings[t].val_loss for t in finite)][-1:]
    kept = set(regular[-1:] if n == 1 else best)
    for step in reversed(regular):
        if len(kept) < n:
            kept.add(step)
    newest = max(standings, default=None)
    return kept | ({newest} if newest is not None and standings[newest].interim else set())


LOSSES = st.sampled_from([None, math.nan, math.inf, -math.inf, 1.0, 2.0, 3.0])


@given(st.dictionaries(st.integers(0, 9), st.builds(Standing, LOSSES, st.booleans())), st.integers(1, 4))
def test_the_best_and_the_newest_are_kept_and_an_interim_one_beside_them(standings, n):
    assert checkpoint.kept_steps(standings, n) == kept_by_brute_force(standings, n)


@settings(max_examples=5, deadline=None, derandomize=True)
@given(st.lists(st.tuples(LOSSES, st.booleans(), st.booleans()), min_size=4, max_size=6), st.integers(1, 3))
def test_the_disk_holds_what_is_kept_also_after_restarts(tmp_path_factory, saves, n):
    run_dir, alive, state = tmp_path_factory.mktemp("run"), {}, {"x": jnp.ones(3)}
    (run_dir / "anomaly" / "1").mkdir(parents=True)
    (run_dir / "7.txt").write_text("")
    checkpoints = checkpoint.open_checkpoints(run_dir, n)
    for step, (loss, interim, restart) in enumerate(saves):
        assert save(checkpoints, step, loss, state, interim=interim).error is None
        alive[step] = Standing(loss, interim)
        alive = {step: alive[step] for step in kept_by_brute_force(alive, n)}
        assert checkpoints.steps() == sorted(alive)
        if restart:
            checkpoints = checkpoint.open_checkpoints(run_dir, n)
    assert {entry.name for entry in run_dir.iterdir()} == {*map(str, alive), "anomaly", "7.txt"}


def test_a_folder_opens_for_saving_whatever_its_files_hold(tmp_path):
    folder_with(tmp_path, 1, 2, val_loss=1.0)
    for file in verified_files(tmp_path / "1"):
        file.write_bytes(b"\xff{]")
    (tmp_path / "3").mkdir()
    assert folder_with(tmp_path, 4).steps() == [2, 3, 4]


# Round trip.


def test_the_state_comes_back_bit_for_bit_although_it_was_donated(tmp_path, monkeypatch):
    checkpoints = checkpoint.open_checkpoints(tmp_path, 3)
    state, expected = make_state(5), make_state(5)
    donated, write = threading.Event(), checkpoint._write
    # The worker looks at the copy only when the original has been overwritten.
    monkeypatch.setattr(checkpoint, "_write", lambda *args: donated.wait(60) and write(*args))
    meta = {**META, "alerts": [1]}
    assert checkpoints.save(5, state, meta, val_loss=2.5)
    meta["alerts"].append(2)
    overwrite = jax.jit(lambda s: jax.tree.map(lambda x: (x + 1).astype(x.dtype), s), donate_argnums=0)
    for _ in range(3):
        before, state = state, overwrite(state)
        assert before.params["half"].is_deleted()
    jax.block_until_ready(state)
    donated.set()
    restored, meta = checkpoints.restore(5, abstract(expected))
    assert meta == {**META, "alerts": [1]}
    assert_same_bits(restored, expected)
    assert restored.params["half"].sharding == expected.params["half"].sharding
    without_shardings = jax.eval_shape(lambda: expected)
    assert_same_bits(checkpoint.restore_path(tmp_path / "5", without_shardings)[0], expected)


@pytest.mark.parametrize("share, waits", [(1.26, False), (1.24, True)])
def test_without_room_for_a_copy_the_save_has_ended_when_the_caller_goes_on(tmp_path, monkeypatch, share, waits):
    class Device:
        def memory_stats(self):
            return {"bytes_limit": 10**6, "peak_bytes_in_use": 10**6 - int(share * n_bytes), "bytes_in_use": 10}

    n_bytes = sum(x.nbytes for x in jax.tree.leaves(make_state(1)))
    go_on, write = threading.Event(), checkpoint._write
    monkeypatch.setattr(jax, "local_devices", lambda: [Device()])
    monkeypatch.setattr(checkpoint, "_write", lambda *args: (waits or go_on.wait(60)) and write(*args))
    checkpoints = checkpoint.open_checkpoints(tmp_path, 3)
    checkpoints.save(1, make_state(1), META)
    assert checkpoints.is_saving() != waits
    go_on.set()
    assert_same_bits(checkpoints.restore(1, abstract(make_state(1)))[0], make_state(1))


def test_the_digests_are_plain_sha256_of_dtype_shape_and_bytes(tmp_path):
    folder_with(tmp_path, 3, val_loss=math.nan)
    document = json.loads((tmp_path / "3" / "meta" / "metadata").read_text())
    assert (document["schema_version"], document["step"], document["val_loss"]) == (4, 3, None)
    assert document["meta"] == META and not (tmp_path / "3" / "metrics").exists()
    half = np.asarray(make_state(3).params["half"])
    expected = hashlib.sha256(b"bfloat16[3, 3]" + half.tobytes()).hexdigest()
    assert document["arrays"]["params/half"] == {"dtype": "bfloat16", "shape": [3, 3], "sha256": expected}
    assert len(document["arrays"]) == len(jax.tree.leaves(make_state(3)))
    assert document["files"].keys() == {
        file.relative_to(tmp_path / "3").as_posix() for file in verified_files(tmp_path / "3" / "state")
    }


def test_a_step_is_saved_once(tmp_path):
    checkpoints = folder_with(tmp_path, 1)
    assert not checkpoints.save(1, make_state(9), META)
    assert checkpoints.save(2, make_state(2), META) and not checkpoints.save(2, make_state(9), META)
    for step in (1, 2):
        assert_same_bits(checkpoints.restore(step, abstract(make_state(step)))[0], make_state(step))


def test_arrays_are_read_without_a_model(tmp_path, monkeypatch):
    folder_with(tmp_path, 1, 2)
    monkeypatch.chdir(tmp_path.parent)
    for path, step, expected in (
        (tmp_path, None, 2),
        (tmp_path, 1, 1),
        (tmp_path / "1", None, 1),
        (tmp_path.name, 2, 2),
    ):
        arrays, meta = checkpoint.load_arrays(path, step, ("params/", "monitor/empty"))
        assert meta == META
        assert_same_bits(arrays["params"], make_state(expected).params)
        assert arrays["monitor"].keys() == {"empty"} and arrays["monitor"]["empty"].shape == (0, 3)
    break_arrays(tmp_path / "2")
    with pytest.raises(checkpoint.DamagedCheckpoint):
        checkpoint.load_arrays(tmp_path, None, ("params/",))
    assert checkpoint.list_steps(tmp_path) == [1, 2]  # reading moves nothing


# Refusals.


@pytest.mark.parametrize(
    "changes, expected",
    [
        (lambda s: {"step": jnp.float32(1)}, "step is int32[], wanted is float32[]"),
        (
            lambda s: {"params": {**s.params, "half": s.params["half"].astype(jnp.float32)}},
            "params/half is bfloat16[3, 3], wanted is float32[3, 3]",
        ),
        (
            lambda s: {"params": make_state(1, width=9).params},
            "params/block_0/mlp_up/kernel is float32[4, 8], wanted is float32[4, 9]",
        ),
        (lambda s: {"params": {**s.params, "more": s.step}}, "params/more is missing in it"),
        (lambda s: {"opt_state": ()}, "opt_state/1/0/count is only in it"),
        (
            lambda s: {"monitor": s.monitor._replace(empty=jnp.zeros((3, 0)))},
            "monitor/empty is float32[0, 3], wanted is float32[3, 0]",
        ),
    ],
)
def test_another_state_is_refused_by_the_names_of_its_leaves(tmp_path, changes, expected):
    checkpoints = folder_with(tmp_path, 1)
    state = make_state(1)
    with pytest.raises(UserError) as error:
        checkpoints.restore_newest(abstract(state._replace(**changes(state))), no_damage)
    assert expected in str(error.value) and not isinstance(error.value, checkpoint.DamagedCheckpoint)
    assert checkpoints.steps() == [1]


def test_impossible_requests_name_what_is_possible(tmp_path):
    assert checkpoint.open_checkpoints(tmp_path, 3).restore_newest(abstract(make_state(1)), no_damage) is None
    with pytest.raises(UserError, match="holds no checkpoint, it has none"):
        checkpoint.load_arrays(tmp_path, None, ("params/",))
    checkpoints = folder_with(tmp_path, 1, 2)
    with pytest.raises(UserError, match="no checkpoint of step 3, it has 1, 2"):
        checkpoints.restore(3, abstract(make_state(1)))
    with pytest.raises(UserError, match="step 2 was asked for"):
        checkpoint.load_arrays(tmp_path / "1", 2, ("params/",))
    with pytest.raises(UserError, match="max_checkpoints is 0"):
        checkpoint.open_checkpoints(tmp_path, 0)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written to"):
        checkpoint.open_checkpoints(tmp_path / "file", 3)


# Damage.


@pytest.mark.parametrize("way", ["flip", "truncate", "delete"])
def test_every_damaged_file_is_named(tmp_path, way):
    checkpoints, rng = folder_with(tmp_path, 1, val_loss=2.0), random.Random(0)
    files = verified_files(tmp_path / "1")
    assert {"metadata", "metrics", "manifest.ocdbt", "_METADATA"} <= {file.name for file in files}
    for file in files:
        content = file.read_bytes()
        for _ in range(6 if way == "flip" else 1):
            if way == "flip":
                flip(file, rng.randrange(len(content)), rng.randrange(8))
            elif way == "truncate":
                os.truncate(file, rng.randrange(len(content)))
            else:
                file.unlink()
            with pytest.raises(checkpoint.DamagedCheckpoint) as caught:
                checkpoints.restore(1, abstract(make_state(1)))
            assert str(tmp_path / "1") in str(caught.value) and "\n" not in str(caught.value)
            assert file.name in str(caught.value)
            file.write_bytes(content)
    assert_same_bits(checkpoints.restore(1, abstract(make_state(1)))[0], make_state(1))


def test_a_change_between_memory_and_disk_is_found(tmp_path, monkeypatch):
    """The files' hashes do not see it: the arrays' do."""
    digest = checkpoint._digest
    monkeypatch.setattr(checkpoint, "_digest", lambda array: digest(array if array.size != 9 else array + 1))
    checkpoints = folder_with(tmp_path, 1)
    monkeypatch.setattr(checkpoint, "_digest", digest)
    with pytest.raises(checkpoint.DamagedCheckpoint, match="the bytes of params/half do not match"):
        checkpoints.restore(1, abstract(make_state(1)))


def test_what_is_as_it_was_written_is_never_called_damaged(tmp_path, monkeypatch):
    """A reader that fails says nothing about the files: nothing may be set aside for it."""
    checkpoints = folder_with(tmp_path, 1)

    def restore(*args, **kwargs):
        raise ValueError("unknown layout")

    monkeypatch.setattr(ocp.PyTreeCheckpointHandler, "restore", restore)
    with pytest.raises(UserError, match="its files are as they were written .*unknown layout.*: use the versions"):
        checkpoints.restore_newest(abstract(make_state(1)), no_damage)
    assert checkpoints.steps() == [1]


def test_a_damaged_newest_is_set_aside_each_time_and_the_next_is_used(tmp_path):
    checkpoints = folder_with(tmp_path, 1, 2)
    for k in (1, 2):
        assert save(checkpoints, 3).error is None
        break_arrays(tmp_path / "3") if k == 1 else shutil.rmtree(tmp_path / "3" / "meta")
        said = []
        step, state, _ = checkpoints.restore_newest(abstract(make_state(2)), lambda *args: said.append(args))
        assert step == 2 and [s for s, _ in said] == [3] and said[0][1]
        assert_same_bits(state, make_state(2))
        assert checkpoints.steps() == [1, 2] and (tmp_path / "damaged" / f"3-{k}").is_dir()
    assert save(checkpoints, 3).error is None and save(checkpoints, 4).error is None
    assert checkpoints.steps() == [2, 3, 4]


def test_only_damaged_ones_is_an_error_each_time_and_moves_nothing(tmp_path):
    checkpoints = folder_with(tmp_path, 1, 2)
    for step in (1, 2):
        break_arrays(tmp_path / str(step))
    before = sorted(tmp_path.rglob("*"))
    for _ in range(2):
        said = []
        with pytest.raises(UserError, match=r"every checkpoint in .* is damaged \(steps 1, 2\)"):
            checkpoints.restore_newest(abstract(make_state(1)), lambda step, reason: said.append(step))
        assert said == [2, 1] and sorted(tmp_path.rglob("*")) == before
    # Nor does a folder whose last ones are all set aside look like a new one.
    (tmp_path / "damaged").mkdir()
    for step in (1, 2):
        (tmp_path / str(step)).rename(tmp_path / "damaged" / f"{step}-1")
    with pytest.raises(UserError, match="set aside in damaged/"):
        checkpoints.restore_newest(abstract(make_state(1)), no_damage)


def test_going_back_to_a_step_keeps_the_later_ones_aside(tmp_path):
    checkpoints = folder_with(tmp_path, 1, 2, 3)
    assert checkpoints.set_aside_newer_than(1) == [2, 3] and checkpoints.steps() == [1]
    assert save(checkpoints, 3).error is None and checkpoints.steps() == [1, 3]
    aside = tmp_path / "superseded" / "3-1"
    assert_same_bits(checkpoint.restore_path(aside, abstract(make_state(3)))[0], make_state(3))


def test_an_anomaly_stays_and_is_read_like_any_other(tmp_path):
    outcome = checkpoint.save_anomaly(tmp_path, 7, make_state(7), META)
    assert outcome.error is None and outcome.path == tmp_path / "anomaly" / "7"
    assert checkpoint.save_anomaly(tmp_path, 7, make_state(8), META).error is None  # the first one stays
    folder_with(tmp_path, 8, 9, max_checkpoints=1)
    state, meta = checkpoint.restore_path(outcome.path, abstract(make_state(7)))
    assert meta == META
    assert_same_bits(state, make_state(7))


# Earlier versions.


def of_version(version, tmp_path):
    """A run folder whose step 7 is of this version. Version 1 and 2 had no list of files, version 2 had shards."""
    shutil.copytree(V3, tmp_path / "run")
    file = tmp_path / "run" / "7" / "meta" / "meta.json"
    document = json.loads(file.read_text())
    for name in ("sha256", "files", "interim") if version < 3 else ("sha256",):
        del document[name]
    document["schema_version"] = version
    if version == 2:
        w, array = document["arrays"]["params/w"], old_state().params["w"]
        del w["sha256"]
        w["shards"] = [
            {"index": [[a, b], [0, 3]], "sha256": checkpoint._digest(np.asarray(array[a:b]))}
            for a, b in ((0, 1), (1, 4))
        ]
    file.write_text(json.dumps({**document, "sha256": checkpoint._document_digest(document)}))
    return tmp_path / "run"


def old_state():
    w = np.arange(12, dtype=np.float32).reshape(4, 3)
    params = {"w": jnp.asarray(w), "half": jnp.asarray([1.5, -0.0, np.nan], jnp.bfloat16)}
    return State(jnp.int32(7), params, ({"mu": jnp.asarray(w[::-1] / 3)}, jnp.zeros((0, 2))), None)


@pytest.mark.parametrize("version", [1, 2, 3])
def test_checkpoints_of_earlier_versions_are_read_kept_and_verified(tmp_path, version):
    run_dir = of_version(version, tmp_path)
    checkpoints = checkpoint.open_checkpoints(run_dir, 2)
    step, state, meta = checkpoints.restore_newest(abstract(old_state()), no_damage)
    assert (step, meta) == (7, {"config": {"seed": 1}})
    assert_same_bits(state, old_state())
    assert_same_bits(checkpoint.load_arrays(run_dir, 7, ("params/",))[0]["params"], old_state().params)
    for step in (8, 9):  # 7 is the best
        assert save(checkpoints, step, 3.0).error is None
    assert checkpoints.steps() == [7, 9]
    shutil.rmtree(run_dir / "7" / "state" / "d")
    with pytest.raises(checkpoint.DamagedCheckpoint):
        checkpoints.restore(7, abstract(old_state()))


def test_a_later_version_is_refused_by_its_number(tmp_path):
    run_dir = of_version(5, tmp_path)
    with pytest.raises(UserError, match="schema version 5, but this program reads versions 1, 2, 3, 4"):
        checkpoint.restore_path(run_dir / "7", abstract(old_state()))


# Plain Orbax.


@pytest.fixture(scope="module")
def plain_run(tmp_path_factory):
    checkpoints = checkpoint.open_checkpoints(tmp_path_factory.mktemp("plain"), 3)
    for step, val_loss in ((1, 3.0), (2, 1.5), (3, None)):
        assert save(checkpoints, step, val_loss).error is None
    return checkpoints.run_dir


def test_plain_orbax_restores_without_arguments(plain_run):
    with ocp.CheckpointManager(plain_run) as manager, pytest.warns(UserWarning, match="Sharding info not provided"):
        restored = manager.restore(2)
    assert restored["meta"]["meta"] == META and restored["metrics"] == {"val_loss": 1.5}
    assert_same_bits(restored["state"]["params"], make_state(2).params)


def test_plain_orbax_restores_a_train_state(plain_run):
    state = make_state(3)
    with ocp.CheckpointManager(plain_run) as manager:
        args = ocp.args.Composite(state=ocp.args.StandardRestore(abstract(state)), meta=ocp.args.JsonRestore())
        restored = manager.restore(3, args=args)
    assert restored.meta["meta"] == META
    # Orbax stores no arrays without elements, and gives None for them.
    assert_same_bits(restored.state, state._replace(monitor=state.monitor._replace(empty=None)))


def test_plain_orbax_knows_steps_metrics_and_the_best(plain_run):
    options = ocp.CheckpointManagerOptions(best_fn=lambda metrics: metrics["val_loss"], best_mode="min")
    with ocp.CheckpointManager(plain_run, options=options) as manager:
        assert list(manager.all_steps()) == [1, 2, 3] and manager.latest_step() == 3
        assert manager.metrics(2) == {"val_loss": 1.5} and manager.metrics(3) is None
        assert manager.best_step() == 2
        assert manager.item_metadata(3) is not None


# Failing saves.


def test_a_full_disk_is_one_sentence_and_the_next_save_works(tmp_path, capfd):
    checkpoints = folder_with(tmp_path, 1, 2, max_checkpoints=2)
    arrays = np.random.default_rng(0).normal(size=(20, 50_000)).astype(np.float32)
    state = {"small": jnp.ones(3), "params": {f"w{i}": jnp.asarray(array) for i, array in enumerate(arrays)}}
    # Writes fail as they do on a full disk; but those of the metadata and of the smaller arrays do not.
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        outcome = save(checkpoints, 3, state=state)
        anomaly = checkpoint.save_anomaly(tmp_path, 3, state, META)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    for failed, path in ((outcome, tmp_path / "3"), (anomaly, tmp_path / "anomaly" / "3")):
        assert failed.error == f"checkpoint 3 was not saved to {path}: {os.strerror(errno.EFBIG)}"
    assert checkpoints.steps() == [1, 2]
    # Those that the failed save would have replaced are still rotated out by the next.
    assert save(checkpoints, 3).error is None
    assert checkpoints.steps() == [2, 3]
    assert {entry.name for entry in tmp_path.iterdir()} == {"2", "3", "anomaly"}
    assert capfd.readouterr() == ("", "")


def test_a_disk_without_room_is_told_before_anything_is_written(tmp_path, monkeypatch):
    checkpoints = checkpoint.open_checkpoints(tmp_path, 3)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda path: usage._replace(free=1000))
    assert "0 MB are free" in save(checkpoints, 1).error
    assert list(tmp_path.iterdir()) == []


def test_a_rotation_that_fails_is_told_and_made_up_for(tmp_path):
    checkpoints = folder_with(tmp_path, 1, 2, max_checkpoints=2)
    (tmp_path / ".deleted").write_text("in the way")
    assert save(checkpoints, 3).error.startswith("checkpoint 3 was saved, but older ones were not removed: ")
    assert checkpoints.steps() == [1, 2, 3]
    (tmp_path / ".deleted").unlink()
    assert save(checkpoints, 4).error is None
    assert checkpoints.steps() == [3, 4]


def test_what_is_rotated_out_is_renamed_whole_before_it_is_deleted(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "_purge", lambda folder: None)
    assert folder_with(tmp_path, 1, 2, max_checkpoints=1).steps() == [2]
    assert_same_bits(checkpoint.restore_path(tmp_path / ".deleted" / "1", abstract(make_state(1)))[0], make_state(1))


def test_a_save_that_cannot_be_made_is_an_outcome_too(tmp_path):
    checkpoints = checkpoint.open_checkpoints(tmp_path, 3)
    for state, meta in ((make_state(1), {"set": {1}}), ({"a": "text"}, {})):
        assert checkpoints.save(1, state, meta)
        checkpoints.wait()
        (outcome,) = checkpoints.check()
        assert outcome.error.startswith("checkpoint 1 was not saved") and checkpoints.steps() == []


def test_one_save_is_written_one_waits_and_the_next_is_held(tmp_path, monkeypatch):
    gates, write = {step: threading.Event() for step in (1, 2, 3)}, checkpoint._write
    monkeypatch.setattr(checkpoint, "_write", lambda *args: gates[args[3]["step"]].wait(60) and write(*args))
    checkpoints = checkpoint.open_checkpoints(tmp_path, 3)
    for step in (1, 2):
        assert checkpoints.save(step, make_state(step), META)
    assert checkpoints.check() == [] and checkpoints.steps() == [] and checkpoints.is_saving()
    threading.Timer(0.3, gates[1].set).start()
    checkpoints.save(3, make_state(3), META)
    assert [outcome.step for outcome in checkpoints.check()] == [1] and checkpoints.steps() == [1]
    for gate in gates.values():
        gate.set()
    checkpoints.close()
    second, third = checkpoints.check()
    assert (second.step, third.step) == (2, 3) and second.blocked_s < 0.2 < third.blocked_s
    assert checkpoints.check() == [] and checkpoints.steps() == [1, 2, 3]


# Kills.


def test_opening_purges_only_the_remains_of_killed_runs(tmp_path):
    folder_with(tmp_path, 1)
    for remains in ("2.orbax-checkpoint-tmp/state", ".deleted/0/state", "anomaly/3.orbax-checkpoint-tmp/state"):
        (tmp_path / remains).mkdir(parents=True)
        (tmp_path / remains / "data").write_text("half")
    (tmp_path / "notes").mkdir()
    checkpoints = checkpoint.open_checkpoints(tmp_path, 3)
    assert {entry.name for entry in tmp_path.iterdir()} == {"1", "anomaly", "notes"}
    assert list((tmp_path / "anomaly").iterdir()) == [] and checkpoints.steps() == [1]


def save_until_killed(run_dir: str) -> None:
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
    rng, newest = random.Random(0), 0
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "PYTHONWARNINGS": "error"}
    code = f"import test_checkpoint; test_checkpoint.save_until_killed({str(tmp_path)!r})"
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
        while max(checkpoint.list_steps(tmp_path), default=0) <= newest and child.poll() is None:
            time.sleep(0.02)
        time.sleep(rng.uniform(0.0, 0.4))
        child.send_signal(signal.SIGKILL)
        assert child.communicate() == ("", "")  # no failed save, and not a word from Orbax
        steps = checkpoint.list_steps(tmp_path)
        assert steps and steps[-1] >= newest and len(steps) <= 3
        newest = steps[-1]
        for step in steps:
            state, _ = checkpoint.restore_path(tmp_path / str(step), abstract(make_state(step)))
            assert_same_bits(state, make_state(step))
