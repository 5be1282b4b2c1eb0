"""Several processes that train one run together: how they find each other, and how they come to one decision.

Every process runs the same host loop on its own devices. What the loop decides by the outside world, which is the files
of the run folder, the clock and signals, must be one decision, or the processes would wait for each other in different
programs for ever. So it is made by the first process, the *lead*, or from what all of them saw: `from_lead`,
`everywhere` and `gather`, through the key-value store of jax's coordination service. All processes call them in one
order, from their main threads. Where nothing is distributed there is one process, the lead, and all are plain calls.

What goes wrong at one process is told to the others at their next such call, and ends them too (`joined`).

jax offers the store in `jax._src` only; `_state` is the one place that reaches for it.
"""

import contextlib
import itertools
import json
import os
import re
import sys
import traceback

import jax

from altgrad_jax.errors import Stopped, UserError

# The first to arrive may wait for one that still prepares its data; a process that dies ends the wait much sooner.
_PATIENCE_S = 24 * 3600
# For the others to come and hear why this process ends. After a defect they mostly wait for it on the device instead,
# or have it too; and a signal wants an answer.
_FAREWELL_S, _BRIEF_FAREWELL_S = 30, 5
_calls = itertools.count()


class _Refused(UserError):
    """Why another process cannot go on, heard from it."""


class _Lost(UserError):
    """The others are gone, without a word that was heard."""


def _state():
    return jax._src.distributed.global_state


def n_processes() -> int:
    return _state().num_processes if jax.distributed.is_initialized() else 1


def process_index() -> int:
    return _state().process_id if jax.distributed.is_initialized() else 0


def is_lead() -> bool:
    """Whether this is the process that keeps the record: the first, or the only one."""
    return process_index() == 0


def gather(value) -> list:
    """What every process gave, JSON values, in the order of the processes; waits for all of them."""
    if n_processes() == 1:
        return [value]
    try:
        return _exchange({"value": value}, _PATIENCE_S)
    except RuntimeError as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise _Lost(
            f"process {process_index()} has lost the others ({reason}): see what they said, and start all of "
            "them again with the same command"
        ) from error


def everywhere(function):
    """function(), called by every process; returns when it is done in all of them."""
    result = function()
    gather(None)
    return result


def from_lead(function):
    """function() of the lead; its result, a JSON value where there are several processes, is that of all."""
    return gather(function() if is_lead() else None)[0]


def require_equal(what, value, fix):
    """UserError, one sentence, unless all processes give the same value."""
    for process, other in enumerate(gather(value)):
        if other != value:
            raise UserError(f"process {process_index()} has {what} {value} and process {process} has {other}: {fix}")


def _exchange(message, patience_s):
    client, number = _state().client, next(_calls)
    folder = f"altgrad_jax/{number}/"
    client.key_value_set(f"{folder}{process_index()}", json.dumps(message))
    client.wait_at_barrier(f"altgrad_jax-{number}", 1000 * patience_s)
    found = {int(key.rpartition("/")[2]): json.loads(text) for key, text in client.key_value_dir_get(folder)}
    if is_lead() and number:
        client.key_value_delete(f"altgrad_jax/{number - 1}/")  # all have read it, for they are all here
    for process, heard in sorted(found.items()):
        if "error" in heard and process != process_index():
            raise _Refused(f"process {process} cannot go on: {heard['error']}")
    return [found[process].get("value") for process in range(n_processes())]


# ------------------------------------------------------------------------------------------------------ the beginning


def check_flags(distributed, coordinator, num_processes, process_id):
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
    match = re.fullmatch(r"\S+:([0-9]{1,5})", coordinator) if given else None
    if given and not (match and 1 <= int(match[1]) <= 65535):
        raise UserError(
            f"--coordinator={coordinator} cannot be used: give the host of process 0 and a free port on "
            "it, such as node1:8476"
        )
    if given and process_id >= num_processes:
        raise UserError(
            f"--process_id={process_id} is not one of --num_processes={num_processes} processes: count "
            f"from 0 to {num_processes - 1}"
        )


@contextlib.contextmanager
def joined(distributed="off", coordinator=None, num_processes=None, process_id=None):
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
    except _Refused:
        raise  # all know
    except _Lost as error:
        _end(error)
    except BaseException as error:
        if not isinstance(error, UserError):
            traceback.print_exc()
        reason = str(error) if isinstance(error, UserError) else f"{type(error).__name__}, see what it printed"
        try:
            brief = isinstance(error, Stopped) or not isinstance(error, UserError)
            _exchange({"error": reason}, _BRIEF_FAREWELL_S if brief else _FAREWELL_S)
        except _Refused:
            pass
        except RuntimeError:
            # They wait on the device for this process, and its end ends them; jax's own farewell would wait for them.
            _end(error)
        raise
    finally:
        jax.distributed.shutdown()


def _end(error):
    """Ends the process where jax's own farewell would wait for others that do not come."""
    if isinstance(error, UserError):
        print(f"error: {error}", file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(error.exit_code if isinstance(error, UserError) else 1)


def _initialize(distributed, coordinator, num_processes, process_id):
    # Its handler would swallow the SIGTERM that ends a run (process.StopRequest).
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
