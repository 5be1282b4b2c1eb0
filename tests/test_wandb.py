"""W&B gets every row of the record under the names its users know, and can do nothing to the run."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
import types
from pathlib import Path

import pytest

from altgrad_jax import config as settings
from altgrad_jax.errors import UserError
from altgrad_jax.run import sinks
from altgrad_jax.run import wandb as wandb_module
from altgrad_jax.run.record import METRICS, Record, read_rows
from altgrad_jax.run.wandb import resolve_wandb_mode, stored_records

MANIFEST = {
    "run_id": "abc",
    "config": {"seed": 1, "run_name": "n"},
    "tags": ["baseline", "bf16", "eurlex", "eurlex-sample"],
    "data": {"fingerprint": "f00", "meta": {"source": "sample", "n_tokens": {"train": 90, "val": 10}}},
    "model": {"parameters": 1000},
    "starts": [{"device": {"count": 1, "kind": "cpu", "platform": "cpu"}}],
}


def rows(first, last):
    """Rows of a run; each follows from its step alone, as in a resumed run."""
    for step in range(first, last + 1):
        row = {"step": step, "loss": 5 - step / 10, "learning_rate": 0.1, "grad_norm/block_0/mlp_up": 0.5}
        if step % 5 == 0:
            row["val_loss"] = 4 + abs(step - 5) / 10
        if step == 3:
            row["alerts"] = [{"kind": "loss_spike", "layer": None, "value": 9.5}]
        yield row


def write(run_dir, last, resume_step=None):
    record = Record.open(run_dir, resume_step)
    for row in rows(0 if resume_step is None else resume_step + 1, last):
        record.write([row], [{"step": row["step"], "time": 7.0, "tokens_per_s": 2.0}])
    record.close()


class FakeRun:
    url = "https://wandb.test/run"

    def __init__(self, wandb):
        self.fault, self.starting_step = wandb.fault, wandb.starting_step
        self.sent, self.alerts, self.metrics, self.summary, self.finished = {}, [], [], {}, False

    def define_metric(self, name, **how):
        self.metrics.append((name, how.get("summary")))

    def log(self, values, step):
        self.fault("log", step)
        assert values.pop("step") == step and step not in self.sent
        self.sent[step] = values

    def alert(self, title, text, level, wait_duration):
        self.alerts.append(text)

    def finish(self):
        self.fault("finish")
        self.finished = True


class FakeWandb(types.ModuleType):
    """Plays wandb. A fault is a function that is called within one of its calls."""

    run = None

    def __init__(self, log=None, init=None, finish=None, starting_step=0):
        super().__init__("wandb")
        self.faults, self.starting_step = {"log": log, "init": init, "finish": finish}, starting_step
        self.inits, self.runs, self.torn_down = [], [], 0

    @property
    def sent(self):
        """{step: values} of the last run."""
        return self.runs[-1].sent if self.runs else {}

    def fault(self, where, *args):
        if self.faults[where]:
            self.faults[where](*args)

    def Settings(self, **values):
        return values

    def setup(self, settings):
        assert settings == {"silent": True}

    def teardown(self):
        self.torn_down += 1

    def init(self, **arguments):
        sys.exit = sys.excepthook = lambda *_: None  # wandb puts its own there
        self.fault("init", arguments)
        self.inits.append(arguments)
        self.runs.append(FakeRun(self))
        return self.runs[-1]


@pytest.fixture
def fake(monkeypatch, tmp_path):
    """fake(log=..., ...) puts a FakeWandb in wandb's place, on a machine with a login."""
    for name in [name for name in os.environ if name.startswith("WANDB")] + ["NETRC"]:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
    monkeypatch.setattr(wandb_module, "_open", set())
    monkeypatch.setattr(wandb_module, "_lock", threading.Lock())  # one that a hanging test does not hold
    for name in ("exit", "excepthook"):
        monkeypatch.setattr(sys, name, getattr(sys, name))  # put back even where wandb.init hangs
    monkeypatch.setattr(sinks, "PAUSES_S", (0.01,) * 4)

    def make(**faults):
        monkeypatch.setitem(sys.modules, "wandb", FakeWandb(**faults))
        return sys.modules["wandb"]

    return make


