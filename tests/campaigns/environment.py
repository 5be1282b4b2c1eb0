"""What the machine does to a run: full and read-only disks, a clock that goes back, a second process, signals.

Each scenario is a real training by command, and ends, where it can, with the run finished and compared to the bit with
one that was left alone. A small disk of its own is a tmpfs in a mount namespace of the process (`unshare`, Linux), so
that no rights and no spare partition are needed; where namespaces are not allowed these scenarios fail, and say so.
"""

import dataclasses
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from campaigns.runs import (
    PATIENCE_S,
    ROOT,
    SMALL,
    Part,
    command,
    differences,
    environment,
    fingerprint,
    finish,
    n_rows,
    reference,
    start,
    table,
)

LIMIT_S = 10.0
N_SIGNAL_ROWS = 15  # two signals in seven phases, and a second one


@dataclasses.dataclass(frozen=True)
class Row:
    """One scenario: what was done, what happened in words, and what was wrong with it, if anything was."""

    done: str
    happened: str
    wrong: str | None


def _sentence(output, *, limit=230):
    """The last line that says why a command ended, shortened."""
    lines = [line for line in output.splitlines() if line.strip()]
    told = [line for line in lines if line.startswith(("error: ", "SIG", "interrupted"))]
    text = (told or lines or ["(nothing)"])[-1]
    return text if len(text) <= limit else text[:limit] + " ..."


def _problem(code, output, expected_code, *words):
    if "Traceback" in output:
        return f"a traceback: {output[-500:]}"
    if code != expected_code and code not in (expected_code if isinstance(expected_code, tuple) else ()):
        return f"exit code {code} in place of {expected_code}: {output[-500:]}"
    missing = [word for word in words if word not in output]
    return f"{missing} is not in what it said: {output[-500:]}" if missing else None


class Bench:
    """The folder, the data, and what an undisturbed run looks like."""

    def __init__(self, folder, data_dir, say):
        self.folder, self.data_dir, self.say = folder, data_dir, say
        _, self.expected = reference(folder, data_dir)

    def log(self, run_dir):
        return run_dir.with_name(f"{run_dir.name}.log")

    def ends_equal(self, run_dir, **changes):
        """Finishes a run; None, or what is wrong with it."""
        code, output = finish(command(self.data_dir, run_dir, **changes), self.log(run_dir))
        if code != 0:
            return f"the same command then ended with code {code}: {output[-500:]}"
        different = differences(fingerprint(run_dir), self.expected)
        return f"the finished run differs: {', '.join(different)}" if different else None

    def wait_for(self, condition, process):
        deadline = time.monotonic() + PATIENCE_S
        while not condition() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.002)


# Disks.


def _on_a_small_disk(bench, run_dir, size_kib, script):
    """Runs `script`, a shell script, in a mount namespace in which $DISK is a tmpfs of this size, with what run_dir
    holds in $DISK/run. Afterwards run_dir holds what is there. $TRAIN is the training's command, $LOG its output.

    Returns (exit code of the script, the training's output).
    """
    disk, log = run_dir.with_name(f"{run_dir.name}.disk"), bench.log(run_dir)
    disk.mkdir(exist_ok=True)
    train = " ".join(f"'{part}'" for part in command(bench.data_dir, disk / "run"))
    before = log.stat().st_size if log.exists() else 0
    whole = f"""
        mount -t tmpfs -o size={size_kib}k none "$DISK" || exit 99
        [ -d "$RUN" ] && cp -a "$RUN" "$DISK/run"
        say() {{ tail -c +{before + 1} "$LOG" 2>/dev/null; }}
        heard() {{ i=0; while ! say | grep -q "$1"; do i=$((i+1)); [ $i -gt 3000 ] && exit 98; sleep 0.02; done; }}
        fill() {{ dd if=/dev/zero of="$DISK/filler" bs=1k 2>/dev/null; }}
        {script}
        code=$?
        mount -o remount,rw "$DISK"
        rm -rf "$RUN" "$DISK/filler"
        [ -d "$DISK/run" ] && cp -a "$DISK/run" "$RUN"
        exit $code"""
    # The copy out of a full disk goes elsewhere, so it always fits.
    done = subprocess.run(
        ["unshare", "-rm", "sh", "-c", whole],
        timeout=PATIENCE_S,
        capture_output=True,
        text=True,
        env=environment(DISK=str(disk), RUN=str(run_dir), LOG=str(log), TRAIN=train),
    )
    output = log.read_bytes()[before:].decode(errors="replace") if log.exists() else ""
    return done.returncode, output or done.stderr


