"""`Recorder`: the record of a training loop of one's own, in the files and by the writer of a built-in run.

The manifest holds every setting, for all readers ask for them. A foreign loop has no width of a block or number of
heads, so `recorder` in the manifest lists the settings that were given; the others have their defaults and say nothing.
It also keeps what the model's products are, and runs with other products are not compared.

The row of a step is put together on the device and written on the writer's thread, so the loop does not wait for it. It
has the loss, what the monitor of the built-in step says of it (z-score, spikes, divergence, clipping), the statistics
of the instrument, and what the caller adds.
"""

import contextlib
import dataclasses
import time
from collections import Counter
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

import jax
import jax.numpy as jnp

from altgrad_jax import config as settings
from altgrad_jax.config import FIELDS
from altgrad_jax.errors import UserError
from altgrad_jax.instrumentation.api import Instrument
from altgrad_jax.instrumentation.numbers import Formats
from altgrad_jax.numerics import recipe_certificate, recipes
from altgrad_jax.numerics.recipes import Recipe
from altgrad_jax.numerics.rules import LayerFormats
from altgrad_jax.run import verdict
from altgrad_jax.run.alerts import rules_of
from altgrad_jax.run.console import tell
from altgrad_jax.run.environment import refuse_other
from altgrad_jax.run.folder import own_formats, start_of
from altgrad_jax.run.lock import locked
from altgrad_jax.run.look import diagnosis, evaluation_of
from altgrad_jax.run.record import Record, new_run_id, read_manifest, read_rows, write_manifest
from altgrad_jax.run.setup import certify
from altgrad_jax.run.sinks import open_sinks, require_sinks
from altgrad_jax.run.writer import ALERT, ALERT_VALUE, SPARSE, DispatchRecord, RunFacts, Writer
from altgrad_jax.step import stability
from altgrad_jax.step.metrics import Columns, joined, over, scalars
from altgrad_jax.step.program import Observed
from altgrad_jax.step.quantization import QuantOptions

# Settings that the instrument decides, and those that only a loop of ours reads.
_OF_INSTRUMENT = frozenset("use_fp8 formats scaling operand_rounding amax_history recipe compute_dtype".split())
_FOREIGN = {"loggers": (), "metrics": "all", "console": "quiet", "run_name": "", "tags": ()}


