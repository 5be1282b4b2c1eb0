"""Checkpoints: written beside the training, verified when read, never half there.

The only file that imports orbax, its benchmark excepted. What it decides, and why:

- **A save costs the training one copy on the device.** `save` copies the arrays
  (`device_put(may_alias=False)`: asynchronous, nothing is compiled) and returns; the originals may be
  donated at once. A worker thread takes it from there: transfer, Orbax's array handler with sha256 beside it,
  rotation. Up to SAVES_AT_ONCE of them work side by side, so that the training waits only if it saves faster
  than the disk writes; what they hold on the host is bounded by `_HOST_MEMORY`. Orbax's Checkpointers are not
  asked: the asynchronous one holds its caller for the transfer from the device and returns success although the
  disk is full; either, with several processes, leaves the others waiting at its barriers where one fails.
  Orbax's CheckpointManager takes one save at a time, and when one fails it has already struck the steps that
  were to be deleted from its list, so that they stay for ever: the rotation is ours. Here a save ends as a
  complete checkpoint or as an outcome with an error, and a failed one leaves nothing behind.
- **Nothing unverified is accepted.** Each checkpoint carries `meta/meta.json` with dtype, shape and sha256
  of each array and size and sha256 of each file, itself under a sha256. Restoring compares dtypes and shapes with
  the wanted state before it reads an array (Orbax would cast without a word), then the files, and the arrays'
  hashes before it hands one out. The files' hashes find what reading would pass over: a flipped bit in a part that
  is not read now, a missing file that is only asked for later. They also tell a damaged disk from a reader that
  does not fit: files that are as written are never called damaged because they cannot be read.
- **Nothing half-written or half-deleted is listed.** A checkpoint is written under a temporary name, brought to the
  disk (fsync) and renamed. Deletion is a rename into `.deleted/` first. The remains of both are purged when the run
  folder is opened for training.
- **Layout:** OCDBT over zarr3, not compressed: docs/results/checkpoint-speed.md has what others cost.
- **Which are kept** is decided by `kept_steps` from what stands in the checkpoints themselves, and so is the same
  after a restart. It is applied to what is complete on the disk, so the order in which saves end does not matter.
  An *interim* checkpoint, saved between two regular ones because time passed or a signal came, is there until the
  next regular one and displaces none: the checkpoints of a finished run do not tell how often it was interrupted.
- **Several processes** (jax.distributed, one disk that all see) save together. Each writes the pieces it owns;
  process 0 alone joins and describes them, renames, rotates and deletes. What happens in one happens in all: they
  agree over the key-value store (`_Agreement`), never by device collectives. Restoring reads whole arrays in each
  process and places them by the shardings asked for, so any number of devices or processes reads what any other
  wrote.

In a run folder:

    <step>/state/            the arrays (Orbax), dicts in dicts: params/block_0/mlp_up/kernel, ...
    <step>/meta/meta.json    {"schema_version": 3, "step", "val_loss", "interim",
                              "arrays": {path: {dtype, shape, sha256}}, "files": {name: {bytes, sha256}},
                              "meta": the caller's JSON data, "sha256": of the rest};
                              an array that was spread over processes has, in place of its sha256,
                              "shards": [{"index": [[start, stop], ...], "sha256"}, ...].
                              Versions 1 and 2 (with shards), which are read too, lack "interim" and "files"
    anomaly/<step>/          the same, outside the rotation
    damaged/<step>-<k>/      set aside because it did not verify
    superseded/<step>-<k>/   set aside because the run went back to an earlier step
"""

from __future__ import annotations

import asyncio
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
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor
from concurrent.futures import wait as wait_for
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore
from absl import logging as absl_logging
from etils import epath
from jax._src import distributed

from altgrad_jax.errors import UserError
from altgrad_jax.files import sync

SCHEMA_VERSION = 3
READABLE_VERSIONS = (1, 2, 3)
ANOMALY, DAMAGED, SUPERSEDED, DELETED = "anomaly", "damaged", "superseded", ".deleted"
_STATE, _META, _META_FILE = "state", "meta", "meta.json"
_UNFINISHED = ".orbax-checkpoint-tmp"
_NAMED_IN_A_MESSAGE = 4
# Saves of one run folder that may be under way together; see docs/results/checkpoint-speed.md.
SAVES_AT_ONCE = 3
# How long a process waits for the others, which are as far as it is but for the speed of their disks.
PEER_TIMEOUT_S = 300.0


class DamagedCheckpoint(UserError):
    """A checkpoint whose files are missing, unreadable, or not the bytes that were written.

    Attributes:
      reason: what is wrong with it, without its path.
    """

    def __init__(self, path: Path, reason: str):
        super().__init__(f"the checkpoint {path} is damaged ({reason}): use another step")
        self.reason = reason


@dataclasses.dataclass(frozen=True)
class SaveOutcome:
    """What became of one save.

    Attributes:
      step: the step of the checkpoint.
      path: where it lies, or would lie.
      error: None, or one sentence. Then nothing of this save is left on the disk, unless the sentence says
        that only the removal of older checkpoints failed.
      n_bytes: bytes of all arrays.
      blocked_s: seconds for which the caller was held.
      background_s: seconds the worker took, the removal of older checkpoints included.
    """

    step: int
    path: Path
    error: str | None = None
    n_bytes: int = 0
    blocked_s: float = 0.0
    background_s: float = 0.0


class Standing(NamedTuple):
    """What decides whether a checkpoint is kept: its validation loss, where it has one, and whether it is interim."""

    val_loss: float | None
    interim: bool = False


class _OrbaxIsQuiet(logging.Filter):
    """Keeps Orbax's own log lines off the console unless absl's verbosity asks for information.

    What goes wrong reaches the user as an error or a `SaveOutcome`; Orbax would print a traceback beside it.
    """

    def filter(self, record: logging.LogRecord) -> bool:
        from_orbax = "/orbax/checkpoint/" in record.pathname.replace("\\", "/")
        return not from_orbax or absl_logging.get_verbosity() >= absl_logging.INFO


absl_logging.get_absl_logger().addFilter(_OrbaxIsQuiet())


# Which checkpoints are kept.