def full_from_the_start(bench):
    run_dir = bench.folder / "full-start"
    code, output = _on_a_small_disk(bench, run_dir, 1000, 'mkdir $DISK/run; fill; eval "$TRAIN" > "$LOG" 2>&1')
    wrong = _problem(code, output, 1, "No space left on device")
    return Row("disk full from the start", f"exit code {code}, {_sentence(output)}", wrong or bench.ends_equal(run_dir))


def full_while_training(bench):
    run_dir = bench.folder / "full-while"
    code, output = _on_a_small_disk(
        bench,
        run_dir,
        40_000,
        """
        sh -c "exec $TRAIN" > "$LOG" 2>&1 & pid=$!
        heard "step  *[0-9][0-9]*/"; fill; wait $pid""",
    )
    wrong = _problem(code, output, 1, "cannot be written (No space left on device)", "then the same command")
    return Row(
        "disk full while training",
        f"exit code {code}, {_sentence(output)}; with room the same command then finished, equal to the bit",
        wrong or bench.ends_equal(run_dir),
    )


def read_only(bench):
    run_dir = bench.folder / "read-only"
    code, output = _on_a_small_disk(bench, run_dir, 40_000, 'mount -o remount,ro "$DISK"; eval "$TRAIN" > "$LOG" 2>&1')
    return Row(
        "read-only directory",
        f"exit code {code}, {_sentence(output)}",
        _problem(code, output, 2, "cannot be written to (Read-only file system)"),
    )


def another_disk(bench):
    run_dir = bench.folder / "another-disk"
    code, output = _on_a_small_disk(
        bench,
        run_dir,
        40_000,
        """
        sh -c "exec $TRAIN" > "$LOG" 2>&1 & pid=$!
        heard "step  *[0-9][0-9]*/"; mkdir "$DISK/lower"; mount --bind "$DISK/lower" "$DISK/run"
        mount -o remount,ro,bind "$DISK/run"; wait $pid; code=$?; umount "$DISK/run"; rmdir "$DISK/lower"
        (exit $code)""",
    )
    wrong = _problem(code, output, 1, "was removed or replaced while the run wrote to it", "then the same command")
    return Row(
        "another, read-only disk is mounted over the folder while training",
        f"at the next checkpoint exit code {code}, {_sentence(output)}; unmounted, the same command then "
        "finished, equal to the bit",
        wrong or bench.ends_equal(run_dir),
    )


def removed_folder(bench):
    run_dir = bench.folder / "removed"
    process = start(command(bench.data_dir, run_dir), bench.log(run_dir))
    bench.wait_for(lambda: n_rows(run_dir) > 30, process)
    shutil.rmtree(run_dir, ignore_errors=True)
    shutil.rmtree(run_dir, ignore_errors=True)  # a save may have come between
    code = process.wait(timeout=PATIENCE_S)
    output = bench.log(run_dir).read_text(errors="replace")
    shutil.rmtree(run_dir, ignore_errors=True)
    wrong = _problem(code, output, 1, "was removed or replaced while the run wrote to it")
    return Row("run folder removed while training", f"exit code {code}, {_sentence(output)}", wrong)


# The clock, and company.


