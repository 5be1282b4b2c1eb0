"""TensorBoard is fed as W&B is, and its event files hold each row once."""

import importlib.util
import struct

import pytest
from test_wandb import Feed, fake, write  # noqa: F401 (a fixture)

from altgrad_jax import config as settings
from altgrad_jax.errors import UserError
from altgrad_jax.run.sinks import require_sinks


def events_of(path):
    """[(step, {name: value})] of an event file."""
    from tensorboardX.proto.event_pb2 import Event

    found, data, at = [], path.read_bytes(), 0
    while at < len(data):
        (length,) = struct.unpack_from("<Q", data, at)
        event = Event.FromString(data[at + 12 : at + 12 + length])
        values = {value.tag: value.simple_value for value in event.summary.value}
        found.append((event.step, values))
        at += 16 + length
    return found


def test_rows_names_and_alerts(tmp_path):
    feed = Feed(tmp_path, loggers=("tensorboard",))
    assert feed.close() == 0 and not feed.said and not feed.events
    (path,) = (tmp_path / "tensorboard").iterdir()
    rows = {step: values for step, values in events_of(path) if "train/loss" in values}
    assert list(rows) == list(range(13))
    assert rows[5] == pytest.approx({
        "train/loss": 4.5, "val/loss": 4.0, "optim/learning_rate": 0.1, "grad_norm/block_0/mlp_up": 0.5,
        "perf/time": 7.0, "perf/tokens_per_s": 2.0,
    })  # fmt: skip
    assert [step for step, values in events_of(path) if "alerts/text_summary" in values] == [3]


def test_a_resumed_run_holds_each_row_once(tmp_path):
    folder = tmp_path / "tensorboard"
    for last, resume_step in ((12, None), (20, 10)):
        assert Feed(tmp_path, last=last, resume_step=resume_step, loggers=("tensorboard",)).close() == 0
        (path,) = folder.iterdir()
        assert [step for step, values in events_of(path) if "train/loss" in values] == list(range(last + 1))


def test_both_dashboards_and_a_missing_package(tmp_path, fake, monkeypatch):  # noqa: F811
    wandb = fake()
    assert Feed(tmp_path, loggers=("wandb", "tensorboard")).close() == 0
    assert list(wandb.sent) == list(range(13)) and len(list((tmp_path / "tensorboard").iterdir())) == 1
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    config = settings.default_config()
    with config.unlocked():
        config.update(wandb_mode="disabled", loggers=("wandb", "tensorboard"))
    with pytest.raises(UserError, match="loggers has tensorboard, which needs .*: pip install"):
        require_sinks(config)
