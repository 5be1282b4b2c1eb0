"""The verdict says of made-up runs what a person would, and draws them whatever is in them."""

import io
import json
import math

import numpy as np
import pytest

from altgrad_jax.errors import UserError
from altgrad_jax.run import verdict
from altgrad_jax.run.record import Record, read_history, read_rows, write_manifest
from altgrad_jax.run.verdict import make_verdict

PNG = b"\x89PNG\r\n\x1a\n"


def make_run(run_dir, losses, max_steps=None, validation=None, alerts=None, extra=None):
    """A run folder with one row per loss, from step 1 on."""
    run_dir.mkdir(exist_ok=True)
    write_manifest(run_dir, {"config": {"max_steps": len(losses) if max_steps is None else max_steps}})
    record = Record.open(run_dir)
    validation = {0: 10.0} if validation is None else validation
    if 0 in validation:
        record.write([{"step": 0, "val_loss": validation[0], "val_perplexity": math.exp(validation[0])}])
    for step, loss in enumerate(losses, 1):
        row = {
            "step": step,
            "loss": loss,
            "learning_rate": 1e-3 * step,
            "grad_norm": 2.0 if step < 5 else 0.5,
            "grad_norm_clipped": 1.0 if step < 5 else 0.5,
            "nonfinite_loss": float(not math.isfinite(loss)),
            **(extra or {}).get(step, {}),
        }
        row |= {"val_loss": validation[step]} if step in validation else {}
        row |= {"alerts": alerts[step]} if step in (alerts or {}) else {}
        record.write([row])
    record.close()
    return run_dir


def alert(kind, layer=None, value=1.0):
    return {"kind": kind, "layer": layer, "value": value}


FALLING = [10.0 - 0.05 * i for i in range(100)]


def test_a_sound_run(tmp_path):
    run = make_run(
        tmp_path / "run",
        FALLING,
        validation={0: 10.5, 50: 8.0, 100: 8.5},
        alerts={40: [alert("loss_spike"), alert("dead_layer", "ln_f")], 41: [alert("loss_spike")]},
    )
    for folder in ("100", "50", "anomaly/40", "wandb", "7.tmp"):
        (run / folder).mkdir(parents=True)
    (run / "60").touch()
    v = make_verdict(run)
    assert v["sound"] and v["finished"] and v["loss_fell"] and v["stopped"] is None
    assert v["verdict"] == (
        "sound: 100 steps, loss fell from 9.9000 to 5.1500, every step finite, with alerts: dead_layer 1, loss_spike 2"
    )
    assert (v["loss_first"], v["loss_last"]) == (pytest.approx(9.9), pytest.approx(5.15))  # means of five
    assert (v["initial_loss"], v["final_loss"]) == (10.0, 5.05)
    assert v["final_perplexity"] == pytest.approx(math.exp(5.05))
    assert v["validation"] == [[0, 10.5], [50, 8.0], [100, 8.5]]
    assert (v["best_val_loss"], v["best_val_step"], v["final_val_loss"]) == (8.0, 50, 8.5)
    assert v["alerts"] == {"loss_spike": 2, "dead_layer": 1} and v["nonfinite_steps"] == 0
    assert (v["checkpoints"], v["anomalies"]) == ([50, 100], [40])


@pytest.mark.parametrize(
    ("losses", "settings", "reason"),
    [
        (FALLING[::-1], {}, "the loss did not fall (first 5% of the steps 5.1500, last 5% 9.9000)"),
        ([5.0] * 10, {}, "the loss did not fall"),
        (FALLING, {"max_steps": 120}, "stopped after 100 of 120 steps"),
        ([*FALLING[:50], math.nan, *FALLING[51:]], {}, "1 non-finite step, the first at step 51"),
        (
            FALLING,
            {"extra": {7: {"nonfinite_grads/block_0/mlp_up": 3.0}, 9: {"grad_norm": math.inf}}},
            "2 non-finite steps, the first at step 7",
        ),
        (FALLING, {"alerts": {9: [alert("divergence")]}}, "the loss rose above where it began"),
        (FALLING, {"alerts": {9: [alert("val_rising")]}}, "the validation loss kept rising"),
        ([7.0], {}, "too few finite losses"),
        ([], {}, "too few finite losses"),
        ([math.nan] * 9, {}, "too few finite losses"),
    ],
)
def test_what_makes_a_run_unsound(tmp_path, losses, settings, reason):
    v = make_verdict(make_run(tmp_path / "run", losses, **settings))
    assert not v["sound"] and v["verdict"].startswith("not sound: ") and reason in v["verdict"]


def test_a_reason_given_by_the_caller_is_told(tmp_path):
    v = make_verdict(make_run(tmp_path / "run", FALLING), stopped="10 non-finite steps in a row")
    assert v["verdict"] == "not sound: stopped after 100 of 100 steps (10 non-finite steps in a row)"