def kept_steps(standings: Mapping[int, Standing], max_checkpoints: int) -> set[int]:
    """The steps to keep: the one with the best finite validation loss, the newest others, and the interim one.

    Args:
      standings: step -> Standing; a loss that is None, NaN or infinite never counts as best.
      max_checkpoints: how many regular ones to keep; exactly so many are, once they exist. With 1 it is the newest.

    Returns:
      The steps to keep. Of equal losses the newest is the best. Beside them the newest interim checkpoint, if it is
      newer than every regular one.
    """
    regular = sorted((step for step, standing in standings.items() if not standing.interim), reverse=True)
    newest = max(standings, default=-1)
    interim = {newest} & {step for step, standing in standings.items() if standing.interim}
    best = best_step({step: standings[step] for step in regular})
    if best is None or max_checkpoints == 1:
        return {*regular[:max_checkpoints], *interim}
    others = [step for step in regular if step != best]
    return {best, *others[: max_checkpoints - 1], *interim}


def best_step(standings: Mapping[int, Standing]) -> int | None:
    """The step with the lowest finite validation loss, the newest of equals; None where there is none."""
    losses = {step: standing.val_loss for step, standing in standings.items()}
    finite = {step: loss for step, loss in losses.items() if loss is not None and math.isfinite(loss)}
    return min(finite, key=lambda step: (finite[step], -step)) if finite else None


# Trees, paths and digests.


def _key_name(key: Any) -> str:
    for attribute in ("key", "idx", "name"):
        if hasattr(key, attribute):
            return str(getattr(key, attribute))
    raise TypeError(f"a tree path with a key of type {type(key).__name__} cannot be stored")


def _flatten(tree: Any) -> dict[str, Any]:
    """{"params/block_0/mlp_up/kernel": leaf}: dict keys, tuple positions and field names, joined by '/'."""
    flat = {}
    for keys, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        names = [_key_name(key) for key in keys]
        path = "/".join(names)
        if path in flat or any("/" in name for name in names):
            raise ValueError(f"the tree path {names} cannot be named by its parts joined with '/'")
        flat[path] = leaf
    return flat