class Recorder:
    """The folder of a training loop of one's own; a context manager, whose end writes the verdict.

        with Recorder("runs/E4M3", inst, data="shapes, seed 0", max_steps=200, learning_rate=3e-3) as recorder:
            for i in range(200):
                ...
                recorder.row(loss, statistics)

    `python scripts/report.py runs` then compares such folders, and `verdict.json` says whether the run was sound.

    Args:
      folder: new or empty, or with `resume_step` one that a Recorder wrote.
      inst: of the loss function; its recipe or formats are the run's arm in a report. A run in float32 or bfloat16 that
        others are compared with is one with recipe="BF16".
      data: says which data these are; runs with another text are not compared. To compare with a built-in run, give the
        fingerprint in its manifest.
      max_steps: updates of the run.
      resume_step: the step of the loop's own checkpoint: rows up to it are kept, later ones are cut off.
      given: settings by their names in the config (learning_rate, seed, data_seed, batch_size, block_size, ...). They
        say what the loop does, the thresholds of alerts and `loggers` also decide what is done here. Those that
        the instrument knows are refused.

    Raises:
      UserError: a folder or a setting that cannot be used.
    """

    def __init__(
        self,
        folder: str | Path,
        inst: Instrument,
        *,
        data: str,
        max_steps: int,
        resume_step: int | None = None,
        **given: Any,
    ):
        self.run_dir, self.config = Path(folder).expanduser().absolute(), _config(inst, max_steps, given)
        require_sinks(self.config)
        self._thresholds = stability.Thresholds(**{name: self.config[name] for name in stability.Thresholds._fields})
        self._monitor: Any = None
        self._names: tuple[str, ...] = ()  # of the last row's columns
        self._held: DispatchRecord | None = None
        self.step, self._since = 0 if resume_step is None else resume_step, time.perf_counter()
        self._submitted = -1 if resume_step is None else resume_step  # the step of the last row that was written
        self._quant = _quant(inst)
        with contextlib.ExitStack() as resources:
            resources.enter_context(locked(self.run_dir))
            manifest = _manifest(self.run_dir, self.config, inst, data, sorted(given), self.step, resume_step)
            if resume_step is not None:
                self._replay()
            record = Record.open(self.run_dir, resume_step)
            write_manifest(self.run_dir, manifest)
            (self.run_dir / verdict.VERDICT).unlink(missing_ok=True)
            c = self.config
            facts = RunFacts(
                max_steps=max_steps,
                tokens_per_step=c.batch_size * c.block_size if {"batch_size", "block_size"} <= given.keys() else None,
                layer_interval=c.layer_interval,
                alert_interval=c.alert_interval,
            )
            self._writer = Writer(record, facts, rules=rules_of(c))
            resources.callback(self._writer.close)
            self._sinks = open_sinks(
                c, self.run_dir, manifest, resume_step=resume_step, say=tell, event=self._writer.event
            )
            resources.callback(self._sinks.close, drain_timeout=5.0)
            self._resources = resources.pop_all()

    def row(self, loss, *columns: Columns, **metrics: Any) -> None:
        """The row of the next step. Arrays may still be computed on the device.

        Args:
          loss: scalar, before the update.
          columns: statistics of `Instrument.value_and_grad`, of `measure`, of `Instrument.fidelity`.
          metrics: scalars by name, such as learning_rate=..., grad_norm=...

        Raises:
          UserError: a name that rows have already, or more rows than max_steps.
        """
        names = ("loss", *metrics, *(name for part in columns for name in part.names))
        if names != self._names:
            _check_names(names)
            self._names = names
        if self.step >= self.config.max_steps:
            raise UserError(
                f"the run has max_steps={self.config.max_steps}, and this is a row more: give Recorder more"
            )
        self._submit()
        now = time.perf_counter()
        found = joined([scalars({"loss": loss, **metrics}), *columns])
        self._monitor = self._monitor or _fresh(self._thresholds, names)
        self._monitor, row = _row(self._monitor, found, self.step, self._thresholds, frozenset(("loss", *metrics)))
        self.step += 1
        self._held = DispatchRecord(
            first_step=self.step, names=row.names, values=row.values[None], seconds=now - self._since
        )
        self._since = now

    def evaluation(self, val_loss, **metrics: Any) -> None:
        """A validation loss in nats after the last row's update; before the first row it is that of the start."""
        seconds = time.perf_counter() - self._since
        self._look(evaluation_of(val_loss) | {name: float(value) for name, value in metrics.items()}, [], seconds)
        self._since = time.perf_counter()

    def diagnose(self, observed: Observed) -> None:
        """The use of the formats after the last row's update, from `Instrument.histograms`; scripts/what_if.py reads
        it."""
        assert self._quant is not None, "histograms are of formats"
        self._look(*diagnosis(self._quant, 0, self.step, jax.device_get(observed)))

    def _look(self, found: dict[str, float], lines: list[dict], seconds: float = 0.0) -> None:
        """Adds what was looked at after the last row's update to that row; before the first it is row 0."""
        if self._held is None and self._submitted == self.step:
            raise UserError(
                "an evaluation belongs to the row before it, which a resumed run has not made: call row first"
            )
        held = self._held or DispatchRecord(first_step=0)
        self._held = dataclasses.replace(
            held,
            evaluation=dict(held.evaluation or {}) | found,
            evaluation_s=held.evaluation_s + seconds,
            diagnostics=[*held.diagnostics, *lines],
        )

    def close(self, stopped: str | None = None) -> dict[str, Any]:
        """Writes what is left, the verdict and the plot of the loss. Returns the verdict.

        Args:
          stopped: why the run ended early, in a few words.
        """
        with self._resources:
            self._submit()
            self._writer.flush()
            found = verdict.make_verdict(self.run_dir, stopped=stopped)
            verdict.try_to_plot(self.run_dir, self.config.run_name, tell)
            verdict.write_verdict(self.run_dir, found)
            self._sinks.close(drain_timeout=300.0, summary=found)
        return found

    def __enter__(self) -> "Recorder":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if kind is None:
            self.close()
            return
        with self._resources:  # interrupted: the rows stay, and there is no verdict
            self._submit()

    def _submit(self) -> None:
        held, self._held = self._held, None
        if held is not None:
            self._submitted = self.step
            self._writer.submit(held)

    def _replay(self) -> None:
        """The monitor as the rows up to the step leave it."""
        for row in read_rows(self.run_dir):
            if 0 < row["step"] <= self.step:
                found = scalars({name: value for name, value in row.items() if name not in ("step", "alerts")})
                self._monitor = self._monitor or _fresh(self._thresholds, found.names)
                self._monitor, _ = _row(self._monitor, found, row["step"] - 1, self._thresholds, frozenset())