class Feed:
    """A run of `last` rows that grows under its dashboards, and what was said."""

    def __init__(self, run_dir, last=12, resume_step=None, **changes):
        self.run_dir, self.said, self.events = run_dir, [], []
        config = settings.default_config()
        with config.unlocked():
            config.update({"run_name": "n", "wandb_mode": "online", **changes})
        write(run_dir, 4 if resume_step is None else resume_step, resume_step)
        self.sinks = sinks.open_sinks(
            config,
            run_dir,
            MANIFEST,
            resume_step=resume_step,
            say=self.said.append,
            event=lambda kind, step, **values: self.events.append((kind, values)),
        )
        started = time.monotonic()
        write(run_dir, last, 4 if resume_step is None else resume_step)
        assert time.monotonic() - started < 5  # nobody waits for W&B

    def close(self, within=20.0, summary=None):
        return self.sinks.close(within, {"sound": True, "verdict": "v", "best_val_loss": 4.0, "steps": 12})


def wait_for(condition):
    deadline = time.monotonic() + 20
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.02)


def test_wandb_gets_every_row_under_its_users_names(tmp_path, fake):
    wandb, hooks = fake(), (sys.exit, sys.excepthook)
    feed = Feed(tmp_path / "run", wandb_group="sweep")
    assert feed.close() == 0 and feed.close() == 0
    (init,), (run,) = wandb.inits, wandb.runs
    assert init["settings"]["console"] == "off" and init["settings"]["reinit"] == "create_new"
    assert (init["id"], init["mode"], init["resume"], init["dir"]) == ("abc", "online", "allow", tmp_path / "run")
    assert (init["project"], init["entity"], init["group"], init["name"]) == ("altgrad", None, "sweep", "n")
    assert init["tags"] == MANIFEST["tags"]
    assert init["config"] == MANIFEST["config"] | {
        "data": {"fingerprint": "f00", "source": "sample", "train_tokens": 90, "val_tokens": 10},
        "parameters": 1000,
        "device": "1 x cpu (cpu)",
        "run_dir": str(tmp_path / "run"),
    }
    assert list(wandb.sent) == list(range(13))
    assert wandb.sent[5] == {
        "train/loss": 4.5,
        "val/loss": 4.0,
        "optim/learning_rate": pytest.approx(0.1),
        "grad_norm/block_0/mlp_up": 0.5,
        "perf/time": 7.0,
        "perf/tokens_per_s": 2.0,
    }
    assert run.finished and run.alerts == ["step 3: loss_spike, value 9.5"]
    assert {("val/loss", "min"), ("train/loss", "last"), ("*", None)} < set(run.metrics)
    assert run.summary == {"sound": True, "verdict": "v", "best_val_loss": 4.0}
    assert feed.said == ["W&B: https://wandb.test/run"] and not feed.events
    assert (sys.exit, sys.excepthook) == hooks


def test_names_on_dashboards():
    names = "perplexity", "val_perplexity", "grad_norm", "mfu", "loss_zscore", "sqnr_db/head/W"
    shown = "train/perplexity", "val/perplexity", "optim/grad_norm", "perf/mfu", "train/loss_zscore", "sqnr_db/head/W"
    assert tuple(map(sinks.dashboard_name, names)) == shown


def test_only_the_asked_keys_are_sent_by_their_names_in_the_record(tmp_path, fake):
    wandb = fake()
    assert Feed(tmp_path, wandb_keys=("lo*s", "tokens_per_s")).close() == 0
    assert [set(values) for values in wandb.sent.values()] == [{"train/loss", "perf/tokens_per_s"}] * 13


def test_the_environment_is_heard_where_the_config_says_nothing(tmp_path, fake, monkeypatch):
    wandb = fake()
    for name, value in (("PROJECT", "p"), ("ENTITY", "e"), ("TAGS", "a, b"), ("MODE", "OnLine")):
        monkeypatch.setenv(f"WANDB_{name}", value)
    Feed(tmp_path / "default", wandb_mode="auto").close()
    Feed(tmp_path / "set", project="own", wandb_entity="us", tags=("t",)).close()
    found = [(init["project"], init["entity"], init["tags"]) for init in wandb.inits]
    assert found[0] == ("p", "e", ["a", "b", "eurlex-sample"]) and found[1][:2] == ("own", "us")
    assert found[1][2][0] == "t" and os.environ["WANDB_MODE"] == "online"


