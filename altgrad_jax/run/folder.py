"""A run's folder while it is trained into: what it is (manifest), what it did (record), what it goes on from
(checkpoints).

The rows up to step k are flushed before checkpoint k is begun: whatever checkpoint a resume finds,
the record reaches it.

Of several processes the lead keeps the record; all of them save and restore together.
"""

import contextlib
import dataclasses
import os
import signal
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from altgrad_jax import config as settings
from altgrad_jax.config import Config
from altgrad_jax.data.dataset import permute_windows
from altgrad_jax.data.prepare import describe_duplicates
from altgrad_jax.errors import UserError
from altgrad_jax.models.parameters import count_params
from altgrad_jax.numerics import formats, recipes, rules
from altgrad_jax.run import processes, verdict
from altgrad_jax.run.alerts import rules_of
from altgrad_jax.run.checkpoint import list_steps, open_checkpoints, save_anomaly
from altgrad_jax.run.console import tell
from altgrad_jax.run.device import git_commit, versions
from altgrad_jax.run.environment import recorded, refuse_other
from altgrad_jax.run.goodput import Goodput, describe, total
from altgrad_jax.run.initial import initial_for
from altgrad_jax.run.lock import is_empty
from altgrad_jax.run.record import (
    MANIFEST,
    METRICS,
    SCHEMA_VERSION,
    WINDOW_LOSSES,
    Record,
    furthest_step,
    new_run_id,
    read_manifest,
    read_timing,
    write_manifest,
    write_window_losses,
)
from altgrad_jax.run.setup import Setup, certify, certify_recipes
from altgrad_jax.run.sinks import Sinks, open_sinks
from altgrad_jax.run.writer import DispatchRecord, RunFacts, Writer
from altgrad_jax.step import quantization, stability
from altgrad_jax.step.from_config import inputs_of
from altgrad_jax.step.mesh import FSDP
from altgrad_jax.step.recipe import options_of as recipe_options
from altgrad_jax.step.update import TrainState

FINISHED, NOT_SAVED, STOPPED_NON_FINITE = 0, 1, 3


# ------------------------------------------------------------------------------------------------ before the first step


def require_resume(resume: str | int) -> None:
    """UserError unless it is a value of train's `resume`."""
    if resume not in ("auto", "never") and type(resume) is not int:
        raise UserError(
            f"resume={resume!r} cannot be used: give 'auto', 'never', or the step of a checkpoint such as 1000"
        )


def is_finished(run_dir: Path, config: Config) -> bool:
    """Whether the folder holds the run that `config` describes, with all steps made; UserError if it holds another."""
    steps, ended = list_steps(run_dir), verdict.read_verdict(run_dir) or {}
    has_all = (run_dir / MANIFEST).exists() and max(steps, default=-1) >= config.max_steps
    if not has_all or ended.get("max_steps") != config.max_steps:
        return False
    refuse_other_config(run_dir, read_manifest(run_dir), config)
    return True


def has_ended(run_dir: Path, config: Config) -> bool:
    """Whether the run made all its steps, or stopped for good because it was not finite; UserError as is_finished."""
    if is_finished(run_dir, config):
        return True
    ended = verdict.read_verdict(run_dir) or {}
    if ended.get("finished") or "non-finite steps in a row" not in str(ended.get("stopped")):
        return False
    refuse_other_config(run_dir, read_manifest(run_dir), config)
    return True


def refuse_other_config(run_dir: Path, manifest: dict, config: Config) -> None:
    """UserError where the run of this manifest cannot be continued with `config`."""
    lines = settings.config_difference(manifest["config"], settings.to_dict(config))
    if lines:
        raise UserError(
            f"{run_dir} was made with other settings, so it cannot be continued with these: "
            f"{'; '.join(lines)}. Set them back, or give another --workdir to start a new run"
        )


def how_it_goes_on(run_dir: Path, resume: str | int) -> str:
    """What the command to continue does, for a sentence about a run that ended early."""
    saved = list_steps(run_dir)
    how = "the same command" if resume == "auto" else "the same command with --resume=auto"
    goes_on = f"continues from checkpoint {max(saved)}" if saved else "starts again, because nothing was saved yet"
    return f"{how} {goes_on}"