def clock_back(bench):
    run_dir, site = bench.folder / "clock", bench.folder / "site"
    site.mkdir(exist_ok=True)
    # Once steps have been timed, however long the start took.
    (site / "sitecustomize.py").write_text(
        "import os, time\n"
        "real, is_back = time.time, []\n"
        "def now():\n"
        f"    if not is_back and os.path.exists({str(run_dir / 'timing.jsonl')!r}):\n"
        f"        is_back.extend([1] * (os.path.getsize({str(run_dir / 'timing.jsonl')!r}) > 3000))\n"
        "    return real() - 2 * 86400 * bool(is_back)\n"
        "time.time = now\n"
    )
    code, output = finish(
        command(bench.data_dir, run_dir, max_steps=900),
        bench.log(run_dir),
        PYTHONPATH=os.pathsep.join([str(site), str(ROOT)]),
    )
    times = [
        float(line.partition('"time": ')[2].split(",")[0].rstrip("}"))
        for line in (run_dir / "timing.jsonl").read_text().splitlines()
        if '"time": ' in line
    ]
    steps_back = sum(b < a - 86400 for a, b in zip(times, times[1:]))
    wrong = _problem(code, output, 0, "sound: 900 steps")
    if not wrong and steps_back != 1:
        wrong = f"the clock went back {steps_back} times in timing.jsonl"
    record = bench.folder / "clock-whole"
    whole_code, _ = finish(command(bench.data_dir, record, max_steps=900), bench.log(record))
    if not wrong and (whole_code or differences(fingerprint(run_dir), fingerprint(record))):
        wrong = "the run differs from one with an even clock"
    return Row(
        "clock set back two days while training",
        f"exit code {code}; timing.jsonl has the clock's own times, "
        "the record and every array equal those of a run with an even clock",
        wrong,
    )


def two_processes(bench):
    run_dir = bench.folder / "two"
    first = start(command(bench.data_dir, run_dir), bench.log(run_dir))
    bench.wait_for(lambda: n_rows(run_dir) > 10, first)
    code, output = finish(command(bench.data_dir, run_dir), run_dir.with_name("two-second.log"))
    wrong = _problem(code, output, 2, "is being trained into by another process")
    first_code = first.wait(timeout=PATIENCE_S)
    if not wrong and (first_code or differences(fingerprint(run_dir), bench.expected)):
        wrong = f"the first process ended with code {first_code}, or differs"
    return Row(
        "two processes on one folder",
        f"the second: exit code {code}, {_sentence(output)}; the first went on, equal to the bit",
        wrong,
    )


# Signals.


def _signal(
    bench, name, number, arguments, has_come, rng, later_s, expected_code, *words, finish_with=None, **variables
):
    """One signal at one phase of a command: a Row, with the seconds it took to end."""
    run_dir = bench.folder / f"signal-{name.replace(' ', '-')}-{number}"
    arguments = arguments(run_dir)
    process = start(arguments, bench.log(run_dir), **variables)
    bench.wait_for(lambda: has_come(run_dir, bench.log(run_dir)), process)
    time.sleep(rng.uniform(0, later_s))
    process.send_signal(number)
    sent = time.monotonic()
    try:
        code = process.wait(timeout=60)
    except subprocess.TimeoutExpired:
        process.kill()
        code = process.wait()
    took = time.monotonic() - sent
    output = bench.log(run_dir).read_text(errors="replace")
    wrong = _problem(code, output, expected_code, *words)
    if not wrong and took > LIMIT_S:
        wrong = f"it took {took:.1f} s"
    if not wrong and finish_with is not None:
        wrong = finish_with(run_dir)
    return Row(
        f"{signal.Signals(number).name} during {name}",
        f"ended after {took:.1f} s with exit code {code}: {_sentence(output)}",
        wrong,
    )