def test_speed_leaves_out_each_process_s_first_dispatch(tmp_path):
    def row(step, time, seconds):
        return {"step": step, "time": time, "step_time_s": seconds, "tokens_per_s": 100 / seconds}

    run = make_run(tmp_path / "run", FALLING)
    rows = [
        {"event": "start", "step": 0, "time": 0.0},
        row(1, 60.0, 30.0),
        row(2, 60.0, 30.0),
        row(3, 61.0, 1.0),
        row(4, 62.0, 0.75),
        row(5, 63.0, 0.5),
        {"event": "resume", "step": 4, "time": 100.0},
        row(5, 150.0, 50.0),
        row(6, 151.0, 0.25),
    ]
    (run / "timing.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows) + '{"step": 7, "ti')
    v = make_verdict(run)
    # Of steps 3, 4, 5 (as the first process made it) and 6.
    assert v["step_time_s"] == 0.625 and v["tokens_per_s"] == pytest.approx((100 / 0.75 + 200) / 2)
    (run / "timing.jsonl").unlink()
    assert make_verdict(run)["step_time_s"] is None


def test_verdict_json_is_strict_json(tmp_path):
    run = make_run(tmp_path / "run", [math.nan, math.inf], validation={0: math.nan})
    verdict.write_verdict(run, make_verdict(run))
    v = json.loads((run / "verdict.json").read_text(), parse_constant=lambda name: pytest.fail(name))
    assert v["final_loss"] == "Infinity" and v["validation"] == [[0, "NaN"]] and v["best_val_loss"] is None


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize("losses", [FALLING, [7.0], [], [math.nan] * 3, [1000.0] * 3])
def test_printing(tmp_path, losses, monkeypatch):
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "100")
    validation = {step: 9.0 + step for step in range(0, len(losses) + 1, 7)}
    run = make_run(tmp_path / "run", losses, validation=validation)
    v = make_verdict(run)
    verdict.write_verdict(run, v)
    plain, terminal = io.StringIO(), Terminal()
    # What verdict.json gives back prints the same.
    verdict.print_verdict(json.loads((run / "verdict.json").read_text()), plain, seconds=75)
    verdict.print_verdict(v, terminal, seconds=75)
    text = plain.getvalue()
    assert "\x1b" not in text and text.rstrip().splitlines()[-1] == v["verdict"]
    # Names and values in two columns.
    assert all(line[21:23] == "  " and line[23] != " " for line in text.splitlines()[1:-2])
    assert "0:01:15" in text and str(run / "metrics.jsonl") in text
    assert "\x1b" in terminal.getvalue() and "non-finite steps" in terminal.getvalue()


@pytest.mark.parametrize("losses", [FALLING, [7.0], [], [math.nan] * 3, [math.nan, 5.0, math.inf, 4.0]])
def test_the_plot_takes_any_run(tmp_path, losses):
    run = make_run(tmp_path / "run", losses, alerts={2: [alert("loss_spike")]})
    Record.open(run, max(len(losses) - 1, 0)).close()  # a resume
    path = verdict.plot_loss(run)
    assert path == run / "loss.png" and path.read_bytes().startswith(PNG) and path.stat().st_size > 10000
    assert not [p for p in run.iterdir() if p.name.endswith(".tmp")]


def test_smoothing_ignores_what_is_not_finite():
    smooth = verdict._smooth(np.array([1.0, np.nan, 3.0, 5.0, np.nan, np.nan, np.nan]), 3)
    assert smooth[:5].tolist() == [1.0, 2.0, 4.0, 4.0, 5.0] and np.isnan(smooth[5:]).all()


def test_history_has_a_column_per_name_with_nan_where_a_row_lacks_it(tmp_path):
    run = make_run(
        tmp_path / "run",
        [3.0, 2.0, math.nan],
        validation={0: 10.0, 2: 9.0},
        extra={3: {"late": 4.0}},
        alerts={1: [alert("loss_spike")]},
    )
    history = read_history(run)
    assert history["step"].tolist() == [0, 1, 2, 3] and history["step"].dtype == np.int64
    np.testing.assert_array_equal(history["loss"], np.array([np.nan, 3, 2, np.nan], np.float32))
    np.testing.assert_array_equal(history["val_loss"], np.array([10, np.nan, 9, np.nan], np.float32))
    np.testing.assert_array_equal(history["late"], np.array([np.nan, np.nan, np.nan, 4], np.float32))
    assert "alerts" not in history and history["loss"].dtype == np.float32
    some = read_history(run, ["loss", "none"])
    assert some.keys() == {"step", "loss", "none"} and np.isnan(some["none"]).all()
    np.testing.assert_array_equal(some["loss"], history["loss"])


def test_reading_names_what_is_wrong(tmp_path):
    with pytest.raises(UserError, match="is not a run folder"):
        make_verdict(tmp_path)
    run = make_run(tmp_path / "run", [3.0, 2.0])
    whole = (run / "metrics.jsonl").read_text()
    (run / "metrics.jsonl").write_text(whole + '{"step": 3, "lo')
    assert [row["step"] for row in read_rows(run)] == [0, 1, 2]  # a torn last line is what a kill leaves
    (run / "metrics.jsonl").write_text(whole + "{broken\n" + whole)
    with pytest.raises(UserError, match="damaged in line 4"):
        make_verdict(run)


@pytest.mark.parametrize("first_bad_step, told", [(7, True), (3, False)])
def test_the_cause_of_the_first_non_finite_step_is_told_as_the_record_has_it(tmp_path, first_bad_step, told):
    """An event of a step that a resume has since made anew, and found finite, says nothing."""
    run = make_run(tmp_path / "run", [*FALLING[:6], math.nan, *FALLING[7:]])
    event = {
        "event": "anomaly",
        "step": 10,
        "time": 1.0,
        "first_bad_step": first_bad_step,
        "cause": "1 bad thing in ln_f",
    }
    (run / "timing.jsonl").write_text(json.dumps(event) + "\n")
    v = make_verdict(run)
    assert v["first_nonfinite_cause"] == ("1 bad thing in ln_f" if told else None)
    assert ("1 non-finite step, the first at step 7 (1 bad thing in ln_f)" in v["verdict"]) == told
    stream = io.StringIO()
    verdict.print_verdict(v, stream)
    assert ("the first at step 7: 1 bad thing in ln_f" in stream.getvalue()) == told
