"""Checkpoints: Orbax's CheckpointManager saves, lists and rotates them; this module adds what Orbax lacks.

- **Verification.** Orbax restores flipped bits and casts dtypes without a word. The item "meta" (`Seal`) therefore
  holds dtype, shape and sha256 of every array, and size and sha256 of every file. Orbax finalizes it after the arrays
  and before it renames the folder, so no checkpoint appears without it. A restore compares the dtypes and shapes with
  the wanted state, then the files, then the arrays.
- **Retention.** `BestAndNewest` keeps the best finite validation loss and the newest others. It decides by what stands
  in the checkpoints, so a restart decides the same.
- **Saves beside the training.** `Checkpoints.save` copies the state on the device and returns. One thread of the
  process makes the saves, one after the other. Their managers are synchronous: an asynchronous one reports success on
  a full disk. Each save has a manager of its own, so a failed save leaves no state behind.
- **Damage.** A damaged checkpoint is named and set aside, and an older one is used.

docs/checkpoints.md describes the files and shows how plain Orbax reads them.
"""

import contextlib
import dataclasses
import errno
import hashlib
import itertools
import json
import logging
import math
import os
import re
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from altgrad_jax.errors import UserError
from altgrad_jax.files import file_sha256, sync
from altgrad_jax.run import processes as run_processes

SCHEMA_VERSION, READABLE_VERSIONS = 4, (1, 2, 3, 4)
ANOMALY, DAMAGED, SUPERSEDED, DELETED = "anomaly", "damaged", "superseded", ".deleted"
STATE, META = "state", "meta"
SAVES_AT_ONCE = 1  # are written; one more of each run folder may wait as a copy on the device
_PEER_TIMEOUT_S = 600  # longer than Orbax's own barriers wait, which is 300 s

