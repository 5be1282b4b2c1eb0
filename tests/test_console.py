"""Plain output has a known length and no escape codes; the live line survives what is printed above it."""

import io
import math
import re
import threading

import pytest

from altgrad_jax.errors import UserError
from altgrad_jax.run.console import make_console, show_duration, show_rate


class Terminal(io.StringIO):
    def isatty(self):
        return True


def play(mode, stream, steps=2000, every=100, clock=lambda: 0.0):
    console = make_console(mode, steps, stream, clock)
    console.update(0, None, 10.8, None)
    for step in range(1, steps + 1):
        console.update(step, 10.0 - step / 1000, 9.5 if step % every == 0 else None, 1.2e6)
    return console


def test_plain_lines_are_few_and_the_same_at_any_speed():
    outputs = []
    for pace in (0.0, 3.7):
        stream, ticks = io.StringIO(), iter(range(10**6))
        play("auto", stream, clock=lambda pace=pace, ticks=ticks: pace * next(ticks)).close()
        outputs.append([line.split("  ETA")[0] for line in stream.getvalue().splitlines()])
    assert outputs[0] == outputs[1]
    lines = outputs[0]
    assert lines[0] == "step    0/2000  val_loss 10.8000"
    assert lines[1] == "step    1/2000  loss 9.9990  1.2M tok/s"
    assert lines[-1] == "step 2000/2000  loss 8.0000  val_loss 9.5000  1.2M tok/s"
    assert len([line for line in lines if "val_loss" in line]) == 21
    assert len([line for line in lines if "val_loss" not in line]) <= 51
    assert "\x1b" not in stream.getvalue()


def test_a_short_run_prints_every_step():
    stream = io.StringIO()
    play("plain", stream, steps=5).close()
    assert len(stream.getvalue().splitlines()) == 6


def test_quiet_prints_only_alerts():
    stream = io.StringIO()
    console = play("quiet", stream)
    console.alert("step 3: loss_spike, value 9")
    console.message("finished")
    with console.working("compiling"):
        pass
    console.close()
    assert stream.getvalue() == "ALERT step 3: loss_spike, value 9\n"


def test_a_plain_console_says_what_took_how_long():
    stream = io.StringIO()
    with make_console("plain", 10, stream).working("compiling"):
        pass
    assert re.fullmatch(r"compiling \.\.\.\ncompiling took \d\.\d s\n", stream.getvalue())


def test_the_live_line_and_what_scrolls_above_it(monkeypatch):
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "120")
    stream = Terminal()
    console = play("auto", stream)
    console.alert("step 3: [bold]loss_spike[/bold], value 9")
    console.message("[/red] is no markup")
    console.message("a path /that/is/long" + "/x" * 80)
    console.close()
    console.close()
    text = stream.getvalue()
    # Shown as written: brackets are no markup, a long path is one line to be copied.
    assert "[/red] is no markup" in text
    assert "step 3: [bold]loss_spike[/bold], value 9" in text and "/that/is/long" + "/x" * 80 in text
    last = text[text.rindex("/that/is/long") :]
    assert "2000/2000" in last and "loss 8.0000" in last and "val_loss 9.5000" in last and "1.2M tok/s" in last
    assert "1 alert" in last and "\x1b[?25h" in last  # the cursor is back


def test_a_dumb_terminal_gets_plain_lines(monkeypatch):
    monkeypatch.setenv("TERM", "dumb")
    stream = Terminal()
    play("auto", stream).close()
    assert "\x1b" not in stream.getvalue() and len(stream.getvalue().splitlines()) > 20


class Gone(io.StringIO):
    """A pipe whose reader has left."""

    def write(self, text):
        raise BrokenPipeError


@pytest.mark.parametrize("mode", ["plain", "quiet", "live"])
def test_a_reader_that_has_gone_never_ends_the_run(mode, monkeypatch):
    monkeypatch.setenv("TERM", "xterm-256color")
    console = make_console(mode, 10, Gone())
    console.update(1, 1.0, 1.0, 1.0)
    console.alert("a")
    console.message("b")
    console.close()


@pytest.mark.parametrize("stream", [io.StringIO, Terminal])
def test_two_threads_never_share_a_line(stream, monkeypatch):
    monkeypatch.setenv("TERM", "xterm-256color")
    stream = stream()
    console = make_console("auto", 10**6, stream)

    def shout(word):
        for _ in range(100):
            console.update(1, 1.0, None, None)
            console.alert(word * 20)

    threads = [threading.Thread(target=shout, args=(word,)) for word in "ab"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive()
    console.close()
    assert stream.getvalue().count("a" * 20) == stream.getvalue().count("b" * 20) == 100


def test_eta_leaves_the_first_dispatch_out():
    now, stream = [0.0], io.StringIO()
    console = make_console("plain", 100, stream, lambda: now[0])
    for step in (1, 2, 3):  # one dispatch, at the end of a minute of compilation
        now[0] = 60.0 + step / 1000
        console.update(step, 1.0)
    now[0] += 30.0
    console.update(33, 1.0, 5.0)  # 30 steps in 30 s leave 67 s for 67 steps
    lines = stream.getvalue().splitlines()
    assert lines[-1].endswith("ETA 0:01:07") and "ETA" not in lines[0]


def test_numbers_for_people():
    assert [show_rate(x) for x in (7.0, 999.0, 1536.0, 123456.0, 1.234e6, 2.5e9)] == [
        "7 tok/s",
        "999 tok/s",
        "1.54k tok/s",
        "123k tok/s",
        "1.23M tok/s",
        "2.5G tok/s",
    ]
    assert [show_duration(x) for x in (None, math.nan, 0, 59.6, 3725)] == ["-", "-", "0:00:00", "0:01:00", "1:02:05"]


def test_an_unknown_mode_is_named():
    with pytest.raises(UserError, match="console is 'loud'; allowed are auto, live, plain, quiet"):
        make_console("loud", 10)