def signals(bench, rng):
    """Rows of SIGTERM and SIGINT in every phase."""
    cold = {"JAX_COMPILATION_CACHE_DIR": str(bench.folder / "cold-cache")}
    deep = dict(n_layer=16)  # half a minute of compilation
    slow_look = dict(eval_windows=2048, eval_batch_size=1)  # an evaluation of seconds

    def train(**changes):
        return lambda run_dir: command(bench.data_dir, run_dir, **changes)

    def log_has(text):
        return lambda run_dir, log: log.exists() and text in log.read_bytes()

    def rows(n):
        return lambda run_dir, log: n_rows(run_dir) > n

    def looking(run_dir, log):
        timing = run_dir / "timing.jsonl"
        return timing.exists() and b'"compiled"' in timing.read_bytes()

    def saving(run_dir, log):
        return n_rows(run_dir) > 50 and any("tmp" in entry.name for entry in run_dir.iterdir())

    text = bench.folder / "signal-text"
    text.mkdir(exist_ok=True)
    for i in range(8):
        (text / f"{i}.txt").write_text(" ".join(rng.choices(["council", "article", "shall", "of"], k=2_000_000)))

    def prepare(run_dir):
        return [
            sys.executable,
            str(ROOT / "scripts" / "prepare_data.py"),
            f"--input={text}",
            "--tokenizer=bytes",
            f"--out={run_dir}",
        ]

    def preparing(run_dir, log):
        return any(bench.folder.glob(f".{run_dir.name}.*.tmp/new/all.bin"))

    def nothing_left(run_dir):
        left = list(bench.folder.glob(f"*{run_dir.name}*"))
        return None if left == [bench.log(run_dir)] else f"it left {left}"

    found = []
    for number in (signal.SIGTERM, signal.SIGINT):
        code = 128 + number
        then = dict(finish_with=bench.ends_equal)
        found += [
            _signal(bench, "start-up", number, train(), lambda *_: True, rng, 1.5, (code, -number), **then),
            _signal(
                bench,
                "compilation",
                number,
                train(**deep),
                log_has(b"compiling ..."),
                rng,
                8.0,
                code,
                "stopped while no step was under way; the same command starts again",
                **cold,
            ),
            _signal(
                bench,
                "training",
                number,
                train(),
                rows(60),
                rng,
                0.1,
                code,
                "saving after this dispatch",
                "the same command continues from checkpoint",
                **then,
            ),
            _signal(
                bench,
                "an evaluation",
                number,
                train(**slow_look),
                looking,
                rng,
                0.5,
                code,
                "saving after this dispatch",
            ),
            _signal(
                bench,
                "a save",
                number,
                train(),
                saving,
                rng,
                0.02,
                code,
                "the same command continues from checkpoint",
                **then,
            ),
            # All may be done by then but for Python's own end, or that too.
            _signal(
                bench,
                "the end (verdict and plot)",
                number,
                train(),
                rows(SMALL["max_steps"]),
                rng,
                0.4,
                (code, -number, 0),
                **then,
            ),
            _signal(
                bench,
                "data preparation",
                number,
                prepare,
                preparing,
                rng,
                0.3,
                code,
                "interrupted",
                finish_with=nothing_left,
            ),
        ]
    return found


def second_signal(bench, rng):
    run_dir = bench.folder / "second-signal"
    endless = dict.fromkeys(("max_steps", "checkpoint_interval", "eval_interval", "diagnostic_interval"), 10**6)
    process = start(command(bench.data_dir, run_dir, steps_per_dispatch=60_000, **endless), bench.log(run_dir))
    bench.wait_for(lambda: n_rows(run_dir) > 0, process)
    time.sleep(1.0)
    process.send_signal(signal.SIGTERM)
    time.sleep(0.5)
    process.send_signal(signal.SIGTERM)
    sent = time.monotonic()
    code = process.wait(timeout=60)
    took = time.monotonic() - sent
    output = bench.log(run_dir).read_text(errors="replace")
    wrong = _problem(code, output, -15, "once more to leave at once") or (took > 2 and f"it took {took:.1f} s") or None
    return Row("a second SIGTERM during a dispatch of minutes", f"left after {took:.1f} s with exit code {code}", wrong)


SCENARIOS = (
    full_from_the_start,
    full_while_training,
    read_only,
    another_disk,
    removed_folder,
    clock_back,
    two_processes,
)


def run(folder, data_dir, *, seed, deadline, say=print, scenarios=SCENARIOS, with_signals=True):
    """The campaign. Returns a Part."""
    rng = random.Random(seed)
    bench, rows = Bench(Path(folder), data_dir, say), []

    def told(row):
        rows.append(row)
        say(f"{row.done}: {'WRONG: ' + row.wrong if row.wrong else row.happened}")

    for scenario in scenarios:
        if not deadline.is_over():
            told(scenario(bench))
    wanted = len(scenarios) + with_signals * N_SIGNAL_ROWS
    if with_signals and not deadline.is_over():
        for row in [*signals(bench, rng), second_signal(bench, rng)]:
            told(row)
    lines = table(
        ["what was done", "what happened"], [[row.done, row.wrong or _public(row.happened, folder)] for row in rows]
    )
    return Part(
        "Disk, clock, company, signals",
        lines,
        len(rows),
        wanted,
        [f"{row.done}: {row.wrong}" for row in rows if row.wrong],
    )


def _public(text, folder):
    return text.replace(str(folder), "...")
