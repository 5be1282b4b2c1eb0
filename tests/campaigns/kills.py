"""kill -9 at random moments of every phase of a run, then resumed and compared with an uninterrupted one, to the bit.

A run is started, killed and started again, up to KILLS_PER_RUN times, then left to finish. The moment of a kill is
chosen by what the run has come to, not by the clock, so that a slow machine does not move all kills to one end:

    start-up     a random time after the start of the process, before anything is compiled
    compile      a random time after it says that it compiles
    step         when a random row is written, and up to 0.1 s later
    evaluation   when the row before an evaluation is written, and up to 10 ms later
    save         when a checkpoint is being written, and up to 30 ms later
    delete       when a checkpoint is being deleted, or has just come to be one too many, and up to 3 ms later
    end          after the last row: verdict, plot, last save
    preparation  of token files (scripts/prepare_data.py), at a random moment; the same command then makes the same
                 files

What the kill really met (a half-written or half-deleted checkpoint, a torn row) is looked up afterwards and told too.
"""

import collections
import os
import random
import signal
import statistics
import sys
import time

from altgrad_jax.run.checkpoint import DELETED
from altgrad_jax.run.record import METRICS
from campaigns.runs import (
    PATIENCE_S,
    ROOT,
    SMALL,
    Part,
    command,
    differences,
    events,
    fingerprint,
    finish,
    last_row,
    n_rows,
    reference,
    start,
    table,
)

KILLS_PER_RUN = 16
PHASES = ("start-up", "compile", "step", "step", "evaluation", "save", "save", "delete", "step", "end")


def _names(run_dir):
    try:
        return os.listdir(run_dir)
    except FileNotFoundError:
        return []


def _is_saving(run_dir):
    return any("tmp" in name for name in _names(run_dir) if name[0].isdigit())


def _is_deleting(run_dir):
    names = _names(run_dir)
    return DELETED in names and bool(_names(run_dir / DELETED)) or sum(name.isdigit() for name in names) > 3


class _Moment:
    """When to kill a run that starts now: `wait` returns when it has come, or the process has ended before."""

    def __init__(self, phase, run_dir, log, rng):
        self.phase, self.run_dir, self.log, self.rng = phase, run_dir, log, rng
        done = max(last_row(run_dir), 0)
        left = range(done + 1, SMALL["max_steps"])
        # Not too far on, or a run would have room for a few kills only.
        self.row = rng.choice(left[:40]) if left else done
        self.heard = log.stat().st_size if log.exists() else 0

    def _has_come(self):
        if self.phase == "compile":
            with open(self.log, "rb") as file:
                file.seek(self.heard)
                return b"compiling ..." in file.read()
        rows = n_rows(self.run_dir)
        if self.phase == "evaluation":
            interval = SMALL["eval_interval"]
            return rows - 1 >= self.row and (rows - 1) % interval >= interval - SMALL["steps_per_dispatch"]
        if self.phase in ("save", "delete"):
            look = _is_saving if self.phase == "save" else _is_deleting
            return rows - 1 >= self.row and look(self.run_dir)
        return rows - 1 >= (SMALL["max_steps"] if self.phase == "end" else self.row)

    def wait(self, process, startup_s):
        if self.phase == "start-up":
            time.sleep(self.rng.uniform(0, startup_s))
            return
        deadline = time.monotonic() + PATIENCE_S
        while process.poll() is None and not self._has_come() and time.monotonic() < deadline:
            # Reading the folder costs the run nothing that matters; a save of this size takes tens of milliseconds.
            time.sleep(0.0005)
        longest = {"compile": 2.0, "step": 0.1, "evaluation": 0.01, "save": 0.03, "delete": 0.003, "end": 0.6}
        time.sleep(self.rng.uniform(0, longest[self.phase]))


def _left_behind(run_dir):
    """What the kill met, by what lies there."""
    record = run_dir / METRICS
    torn = record.exists() and record.stat().st_size and not record.read_bytes().endswith(b"\n")
    return [
        words
        for words, there in (
            ("half-written checkpoint", _is_saving(run_dir)),
            ("half-deleted checkpoint", bool(_names(run_dir / DELETED))),
            ("torn row", torn),
        )
        if there
    ]


def _kill_run(folder, name, kind, data_dir, phases, rng, startup_s, deadline, told):
    """Starts and kills one run until `phases` are spent or it has ended. Returns the kills made, told one by one."""
    run_dir, log, made = folder / name, folder / f"{name}.log", 0
    arguments = command(data_dir, run_dir, kind)
    while phases and not deadline.is_over():
        moment = _Moment(phases[0], run_dir, log, rng)
        reached, starts = last_row(run_dir), _n_starts(run_dir)
        process = start(arguments, log)
        moment.wait(process, startup_s)
        ended = process.poll() is not None
        if not ended:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        replayed = None
        if _n_starts(run_dir) > starts:
            # Where this start went on, against what the one before had recorded.
            replayed = max(0, reached - events(run_dir, "start", "resume")[-1]["step"])
        if ended:
            break  # it was at its end: these moments are another run's
        told(phases.pop(0), _left_behind(run_dir), replayed)
        made += 1
    return made


def _n_starts(run_dir):
    try:
        return len(events(run_dir, "start", "resume"))
    except FileNotFoundError:
        return 0


def _preparation(folder, out):
    """The command that makes token files of the texts in the campaign's folder."""
    return [
        sys.executable,
        str(ROOT / "scripts" / "prepare_data.py"),
        f"--input={folder / 'text'}",
        "--tokenizer=bytes",
        f"--out={out}",
    ]