def hang(*_):
    time.sleep(60)  # on a daemon thread, which the end of the tests does not wait for


def leave(*_):
    raise SystemExit(3)


def fail(*_):
    raise RuntimeError("no\nroute")


@pytest.mark.parametrize(
    "fault",
    [
        {"log": lambda step: time.sleep(0.2)},
        {"log": hang},
        {"log": fail},
        {"init": hang},
        {"init": fail},
        {"finish": hang},
        {"log": leave},
    ],
    ids=["slow", "log hangs", "log fails", "init hangs", "init fails", "finish hangs", "exits"],
)
def test_no_fault_of_wandb_holds_the_run_up(tmp_path, fake, fault):
    wandb = fake(**fault)
    feed = Feed(tmp_path, last=20)
    raises = fail in fault.values() or leave in fault.values()
    if raises:
        wait_for(lambda: any(event == "wandb_failed" and "gave up" in str(values) for event, values in feed.events))
    started = time.monotonic()
    unsent, sent = feed.close(1.0), len(wandb.sent)
    assert time.monotonic() - started < 2
    assert len(list(read_rows(tmp_path))) == 21
    # A slow W&B may take one more row after it was given up.
    assert 0 <= unsent - (21 - sent) <= 1 and ("finish" in fault) == (unsent == 0)
    if unsent:
        assert f"W&B: {unsent} rows were not sent; all are in {tmp_path / METRICS}" in feed.said
        assert ("wandb_unsent", {"rows": unsent}) in feed.events
    warnings = [text for text in feed.said if text.startswith("warning: W&B: ")]
    assert len(warnings) == raises and all("the run goes on" in text and "\n" not in text for text in warnings)


def test_a_feed_that_lags_drains_at_the_end_and_says_how_far_it_is(tmp_path, fake):
    wandb = fake(log=lambda step: time.sleep(0.35))
    feed = Feed(tmp_path)
    assert feed.close(300.0) == 0 and list(wandb.sent) == list(range(13))
    assert any("rows still to be sent; giving up in 29" in line for line in feed.said)


def test_a_failing_row_is_tried_again_and_people_are_warned_once(tmp_path, fake):
    tries = []

    def sometimes(step):
        tries.append(step)
        if step in (4, 7) and tries.count(step) < 4:
            raise OSError("down")

    wandb = fake(log=sometimes)
    feed = Feed(tmp_path)
    assert feed.close() == 0 and list(wandb.sent) == list(range(13))
    assert [text for text in feed.said if "warning" in text] == [
        "warning: W&B: sending failed (OSError: down); the run goes on, the local record is complete"
    ]


def test_a_server_that_does_not_answer_makes_the_run_offline(tmp_path, fake):
    def refuse(arguments):
        if arguments["mode"] == "online":
            raise TimeoutError("no answer")

    wandb = fake(init=refuse)
    first, second = Feed(tmp_path / "1"), Feed(tmp_path / "2")
    assert first.close() == second.close() == 0
    assert [init["mode"] for init in wandb.inits] == ["offline"] * 2 and len(wandb.sent) == 13 and wandb.torn_down == 2
    assert len(first.said) == 1 and "so it is kept offline; to send it later: wandb sync" in first.said[0]


@pytest.mark.parametrize("starting_step", [9, 14, 0])
def test_online_a_resumed_run_sends_what_wandb_says_it_lacks(tmp_path, fake, starting_step):
    write(tmp_path, 12)
    wandb = fake(starting_step=starting_step)
    assert Feed(tmp_path, last=20, resume_step=10).close() == 0
    assert list(wandb.sent) == list(range(starting_step, 21))