@dataclasses.dataclass(frozen=True)
class Claim:
    """A folder that a run may train into.

    Attributes:
      manifest: of the run that is in it; None where there is none yet.
    """

    config: Config
    run_dir: Path
    resume: str | int
    manifest: dict | None

    @property
    def made_on(self) -> str | None:
        """Device kind of the run's first start, None if this is it."""
        return self.manifest["starts"][0]["device"]["kind"] if self.manifest else None

    def require_same_data(self, setup: Setup) -> None:
        """UserError if the folder's run was trained on other data."""
        tokens = setup.data.tokens
        if self.manifest and self.manifest["data"]["fingerprint"] != tokens.fingerprint:
            raise UserError(
                f"{self.run_dir} was trained on other data (fingerprint {self.manifest['data']['fingerprint'][:12]}, "
                f"{tokens.dir} has {tokens.fingerprint[:12]}): give the --data_dir it was made with, or another "
                "--workdir to start a new run"
            )


def claim(config: Config, run_dir: Path, resume: str | int = "auto") -> Claim:
    """Refuses a folder that this run may not use, before anything expensive is done."""
    return Claim(config, run_dir, resume, processes.from_lead(lambda: _manifest_of(config, run_dir, resume)))


def _manifest_of(config: Config, run_dir: Path, resume: str | int) -> dict | None:
    manifest = None
    if resume == "never":
        if run_dir.exists() and not is_empty(run_dir):
            raise UserError(
                f"{run_dir} is not empty and --resume=never starts anew: give an empty folder with "
                "--workdir, or continue with --resume=auto"
            )
    elif (run_dir / MANIFEST).exists():
        manifest = read_manifest(run_dir)
        if "recorder" in manifest:
            raise UserError(
                f"{run_dir} holds the record of another training loop (Recorder), which this program cannot continue: "
                "give another --workdir"
            )
        refuse_other_config(run_dir, manifest, config)
        refuse_other(run_dir, manifest)
    elif list_steps(run_dir) or (run_dir / METRICS).exists():
        raise UserError(
            f"{run_dir} holds a run without its {MANIFEST}: bring that file back, or give another "
            "--workdir to start a new run"
        )
    if isinstance(resume, int) and resume not in list_steps(run_dir):
        raise UserError(
            f"--resume={resume} names a checkpoint that {run_dir} does not hold; it has "
            f"{', '.join(map(str, list_steps(run_dir))) or 'none'}"
        )
    return manifest


def start_of(started: float, step: int, device, count: int) -> dict[str, Any]:
    """What the manifest keeps of a start: when, from which step, by which program, on `count` devices like this one."""
    return {
        "time": round(started, 3),
        "step": step,
        "schema_version": SCHEMA_VERSION,
        "argv": sys.argv,
        "versions": versions(),
        "git": git_commit(),
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
        "environment": recorded(),
        "device": {"platform": device.platform, "kind": device.device_kind, "count": count},
        "processes": processes.n_processes(),
    }


def own_formats(quant: quantization.QuantOptions | None) -> dict[str, Any]:
    """{"registered": the facts of a run's own formats}, which readers of the record make known; {} without any."""
    if quant is None:
        return {}
    found = formats.registered([*rules.names_used(quant.layers), *quant.emergency_formats])
    return {"registered": found} if found else {}


# ------------------------------------------------------------------------------------------------------ a run's folder