def _nest(flat: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `_flatten`, with a dict at every level."""
    tree: dict[str, Any] = {}
    for path, leaf in flat.items():
        *parents, last = path.split("/")
        node = tree
        for name in parents:
            node = node.setdefault(name, {})
        node[last] = leaf
    return tree


def _digest(array: np.ndarray) -> str:
    """sha256 over dtype, shape and the bytes in C order."""
    digest = hashlib.sha256(f"{array.dtype.name}{list(array.shape)}".encode())
    if array.size:
        # ml_dtypes' types have no buffer protocol, hence the view as bytes.
        digest.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8))
    return digest.hexdigest()


def _document_bytes(document: Mapping[str, Any]) -> bytes:
    """meta.json as it is written. Equal documents have equal bytes, so that no change of the file goes unseen."""
    return json.dumps(document).encode()


def _document_digest(document: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()


def _one_line(error: BaseException) -> str:
    """An exception as one short line; TensorStore's messages run over many, with their cause far back."""
    text = " ".join(str(error).split())
    if code := re.search(r"os_error_code='(\d+)'", text):
        return os.strerror(int(code[1]))
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if isinstance(error, UserError):
        return text
    return f"{type(error).__name__}: {text[:200]}" if text else type(error).__name__


# Several processes.


# An index of a piece of an array: (start, stop) of each axis.
Index = tuple[tuple[int, int], ...]
_AGREEMENTS = itertools.count()


class _Agreement:
    """One matter in which all processes take part, through the key-value store of jax.distributed.

    Not through device collectives, nor through Orbax's barriers, which are such by default: a thread that
    writes a checkpoint would issue them in another order than the training beside it, and both would wait for
    ever. The store may be used from any thread. Made in the thread in which all processes do the same
    things in the same order, for that names it; used from one thread. With one process it does nothing.
    """

    def __init__(self) -> None:
        self._name = f"altgrad_jax/checkpoint/{next(_AGREEMENTS)}"
        self._turn = 0

    def share(self, value: Any) -> list[Any]:
        """The JSON value of each process, in their order.

        Raises:
          UserError: another process gave none within PEER_TIMEOUT_S.
        """
        if jax.process_count() == 1:
            return [value]
        client = distributed.global_state.client
        here = jax.process_index()
        prefix = f"{self._name}/{self._turn}"
        client.key_value_set(f"{prefix}/{here}", json.dumps(value))
        values = []
        for process in range(jax.process_count()):
            try:
                text = client.blocking_key_value_get(f"{prefix}/{process}", int(PEER_TIMEOUT_S * 1000))
            except Exception as error:
                late = f"did not answer within {PEER_TIMEOUT_S:g} s"
                reason = late if "DEADLINE_EXCEEDED" in str(error) else f"cannot be asked ({_one_line(error)})"
                raise UserError(
                    f"process {process} {reason}: see what became of it and start all processes again"
                ) from error
            values.append(json.loads(text))
        if self._turn:  # All have given the value of this turn, so all have read that of the last.
            client.key_value_delete(f"{self._name}/{self._turn - 1}/{here}")
        self._turn += 1
        return values

    def do(self, work: Callable[[], Any]) -> list[Any]:
        """Runs `work` in each process: the JSON value that each returned, or the same error in all of them."""
        result, failure, problem = None, None, None
        try:
            result = work()
        except Exception as error:
            failure, problem = error, _one_line(error)
        if jax.process_count() == 1:
            if failure is not None:
                raise failure
            return [result]
        answers = self.share([result, problem])
        for process, (_, problem) in enumerate(answers):
            if problem is not None:
                raise OSError(errno.EIO, f"process {process}: {problem}") from failure
        return [result for result, _ in answers]


def _in_process_0(work: Callable[[], Any]) -> Callable[[], Any]:
    return lambda: work() if jax.process_index() == 0 else None


@dataclasses.dataclass(frozen=True)
class _Part:
    """What this process writes of an array that several processes hold.

    Attributes:
      shape, dtype: of the whole array.
      piece_shape: of each piece.
      spread: whether process 0 does not hold all of it.
      pieces: where each piece lies in the array -> the piece. No two processes write the same.
    """

    shape: tuple[int, ...]
    dtype: Any
    piece_shape: tuple[int, ...]
    spread: bool
    pieces: dict[Index, Any]

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    def assemble(self) -> np.ndarray:
        """The whole array, where all pieces are here."""
        if len(self.pieces) == 1:
            return np.asarray(*self.pieces.values())
        array = np.empty(self.shape, self.dtype)
        for index, piece in self.pieces.items():
            array[_slices(index)] = np.asarray(piece)
        return array


def _slices(index: Sequence[Sequence[int]]) -> tuple[slice, ...]:
    return tuple(slice(start, stop) for start, stop in index)


def _part(array: jax.Array) -> _Part:
    here = jax.process_index()
    everything = tuple((0, n) for n in array.shape)
    if array.is_fully_addressable:
        # Each process has its own, and all are the same.
        return _Part(array.shape, array.dtype, array.shape, False, {everything: array} if here == 0 else {})

    def bounds(slices: tuple[slice, ...]) -> Index:
        return tuple(s.indices(n)[:2] for s, n in zip(slices, array.shape, strict=True))

    owners: dict[Index, int] = {}
    for device, slices in array.sharding.devices_indices_map(array.shape).items():
        index = bounds(slices)
        owners[index] = min(owners.get(index, device.process_index), device.process_index)
    pieces = {bounds(shard.index): shard.data for shard in array.addressable_shards}
    mine = {index: piece for index, piece in pieces.items() if owners[index] == here}
    piece_shape = array.sharding.shard_shape(array.shape)
    return _Part(array.shape, array.dtype, piece_shape, set(owners.values()) != {0}, mine)


def _written_here(state: Any) -> dict[str, Any]:
    """Path -> array or, with several processes, the `_Part` of this one; process 0 names every array."""
    flat = _flatten(state)
    if jax.process_count() == 1:
        return flat
    parts = {name: _part(leaf) for name, leaf in flat.items()}
    return {name: part for name, part in parts.items() if part.pieces or jax.process_index() == 0}


# Writing.


def _has_room_for_a_copy(leaves: Sequence[jax.Array]) -> bool:
    """Whether each device can hold a second set of `leaves` beside the most that it ever held.

    Devices that do not report their memory (the CPU) are taken to have room.
    """
    needed: Counter[jax.Device] = Counter()
    for leaf in leaves:
        for shard in leaf.addressable_shards:
            needed[shard.device] += shard.data.nbytes
    for device, n_bytes in needed.items():
        memory = device.memory_stats() or {}
        # The peak, not the present use: the next step needs its temporaries while the copy is still alive.
        free = memory.get("bytes_limit", math.inf) - memory.get("peak_bytes_in_use", 0)
        if free < 1.25 * n_bytes:
            return False
    return True


def _copies(leaves: Sequence[jax.Array]) -> list[Any]:
    """Copies that outlive the donation of `leaves`: on the device or, if that is full, on the host."""
    if _has_room_for_a_copy(leaves):
        # One call per sharding: a list of shardings, one for each leaf, takes device_put twice as long.
        alike: dict[jax.sharding.Sharding, list[int]] = {}
        for i, leaf in enumerate(leaves):
            alike.setdefault(leaf.sharding, []).append(i)
        copies: dict[int, jax.Array] = {}
        for sharding, which in alike.items():
            copies |= zip(which, jax.device_put([leaves[i] for i in which], sharding, may_alias=False), strict=True)
        return [copies[i] for i in range(len(leaves))]
    for leaf in leaves:
        leaf.copy_to_host_async()
    return [np.array(leaf) for leaf in leaves]


def _snapshot(state: Any) -> dict[str, Any]:
    """Path -> copy of what this process writes of it; with several processes a `_Part`."""
    flat = _written_here(state)
    if jax.process_count() == 1:
        return dict(zip(flat, _copies(list(flat.values()))))
    pieces = [(part.pieces, index) for part in flat.values() for index in part.pieces]
    for (indices, index), copy in zip(pieces, _copies([indices[index] for indices, index in pieces])):
        indices[index] = copy
    return flat


class _HostMemory:
    """Bounds the bytes that saves under way hold together on the host, over all run folders of the process."""

    def __init__(self, limit: float):
        self.limit = limit
        self._taken = 0
        self._changed = threading.Condition()

    def take(self, n_bytes: int) -> None:
        """Waits until there is room; one save alone always has room."""
        with self._changed:
            self._changed.wait_for(lambda: not self._taken or self._taken + n_bytes <= self.limit)
            self._taken += n_bytes

    def give_back(self, n_bytes: int) -> None:
        with self._changed:
            self._taken -= n_bytes
            self._changed.notify_all()


_HOST_MEMORY = _HostMemory(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 4)
# sha256 releases the GIL. Half the cores at most: the others belong to the loop and to the writing.
_HASHERS = ThreadPoolExecutor(max(1, min(4, (os.cpu_count() or 1) // 2)), thread_name_prefix="sha256")


def _to_host(copies: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Empties `copies` one by one, so that the device's copy goes as the host's comes.

    Returns:
      What is to be written, on the host, and the sha256 of each (of each piece, in a dict, where it is
      spread over processes), which are worked out beside what follows.
    """
    arrays: dict[str, Any] = {}
    digests: dict[str, Any] = {}
    for name in list(copies):
        copy = copies.pop(name)
        if isinstance(copy, _Part) and copy.spread:
            for index, piece in copy.pieces.items():
                copy.pieces[index] = np.asarray(piece)
            digests[name] = {index: _HASHERS.submit(_digest, piece) for index, piece in copy.pieces.items()}
            arrays[name] = copy
        else:
            arrays[name] = copy.assemble() if isinstance(copy, _Part) else np.asarray(copy)
            digests[name] = _HASHERS.submit(_digest, arrays[name])
    return arrays, digests


def _describe(
    step: int,
    standing: Standing,
    arrays: Mapping[str, Any],
    digests: Mapping[str, Any],
    files: Mapping[str, Any],
    meta: Mapping[str, Any],
) -> dict[str, Any]:
    """The content of meta.json, with the sha256 of each array, of each other file and of itself.

    Args:
      step, standing, meta: as they were given to the save.
      arrays: path -> anything with dtype and shape.
      digests: path -> sha256, a future of it or, of an array that is spread over processes, the list of
        {"index": [[start, stop], ...], "sha256"} of its shards.
      files: as `_describe_files` gives them.
    """
    described = {}
    for path, array in arrays.items():
        digest = digests[path]
        if isinstance(digest, list):
            verified = {"shards": digest}
        else:
            verified = {"sha256": digest.result() if isinstance(digest, Future) else digest}
        described[path] = {"dtype": np.dtype(array.dtype).name, "shape": list(array.shape), **verified}
    document = {
        "schema_version": SCHEMA_VERSION,
        "step": step,
        "val_loss": _finite_or_none(standing.val_loss),
        "interim": standing.interim,
        "arrays": described,
        "files": files,
        "meta": meta,
    }
    return {**document, "sha256": _document_digest(document)}


def _file_digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _describe_files(folder: Path) -> dict[str, dict[str, Any]]:
    """{name relative to `folder`: {"bytes", "sha256"}} of every file under it, in the order of their names."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    digests = [_HASHERS.submit(_file_digest, path) for path in paths]
    return {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": digest.result()}
        for path, digest in zip(paths, digests, strict=True)
    }


def _damage_in_files(folder: Path, described: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """What is wrong with the files of a checkpoint, each in a few words; files that are not described may be there."""
    wrong, present = [], {}
    for name, description in described.items():
        path = folder / name
        size = path.stat().st_size if path.is_file() else None
        if size is None:
            wrong.append(f"{name} is missing")
        elif size != description["bytes"]:
            wrong.append(f"{name} has {size} bytes in place of {description['bytes']}")
        else:
            present[name] = _HASHERS.submit(_file_digest, path)
    return wrong + [
        f"{name} does not match its sha256"
        for name, digest in present.items()
        if digest.result() != described[name]["sha256"]
    ]


def _finite_or_none(val_loss: float | None) -> float | None:
    return val_loss if val_loss is not None and math.isfinite(val_loss) else None


class _AllOrAnError(ocp.type_handlers.NumpyHandler):
    """Reads and writes NumPy arrays as Orbax does, but ends only when the last of them is done or has failed.

    Orbax's handler leaves at the first failure. TensorStore still works on the other arrays then: writes go
    on into the folder that is being removed, and each prints a RuntimeError about a closed event loop, past
    everything that could catch it.
    """

    def __init__(self) -> None:
        # The arrays are ours alone, so Orbax need not copy them against changes.
        super().__init__(deepcopy_host_arrays=False)
        self._failures: list[Exception] = []

    async def _open_and_write(self, *args: Any, **kwargs: Any) -> None:
        try:
            await self._write(*args, **kwargs)
        except Exception as error:
            self._failures.append(error)

    async def _write(self, *args: Any, **kwargs: Any) -> None:
        await super()._open_and_write(*args, **kwargs)

    async def serialize(self, values: Sequence[Any], infos: Sequence[Any], args: Any = None) -> list[Any]:
        self._failures = []
        writes = await super().serialize(values, infos, args)
        return [_Checked(write, self._failures) for write in writes]

    async def deserialize(self, infos: Sequence[Any], args: Any = None) -> list[np.ndarray]:
        args = args or [ocp.RestoreArgs()] * len(infos)
        read = super().deserialize
        reads = (read([info], [arg]) for info, arg in zip(infos, args, strict=True))
        results = await asyncio.gather(*reads, return_exceptions=True)
        for result in results:
            if isinstance(result, BaseException):
                raise result
        return [array for (array,) in results]


class _PiecesOfEach(_AllOrAnError):
    """Writes a `_Part` as a part of the array that all processes write together."""

    async def _background_serialize(
        self, values: Sequence[Any], infos: Sequence[Any], args: Sequence[Any] | None = None
    ) -> None:
        specs = (
            ocp.type_handlers.get_json_tspec_write(
                info,
                use_ocdbt=True,
                global_shape=value.shape,
                local_shape=value.piece_shape,
                dtype=value.dtype,
                process_index=jax.process_index(),
            )
            for value, info in zip(values, infos, strict=True)
        )
        writes = zip(values, specs, infos, strict=True)
        await asyncio.gather(*(self._open_and_write(value, spec, info.ts_context) for value, spec, info in writes))

    async def _write(self, value: _Part, spec: dict[str, Any], context: Any) -> None:
        array = await tensorstore.open(tensorstore.Spec(spec), create=True, open=True, context=context)
        await asyncio.gather(
            *(
                array[_slices(index)].write(piece, can_reference_source_data_indefinitely=True)
                for index, piece in value.pieces.items()
            )
        )


@dataclasses.dataclass(frozen=True)
class _Checked:
    """An Orbax future that raises the first of `failures` once the work is done."""

    future: Any
    failures: list[Exception]

    def result(self, timeout: float | None = None) -> Any:
        result = self.future.result(timeout=timeout)
        if self.failures:
            raise self.failures[0]
        return result


def _array_handler() -> ocp.PyTreeCheckpointHandler:
    """How arrays are written and read; see the module's docstring for the choice of layout."""
    registry = ocp.type_handlers.create_type_handler_registry((np.ndarray, _AllOrAnError()), (_Part, _PiecesOfEach()))
    return ocp.PyTreeCheckpointHandler(
        use_ocdbt=True, use_zarr3=True, use_compression=False, type_handler_registry=registry
    )


def _refuse_a_full_disk(folder: Path, n_bytes: int) -> None:
    # Clearer than what TensorStore says, and sooner. Quotas do not show here; they fail in the writing.
    free = shutil.disk_usage(folder).free
    if free < n_bytes:
        raise OSError(errno.ENOSPC, f"it needs {n_bytes / 1e6:.0f} MB, and {free / 1e6:.0f} MB are free")


def _with_elements(arrays: Mapping[str, Any]) -> dict[str, Any]:
    # Orbax refuses arrays without elements. Dtype and shape say all there is to know of them.
    return {name: array for name, array in arrays.items() if array.size}


def _write(
    agreement: _Agreement,
    path: Path,
    step: int,
    standing: Standing,
    copies: dict[str, Any] | Exception,
    n_bytes: int,
    meta: Mapping[str, Any],
) -> None:
    """Writes the checkpoint `path`; it is there whole or not at all.

    Each process writes its parts, as Orbax does; process 0 joins and describes them and renames the folder.
    """
    unfinished = path.with_name(path.name + _UNFINISHED)
    handler = _array_handler()
    arrays: dict[str, Any] = {}
    digests: dict[str, Any] = {}

    def begin() -> None:
        if isinstance(copies, Exception):
            raise copies
        if jax.process_index() == 0:
            _refuse_a_full_disk(path.parent, n_bytes)
            shutil.rmtree(unfinished, ignore_errors=True)
            (unfinished / _STATE).mkdir(parents=True)

    def write() -> dict[str, Any]:
        written, hashed = _to_host(copies)
        arrays.update(written)
        digests.update(hashed)
        if parts := _with_elements(arrays):
            handler.save(epath.Path(unfinished / _STATE), args=ocp.args.PyTreeSave(_nest(parts)))
        spread = {name: pieces for name, pieces in digests.items() if isinstance(pieces, dict)}
        return {
            name: [{"index": index, "sha256": digest.result()} for index, digest in pieces.items()]
            for name, pieces in spread.items()
        }

    def finish() -> None:
        for name, array in arrays.items():
            if isinstance(array, _Part):
                shards = [shard for part in parts_written for shard in part.get(name, ())]
                digests[name] = sorted(shards, key=lambda shard: shard["index"])
                if sum(math.prod(b - a for a, b in shard["index"]) for shard in shards) != array.size:
                    raise OSError(errno.EIO, f"the processes together do not hold all of {name}")
        if _with_elements(arrays):
            handler.finalize(epath.Path(unfinished / _STATE))
        document = _describe(step, standing, arrays, digests, _describe_files(unfinished), meta)
        (unfinished / _META).mkdir()
        with open(unfinished / _META / _META_FILE, "wb") as file:
            file.write(_document_bytes(document))
            file.flush()
            os.fsync(file.fileno())
        # The names too: after a power cut a folder that is listed must not be empty.
        for folder in (unfinished / _META, unfinished / _STATE, unfinished):
            sync(folder)
        unfinished.rename(path)
        sync(path.parent)

    try:
        agreement.do(begin)
        parts_written = agreement.do(write)
        agreement.do(_in_process_0(finish))
    except Exception:
        _in_process_0(lambda: shutil.rmtree(unfinished, ignore_errors=True))()
        raise


def save_anomaly(run_dir: str | Path, step: int, state: Any, meta: Mapping[str, Any]) -> SaveOutcome:
    """Writes `state` to `<run_dir>/anomaly/<step>/`, outside the rotation, and waits until it is there.

    Does not raise: a training that met an anomaly goes on or stops by its own rules. A checkpoint that lies
    there already, from the same step before a resume, is kept.

    Args:
      run_dir: the run folder.
      step: the step of `state`.
      state: pytree of jax arrays.
      meta: JSON data, returned by `restore_path` and `load_params`.
    """
    started = time.perf_counter()
    path = Path(run_dir).absolute() / ANOMALY / str(step)
    agreement = _Agreement()
    try:
        if agreement.share(path.is_dir())[0]:
            return SaveOutcome(step, path)
        n_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
        agreement.do(_in_process_0(lambda: path.parent.mkdir(parents=True, exist_ok=True)))
        meta = json.loads(json.dumps(meta))
        _write(agreement, path, step, Standing(None), _written_here(state), n_bytes, meta)
    except Exception as error:
        _in_process_0(lambda: _remove_unfinished(path.parent))()
        message = f"the anomaly checkpoint of step {step} was not saved to {path}: {_one_line(error)}"
        return SaveOutcome(step, path, error=message)
    return SaveOutcome(step, path, n_bytes=n_bytes, blocked_s=time.perf_counter() - started)


# Reading.


def _read_document(path: Path) -> dict[str, Any]:
    """meta.json of the checkpoint at `path`, verified against its own sha256."""
    file = f"{_META}/{_META_FILE}"
    try:
        content = (path / file).read_bytes()
        document = json.loads(content)
        whole = dict(document)
        sha256 = document.pop("sha256")
        version = document["schema_version"]
    except PermissionError:
        raise UserError(f"{path / file} cannot be read (no permission): make it readable") from None
    except OSError as error:
        raise DamagedCheckpoint(path, f"{file}: {error.strerror}") from None
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError):
        raise DamagedCheckpoint(path, f"{file} is not the JSON it was") from None
    # Version 1 and 2 were written alike, but never promised it.
    if sha256 != _document_digest(document) or version == SCHEMA_VERSION and content != _document_bytes(whole):
        raise DamagedCheckpoint(path, f"{file} does not match its sha256")
    if version not in READABLE_VERSIONS:
        raise UserError(
            f"the checkpoint {path} has schema version {version}, but this program reads versions"
            f" {', '.join(map(str, READABLE_VERSIONS))}: use the program that wrote it"
        )
    return {"interim": False, "files": None, **document}


def _named(items: Sequence[str]) -> str:
    more = len(items) - _NAMED_IN_A_MESSAGE
    return "; ".join(items[:_NAMED_IN_A_MESSAGE]) + (f"; and {more} more" if more > 0 else "")


def _read_arrays(
    path: Path, described: Mapping[str, Mapping[str, Any]], files: Mapping[str, Any] | None
) -> dict[str, np.ndarray]:
    """Reads the arrays named in `described` ({path: {dtype, shape, sha256 or shards}}) and verifies each.

    Args:
      files: of the document, where all of them are to be verified before anything is read.
    """
    try:
        damage = _damage_in_files(path, files or {})
    except PermissionError as error:
        raise UserError(f"{error.filename} cannot be read (no permission): make it readable") from None
    except OSError as error:
        damage = [f"{error.filename}: {error.strerror}"]
    if damage:
        raise DamagedCheckpoint(path, _named(damage))
    empty = {name: d for name, d in described.items() if 0 in d["shape"]}
    stored = {name: d for name, d in described.items() if name not in empty}
    arrays: dict[str, np.ndarray] = {}
    if stored:
        # No dtype is asked for: Orbax would cast to it, and what lies on the disk is what must be compared.
        as_stored = ocp.RestoreArgs(restore_type=np.ndarray)
        # The handler without a Checkpointer, which has barriers by device collectives.
        try:
            tree = _array_handler().restore(
                epath.Path(path / _STATE),
                args=ocp.args.PyTreeRestore(
                    item=_nest({name: 0 for name in stored}),
                    restore_args=_nest({name: as_stored for name in stored}),
                    partial_restore=True,
                ),
            )
            arrays = _flatten(tree)
        except MemoryError:
            raise
        except Exception as error:
            if files:
                raise UserError(
                    f"the checkpoint {path} cannot be read, although its files are as they were written"
                    f" ({_one_line(error)}): use the versions of altgrad_jax and orbax-checkpoint that wrote it"
                ) from error
            raise DamagedCheckpoint(path, f"the arrays are not readable, {_one_line(error)}") from error
    for name, description in empty.items():
        arrays[name] = np.zeros(description["shape"], jax.numpy.dtype(description["dtype"]))
    wrong = []
    for name, description in described.items():
        array = arrays.get(name)
        if not isinstance(array, np.ndarray) or _signature(array) != _signature_of(description):
            wrong.append(f"{name} is not {_signature_of(description)}")
        elif "shards" in description:
            for shard in description["shards"]:
                if _digest(array[_slices(shard["index"])]) != shard["sha256"]:
                    wrong.append(f"the bytes of {name} at {shard['index']} do not match their sha256")
        elif _digest(array) != description["sha256"]:
            wrong.append(f"the bytes of {name} do not match their sha256")
    if wrong:
        raise DamagedCheckpoint(path, _named(wrong))
    return arrays


def _signature(array: Any) -> str:
    """'float32[384, 1152]', of anything with a dtype and a shape."""
    return f"{np.dtype(array.dtype).name}{list(array.shape)}"


def _signature_of(description: Mapping[str, Any]) -> str:
    return f"{description['dtype']}{list(description['shape'])}"


def _refuse_differences(path: Path, described: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    differences = []
    for name in sorted({*described, *wanted}):
        if name not in described:
            differences.append(f"{name} is missing in it")
        elif name not in wanted:
            differences.append(f"{name} is only in it")
        elif _signature_of(described[name]) != _signature(wanted[name]):
            stored = _signature_of(described[name])
            differences.append(f"{name} is {stored}, wanted is {_signature(wanted[name])}")
    if differences:
        raise UserError(
            f"the checkpoint {path} holds another state than this run's ({_named(differences)}):"
            " use the config it was written with, or another run folder"
        )


def restore_path(path: str | Path, abstract_state: Any) -> tuple[Any, dict[str, Any]]:
    """Reads the checkpoint folder `path` into the shape of `abstract_state`.

    Args:
      path: one checkpoint: `<run folder>/<step>` or `<run folder>/anomaly/<step>`.
      abstract_state: pytree of jax.ShapeDtypeStruct (from jax.eval_shape); a leaf's sharding places it.

    Returns:
      (state, meta): the pytree with jax arrays as leaves, and the JSON data given at the save.

    Raises:
      UserError: a leaf's dtype or shape differs from what is stored, or leaves are missing or too many.
      DamagedCheckpoint: files are missing or unreadable, or an array's bytes are not those that were saved.
    """
    path = _existing(path)
    document = _read_document(path)
    wanted = _flatten(abstract_state)
    _refuse_differences(path, document["arrays"], wanted)
    arrays = _read_arrays(path, document["arrays"], document["files"])
    leaves = [_place(arrays[name], _placement(leaf)) for name, leaf in wanted.items()]
    return jax.tree.unflatten(jax.tree.structure(abstract_state), leaves), document["meta"]


def _place(array: np.ndarray, sharding: jax.sharding.Sharding | None) -> jax.Array:
    if sharding is None or sharding.is_fully_addressable:
        return jax.device_put(array, sharding)
    # device_put would compare the values of all processes by a collective.
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


def _placement(leaf: Any) -> jax.sharding.Sharding | None:
    """Where `leaf` says it lies. On a mesh without devices, as jax.eval_shape leaves it, it says nothing."""
    sharding = getattr(leaf, "sharding", None)
    without_devices = isinstance(getattr(sharding, "mesh", None), jax.sharding.AbstractMesh)
    return None if without_devices else sharding


def load_params(path: str | Path, step: int | None = None) -> tuple[dict[str, Any], dict[str, Any]]:
    """Reads only the parameters of a checkpoint; needs no model.

    Args:
      path: a run folder, or one checkpoint in it.
      step: which checkpoint of the run folder; None is the newest.

    Returns:
      (params, meta): nested dict of NumPy arrays, verified as by a full restore; the JSON data of the save.

    Raises:
      UserError: there is no such checkpoint. DamagedCheckpoint: as `restore_path`.
    """
    arrays, meta = load_arrays(path, step, ("params/",))
    if "params" not in arrays:
        raise UserError(f"the checkpoint {path} holds no parameters: give one that the training wrote")
    return arrays["params"], meta


def load_arrays(path: str | Path, step: int | None, prefixes: tuple[str, ...]) -> tuple[dict[str, Any], dict[str, Any]]:
    """(nested dict of the arrays whose paths begin with one of `prefixes`, meta); else as `load_params`."""
    path = _existing(path)
    if not (path / _META).is_dir():
        path = _step_path(path, step)
    elif step is not None and path.name != str(step):
        raise UserError(f"step {step} was asked for, but {path} is one checkpoint: give the run folder")
    document = _read_document(path)
    described = {name: d for name, d in document["arrays"].items() if name.startswith(prefixes)}
    # Only what is read need be sound: a bit of a moment is no reason to keep the parameters from an evaluation.
    return _nest(_read_arrays(path, described, None)) if described else {}, document["meta"]


def _existing(path: str | Path) -> Path:
    path = Path(path).absolute()
    if not os.path.isdir(path):  # Path.is_dir raises for a name that is too long
        raise UserError(f"there is no checkpoint folder {path}: give a run folder or a checkpoint in it")
    return path


def list_steps(run_dir: str | Path) -> list[int]:
    """The steps of the complete checkpoints in `run_dir`, ascending; [] where the folder does not exist."""
    run_dir = Path(run_dir).absolute()
    if not os.path.isdir(run_dir):
        return []
    try:
        names = [entry.name for entry in run_dir.iterdir() if entry.is_dir()]
    except PermissionError:
        raise UserError(f"{run_dir} cannot be read (no permission): make it readable, or give another folder") from None
    # Only the names that Orbax gives a finished step: no sign, no leading zero.
    return sorted(int(name) for name in names if name.isascii() and name.isdigit() and str(int(name)) == name)


def _step_path(run_dir: Path, step: int | None) -> Path:
    steps = list_steps(run_dir)
    if not steps:
        raise UserError(f"{run_dir} holds no checkpoint: give the folder of a run that has saved one")
    if step is None:
        step = steps[-1]
    if step not in steps:
        raise UserError(f"{run_dir} holds no checkpoint of step {step}: it has {', '.join(map(str, steps))}")
    return run_dir / str(step)


# The run folder, while it is trained into.


def _remove_unfinished(folder: Path, name: str = "*") -> None:
    for path in folder.glob(f"{name}{_UNFINISHED}*") if folder.is_dir() else ():
        shutil.rmtree(path, ignore_errors=True)


def _set_aside(run_dir: Path, step: int, folder: str) -> Path:
    """Renames `<run_dir>/<step>` to the first free `<run_dir>/<folder>/<step>-<k>`."""
    (run_dir / folder).mkdir(exist_ok=True)
    k = 1
    while (target := run_dir / folder / f"{step}-{k}").exists():
        k += 1
    return (run_dir / str(step)).rename(target)


def _standing_of(path: Path) -> Standing:
    """What stands in a checkpoint; nothing but that it is there where it cannot be read."""
    try:
        document = _read_document(path)
    except UserError:
        return Standing(None)
    return Standing(document["val_loss"], document["interim"])


def open_checkpoints(run_dir: str | Path, max_checkpoints: int) -> Checkpoints:
    """Opens a run folder for training: makes it where it is missing, purges what killed runs left half-done.

    Args:
      run_dir: the run folder; may hold any other files.
      max_checkpoints: how many checkpoints to keep, at least 1; see `kept_steps`.

    Raises:
      UserError: the folder cannot be made or written to.
    """
    run_dir = Path(run_dir).absolute()
    if max_checkpoints < 1:
        raise UserError(f"max_checkpoints is {max_checkpoints}, but must be at least 1: set it to 1 or more")
    agreement = _Agreement()

    def prepare() -> str | None:
        try:
            run_dir.mkdir(parents=True, exist_ok=True)
            # Making and removing the folder for deletions shows that the run folder can be written to.
            (run_dir / DELETED).mkdir(exist_ok=True)
        except OSError as error:
            return error.strerror
        return None

    problem = agreement.do(_in_process_0(prepare))[0]
    if problem is not None:
        raise UserError(f"the run folder {run_dir} cannot be written to ({problem}): choose another with --workdir")
    seen = agreement.do(lambda: (run_dir / DELETED).is_dir())
    if not all(seen):
        raise UserError(
            f"process {seen.index(False)} does not see the run folder {run_dir} that process 0 made: choose one"
            " on a disk that all processes share with --workdir"
        )

    def purge() -> list[tuple[int, Standing]]:
        shutil.rmtree(run_dir / DELETED, ignore_errors=True)
        _remove_unfinished(run_dir)
        _remove_unfinished(run_dir / ANOMALY)
        return [(step, _standing_of(run_dir / str(step))) for step in list_steps(run_dir)]

    return Checkpoints(run_dir, max_checkpoints, _as_standings(agreement.do(_in_process_0(purge))[0]))


def _as_standings(told: Sequence[tuple[int, Sequence[Any]]]) -> dict[int, Standing]:
    """{step: Standing}, from pairs that may have come from another process."""
    return {step: Standing(*standing) for step, standing in told}


class Checkpoints:
    """The checkpoints of one run folder; made by `open_checkpoints`, released by `close`.

    Methods are called from one thread and, with several processes, in each at the same points with the same
    arguments, `check`, `steps`, `latest` and `best` excepted. `save` hands its work to worker threads: up to
    SAVES_AT_ONCE with one process, so many saves in the queue of one with several, where the saves must come in
    one order. The rotation is under a lock.
    """

    def __init__(self, run_dir: Path, max_checkpoints: int, standings: dict[int, Standing]):
        self.run_dir = run_dir
        self.max_checkpoints = max_checkpoints
        self._standings = standings
        # With several processes: what is on the disk, as process 0 last told it.
        self._told_steps = sorted(standings)
        n_workers = SAVES_AT_ONCE if jax.process_count() == 1 else 1
        self._workers = ThreadPoolExecutor(n_workers, thread_name_prefix="checkpoint")
        self._running: dict[Future[SaveOutcome], int] = {}
        self._finished: list[SaveOutcome] = []
        self._rotation = threading.Lock()

    def steps(self) -> list[int]:
        """The steps of the complete checkpoints on the disk, ascending, without one that is being written.

        With several processes they may differ while a save is under way, and are the same after `wait`.
        """
        return list_steps(self.run_dir) if jax.process_count() == 1 else list(self._told_steps)

    def latest(self) -> int | None:
        """The newest of `steps`, or None."""
        return max(self.steps(), default=None)

    def best(self) -> int | None:
        """The one of `steps` with the best finite validation loss, or None."""
        return best_step(self._standings_of(self.steps()))

    def _standings_of(self, steps: Sequence[int]) -> dict[int, Standing]:
        return {step: self._standings.get(step, Standing(None)) for step in steps}

    def is_saving(self) -> bool:
        """Whether a save is under way."""
        return not all(future.done() for future in self._running)

    def save(
        self, step: int, state: Any, meta: Mapping[str, Any], val_loss: float | None = None, *, interim: bool = False
    ) -> bool:
        """Starts to save `state` as checkpoint `step`; never raises for want of disk, memory or rights.

        Waits only while SAVES_AT_ONCE saves are under way, or for the memory that they hold.

        Args:
          step: updates made so far; the folder's name.
          state: pytree of jax arrays. They may be donated as soon as this returns.
          meta: JSON data: config, data fingerprint, W&B run id, ... Tuples come back as lists.
          val_loss: the validation loss of this very state, where there is one.
          interim: whether the checkpoint is to be there only until the next one that is not; see `kept_steps`.

        Returns:
          True if a save was started, False if checkpoint `step` is there already. What became of a save is
          told by `check`; after a failed one the caller simply saves at the next interval.
        """
        started = time.perf_counter()
        agreement = _Agreement()
        if step in self._running.values():
            self.wait()
        while len(self._running) >= SAVES_AT_ONCE:
            wait_for(self._running, return_when=FIRST_COMPLETED)
            self._collect()
        if step in self.steps():
            return False
        n_bytes = 0
        try:
            meta = json.loads(json.dumps(meta))
            n_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
            _HOST_MEMORY.take(n_bytes)
            copies = _snapshot(state)
        except Exception as error:
            # The worker tells it, for with several processes it has to tell the others.
            copies = error
        standing = Standing(_finite_or_none(None if val_loss is None else float(val_loss)), interim)
        blocked_s = time.perf_counter() - started
        save = self._workers.submit(self._save, agreement, step, copies, n_bytes, meta, standing, blocked_s)
        self._running[save] = step
        if isinstance(copies, Exception):
            self.wait()
        return True

    def wait(self) -> None:
        """Blocks until no save is under way. Never raises for a save that failed: `check` tells."""
        wait_for(self._running)
        self._collect()

    def check(self) -> list[SaveOutcome]:
        """The saves that ended since the last call, in the order of their start, without waiting.

        A failed one has `error`. One that was started earlier may end, and so be told, later.
        """
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
        path = self.run_dir / str(step)
        restored, failure, problem = None, None, None
        try:
            restored = restore_path(_step_path(self.run_dir, step), abstract_state)
        except DamagedCheckpoint as error:
            failure, problem = error, ["damaged", error.reason]
        except Exception as error:
            failure, problem = error, ["refused", str(error)]
        problems = _Agreement().share(problem)
        process, problem = next(((p, found) for p, found in enumerate(problems) if found), (None, None))
        if problem is None:
            return restored
        if process == jax.process_index():
            raise failure
        kind, text = problem
        text = f"process {process}: {text}"
        raise (DamagedCheckpoint(path, text) if kind == "damaged" else UserError(text)) from failure

    def restore_newest(
        self, abstract_state: Any, on_damaged: Callable[[int, str], None]
    ) -> tuple[int, Any, dict[str, Any]] | None:
        """Reads the newest checkpoint that verifies.

        Damaged ones on the way are told to `on_damaged(step, reason)`. Once a good one is found they are
        renamed to `damaged/<step>-<k>`; before that nothing is moved, so that a folder with only damaged ones
        stays an error however often it is tried, and never turns into a fresh start.

        Returns:
          (step, state, meta), or None where the run folder holds no checkpoint at all.

        Raises:
          UserError: every checkpoint is damaged, or the newest good one holds a state of another structure.
        """
        self.wait()
        damaged = []
        for step in reversed(self.steps()):
            try:
                state, meta = self.restore(step, abstract_state)
            except DamagedCheckpoint as error:
                damaged.append(step)
                on_damaged(step, error.reason)
                continue
            self._move(damaged, DAMAGED)
            return step, state, meta
        if damaged:
            raise UserError(
                f"every checkpoint in {self.run_dir} is damaged (steps {', '.join(map(str, damaged[::-1]))});"
                " nothing was deleted: bring back a copy, or start again in another folder with --workdir"
            )
        if (self.run_dir / DAMAGED).is_dir() and any((self.run_dir / DAMAGED).iterdir()):
            raise UserError(
                f"{self.run_dir} holds only checkpoints that were set aside as damaged, in {DAMAGED}/:"
                " bring back a copy, or start again in another folder with --workdir"
            )
        return None

    def set_aside_newer_than(self, step: int) -> list[int]:
        """Renames each checkpoint after `step` to `superseded/<step>-<k>`: the run goes back to `step`.

        Returns:
          The steps that were moved, ascending.
        """
        self.wait()
        newer = [other for other in self.steps() if other > step]
        self._move(newer, SUPERSEDED)
        return newer

    def close(self) -> None:
        """Waits for the saves under way and releases the workers. `check` may still be called, `close` again."""
        self.wait()
        self._workers.shutdown()

    def _move(self, steps: Sequence[int], folder: str) -> None:
        def move() -> None:
            for step in steps:
                _set_aside(self.run_dir, step, folder)

        _Agreement().do(_in_process_0(move))
        for step in steps:
            self._standings.pop(step, None)
        self._told_steps = [step for step in self._told_steps if step not in steps]

    def _failure(self, step: int, error: Exception, **timings: Any) -> SaveOutcome:
        path = self.run_dir / str(step)
        if path.is_dir():
            message = f"checkpoint {step} was saved, but older ones were not removed: {_one_line(error)}"
        else:
            message = f"checkpoint {step} was not saved to {path}: {_one_line(error)}"
        return SaveOutcome(step, path, error=message, **timings)

    # The workers' side.

    def _save(
        self,
        agreement: _Agreement,
        step: int,
        copies: dict[str, Any] | Exception,
        n_bytes: int,
        meta: dict[str, Any],
        standing: Standing,
        blocked_s: float,
    ) -> SaveOutcome:
        started = time.perf_counter()
        path = self.run_dir / str(step)
        try:
            # Before the checkpoint appears: the save beside this one may rotate it.
            self._standings[step] = standing
            _write(agreement, path, step, standing, copies, n_bytes, meta)
            if jax.process_count() == 1:
                self._rotate()
            else:
                self._rotate_together(agreement)
        except Exception as error:
            _in_process_0(lambda: _remove_unfinished(self.run_dir, str(step)))()
            if not path.is_dir():
                self._standings.pop(step, None)
            elapsed = time.perf_counter() - started
            return self._failure(step, error, blocked_s=blocked_s, background_s=elapsed)
        finally:
            _HOST_MEMORY.give_back(n_bytes)
        elapsed = time.perf_counter() - started
        return SaveOutcome(step, path, n_bytes=n_bytes, blocked_s=blocked_s, background_s=elapsed)

    def _rotate_together(self, agreement: _Agreement) -> None:
        def rotate() -> tuple[str | None, list[tuple[int, Standing]]]:
            problem = None
            try:
                self._rotate()
            except OSError as error:
                problem = _one_line(error)
            return problem, list(self._standings_of(list_steps(self.run_dir)).items())

        problem, told = agreement.do(_in_process_0(rotate))[0]
        self._standings = _as_standings(told)
        self._told_steps = sorted(self._standings)
        if problem is not None:
            raise OSError(errno.EIO, problem)

    def _rotate(self) -> None:
        """Deletes what `kept_steps` does not keep of the checkpoints that are complete now.

        In whatever order saves end, the same remain: a step that is dropped for newer and better ones would
        be dropped for them and any others too.
        """
        folder = self.run_dir / DELETED
        dropped = []
        with self._rotation:
            steps = list_steps(self.run_dir)
            kept = kept_steps(self._standings_of(steps), self.max_checkpoints)
            for step in steps:
                if step not in kept:
                    folder.mkdir(exist_ok=True)
                    shutil.rmtree(folder / str(step), ignore_errors=True)
                    dropped.append((self.run_dir / str(step)).rename(folder / str(step)))
                    self._standings.pop(step, None)
        for path in dropped:
            shutil.rmtree(path, ignore_errors=True)
        with self._rotation, contextlib.suppress(OSError):
            folder.rmdir()
