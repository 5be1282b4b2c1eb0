"""Where a step spends its time: a trace of jax's profiler, read with the standard library. No jax.

The profiler writes `*.trace.json.gz` (Chrome's trace format). Events that run an operation of the compiled program
carry its name (`hlo_op`). They nest: a loop contains its body, a fusion that is called the operations in it; what is
reported is an operation's own time, without what runs inside it on the same thread. On a GPU only the lanes of its
streams are read, for the lanes derived from them show the same kernels again.
"""

import collections
import gzip
import json
import re
from pathlib import Path

from altgrad_jax.errors import UserError


def newest_trace(folder):
    """The newest trace file in a folder that jax.profiler.trace wrote into; UserError if there is none."""
    files = sorted(Path(folder).rglob("*.trace.json.gz"), key=lambda path: path.stat().st_mtime)
    if not files:
        raise UserError(
            f"--profile={folder} holds no *.trace.json.gz, so this version of jax's profiler wrote none: "
            "read what it wrote with TensorBoard or xprof"
        )
    return files[-1]


def own_times(events):
    """{name: microseconds} of nested events of one thread: (start, duration, name or None), in microseconds.

    An event's time less that of the events inside it; events without a name are passed through: what is inside them
    still counts as inside the event around them.
    """
    total, around = collections.Counter(), []
    # Of events that start together the longer one is the outer.
    for start, duration, name in sorted(events, key=lambda event: (event[0], -event[1])):
        if name is None:
            continue
        while around and start >= around[-1][0]:
            around.pop()
        if around:
            total[around[-1][1]] -= min(duration, around[-1][0] - start)
        total[name] += duration
        around.append((start + duration, name))
    return total


def read_operations(path):
    """{operation: microseconds of its own} over a whole trace file."""
    with gzip.open(path) as file:
        events = json.load(file)["traceEvents"]
    processes, threads = {}, {}
    lanes = collections.defaultdict(list)
    for event in events:
        kind, lane = event.get("ph"), (event.get("pid"), event.get("tid"))
        if kind == "M" and event["name"] == "process_name":
            processes[event["pid"]] = event["args"]["name"]
        elif kind == "M" and event["name"] == "thread_name":
            threads[lane] = event["args"]["name"]
        elif kind == "X":
            name = event.get("args", {}).get("hlo_op")
            lanes[lane].append((event["ts"], event.get("dur", 0.0), name))
    devices = {pid for pid, name in processes.items() if name.startswith("/device:")}
    streams = {lane for lane, name in threads.items() if lane[0] in devices and name.startswith("Stream")}
    total = collections.Counter()
    for lane, of_lane in lanes.items():
        if not streams or lane in streams:
            total.update(own_times(of_lane))
    return total


def sources_of(program_text):
    """{operation: where it comes from in the model} from a compiled program's text (Compiled.as_text)."""
    found = re.findall(r'^\s*(?:ROOT )?%?([\w.\-]+) = .*metadata=\{[^}]*?op_name="([^"]*)"', program_text, re.M)
    return {name: re.sub(r"^jit\(\w+\)/|while/body/|closed_call/", "", source) for name, source in found}


def top_operations(times, steps, sources, n=20):
    """The n operations with the most time, and the rest as one.

    Args:
      times: from read_operations. steps: training steps in the trace. sources: from sources_of.

    Returns:
      [{"name", "ms_per_step", "share", "what"}]; share is of all operations' time. On several threads at once the times
      add up to more than the step.
    """
    total = sum(times.values())
    if not total:
        return []
    ranked = sorted(times.items(), key=lambda item: -item[1])
    rows = [(name, time, sources.get(name, "")) for name, time in ranked[:n]]
    rest = [time for _, time in ranked[n:]]
    if rest:
        rows.append((f"{len(rest)} others", sum(rest), ""))
    return [
        {"name": name, "ms_per_step": time / 1e3 / steps, "share": time / total, "what": what}
        for name, time, what in rows
    ]