def _prepare_whole(folder, rng):
    """Makes the texts, and token files of them that nothing disturbs; the seconds that these took."""
    (folder / "text").mkdir()
    for i in range(12):
        words = rng.choices(["council", "article", "shall", "of"], k=400_000)
        (folder / "text" / f"{i}.txt").write_text(" ".join(words))
    started = time.monotonic()
    finish(_preparation(folder, folder / "prepared"), folder / "preparation.log")
    return time.monotonic() - started


def _kill_preparation(folder, number, takes_s, rng, told):
    """Kills the preparation of token files; whether the same command then makes what an undisturbed one makes."""
    whole, out, log = folder / "prepared", folder / f"prepared-{number}", folder / "preparation.log"
    process = start(_preparation(folder, out), log)
    time.sleep(rng.uniform(0, takes_s))
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    hidden = [name for name in _names(folder) if name.startswith(f".{out.name}.")]
    told("preparation", ["half-made token files"] if hidden else [], None)
    if not out.exists():
        finish(_preparation(folder, out), log)
    left = [name for name in _names(folder) if name.startswith(f".{out.name}.")]
    same = _names(out) and all((out / name).read_bytes() == (whole / name).read_bytes() for name in _names(whole))
    return same and not left


def run(folder, data_dir, *, kills, seed, deadline, say=print):
    """The campaign; a tenth of the kills are of preparations. Returns a Part."""
    rng = random.Random(seed)
    by_phase, met, replays, failures, runs = collections.Counter(), collections.Counter(), [], [], []

    def told(phase, left, replayed):
        by_phase[phase] += 1
        met.update(left)
        if replayed is not None:
            replays.append(replayed)
        say(f"kill {sum(by_phase.values())} of {kills}: {phase}{', ' if left else ''}{', '.join(left)}")

    def all_made():
        return sum(by_phase.values())

    n_preparations = kills // 10
    takes_s = _prepare_whole(folder, rng) if n_preparations and not deadline.is_over() else None
    for number in range(n_preparations):
        if not deadline.is_over() and not _kill_preparation(folder, number, takes_s, rng, told):
            failures.append(f"preparation {number}: the files differ from an undisturbed preparation's")
    expected = {}
    while all_made() < kills and not deadline.is_over():
        kind = ("bf16", "E4M3")[len(runs) % 2]
        if kind not in expected:
            started = time.monotonic()
            run_dir, expected[kind] = reference(folder, data_dir, kind)
            first_row = events(run_dir, "eval")[0]["time"] - events(run_dir, "start")[0]["time"]
            startup_s = max(1.0, time.monotonic() - started - first_row - 2.0)
        name = f"killed-{len(runs)}-{kind}"
        wanted = min(KILLS_PER_RUN, kills - all_made())
        phases = (list(PHASES) * 2)[:wanted]
        rng.shuffle(phases)
        # A run can only be killed at its end once it is there, and then no more.
        phases.sort(key=lambda phase: phase == "end")
        made = _kill_run(folder, name, kind, data_dir, phases, rng, min(startup_s, 6.0), deadline, told)
        code, output = finish(command(data_dir, folder / name, kind), folder / f"{name}.log")
        # What it replays now, it replays of the last kill.
        different = differences(fingerprint(folder / name), expected[kind]) if code == 0 else [f"exit code {code}"]
        runs.append((name, made, different))
        if different:
            failures.append(f"{name} after {made} kills: {', '.join(different)}; {output[-300:] if code else ''}")
        say(f"{name}: {made} kills, {'DIFFERENT: ' + ', '.join(different) if different else 'equal to the bit'}")
    return Part("kill -9", _report(by_phase, met, replays, runs, expected, failures), all_made(), kills, failures)


def _report(by_phase, met, replays, runs, expected, failures):
    interval = SMALL["checkpoint_interval"]
    arrays = {kind: len(found.arrays) for kind, found in expected.items()}
    lines = table(["kills", *by_phase], [["", *by_phase.values()]])
    half_done = ", ".join(f"{n} x {what}" for what, n in met.items()) or "nothing half-done"
    lines += ["", f"Met by a kill: {half_done}.", ""]
    wrong = [name for name, _, different in runs if different]
    lines.append(
        f"{len(runs)} runs, killed {sum(made for _, made, _ in runs)} times, then left to finish: "
        f"{len(runs) - len(wrong)} equal the uninterrupted run in metrics.jsonl, diagnostics.jsonl, the "
        "checkpoints that are kept and every array of the last one ("
        + ", ".join(f"{n} arrays for {kind}" for kind, n in arrays.items())
        + f"); {sum(len(different) for _, _, different in runs)} differ."
    )
    if replays:
        more = sum(replayed > interval for replayed in replays)
        lines.append(
            f"Steps replayed after a kill, with a checkpoint every {interval}: median "
            f"{statistics.median(replays):g}, at most {max(replays)}; {more} of {len(replays)} above one "
            "interval (a save was under way when the kill came, and the steps made beside it count too)."
        )
    n_preparations = by_phase["preparation"]
    if n_preparations:
        bad = sum(failure.startswith("preparation") for failure in failures)
        lines.append(
            f"{n_preparations} preparations of token files killed and started again: {n_preparations - bad} "
            "made the files of an undisturbed one, and left nothing else."
        )
    return lines