def test_modes(tmp_path, fake, monkeypatch):
    def resolved_in(mode, environ):
        for name in ("HOME", "NETRC", "WANDB_API_KEY", "WANDB_MODE", "WANDB_DISABLED", "WANDB_BASE_URL"):
            monkeypatch.delenv(name, raising=False)
        for name, value in environ.items():
            monkeypatch.setenv(name, value)
        return resolve_wandb_mode(mode)

    home = {"HOME": str(tmp_path)}
    login = {**home, "WANDB_API_KEY": "k"}
    for mode, environ, resolved in (
        ("auto", home, "offline"),
        ("auto", login, "online"),
        ("auto", login | {"WANDB_MODE": "Disabled"}, "disabled"),
        ("auto", login | {"WANDB_MODE": "dryrun"}, "offline"),
        ("auto", login | {"WANDB_DISABLED": "true"}, "disabled"),
        ("offline", login | {"WANDB_MODE": "disabled"}, "offline"),
        ("auto", login | {"WANDB_MODE": "run"}, "online"),
    ):
        assert resolved_in(mode, environ) == resolved
    for mode, environ, error in (
        ("online", home, "wandb_mode is online but there is no W&B login"),
        ("on", home, "wandb_mode is 'on'; allowed are auto"),
        ("auto", home | {"WANDB_MODE": "of"}, "WANDB_MODE is 'of'; allowed"),
    ):
        with pytest.raises(UserError, match=error):
            resolved_in(mode, environ)
    (tmp_path / ".netrc").write_text("machine api.wandb.ai login user password secret\n")
    assert resolved_in("auto", home) == "online"
    assert resolved_in("auto", {**home, "WANDB_BASE_URL": "https://elsewhere.org"}) == "offline"
    wandb = fake()
    feed = Feed(tmp_path / "run", wandb_mode="disabled")
    assert feed.close() == 0 and not feed.said and not wandb.inits


SCRIPT = """
import os, signal, sys, time
from pathlib import Path
from test_wandb import Feed
if sys.argv[2] == "killed":
    feed = Feed(Path(sys.argv[1]), wandb_mode="offline")
    while feed.sinks._followers[0].last_sent < 10:
        time.sleep(0.01)
    os.kill(os.getpid(), signal.SIGKILL)
feed = Feed(Path(sys.argv[1]), last=20, resume_step=6, wandb_mode="offline")
assert feed.close(60.0) == 0
os.kill(os.getpid(), signal.SIGINT)
"""


def test_the_files_of_a_run_that_was_killed_and_resumed_offline_hold_each_row_once(tmp_path):
    """The real wandb: what its offline files hold, and that it keeps to itself."""
    root, run = Path(__file__).parents[1], tmp_path / "run"
    environ = {name: value for name, value in os.environ.items() if not name.startswith("WANDB")}
    environ |= {"PYTHONPATH": f"{root}{os.pathsep}{root / 'tests'}", "HOME": str(tmp_path)}
    for how, code in (("killed", -signal.SIGKILL), ("resumed", -signal.SIGINT)):
        command = [sys.executable, "-c", SCRIPT, str(run), how]
        ended = subprocess.run(command, env=environ, text=True, capture_output=True, timeout=120)
        assert (ended.returncode, ended.stdout) == (code, ""), ended.stderr
        assert "wandb" not in ended.stderr and ended.stderr.count("Traceback") == (code == -signal.SIGINT)
    files = sorted(run.glob("wandb/offline-run-*/run-abc.wandb"))
    assert len(files) == 2 and not list(run.glob("wandb/*/files/output.log"))
    records = [record for path in files for record in stored_records(path)]
    history = [
        {"/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
        for record in records
        if record.HasField("history")
    ]
    assert [values["step"] for values in history] == list(range(21))
    for values, row in zip(history, rows(0, 20), strict=True):
        assert values["train/loss"] == pytest.approx(row["loss"]) and values["perf/tokens_per_s"] == 2.0
        assert ("val/loss" in values) == ("val_loss" in row)
        assert {name.partition("/")[0] for name in values} <= {
            "step", "train", "val", "optim", "perf", "grad_norm", "_step", "_runtime", "_timestamp"
        }  # fmt: skip
    run_config = {item.key: json.loads(item.value_json) for item in records[1].run.config.update}
    assert run_config["seed"] == 1 and run_config["data"]["fingerprint"] == "f00"
    assert run_config["run_dir"] == str(run) and list(records[1].run.tags) == MANIFEST["tags"]
    assert {r.metric.name: r.metric.summary.min for r in records if r.HasField("metric")}["val/loss"] is True
    assert [record.alert.text for record in records if record.HasField("alert")] == ["step 3: loss_spike, value 9.5"]
    summary = {}
    for record in records:
        summary |= {"/".join([i.key, *i.nested_key]).strip("/"): i.value_json for i in record.summary.update}
    assert (summary["sound"], summary["verdict"], summary["best_val_loss"]) == ("true", '"v"', "4.0")