class RunFolder:
    """The folder of one run, open for training. Made by `open_run`.

    Attributes:
      step: updates made. frozen: whether so many steps in a row were non-finite that it stopped. resumed: whether it
        goes on from a checkpoint. furthest: the last step that an earlier start recorded. inputs: its Inputs.
      exit_code, verdict: set by `finish`.
    """

    def __init__(self, claim: Claim, setup: Setup, console, goodput: Goodput, width: int | None = None, watch=None):
        self.config, self.run_dir, self.resume = claim.config, claim.run_dir, claim.resume
        self.manifest, self.made_on = claim.manifest, claim.made_on
        self.setup, self.console, self.goodput, self.watch = setup, console, goodput, watch or console
        self.width = width
        self.quant, self.recipe = quantization.options_of(self.config), recipe_options(self.config)
        self.inputs, self.certificates = inputs_of(self.config), certify(self.quant)
        self.recipe_certificates = certify_recipes(self.recipe)
        self.started = time.time()
        self.step, self.resumed, self.frozen, self.first_bad_step = 0, False, False, -1
        self.furthest = 0
        self.source: dict[str, Any] | None = None
        self.evaluation: Mapping[str, Any] | None = None
        self.account: dict[str, float] | None = None
        self.verdict: dict[str, Any] | None = None
        self.writer: Writer | None = None
        self.sinks: Sinks | None = None
        self.tags = [*self.config.tags, *setup.data.tags]

    # The start.

    def restore_or_start(self, resources: contextlib.ExitStack) -> TrainState:
        """The state that the run goes on from; sets `step` and `resumed`."""
        self.checkpoints = processes.everywhere(lambda: open_checkpoints(self.run_dir, self.config.max_checkpoints))
        resources.callback(self.checkpoints.close)
        abstract_state = self.setup.functions.abstract_state
        if isinstance(self.resume, int):
            found = self.resume, *self.checkpoints.restore(self.resume, abstract_state)
        elif self.manifest is not None:
            found = self.checkpoints.restore_newest(abstract_state, on_damaged=self._report_damaged)
        else:
            found = None
        if found is None:
            if self.manifest is not None:
                processes.from_lead(self._start_again)
            return self.setup.functions.init(self.config.seed, self.inputs.formats, self._initial_params())
        self.step, state, meta = found
        self._refuse_foreign(self.step, meta)
        self.resumed = True
        if isinstance(self.resume, int) and (superseded := self.checkpoints.set_aside_newer_than(self.resume)):
            self.console.message(
                f"checkpoints after step {self.resume} were set aside: {', '.join(map(str, superseded))}"
            )
        streak = jax.device_get(state.monitor.bad_streak)
        thresholds = self.setup.functions.step.options.thresholds
        self.frozen = bool(stability.is_frozen(state.monitor._replace(bad_streak=streak), thresholds))
        return state

    def _initial_params(self) -> dict | None:
        """The weights that the setting `init_from` names; None without it. Sets `source`."""
        if not self.config.init_from:
            return None
        initial = initial_for(self.config, self.setup.functions.abstract_state.params)
        began_from = self.manifest and self.manifest.get("init_from")
        if began_from and began_from["sha256"] != initial.source["sha256"]:
            raise UserError(
                f"{self.run_dir} began from other weights than init_from={self.config.init_from!r} holds now: bring "
                "those back, or give another --workdir to start a new run"
            )
        processes.require_equal("weights to start from, of sha256", initial.source["sha256"], "give all the same files")
        self.source = initial.source
        return initial.params

    def _report_damaged(self, step: int, reason: str) -> None:
        self.console.alert(f"checkpoint {step} is damaged ({reason}); it is set aside and an older one is used")

    def _refuse_foreign(self, step: int, meta: dict) -> None:
        """A checkpoint of another run, copied into this folder, would continue as if it were this one's."""
        run_id = self.manifest["run_id"] if self.manifest else None
        if meta.get("run_id") != run_id or meta.get("data_fingerprint") != self.setup.data.tokens.fingerprint:
            raise UserError(
                f"checkpoint {step} in {self.run_dir} belongs to another run (id {meta.get('run_id')!r}, this folder's "
                f"manifest says {run_id!r}): take it out of the folder, or give another --workdir"
            )

    def _start_again(self) -> None:
        """A folder with a manifest and no checkpoint: fine if none was ever saved, an error if they were taken away."""
        _, events = read_timing(self.run_dir)
        saved = [event["step"] for event in events if event.get("event") == "checkpoint"]
        if saved:
            raise UserError(
                f"{self.run_dir} holds the record of a run with checkpoints up to step {max(saved)}, but no checkpoint "
                "any more: bring one back, or give another --workdir to start a new run"
            )
        self.console.message("no checkpoint was saved in this folder yet: starting again at step 0")

    def open_record(self, resources: contextlib.ExitStack) -> None:
        """Writes the manifest, opens the record where the run goes on, and the dashboards."""
        config, run_dir, setup = self.config, self.run_dir, self.setup
        was_new = self.manifest is None
        self.manifest = processes.from_lead(self._write_manifest)
        if not processes.is_lead():
            return
        # What an earlier end said is no longer true.
        for name in (verdict.VERDICT, verdict.LOSS_PLOT, WINDOW_LOSSES):
            (run_dir / name).unlink(missing_ok=True)
        resume_step = self.step if self.resumed else (None if was_new else -1)
        self.furthest = furthest_step(run_dir)
        record = Record.open(run_dir, resume_step, log_interval=config.log_interval)
        self.writer = Writer(
            record,
            RunFacts(
                max_steps=config.max_steps,
                tokens_per_step=setup.tokens_per_step,
                log_interval=config.log_interval,
                layer_interval=config.layer_interval,
                alert_interval=config.alert_interval,
                flops_per_step=setup.flops_per_step,
                peak_flops=setup.peak_flops,
            ),
            console=self.watch,
            rules=rules_of(config),
        )
        resources.callback(self.writer.close)
        resources.callback(self._account)  # after an exception; else finish() has done it
        self.sinks = open_sinks(
            config, run_dir, self.manifest, resume_step=resume_step, say=self.console.message, event=self.writer.event
        )
        # After finish() there is nothing left to close; after an exception this ends the dashboards' runs.
        resources.callback(self.sinks.close, drain_timeout=5.0)

    def _write_manifest(self) -> dict:
        """Writes and returns what this run is. A resumed run keeps what was true at its start and adds how it was
        continued."""
        setup = self.setup
        start = start_of(self.started, self.step, setup.device, len(setup.devices))
        start["mesh"] = dict(setup.functions.step.mesh.shape)
        if self.width is not None:
            # The times of this run's rows are its share of those of all.
            start["side_by_side"] = self.width
        manifest = self.manifest or self._first_manifest()
        manifest = manifest | {
            "config": settings.to_dict(self.config),
            "tags": self.tags,
            "starts": manifest["starts"] + [start],
        }
        write_manifest(self.run_dir, manifest)
        return manifest

    def _first_manifest(self) -> dict:
        setup, tokens = self.setup, self.setup.data.tokens
        manifest = {
            "run_id": new_run_id(),
            "starts": [],
            "data": {
                "fingerprint": tokens.fingerprint,
                "dir": str(tokens.dir.absolute()),
                "meta": tokens.meta,
                "placement": "device" if setup.on_device else "host",
                "eval_windows": len(setup.data.val_windows),
            },
            "model": {
                "parameters": count_params(setup.functions.abstract_state.params),
                "flops_per_step": setup.flops_per_step,
            },
        }
        if self.source is not None:
            manifest["init_from"] = self.source
        if self.quant is not None:
            layers = [dataclasses.asdict(layer) for layer in self.quant.layers]
            manifest["formats"] = {"layers": layers, "certificates": self.certificates} | own_formats(self.quant)
        if self.recipe is not None:
            manifest["recipes"] = {
                recipe.name: recipes.facts(recipe) | {"certificate": self.recipe_certificates[recipe.name]}
                for recipe in self.recipe.recipes
            }
        return manifest

    def introduce(self) -> None:
        """Says what is trained, on what, where."""
        config, setup, say = self.config, self.setup, self.console.message
        tokens, n = setup.data.tokens, processes.n_processes()
        parameters = count_params(setup.functions.abstract_state.params)
        if config.deterministic and self.made_on not in (None, setup.device.device_kind):
            say(
                f"this run was begun on {self.made_on} and goes on on {setup.device.device_kind}: XLA chooses kernels "
                "of its own for each, so from here on its numbers may round otherwise"
            )
        say(
            f"{config.run_name}: {parameters:,} parameters in {config.compute_dtype}, "
            f"{config.max_steps} steps of {config.batch_size} x {config.block_size} tokens"
        )
        if self.source is not None:
            step = f", step {self.source['step']}" if "step" in self.source else ""
            say(f"weights: from {self.source['path']}{step}, sha256 {self.source['sha256'][:12]}")
        if self.quant is not None:
            say(_describe_formats(config, self.quant))
        if self.recipe is not None:
            for recipe, phase in zip(self.recipe.recipes, self.recipe.schedule):
                say("\n".join([f"{phase.when}:", *recipes.describe(recipe)]))
        n_tokens = tokens.meta["n_tokens"]
        say(
            f"data: {tokens.meta['source']}, {n_tokens['train']:,} training and {n_tokens['val']:,} validation tokens, "
            f"in {tokens.dir}"
            + (f"; {describe_duplicates(tokens.meta['duplicates'])}" if "duplicates" in tokens.meta else "")
        )
        split = setup.functions.step.mesh.shape[FSDP] > 1
        say(
            f"device: {len(setup.devices)} x {setup.device.device_kind} ({setup.device.platform})"
            + (f" of {n} processes" if n > 1 else "")
            + (f", parameters split over {config.fsdp}" if split else "")
        )
        say(f"run folder: {self.run_dir}" + (f", continued from step {self.step}" if self.resumed else ""))

    # While it trains.

    @property
    def goes_on(self) -> bool:
        return not self.frozen and self.step < self.config.max_steps

    def advanced(self, n_steps: int, *, frozen: bool, first_bad_step: int) -> None:
        """Takes note of the updates that were made."""
        self.step += n_steps
        self.frozen, self.first_bad_step = frozen, first_bad_step

    def event(self, name: str, step: int, **values) -> None:
        """Adds an event to timing.jsonl."""
        if self.writer is not None:
            self.writer.event(name, step, **values)

    def record(self, rows: DispatchRecord) -> None:
        """Hands the rows of a dispatch, or an evaluation alone, to the writer."""
        self.evaluation = rows.evaluation
        with self.goodput.spend("logging_blocked"):
            if self.writer is not None:
                self.writer.submit(rows)
        self._report_saves()

    def keep_window_losses(self, losses_E: np.ndarray) -> None:
        """Writes the losses of all validation windows at this step."""
        if processes.is_lead():
            write_window_losses(self.run_dir, self.step, losses_E)

    def is_saved(self) -> bool:
        """Whether there is a complete checkpoint of this step, once no save is under way."""
        with self.goodput.spend("save_blocked"):
            self.checkpoints.wait()
        self._report_saves()
        return processes.from_lead(lambda: self.step in self.checkpoints.steps())

    def save(self, state: TrainState, *, interim: bool = False) -> None:
        """Starts to save the run's state at this step."""
        self._flush()
        val_loss = (self.evaluation or {}).get("val_loss")
        with self.goodput.spend("save_blocked"):
            self.checkpoints.save(self.step, state, self._meta(), val_loss, interim=interim)

    def _flush(self) -> None:
        with self.goodput.spend("logging_blocked"):
            if self.writer is not None:
                self.writer.flush()

    def _meta(self) -> dict:
        return {
            "config": settings.to_dict(self.config),
            "data_fingerprint": self.setup.data.tokens.fingerprint,
            "run_id": self.manifest["run_id"] if self.manifest else None,
            "step": self.step,
        } | own_formats(self.quant)

    def _report_saves(self) -> None:
        for outcome in self.checkpoints.check():
            if outcome.error:
                self.console.alert(f"{outcome.error}; training goes on and saves again at the next interval")
                self.event("checkpoint_failed", outcome.step, reason=outcome.error)
            else:
                self.event(
                    "checkpoint",
                    outcome.step,
                    bytes=outcome.n_bytes,
                    blocked_s=round(outcome.blocked_s, 4),
                    background_s=round(outcome.background_s, 3),
                )

    def save_anomaly(self, state: TrainState, row: dict[str, float]) -> None:
        """Saves the state after the dispatch of the run's first non-finite step, and how to see that step again.

        Args:
          row: of that step, {column: value}.
        """
        numbers = np.arange(self.config.batch_size, dtype=np.uint32)
        numbers += np.uint32((self.first_bad_step - 1) * self.config.batch_size)
        windows = permute_windows(numbers, self.setup.data.tokens.n_train_windows, self.config.data_seed, xp=np)
        cause = stability.locate(row)
        found = {
            name.removeprefix("alert/"): value
            for name, value in row.items()
            if name.startswith("alert/nonfinite") and value != 0
        }
        about = {"first_bad_step": self.first_bad_step, "cause": cause, "windows": windows.tolist(), "found": found}
        self._flush()
        with self.goodput.spend("save_blocked"):
            outcome = save_anomaly(self.run_dir, self.step, state, self._meta() | about)
        self.event(
            "anomaly",
            self.step,
            first_bad_step=self.first_bad_step,
            cause=cause,
            path=str(outcome.path),
            error=outcome.error,
        )
        kept = outcome.error or f"the state at step {self.step} is kept in {outcome.path}"
        self.console.alert(f"step {self.first_bad_step} was not finite: {cause}; {kept}")

    # The end.

    def finish(self, signal_number: int | None, *, plot: bool = True) -> int:
        """Writes the verdict and the plot of the loss, unless the run was interrupted; ends the dashboards' runs;
        returns the exit code. Whoever opened the record closes it."""
        self.exit_code = self._exit_code(signal_number)
        if not processes.is_lead():
            return self.exit_code
        self._flush()
        interrupted = self.exit_code > 128
        if not interrupted:
            self.verdict = found = verdict.make_verdict(self.run_dir, stopped=self._why_it_stopped())
            if plot:
                verdict.try_to_plot(self.run_dir, self.config.run_name, self.console.message)
            verdict.write_verdict(self.run_dir, found)
        if self.sinks is not None:
            # A signal wants an answer within seconds; what W&B then lacks is sent when the run is resumed.
            with self.goodput.spend("logging_blocked"):
                self.sinks.close(drain_timeout=5.0 if signal_number else 300.0, summary=self.verdict)
        self._account()
        if self.account and self.verdict:
            # Once more: sending to W&B may have taken minutes, and a verdict does not wait for that.
            self._flush()
            self.verdict["goodput"] = total(read_timing(self.run_dir)[1])
            verdict.write_verdict(self.run_dir, self.verdict)
        return self.exit_code

    def _exit_code(self, signal_number: int | None) -> int:
        if self.frozen:
            return STOPPED_NON_FINITE
        if self.step > 0 and not self.is_saved():
            return NOT_SAVED
        return 128 + signal_number if signal_number and self.step < self.config.max_steps else FINISHED

    def _why_it_stopped(self) -> str | None:
        if self.exit_code == NOT_SAVED:
            return f"the checkpoint of step {self.step} could not be saved"
        if self.exit_code == STOPPED_NON_FINITE:
            return f"{self.config.nan_patience} non-finite steps in a row, the last at step {self.step}"
        return None

    def _account(self) -> None:
        """Records, once, where the time of this start went. Not of runs side by side, who have no time of their own."""
        if self.account is None and self.width is None:
            self.account = self.goodput.account()
            self.event("goodput", self.step, **self.account)

    def report(self) -> None:
        """Says how it went: where the time went, and the verdict, or how to resume."""
        assert self.account is not None, "finish() makes the account of a run by itself"
        self.console.message(describe(self.account))
        self.console.close()
        if self.exit_code > 128:
            tell(
                f"{signal.Signals(self.exit_code - 128).name}: stopped after step {self.step} of "
                f"{self.config.max_steps}; {how_it_goes_on(self.run_dir, self.resume)}"
            )
        elif self.verdict and (self.config.console != "quiet" or not self.verdict["sound"]):
            verdict.print_verdict(self.verdict, seconds=self.account["wall_s"])