def _check_names(names: tuple[str, ...]) -> None:
    own = {"step", "loss_zscore", "nonfinite_loss", "alerts", "val_loss", "val_perplexity"}
    wrong = [name for name in names if name in own or name.startswith((ALERT, ALERT_VALUE, SPARSE))]
    wrong += [name for name, count in Counter(names).items() if count > 1]
    if wrong:
        raise UserError(f"a row has {wrong[0]!r} already: give that metric another name, or leave it out")


def _fresh(thresholds: stability.Thresholds, names) -> stability.Monitor:
    return stability.init_monitor(thresholds, {}, 0, n_operands=len(_clipped(names)))


def _clipped(names) -> list[str]:
    """Columns with the clipped share of an operand of a layer."""
    return [name for name in names if name.startswith("overflow/") and not name.startswith("overflow/all/")]


@partial(jax.jit, static_argnames=("thresholds", "own"))
def _row(monitor, found: Columns, number, thresholds: stability.Thresholds, own: frozenset[str]):
    """(monitor, all columns of the row of update `number`): metrics `own` as they are, others left out where NaN."""
    loss, clipped = found["loss"], _clipped(found.names)
    bad = ~jnp.isfinite(loss)
    for name, value in zip(found.names, found.values):
        if name == "grad_norm" or name.startswith("nonfinite_"):
            bad |= ~jnp.isfinite(value) | (value > 0) & (name != "grad_norm")
    shares = jnp.stack([found[name] for name in clipped]) if clipped else None
    nothing = jnp.zeros(0, jnp.float32)
    monitor, z, begins = stability.update_monitor(
        monitor,
        row_number=number + 1,
        loss=loss,
        bad=bad,
        dead_streak=(),
        dead_shares=nothing,
        stalled_S=nothing,
        thresholds=thresholds,
        overflow_O=None if shares is None else jnp.where(jnp.isnan(shares), 0.0, shares),
    )
    alerts = {kind: begins[kind] for kind in ("loss_spike", "divergence")} | {"nonfinite_loss": ~jnp.isfinite(loss)}
    row = [
        Columns(tuple(name if name in own else SPARSE + name for name in found.names), found.values),
        scalars({"loss_zscore": z, "nonfinite_loss": ~jnp.isfinite(loss)}),
        scalars({ALERT + kind: value for kind, value in alerts.items()}),
    ]
    if clipped:
        row.append(over([name.removeprefix("overflow/") for name in clipped], {"overflow": begins["overflow"]}, ALERT))
    layers = [name for name in found.names if name.startswith("nonfinite_grads/")]
    row.append(scalars({ALERT + name: found[name] for name in layers}))
    return monitor, joined(row)


