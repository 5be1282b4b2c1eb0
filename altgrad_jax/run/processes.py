"""Several processes that train one run together: how they find each other, and how they come to one decision.

Every process runs the same host loop on its own devices. What the loop decides by the outside world, which is the files
of the run folder, the clock and signals, must be one decision, or the processes would wait for each other in different
programs for ever. So it is made by the first process, the *lead*, or from what all of them saw: `from_lead`,
`everywhere` and `gather`. All processes call them in one order, from their main threads, because each is a collective
of the devices. Where nothing is distributed there is one process, the lead, and all are plain calls.

A UserError at one process is raised in all of them at the same call. Whatever else ends a process ends the others too,
by the heartbeat of jax's coordination service.
"""

import contextlib
import json
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from altgrad_jax.errors import UserError
from altgrad_jax.run.signals import Interrupted


def n_processes() -> int:
    # Asked first, because jax.process_count() starts the backend.
    return jax.process_count() if jax.distributed.is_initialized() else 1


def process_index() -> int:
    return jax.process_index() if jax.distributed.is_initialized() else 0


def is_lead() -> bool:
    """Whether this is the process that keeps the record: the first, or the only one."""
    return process_index() == 0


def gather(value: Any) -> list:
    """What every process gave, JSON values, in the order of the processes; waits for all of them."""
    if n_processes() == 1:
        return [value]
    from jax.experimental import multihost_utils

    data = np.frombuffer(json.dumps(value).encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.int32(len(data)))
    # Few sizes, because each is compiled.
    padded = np.zeros(1 << max(8, int(sizes.max() - 1).bit_length()), np.uint8)
    padded[: len(data)] = data
    return [
        json.loads(bytes(row[:size]))
        for row, size in zip(multihost_utils.process_allgather(padded), sizes, strict=True)
    ]


def everywhere(function: Callable[[], Any]) -> Any:
    """function(), called by every process; returns when it is done in all of them, and raises if it failed in one."""
    result = error = None
    try:
        result = function()
    except UserError as raised:
        if n_processes() == 1:
            raise
        error = raised
    told = gather(None if error is None else str(error))
    if error is not None:
        raise error
    for process, text in enumerate(told):
        if text is not None:
            raise UserError(f"process {process} cannot go on: {text}")
    return result


def from_lead(function: Callable[[], Any]) -> Any:
    """function() of the lead; its result, a JSON value where there are several processes, is that of all."""
    return gather(everywhere(function if is_lead() else lambda: None))[0]


def require_equal(what: str, value: Any, fix: str) -> None:
    """UserError, one sentence, unless all processes give the same value."""
    for process, other in enumerate(gather(value)):
        if other != value:
            raise UserError(f"process {process_index()} has {what} {value} and process {process} has {other}: {fix}")


# ------------------------------------------------------------------------------------------------------ the beginning


def check_flags(distributed: str, coordinator: str | None, num_processes: int | None, process_id: int | None) -> None:
    """UserError unless the flags of a script say clearly how it is distributed."""
    by_hand = {"coordinator": coordinator, "num_processes": num_processes, "process_id": process_id}
    given = [name for name, value in by_hand.items() if value is not None]
    if distributed != "off" and given:
        raise UserError(
            f"--distributed={distributed} finds out by itself what --{given[0]} says: leave one of them out"
        )
    if given and len(given) < 3:
        missing = next(name for name in by_hand if name not in given)
        raise UserError(
            f"--{given[0]} is given without --{missing}: processes that are started by hand each need "
            "--coordinator=HOST:PORT, --num_processes=N and --process_id=0 ... N-1"
        )
    if coordinator is None or num_processes is None or process_id is None:
        return
    match = re.fullmatch(r"\S+:([0-9]{1,5})", coordinator)
    if not (match and 1 <= int(match[1]) <= 65535):
        raise UserError(
            f"--coordinator={coordinator} cannot be used: give the host of process 0 and a free port on "
            "it, such as node1:8476"
        )
    if process_id >= num_processes:
        raise UserError(
            f"--process_id={process_id} is not one of --num_processes={num_processes} processes: count "
            f"from 0 to {num_processes - 1}"
        )


@contextlib.contextmanager
def joined(
    distributed: str = "off",
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
) -> Iterator[None]:
    """A context in which this process is one of several that train together; begins before jax starts.

    Args:
      distributed: "off"; or "auto": as the SLURM, Open MPI or Kubernetes job around this process says, by jax's own
        detection.
      coordinator, num_processes, process_id: HOST:PORT of process 0, how many there are and which one this is, by hand.
    """
    check_flags(distributed, coordinator, num_processes, process_id)
    if distributed == "off" and coordinator is None:
        yield
        return
    _initialize(distributed, coordinator, num_processes, process_id)
    try:
        yield
    except Interrupted as interruption:
        os._exit(128 + interruption.number)
    except BaseException as error:
        # jax's own farewell waits for all processes, and the others may wait on their devices for this one.
        print(f"error: {error}" if isinstance(error, UserError) else traceback.format_exc(), file=sys.stderr)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(error.exit_code if isinstance(error, UserError) else 1)
    jax.distributed.shutdown()


def _initialize(distributed: str, coordinator: str | None, num_processes: int | None, process_id: int | None) -> None:
    # Its handler would swallow the SIGTERM that ends a run (signals.StopRequest).
    jax.config.update("jax_enable_preemption_service", False)
    try:
        if coordinator is None:
            jax.distributed.initialize()
        else:
            # All visible devices, also within a SLURM step, where the detection would take one a process.
            jax.distributed.initialize(coordinator, num_processes, process_id, cluster_detection_method="deactivate")
    except ValueError as error:
        raise UserError(
            f"--distributed={distributed} found no job that says which processes there are ({error}) start "
            "it with srun or mpirun or as an indexed Kubernetes job, or give --coordinator, "
            "--num_processes and --process_id"
        ) from None
    except RuntimeError as error:
        raise UserError(
            "the processes did not find each other: start all of them within five minutes, with one "
            f"--coordinator that each can reach ({' '.join(str(error).split())[:200]})"
        ) from None