def _describe_formats(config: Config, quant: quantization.QuantOptions) -> str:
    """Which layers compute in which formats, in one line."""
    groups: dict[tuple, list[str]] = {}
    for layer in quant.layers:
        groups.setdefault(layer.wag, []).append(layer.layer)
    shown = [
        f"{'/'.join(name or '-' for name in wag) if len(set(wag)) > 1 else wag[0]} in {len(layers)} layers"
        + ("" if len(groups) == 1 else f" ({layers[0]} ...)")
        for wag, layers in groups.items()
    ]
    return (
        f"formats (W/A/G): {', '.join(shown)}; scaling {config.scaling}, products {config.products}, weights at rest "
        f"{config.weights_at_rest}, optimizer {config.optimizer}; rounding certified on this device"
    )


@contextlib.contextmanager
def open_run(
    claim: Claim, setup: Setup, console, goodput: Goodput, width: int | None = None, watch=None
) -> Iterator[tuple[RunFolder, TrainState]]:
    """The claimed folder open for training, and the state that the run goes on from.

    Args:
      width: how many runs are trained side by side with this one; None for a run by itself.
      watch: what the record's writer tells its progress and alerts to; default the console.

    Raises:
      UserError: the folder cannot be continued with this program and these data.
    """
    if setup.data.tokens.dir.absolute() == claim.run_dir:
        raise UserError(
            f"{claim.run_dir} holds the training data, so it cannot be the run's folder too: give another --workdir"
        )
    claim.require_same_data(setup)
    with contextlib.ExitStack() as resources:
        run = RunFolder(claim, setup, console, goodput, width, watch)
        state = run.restore_or_start(resources)
        run.open_record(resources)
        run.introduce()
        yield run, state
