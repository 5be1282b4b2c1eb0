"""Signals that end a program in good order, and the lock on a run folder."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from altgrad_jax.errors import UserError
from altgrad_jax.run.lock import LOCK, is_empty, locked
from altgrad_jax.run.signals import StopRequest

ROOT = Path(__file__).parents[1]
# What a program does in the context, and how it ends when signals come.
SCRIPT = """
import signal, sys, time
from concurrent.futures import ThreadPoolExecutor
from altgrad_jax.run.signals import Interrupted, StopRequest

signal.signal(signal.SIGHUP, signal.{hangup})  # whatever the tests themselves were started under
def ready():
    print("ready", flush=True)
try:
    with StopRequest() as stop:
        {body}
except Interrupted as interruption:
    print("interrupted by", interruption.number)
print("left", stop.number)
"""
LOOP = "with stop.deferred(): ready(); exec('while not stop.number: time.sleep(0.01)')"


def run(body, *signals, hangup="SIG_DFL"):
    """(exit code, output) of a process that does `body` and is sent these signals, one after the other."""
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT.format(body=body, hangup=hangup)],
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert process.stdout.readline() == "ready\n"
    for number in signals:
        time.sleep(0.3)
        process.send_signal(number)
    output, _ = process.communicate(timeout=20)
    return process.returncode, output


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_the_first_signal_interrupts_what_has_nothing_to_save(number):
    assert run("ready(); time.sleep(30)", number) == (0, f"interrupted by {number}\nleft {number}\n")


def test_within_the_loop_the_first_signal_asks_it_to_stop():
    code, output = run(LOOP, signal.SIGTERM)
    assert code == 0 and output.endswith("left 15\n")
    assert output.count("SIGTERM: saving after this dispatch, then stopping; once more to leave at once") == 1


def test_a_second_signal_leaves_at_once_while_the_device_computes():
    """As in the loop: a thread waits for the device, and the main thread for the thread."""
    body = "with stop.deferred(): ready(); ThreadPoolExecutor(1).submit(time.sleep, 15).result()"
    started = time.monotonic()
    code, output = run(body, signal.SIGTERM, signal.SIGINT)
    assert code == -signal.SIGINT and "left" not in output and time.monotonic() - started < 10


def test_under_nohup_a_closed_terminal_changes_nothing():
    assert run("ready(); time.sleep(0.6)", signal.SIGHUP, hangup="SIG_IGN") == (0, "left None\n")


def test_after_the_context_all_is_as_it_was():
    before = [*map(signal.getsignal, StopRequest.SIGNALS)]
    with StopRequest():
        assert signal.getsignal(signal.SIGINT) is not before[0]
    assert [*map(signal.getsignal, StopRequest.SIGNALS)] == before


def test_a_second_training_in_a_folder_is_refused(tmp_path):
    run_dir = tmp_path / "run"
    with locked(run_dir):
        assert is_empty(run_dir)
        for _ in range(2):
            with pytest.raises(UserError, match="is being trained into by another process: wait for it"):
                with locked(run_dir):
                    raise AssertionError("locked twice")
    assert not run_dir.exists()  # nothing was put into it


def test_what_a_killed_process_left_locks_nothing_and_the_folder_stays(tmp_path):
    (tmp_path / LOCK).touch()
    (tmp_path / "metrics.jsonl").touch()
    with locked(tmp_path):
        assert not is_empty(tmp_path)
    assert (tmp_path / "metrics.jsonl").exists()


def test_a_file_is_no_run_folder(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="is a file or lies below one: give a folder with --workdir"):
        with locked(tmp_path / "file"):
            raise AssertionError("a file was locked")


def test_of_several_processes_none_stops_before_all_agree():
    body = (
        "stop._shared = True\n        with stop.deferred():\n            ready(); time.sleep(1); "
        "assert stop.number is None; stop.agree([None, stop.received])"
    )
    code, output = run(body, signal.SIGTERM)
    assert code == 0 and output.endswith("left 15\n")