_SAVER = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
# sha256 releases the GIL. Half the cores at most: the others belong to the loop and to the writing.
_HASHERS = ThreadPoolExecutor(max(1, min(4, (os.cpu_count() or 1) // 2)), thread_name_prefix="sha256")
_saves = itertools.count()  # in the main thread: the same number in all processes


# What goes wrong is an error or a SaveOutcome. Orbax logs a traceback beside it; and it leaves a save at the first
# write that fails, so that TensorStore, which ends the others, finds a closed event loop.
for _logger in ("absl", "asyncio"):
    logging.getLogger(_logger).addFilter(lambda record: "orbax" not in record.pathname + record.getMessage())


def _quiet_about_closed_loops(unraisable: Any, others: Callable[[Any], Any] = sys.unraisablehook) -> None:
    if str(unraisable.exc_value) != "Event loop is closed":
        others(unraisable)


sys.unraisablehook = _quiet_about_closed_loops


class DamagedCheckpoint(UserError):
    """Files are missing, unreadable, or not the bytes that were written. reason: what is wrong, without the path."""

    def __init__(self, path: Path, reason: str):
        super().__init__(f"the checkpoint {path} is damaged ({reason}): use another step")
        self.reason = reason


@dataclasses.dataclass(frozen=True)
class SaveOutcome:
    """What became of one save.

    With an error, one sentence, nothing of it is left on the disk, unless the sentence says that it was saved.
    """

    step: int
    path: Path  # where the checkpoint lies, or would lie
    error: str | None = None
    n_bytes: int = 0  # of all arrays
    blocked_s: float = 0.0  # how long the caller was held
    background_s: float = 0.0  # how long the saving thread worked


# Which are kept.


class Standing(NamedTuple):
    """What decides whether a checkpoint is kept."""

    val_loss: float | None = None
    interim: bool = False


def kept_steps(standings: Mapping[int, Standing], max_checkpoints: int) -> set[int]:
    """The steps to keep: the one with the best finite loss and the newest others, exactly `max_checkpoints`.

    Of equal losses the newest is the best; a single one is the newest. An interim checkpoint is kept beside them while
    it is newer than every other, and displaces none.
    """
    regular = {step: standing.val_loss for step, standing in standings.items() if not standing.interim}
    finite = {step: loss for step, loss in regular.items() if loss is not None and math.isfinite(loss)}
    best = min(finite, key=lambda step: (finite[step], -step), default=None) if max_checkpoints > 1 else None
    by_rank = sorted(regular, key=lambda step: (step == best, step), reverse=True)
    return {*by_rank[:max_checkpoints], *({max(standings, default=-1)} & (standings.keys() - regular.keys()))}


@dataclasses.dataclass
class BestAndNewest(ocp.checkpoint_managers.PreservationPolicy):
    """`kept_steps` as Orbax asks for it. Of a checkpoint that cannot be read it knows only that it is there."""

    run_dir: Path
    max_checkpoints: int

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> Sequence[bool]:
        standings = dict.fromkeys((checkpoint.step for checkpoint in checkpoints), Standing())
        for step in standings:
            with contextlib.suppress(UserError, OSError):
                document = read_document(self.run_dir / str(step))
                standings[step] = Standing(document["val_loss"], document["interim"])
        kept = kept_steps(standings, self.max_checkpoints)
        return [step in kept for step in standings]


# What a checkpoint says of itself.


def _name(path: Any) -> str:
    """ "params/block_0/mlp_up/kernel": dict keys, tuple positions and field names on the way to a leaf."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def _flatten(tree: Any) -> dict[str, Any]:
    return {_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def _nest(flat: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `_flatten`, with a dict at every level."""
    tree: dict[str, Any] = {}
    for name, leaf in flat.items():
        *parents, last = name.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = leaf
    return tree


def _digest(array: np.ndarray) -> str:
    """sha256 over dtype, shape and the bytes in C order."""
    digest = hashlib.sha256(f"{array.dtype.name}{list(array.shape)}".encode())
    if array.size:  # as bytes, because ml_dtypes' types have no buffer protocol
        digest.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def _document_digest(document: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()


def _describe(array: jax.Array) -> dict[str, Any]:
    """dtype, shape and sha256; of an array that is spread over processes the sha256 of each piece of this one."""
    described: dict[str, Any] = {"dtype": np.dtype(array.dtype).name, "shape": list(array.shape)}
    if array.is_fully_addressable or array.is_fully_replicated:
        whole = array if array.is_fully_addressable else array.addressable_data(0)
        return {**described, "sha256": _digest(np.asarray(whole))}
    described["shards"] = []
    for shard in array.addressable_shards:
        if shard.replica_id == 0:
            index = [s.indices(n)[:2] for s, n in zip(shard.index, array.shape, strict=True)]
            described["shards"].append({"index": index, "sha256": _digest(np.asarray(shard.data))})
    return described


class Seal(ocp.CheckpointHandler):
    """Writes the item "meta", in which a checkpoint describes itself; Orbax's readers take it for an item of JSON."""

    def __init__(self):
        self.typestr = ocp.JsonCheckpointHandler.typestr  # what _CHECKPOINT_METADATA says of the item

    def save(self, directory: Any, args: "SealArgs") -> None:
        """Each process writes what it knows."""
        (Path(directory) / f"part.{jax.process_index()}").write_text(json.dumps(args.document))

    def finalize(self, directory: Any) -> None:
        """Process 0 joins the parts and describes the files, of which those of the arrays are final by now."""
        folder, root = Path(directory), Path(directory).parent
        parts = [json.loads((folder / f"part.{i}").read_text()) for i in range(jax.process_count())]
        document = parts[0]
        for name, array in document["arrays"].items():
            if "shards" in array:
                array["shards"] = [shard for part in parts for shard in part["arrays"][name]["shards"]]
                if sum(math.prod(b - a for a, b in s["index"]) for s in array["shards"]) != math.prod(array["shape"]):
                    raise OSError(errno.EIO, f"the processes together do not hold all of {name}")
        # Orbax finalizes (renames) the metrics after this item, if there are any.
        files = [path for path in sorted(root.glob(f"{STATE}/**/*")) if path.is_file()]
        if not files:
            raise OSError(errno.EIO, "Orbax has not finalized the arrays")
        files += root.glob("metrics*/metrics")
        for path, sha256 in zip(files, _HASHERS.map(file_sha256, files), strict=True):
            name = re.sub(r"\.orbax-checkpoint-tmp[^/]*", "", path.relative_to(root).as_posix())
            document["files"][name] = {"bytes": path.stat().st_size, "sha256": sha256}
        for i in range(len(parts)):
            (folder / f"part.{i}").unlink()
        (folder / "metadata").write_text(json.dumps({**document, "sha256": _document_digest(document)}))
        # The names too: after a power cut a folder that is listed must not be empty.
        for path in (folder / "metadata", *filter(Path.is_dir, root.rglob("*")), root):
            sync(path)

    def restore(self, directory: Any, args: Any = None) -> dict[str, Any]:
        return read_document(Path(directory).parent)


@ocp.args.register_with_handler(Seal, for_save=True, for_restore=True)
@dataclasses.dataclass
class SealArgs(ocp.args.CheckpointArgs):
    document: dict[str, Any]


def read_document(path: Path) -> dict[str, Any]:
    """What the checkpoint folder `path` says of itself (docs/checkpoints.md), verified against its own sha256.

    Raises:
      DamagedCheckpoint: it is missing, or not what was written.
      UserError: it is of a version that this program does not know.
    """
    file = f"{META}/meta.json" if (path / META / "meta.json").exists() else f"{META}/metadata"  # versions 1 to 3, or 4
    try:
        content = (path / file).read_bytes()
        document = json.loads(content)
        as_written = json.dumps(document).encode()
        sha256, version = document.pop("sha256"), document["schema_version"]
    except OSError as error:
        raise _unreadable(path, error) from None
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError):
        raise DamagedCheckpoint(path, f"{file} is not the JSON it was") from None
    # Versions 1 and 2 did not promise their bytes.
    if sha256 != _document_digest(document) or version in (3, 4) and content != as_written:
        raise DamagedCheckpoint(path, f"{file} does not match its sha256")
    if version not in READABLE_VERSIONS:
        raise UserError(
            f"the checkpoint {path} has schema version {version}, but this program reads versions "
            f"{', '.join(map(str, READABLE_VERSIONS))}: use the program that wrote it"
        )
    return {"interim": False, "files": {}, **document}


def _unreadable(path: Path, error: OSError) -> Exception:
    """What to raise for an error of the disk; missing rights say nothing about the bytes."""
    where = Path(error.filename or path).name
    return error if isinstance(error, PermissionError) else DamagedCheckpoint(path, f"{where}: {error.strerror}")


# Reading.


def _array_handler(processes: Any = None) -> ocp.PyTreeCheckpointHandler:
    """OCDBT over zarr3, not compressed: docs/results/checkpoint-speed.md has what others cost."""
    options = processes or ocp.options.MultiprocessingOptions()
    return ocp.PyTreeCheckpointHandler(
        use_ocdbt=True, use_zarr3=True, use_compression=False, multiprocessing_options=options
    )


def _signature(array: Any) -> str:
    """'float32[384, 1152]', of an array or its description."""
    if isinstance(array, dict):
        return f"{array['dtype']}{array['shape']}"
    return f"{np.dtype(array.dtype).name}{list(array.shape)}"


def _listed(problems: Sequence[str], at_most: int = 4) -> str:
    more = len(problems) - at_most
    return "; ".join(problems[:at_most]) + (f"; and {more} more" if more > 0 else "")


def _one_line(error: BaseException) -> str:
    """An exception as one short line; TensorStore's messages run over many, with their cause far back."""
    text = " ".join(str(error).split())
    if code := re.search(r"os_error_code='(\d+)'", text):
        return os.strerror(int(code[1]))
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if "DEADLINE_EXCEEDED" in text:
        return "another process failed or did not answer, see what it reported"
    return f"{type(error).__name__}: {text[:200]}"


def _damage_in_files(path: Path, described: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """What is wrong with the files of a checkpoint, each in a few words."""
    present = {name: path / name for name in described if (path / name).is_file()}
    wrong = [f"{name} is missing" for name in described if name not in present]
    for (name, file), sha256 in zip(present.items(), _HASHERS.map(file_sha256, present.values()), strict=True):
        if (size := file.stat().st_size) != described[name]["bytes"]:
            wrong.append(f"{name} has {size} bytes in place of {described[name]['bytes']}")
        elif sha256 != described[name]["sha256"]:
            wrong.append(f"{name} does not match its sha256")
    return wrong


def _damage_in_arrays(arrays: Mapping[str, Any], described: Mapping[str, Any]) -> list[str]:
    wrong = []
    for name, description in described.items():
        array = arrays.get(name)
        if not isinstance(array, np.ndarray) or _signature(array) != _signature(description):
            wrong.append(f"{name} is not {_signature(description)}")
            continue
        whole = {"index": [(0, n) for n in array.shape], "sha256": description.get("sha256")}
        pieces = description.get("shards", [whole])
        if any(_digest(array[tuple(slice(*b) for b in p["index"])]) != p["sha256"] for p in pieces):
            wrong.append(f"the bytes of {name} do not match their sha256")
    return wrong


def _load(path: Path, names: Sequence[str]) -> dict[str, Any]:
    """The arrays of these names as they are stored; Orbax would cast them to a dtype that it is asked for."""
    handler, state = _array_handler(), epath.Path(path / STATE)
    stored = handler.metadata(state).tree
    asked = jax.tree_util.tree_map_with_path(lambda p, leaf: leaf if _name(p) in names else ocp.PLACEHOLDER, stored)
    as_stored = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), stored)
    return _flatten(handler.restore(state, args=ocp.args.PyTreeRestore(asked, as_stored)))


def _read_arrays(path: Path, document: Mapping[str, Any], names: Sequence[str]) -> dict[str, np.ndarray]:
    """The arrays of these names; all files are verified before, and each of the arrays after it is read."""
    described = {name: document["arrays"][name] for name in names}
    # Orbax stores no arrays without elements. Dtype and shape are all there is to know of them.
    empty = {
        name: np.zeros(d["shape"], jax.numpy.dtype(d["dtype"])) for name, d in described.items() if 0 in d["shape"]
    }
    try:
        if wrong := _damage_in_files(path, document["files"]):
            raise DamagedCheckpoint(path, _listed(wrong))
        arrays = _load(path, [*(described.keys() - empty)]) | empty if len(described) > len(empty) else empty
    except (UserError, MemoryError):
        raise
    except OSError as error:
        raise _unreadable(path, error) from None
    except Exception as error:
        if not document["files"]:  # versions 1 and 2
            raise DamagedCheckpoint(path, f"the arrays are not readable, {_one_line(error)}") from error
        raise UserError(
            f"the checkpoint {path} cannot be read, although its files are as they were written ({_one_line(error)}): "
            "use the versions of altgrad_jax and orbax-checkpoint that wrote it"
        ) from error
    if wrong := _damage_in_arrays(arrays, described):
        raise DamagedCheckpoint(path, _listed(wrong))
    return {name: arrays[name] for name in names}


def _refuse_differences(path: Path, described: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    differences = []
    for name in sorted({*described, *wanted}):
        if name not in described:
            differences.append(f"{name} is missing in it")
        elif name not in wanted:
            differences.append(f"{name} is only in it")
        elif (stored := _signature(described[name])) != (asked := _signature(wanted[name])):
            differences.append(f"{name} is {stored}, wanted is {asked}")
    if differences:
        raise UserError(
            f"the checkpoint {path} holds another state than this run's ({_listed(differences)}): use the config it "
            "was written with, or another run folder"
        )


def _place(array: np.ndarray, leaf: Any) -> jax.Array:
    """On the devices of `leaf`'s sharding; on a mesh without devices, as jax.eval_shape leaves it, it says nothing."""
    sharding = getattr(leaf, "sharding", None)
    if sharding is None or isinstance(getattr(sharding, "mesh", None), jax.sharding.AbstractMesh):
        return jax.device_put(array)
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


def restore_path(path: str | Path, abstract_state: Any) -> tuple[Any, dict[str, Any]]:
    """Reads the checkpoint folder `path` (`<run folder>/<step>`, `<run folder>/anomaly/<step>`, ...).

    Args:
      path: one checkpoint.
      abstract_state: pytree of jax.ShapeDtypeStruct (from jax.eval_shape); a leaf's sharding places it.

    Returns:
      (state, meta): the pytree with jax arrays as leaves, and the JSON data given at the save.

    Raises:
      UserError: a leaf's dtype or shape differs from what is stored, or leaves are missing or too many.
      DamagedCheckpoint: files are missing or unreadable, or bytes are not those that were saved.
    """
    path = Path(path).absolute()
    document, wanted = read_document(path), _flatten(abstract_state)
    _refuse_differences(path, document["arrays"], wanted)
    arrays = _read_arrays(path, document, list(wanted))
    leaves = [_place(arrays[name], leaf) for name, leaf in wanted.items()]
    return jax.tree.unflatten(jax.tree.structure(abstract_state), leaves), document["meta"]


def load_arrays(path: str | Path, step: int | None, prefixes: tuple[str, ...]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Reads some arrays of a checkpoint; needs no model.

    Args:
      path: a run folder, or one checkpoint in it.
      step: which checkpoint of the run folder; None is the newest.
      prefixes: of the names of the arrays, such as "params/".

    Returns:
      (arrays, meta): nested dict of NumPy arrays, and the JSON data given at the save.

    Raises:
      UserError: there is no such checkpoint. DamagedCheckpoint: as `restore_path`.
    """
    path = resolve_checkpoint(path, step)
    document = read_document(path)
    names = [name for name in document["arrays"] if name.startswith(prefixes)]
    return _nest(_read_arrays(path, document, names)), document["meta"]


def list_steps(run_dir: str | Path) -> list[int]:
    """The steps of the complete checkpoints in `run_dir`, as Orbax lists them; [] where the folder does not exist."""
    run_dir = Path(run_dir).absolute()
    if not os.path.isdir(run_dir):  # Path.is_dir raises for a name that is too long
        return []
    return sorted(found.step for found in ocp.path.step.standard_name_format().find_all(run_dir))


def resolve_checkpoint(path: str | Path, step: int | None = None) -> Path:
    """The folder of checkpoint `step`, or of the newest one, where `path` is not one itself."""
    path = Path(path).absolute()
    if os.path.isdir(path / STATE) or os.path.isdir(path / META):
        if step is not None and path.name != str(step):
            raise UserError(f"step {step} was asked for, but {path} is one checkpoint: give the run folder")
        return path
    steps = list_steps(path)
    if not steps or step not in (None, *steps):
        which = "no checkpoint" if step is None else f"no checkpoint of step {step}"
        raise UserError(
            f"{path} holds {which}, it has {', '.join(map(str, steps)) or 'none'}: give the folder of a run"
        )
    return path / str(steps[-1] if step is None else step)


# Saving.


def _has_room_for_a_copy(leaves: Sequence[jax.Array]) -> bool:
    """Whether the devices can hold a second set of `leaves` beside the most that they ever held (the next step needs
    its temporaries while the copy is alive); those that do not report their memory (the CPU) are taken to."""
    needed = 1.25 * sum(leaf.addressable_shards[0].data.nbytes for leaf in leaves)
    memories = [device.memory_stats() or {} for device in jax.local_devices()]
    return all(m.get("bytes_limit", math.inf) - m.get("peak_bytes_in_use", 0) >= needed for m in memories)


def _copy(leaves: Sequence[jax.Array]) -> list[jax.Array]:
    """Copies that outlive the donation of `leaves`; nothing is compiled, and the caller does not wait for them."""
    copies = list(leaves)
    for sharding in {leaf.sharding for leaf in leaves}:  # a list of shardings takes device_put twice as long
        which = [i for i, leaf in enumerate(leaves) if leaf.sharding == sharding]
        for i, copy in zip(which, jax.device_put([leaves[i] for i in which], sharding, may_alias=False), strict=True):
            copies[i] = copy
    return copies


def _manager(policy: BestAndNewest, name: str) -> ocp.CheckpointManager:
    """name: of its barriers. With the processes given they are those of jax's coordination service; else they would be
    collectives on the devices, in another order than those of the training beside them."""
    n = jax.process_count()
    processes = ocp.options.MultiprocessingOptions(
        active_processes=set(range(n)) if n > 1 else None, barrier_sync_key_prefix=name
    )
    options = ocp.CheckpointManagerOptions(
        preservation_policy=policy,
        best_fn=lambda metrics: metrics["val_loss"],  # without it Orbax writes no metrics
        best_mode="min",
        todelete_subdir=DELETED,
        enable_async_checkpointing=False,
        create=False,
        lightweight_initialize=True,
        save_root_metadata=False,
        multiprocessing_options=processes,
    )
    # In the order in which they are finalized: the seal needs the final files of the state.
    handlers = {STATE: _array_handler(processes), META: Seal()}
    return ocp.CheckpointManager(policy.run_dir, item_handlers=handlers, options=options)


def _write(policy: BestAndNewest, name: str, state: Any, document: dict[str, Any]) -> None:
    """Writes one checkpoint and rotates."""
    flat, free = _flatten(state), shutil.disk_usage(policy.run_dir).free
    if free < (needed := sum(leaf.nbytes for leaf in flat.values())):  # quotas do not show here, but in the writing
        raise OSError(errno.ENOSPC, f"it needs {needed / 1e6:.0f} MB, and {free / 1e6:.0f} MB are free")
    document["arrays"] = dict(zip(flat, _HASHERS.map(_describe, flat.values()), strict=True))
    items = {
        STATE: ocp.args.PyTreeSave(jax.tree.map(lambda leaf: leaf if leaf.size else None, state)),
        META: SealArgs(document),
    }
    metrics = None if document["val_loss"] is None else {"val_loss": document["val_loss"]}
    with contextlib.closing(_manager(policy, name)) as manager:
        manager.save(document["step"], force=True, metrics=metrics, args=ocp.args.Composite(**items))
    if run_processes.is_lead():
        sync(policy.run_dir)
        _purge(policy.run_dir)


def _save(policy: BestAndNewest, name: str, copy: list[Any], document: dict[str, Any], blocked_s: float) -> SaveOutcome:
    """A save, in the saving thread. copy: the state, or why it could not be copied; it is taken out, so that the
    device's memory is free after the save."""
    started = time.perf_counter()
    step, path, problem, n_bytes = document["step"], policy.run_dir / str(document["step"]), None, 0
    try:
        if isinstance(state := copy.pop(), Exception):
            raise state
        n_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
        _write(policy, name, state, document)
    except Exception as error:
        saved = "was saved, but older ones were not removed" if path.is_dir() else f"was not saved to {path}"
        problem = f"checkpoint {step} {saved}: {_one_line(error)}"
        if run_processes.is_lead():
            _purge(policy.run_dir)
    try:  # the next save begins when this one has ended everywhere
        processes = set(range(jax.process_count()))
        ocp.multihost.sync_global_processes(f"{name}_ended", timeout=_PEER_TIMEOUT_S, processes=processes)
    except Exception as error:
        problem = problem or f"checkpoint {step} was saved to {path}: {_one_line(error)}"
    return SaveOutcome(step, path, problem, n_bytes, blocked_s, time.perf_counter() - started)


def _purge(run_dir: Path) -> None:
    """Removes what is half-written or half-deleted."""
    for path in (run_dir / DELETED, *run_dir.glob("*.orbax-checkpoint-tmp*")):
        shutil.rmtree(path, ignore_errors=True)


def save_anomaly(run_dir: str | Path, step: int, state: Any, meta: Mapping[str, Any]) -> SaveOutcome:
    """Saves to `<run_dir>/anomaly/<step>/`, outside the rotation, and waits until it is there.

    Does not raise: a training that met an anomaly goes on or stops by its own rules. A checkpoint that lies there
    already, from the same step before a resume, is kept.
    """
    folder = Path(run_dir).absolute() / ANOMALY
    try:
        checkpoints = open_checkpoints(folder, 10**9)
        checkpoints.save(step, state, meta)
        checkpoints.close()
        return next(iter(checkpoints.check()), SaveOutcome(step, folder / str(step)))
    except UserError as error:
        return SaveOutcome(step, folder / str(step), f"the anomaly of step {step} was not saved: {error}")


# The run folder, while it is trained into.


def open_checkpoints(run_dir: str | Path, max_checkpoints: int) -> "Checkpoints":
    """Opens a run folder for training: makes it where it is missing, removes what killed runs left half-done.

    Args:
      run_dir: the run folder; may hold any other files.
      max_checkpoints: how many checkpoints to keep, at least 1; see `kept_steps`.

    Raises:
      UserError: the folder cannot be made or written to, or this process does not see it.
    """
    run_dir = Path(run_dir).absolute()
    if max_checkpoints < 1:
        raise UserError(f"max_checkpoints is {max_checkpoints}, but must be at least 1: set it to 1 or more")

    def prepare() -> None:
        try:  # making and removing the folder for deletions shows that the run folder can be written to
            (run_dir / DELETED).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            problem = f"the run folder {run_dir} cannot be written to ({error.strerror})"
            raise UserError(f"{problem}: choose another with --workdir") from None
        for folder in (run_dir, run_dir / ANOMALY):
            _purge(folder)

    run_processes.from_lead(prepare)
    if not run_dir.is_dir():
        problem = f"process {jax.process_index()} does not see the run folder {run_dir} that process 0 made"
        raise UserError(f"{problem}: choose one on a disk that all processes share with --workdir")
    return Checkpoints(run_dir, max_checkpoints)


class Checkpoints:
    """The checkpoints of one run folder; made by `open_checkpoints`, released by `close`.

    Methods are called from one thread and, with several processes, in each at the same points with the same arguments;
    `check`, `steps` and `is_saving` excepted.
    """

    def __init__(self, run_dir: Path, max_checkpoints: int):
        self.run_dir = run_dir
        self._policy = BestAndNewest(run_dir, max_checkpoints)
        self._running: dict[Future[SaveOutcome], int] = {}
        self._finished: list[SaveOutcome] = []

    def steps(self) -> list[int]:
        """The steps of the complete checkpoints on the disk, ascending, without one that is being written."""
        return list_steps(self.run_dir)

    def is_saving(self) -> bool:
        """Whether a save is under way."""
        return not all(future.done() for future in self._running)

    def save(
        self, step: int, state: Any, meta: Mapping[str, Any], val_loss: float | None = None, *, interim: bool = False
    ) -> bool:
        """Starts to save `state` as checkpoint `step`; never raises for want of disk, memory or rights.

        Waits while SAVES_AT_ONCE saves are under way and one more waits. Where the device has no room for a copy of
        the state, waits until the save has ended.

        Args:
          step: updates made so far; the folder's name.
          state: pytree of jax arrays. They may be donated as soon as this returns.
          meta: JSON data: config, data fingerprint, W&B run id, ... Tuples come back as lists.
          val_loss: the validation loss of this very state, where there is one.
          interim: whether the checkpoint is to be there only until the next one that is not; see `kept_steps`.

        Returns:
          True if a save was started, False if checkpoint `step` is there already. `check` reports what became of it;
          after a failed one the caller simply saves at the next interval.
        """
        started = time.perf_counter()
        while len(self._running) > SAVES_AT_ONCE:
            wait(list(self._running)[:1])
            self._collect()
        if step in self._running.values():
            self.wait()
        if step in self.steps():
            return False
        loss = float(val_loss) if val_loss is not None and math.isfinite(val_loss) else None
        document = {"schema_version": SCHEMA_VERSION, "step": step, "val_loss": loss, "interim": interim}
        document |= {"arrays": {}, "files": {}}
        has_room = True
        try:
            document["meta"] = json.loads(json.dumps(meta))
            leaves, structure = jax.tree.flatten(state)
            if has_room := _has_room_for_a_copy(leaves):
                state = jax.tree.unflatten(structure, _copy(leaves))
        except Exception as error:  # the saving thread reports it, as all that goes wrong
            state = error
        name, blocked_s = f"altgrad_jax_save_{next(_saves)}", time.perf_counter() - started
        self._running[_SAVER.submit(_save, self._policy, name, [state], document, blocked_s)] = step
        if not has_room:
            wait(self._running)
        return True

    def wait(self) -> None:
        """Blocks until no save is under way. Never raises for a save that failed: `check` reports it."""
        wait(self._running)
        self._collect()

    def check(self) -> list[SaveOutcome]:
        """The saves that ended since the last call, in the order of their start, without waiting."""
        self._collect()
        finished, self._finished = self._finished, []
        return finished

    def _collect(self) -> None:
        for future in [future for future in self._running if future.done()]:
            del self._running[future]
            self._finished.append(future.result())

    def restore(self, step: int, abstract_state: Any) -> tuple[Any, dict[str, Any]]:
        """Reads checkpoint `step`, or raises UserError if there is none; the rest as `restore_path`.

        With several processes each reads and verifies all of it, and what one finds wrong is raised in all.
        """
        self.wait()
        restored, failure = None, None
        try:
            restored = restore_path(resolve_checkpoint(self.run_dir, step), abstract_state)
        except UserError as error:
            failure = error
        told = run_processes.gather(failure and [getattr(failure, "reason", None), str(failure)])
        for reason, text in filter(None, told):
            damaged = DamagedCheckpoint(self.run_dir / str(step), reason) if reason else None
            raise failure or damaged or UserError(text)
        assert restored is not None
        return restored

    def restore_newest(
        self, abstract_state: Any, on_damaged: Callable[[int, str], None]
    ) -> tuple[int, Any, dict[str, Any]] | None:
        """Reads the newest checkpoint that verifies.

        Damaged ones on the way are reported to `on_damaged(step, reason)`. Once a good one is found they are renamed
        to `damaged/<step>-<k>`; before that nothing is moved, so that a folder with only damaged ones stays an error
        however often it is tried, and never turns into a fresh start.

        Returns:
          (step, state, meta), or None where the run folder holds no checkpoint at all.

        Raises:
          UserError: every checkpoint is damaged, or the newest good one holds a state of another structure.
        """
        self.wait()
        damaged: list[int] = []
        for step in reversed(self.steps()):
            try:
                state, meta = self.restore(step, abstract_state)
            except DamagedCheckpoint as error:
                damaged.append(step)
                on_damaged(step, error.reason)
                continue
            run_processes.from_lead(lambda: self._set_aside(damaged, DAMAGED))
            return step, state, meta
        if damaged or any((self.run_dir / DAMAGED).glob("*")):
            which = f"steps {', '.join(map(str, sorted(damaged)))}" if damaged else f"set aside in {DAMAGED}/"
            raise UserError(
                f"every checkpoint in {self.run_dir} is damaged ({which}); nothing was deleted: bring back a copy, or "
                "start again in another folder with --workdir"
            )
        return None

    def set_aside_newer_than(self, step: int) -> list[int]:
        """Renames each checkpoint after `step` to `superseded/<step>-<k>`: the run goes back to `step`.

        Returns:
          The steps that were moved, ascending.
        """
        self.wait()
        return run_processes.from_lead(lambda: self._set_aside([s for s in self.steps() if s > step], SUPERSEDED))

    def _set_aside(self, steps: list[int], folder: str) -> list[int]:
        """Renames them, in process 0, which alone may: another would list what is already renamed."""
        for step in steps:
            (self.run_dir / folder).mkdir(exist_ok=True)
            targets = (self.run_dir / folder / f"{step}-{k}" for k in itertools.count(1))
            (self.run_dir / str(step)).rename(next(path for path in targets if not path.exists()))
        return steps

    def close(self) -> None:
        """Waits for the saves under way. `check` may still be called, `close` again."""
        self.wait()