def _config(inst: Instrument, max_steps: int, given: Mapping[str, Any]) -> Any:
    """Every setting of the run."""
    if wrong := sorted(given.keys() & _OF_INSTRUMENT):
        raise UserError(f"Recorder takes {wrong[0]} from the instrument: leave {wrong[0]} out")
    if "log_interval" in given:
        raise UserError("a Recorder writes every row: leave log_interval out, or give layer_interval=10")
    config = settings.default_config()
    wanted = _FOREIGN | {"run_name": "recorded"} | dict(given) | {"max_steps": max_steps} | _numbers(inst)
    problems = [settings.unknown_field(name) for name in wanted if name not in FIELDS]
    problems += [text for name in wanted if name in FIELDS and (text := settings.problem(FIELDS[name], wanted[name]))]
    if problems:
        raise UserError(problems[0])
    config.update(wanted)
    return config


def _numbers(inst: Instrument) -> dict[str, Any]:
    """The settings of a built-in run in the instrument's numbers."""
    choice = inst.choice
    if isinstance(choice, Recipe):
        return {"recipe": (choice.name,)}
    bfloat16 = all("bfloat16" in row.dtypes[:2] for row in inst.layers.found)
    if choice is None:
        return {"compute_dtype": "bfloat16" if bfloat16 else "float32"}
    if choice.wag == ("BF16",) * 3:  # operands as the baseline has them
        return {"compute_dtype": "bfloat16"}
    names = dict.fromkeys(name for name in choice.wag if name)
    return {
        "use_fp8": True,
        "formats": tuple(
            f"*:{''.join(operand for operand, of in zip('WAG', choice.wag) if of == name)}={name}" for name in names
        ),
        "scaling": choice.scaling,
        "operand_rounding": choice.rounding,
        "amax_history": choice.amax_history,
    }


def _certified(inst: Instrument) -> dict[str, Any]:
    """What a built-in run's manifest holds of these numbers: certified on this device, before anything is trained."""
    if isinstance(inst.choice, Recipe):
        certificate = recipe_certificate.certify(inst.choice)
        return {"recipes": {inst.choice.name: recipes.facts(inst.choice) | {"certificate": certificate}}}
    quant = _quant(inst)
    if quant is None:
        return {}
    layers = [dataclasses.asdict(layer) for layer in quant.layers]
    return {"formats": {"layers": layers, "certificates": certify(quant)} | own_formats(quant)}


def _quant(inst: Instrument) -> QuantOptions | None:
    """The instrument's formats as a built-in run has them; None without."""
    if not isinstance(inst.choice, Formats):
        return None
    return QuantOptions(tuple(LayerFormats(name, *inst.choice.wag) for name in inst.quantized), inst.choice.scalings)


def _manifest(run_dir, config, inst: Instrument, data: str, given, step, resume_step) -> dict[str, Any]:
    """What the run is; of a resumed one, what it was with one more start."""
    model = [[row.name, row.count, row.K, row.N, row.numbers == "kept"] for row in inst.layers.found]
    device = jax.devices()[0]
    start = start_of(time.time(), step, device, len(jax.devices()))
    recorder = {"settings": given, "loss": getattr(inst.loss_fn, "__name__", str(inst.loss_fn)), "products": model}
    fixed: dict[str, Any] = {
        "config": settings.to_dict(config),
        "data": {"fingerprint": data},
        "model": {"parameters": inst.parameters},
        "recorder": recorder,
    } | _certified(inst)
    if resume_step is None:
        return {"run_id": new_run_id(), "tags": list(config.tags), "starts": [start]} | fixed
    before = read_manifest(run_dir)
    refuse_other(run_dir, before)
    now = {key: fixed[key] for key in ("data", "model", "recorder")}
    differs = [key for key, value in now.items() if before.get(key) != value]
    lines = settings.config_difference(before["config"], fixed["config"])
    if differs or lines:
        raise UserError(f"{run_dir} holds another run, for {'; '.join([*differs, *lines])}: give another folder")
    return before | fixed | {"starts": [*before["starts"], start]}
