"""TensorBoard is fed as W&B is, and its event files hold each row once."""

import importlib.util
import struct

import pytest
from test_wandb import Feed, fake, write  # noqa: F401 (a fixture)

from altgrad_jax import config as settings
from altgrad_jax.errors import UserError
from altgrad_jax.run.sinks import require_sinks
from altgrad_jax.run.tensorboard import last_written_step


def events_of(path):
    """[(step, {name: value}, whether what is behind this step is purged)] of an event file."""
    from tensorboardX.proto.event_pb2 import Event

    found, data, at = [], path.read_bytes(), 0
    while at < len(data):
        (length,) = struct.unpack_from("<Q", data, at)
        event = Event.FromString(data[at + 12 : at + 12 + length])
        values = {value.tag: value.simple_value for value in event.summary.value}
        found.append((event.step, values, event.HasField("session_log")))
        at += 16 + length
    return found


def test_rows_names_and_alerts(tmp_path):
    feed = Feed(tmp_path, loggers=("tensorboard",))
    assert feed.close() == 0 and not feed.said and not feed.events
    (path,) = (tmp_path / "tensorboard").iterdir()
    rows = {step: values for step, values, _ in events_of(path) if "train/loss" in values}
    assert list(rows) == list(range(13))
    assert rows[5] == pytest.approx({
        "train/loss": 4.5, "val/loss": 4.0, "optim/learning_rate": 0.1, "grad_norm/block_0/mlp_up": 0.5,
        "perf/time": 7.0, "perf/tokens_per_s": 2.0,
    })  # fmt: skip
    assert [step for step, values, _ in events_of(path) if "alerts/text_summary" in values] == [3]


def test_a_resumed_run_purges_what_it_makes_again_and_fills_what_was_lost(tmp_path):
    folder = tmp_path / "tensorboard"
    for last, resume_step, purge in ((12, None, 0), (20, 10, 11), (25, 18, None)):
        if purge is None:  # the second file was lost, and the end of the first
            (folder / "events.out.tfevents.20").unlink()
            first = folder / "events.out.tfevents.12"
            first.write_bytes(first.read_bytes()[: first.stat().st_size // 3 * 2])
            purge = last_written_step(folder) + 1
            assert 0 < purge < 12
        assert Feed(tmp_path, last=last, resume_step=resume_step, loggers=("tensorboard",)).close() == 0
        (made,) = set(folder.iterdir()) - {folder / f"events.out.tfevents.{n}" for n in (12, 20)}
        made = made.rename(folder / f"events.out.tfevents.{last}")  # tensorboardX's name is the second
        events = events_of(made)
        assert [step for step, _, begins in events if begins] == [purge]
        assert [step for step, values, _ in events if "train/loss" in values] == list(range(purge, last + 1))


def test_both_dashboards_and_a_missing_package(tmp_path, fake, monkeypatch):  # noqa: F811
    wandb = fake()
    assert Feed(tmp_path, loggers=("wandb", "tensorboard")).close() == 0
    assert list(wandb.sent) == list(range(13)) and last_written_step(tmp_path / "tensorboard") == 12
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    config = settings.default_config()
    with config.unlocked():
        config.update(wandb_mode="disabled", loggers=("wandb", "tensorboard"))
    with pytest.raises(UserError, match="loggers has tensorboard, which needs .*: pip install"):
        require_sinks(config)
