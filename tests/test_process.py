"""Signals that end a program in good order, and the lock on a run folder."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from altgrad_jax.run.process import LOCK, StopRequest, is_empty, lock_folder

from altgrad_jax.errors import UserError

ROOT = Path(__file__).parents[1]
# What a program does in the context, and how it ends when signals come.
SCRIPT = """
import hashlib, signal, sys, time
from altgrad_jax.run.process import Interrupted, StopRequest

StopRequest.LEAVE_S = 0.5
signal.signal(signal.SIGHUP, signal.{hangup})  # whatever the tests themselves were started under
def ready():
    print("ready", flush=True)
def slowly():  # in C, where no Python handler runs
    hashlib.pbkdf2_hmac("sha256", b"", b"", 400_000_000)
try:
    with StopRequest() as outer, StopRequest(shared={shared}) as stop:
        {body}
except Interrupted as interruption:
    print("interrupted by", interruption.number)
print("left", stop.received, stop.number, outer.received)
"""
LOOP = "with stop.deferred(): ready(); exec('while not stop.number: time.sleep(0.01)')"


def run(body, *signals, shared=False, hangup="SIG_DFL"):
    """(exit code, output) of a process that does `body` and is sent these signals, the next when it has told of one."""
    script = SCRIPT.format(body=body, shared=shared, hangup=hangup)
    process = subprocess.Popen(
        [sys.executable, "-c", script],
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert process.stdout.readline() == "ready\n"
    for number in signals:
        time.sleep(0.1)
        process.send_signal(number)
    started = time.monotonic()
    output, _ = process.communicate(timeout=30)
    assert time.monotonic() - started < 5
    return process.returncode, output


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_the_first_signal_interrupts_what_has_nothing_to_save(number):
    assert run("ready(); time.sleep(30)", number) == (0, f"interrupted by {number}\nleft {number} None {number}\n")


def test_within_the_loop_the_first_signal_asks_it_to_stop():
    code, output = run(LOOP, signal.SIGTERM)
    assert code == 0 and output.endswith("left 15 15 15\n")
    assert output.count("SIGTERM: saving after this dispatch, then stopping; once more to leave at once") == 1


def test_of_several_processes_none_stops_before_all_agree():
    code, output = run(
        "with stop.deferred(): ready(); time.sleep(0.5); assert stop.number is None; stop.agree([None, stop.received])",
        signal.SIGTERM,
        shared=True,
    )
    assert code == 0 and output.endswith("left 15 15 15\n")


def test_a_second_signal_leaves_at_once():
    code, output = run("with stop.deferred(): ready(); slowly()", signal.SIGTERM, signal.SIGINT)
    assert code == 130 and "left" not in output


def test_a_main_thread_that_does_not_come_back_is_not_waited_for():
    assert run("ready(); slowly()", signal.SIGTERM) == (143, "")


def test_a_signal_on_the_way_into_the_loop_is_not_lost():
    """The thread saw it before the loop was entered; the handler, which runs later, asks all the same."""
    with StopRequest() as stop:
        stop.received = signal.SIGTERM
        with stop.deferred():
            stop._handle(signal.SIGTERM, None)
            assert stop.number == signal.SIGTERM


def test_under_nohup_a_closed_terminal_changes_nothing():
    code, output = run("ready(); time.sleep(0.5)", signal.SIGHUP, hangup="SIG_IGN")
    assert (code, output) == (0, "left None None None\n")


def test_a_signal_is_not_lost_in_a_callback_of_the_garbage_collector():
    """What is raised there is printed and forgotten by Python; jax has such a callback."""
    body = """
import gc
phases = []
def callback(phase, info):
    phases.append(phase)
    if phases == ["start"]:
        signal.raise_signal(signal.SIGTERM)
    elif phases == ["start", "stop"]:  # raised again while this runs, and lost again
        exec("while True: time.sleep(0.001)", {"time": time})
ready()
gc.callbacks.append(callback)
gc.collect()
time.sleep(20)
"""
    assert run(f"exec({body!r}, globals())") == (0, "interrupted by 15\nleft 15 None 15\n")


def test_what_else_cannot_be_raised_is_told_as_before(capfd):
    class Broken:
        def __del__(self):
            raise ZeroDivisionError

    with StopRequest():
        told = []
        StopRequest._innermost._old_hook = told.append
        Broken()
        assert [type(unraisable.exc_value) for unraisable in told] == [ZeroDivisionError]


def test_a_signal_at_python_s_own_end_leaves_no_traceback():
    script = (
        "import atexit, time\nfrom altgrad_jax import cli\n"
        "atexit.register(lambda: (print('ready', flush=True), time.sleep(20)))\ncli.run_script(lambda: None)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script],
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=30) == ("", None) and process.returncode == -signal.SIGINT


def test_after_the_context_all_is_as_it_was():
    before = [*map(signal.getsignal, StopRequest.SIGNALS), sys.unraisablehook]
    with StopRequest():
        assert signal.getsignal(signal.SIGINT) is not before[0] and sys.unraisablehook is not before[-1]
    assert [*map(signal.getsignal, StopRequest.SIGNALS), sys.unraisablehook] == before


def test_a_second_process_is_told_who_holds_the_folder(tmp_path):
    run_dir = tmp_path / "run"
    with contextlib.ExitStack() as holder:
        lock_folder(run_dir, holder)
        assert is_empty(run_dir)
        for _ in range(2):
            with pytest.raises(UserError) as refused, contextlib.ExitStack() as second:
                lock_folder(run_dir, second)
        assert re.fullmatch(
            rf"{re.escape(str(run_dir))} is being trained into by another process \({os.getpid()} on \S+, since "
            r"20\d\d-\d\d-\d\d \d\d:\d\d:\d\d\): wait for it, .*",
            str(refused.value),
        )
    assert not run_dir.exists()  # nothing was put into it


def test_what_a_killed_process_left_locks_nothing_and_the_folder_stays(tmp_path):
    (tmp_path / LOCK).write_text("another process (1 on elsewhere, since 2001-01-01 00:00:00)\n")
    (tmp_path / "metrics.jsonl").touch()
    with contextlib.ExitStack() as holder:
        lock_folder(tmp_path, holder)
        assert f"({os.getpid()} on " in (tmp_path / LOCK).read_text() and not is_empty(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_lock_that_is_removed_while_it_is_taken_is_taken_anew(tmp_path, monkeypatch):
    """The holder removes its file between another's opening and locking it; that one must not hold a removed file."""
    from altgrad_jax.run import process

    flock = process.fcntl.flock

    def late(fd, how):
        monkeypatch.setattr(process.fcntl, "flock", flock)
        (tmp_path / LOCK).unlink()
        flock(fd, how)

    monkeypatch.setattr(process.fcntl, "flock", late)
    with contextlib.ExitStack() as first, contextlib.ExitStack() as second:
        lock_folder(tmp_path, first)
        with pytest.raises(UserError, match="is being trained into by another process"):
            lock_folder(tmp_path, second)
