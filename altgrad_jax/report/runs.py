"""Run folders as the report sees them: found, identified, checked to be comparable, and read fast.

What a run is follows from its manifest. Its *arm* is everything that defines the treatment but the learning rate and
the seeds: format, which operands have it, how weights are kept, optimizer, and a variant (settings of the number
formats, the clipping or the kept moments that differ from what most runs have). A *cell* is an arm at one learning
rate; its runs differ in the seed or the data seed.

What happened to it follows from its record:

    finished    it made all its steps and its last validation loss is a number
    lost        it diverged or stopped by itself: it has no loss, and is counted apart
    unfinished  it was interrupted or is going on: counted nowhere, named in the report
    damaged     the folder cannot be read: counted nowhere, named with the reason

A finished run may still not be sound (some non-finite steps that were skipped, a rising validation loss): its loss
counts as measured, and it is counted among the failures.

A record is read in two depths. Its few global curves are cut out of the lines without parsing them, 8 MB in 20 ms; all
statistics of all layers are parsed only for runs that the report shows them of.
"""

import json
import math
import os
from collections import Counter
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np

from altgrad_jax import config as settings
from altgrad_jax.errors import UserError
from altgrad_jax.files import read_json
from altgrad_jax.run.record import (
    DIAGNOSTICS,
    MANIFEST,
    METRICS,
    read_diagnostics,
    read_history,
    read_manifest,
    read_rows,
    read_window_losses,
)
from altgrad_jax.run.verdict import UNSOUND_ALERTS, VERDICT

FINISHED, LOST, UNFINISHED, DAMAGED = "finished", "lost", "unfinished", "damaged"
OPERANDS = ("W", "A", "G")
REFERENCE = "BF16"
RECIPE = "recipe "  # in front of the name of a recipe as a format

# Settings that may differ between runs that are compared, as may every interval and those of W&B: they name, watch,
# save or place a run, and change no loss.
FREE = frozenset(
    """
    bit_stall_threshold checkpoint_dir checkpoint_seconds console data_placement data_source dead_neuron_threshold
    dead_neuron_window deterministic eval_batch_size max_checkpoints metrics nan_patience overflow_threshold project
    recipe_program rank_threshold rank_threshold_strict run_name spike_threshold spike_window stall_window
    steps_per_dispatch tags reference_gradient evaluate_all val_patience""".split()
)
# Settings that the arm or the cell stands for.
IDENTITY = frozenset(
    "compute_dtype data_seed formats learning_rate optimizer recipe seed store_formats use_fp8 weights_at_rest".split()
)
# Settings that make a separate arm where they differ from what most runs have. Those of number formats mean nothing
# to a run without any.
FORMAT_VARIANTS = (
    "scaling",
    "amax_history",
    "scale_rounding",
    "operand_rounding",
    "saturate",
    "products",
    "range_clip",
    "emergency_formats",
    "emergency_patience",
)
_RESET = ("oscillation_reset", "oscillation_start", "oscillation_threshold")
VARIANTS = ("grad_clip", "moments", "moments_rounding", *_RESET, *FORMAT_VARIANTS)
# Anything else, a setting this page does not know included, must be equal.

# First elements of the names of the metrics that the report shows or watches.
STATISTICS = frozenset(
    "overflow underflow sqnr_db grad_cosine update_gain lost_update not_flipped stable_rank "
    "participation_ratio grad_total_bias grad_total_variance grad_bias_float32 grad_variance "
    "grad_persistent_bias_float32 nonfinite_loss nonfinite_grads nonfinite_params nonfinite_moments nonfinite_amax "
    "nonfinite_scale nonfinite_residual nonfinite_updates".split()
)


@dataclass(frozen=True, order=True)
class Arm:
    """A treatment. operands: of "WAG" those that have the format; "" where only the stored weights have it."""

    format: str
    operands: str = "WAG"
    at_rest: str = "float32"
    optimizer: str = "adamw"
    variant: str = ""

    @property
    def plain(self):
        """Whether it is a whole format (or none at all), not an ablation."""
        return self.operands == "WAG"

    @property
    def label(self):
        parts = [self.format]
        if self.operands != "WAG":
            parts.append(f"only {' and '.join(self.operands)}" if self.operands else "only at rest")
        return ", ".join(parts + self.treatment_parts)

    @property
    def treatment_parts(self):
        parts = [] if self.at_rest == "float32" else [AT_REST_LABELS.get(self.at_rest, self.at_rest)]
        return (
            parts + ([] if self.optimizer == "adamw" else [self.optimizer]) + ([self.variant] if self.variant else [])
        )


AT_REST_LABELS = {
    "float32": "float32 master",
    "nearest": "stored, nearest",
    "stochastic": "stored, stochastic",
    "error_feedback": "stored, error feedback",
}


@dataclass
class Run:
    """One run folder. loss_S, steps_S: of every row that has a loss (float32, int64); val_steps, val_losses likewise.

    val_loss: the last validation loss of a finished run; infinity for a lost one; NaN otherwise.
    all_windows: likewise the mean loss over every validation window, where the run recorded them.
    """

    path: Path
    name: str
    state: str = DAMAGED
    reason: str = ""
    sound: bool = False
    config: dict = field(default_factory=dict)
    manifest: dict = field(default_factory=dict)
    arm: Arm | None = None
    steps: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    losses: np.ndarray = field(default_factory=lambda: np.zeros(0, np.float32))
    val_steps: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    val_losses: np.ndarray = field(default_factory=lambda: np.zeros(0, np.float32))
    last_step: int = 0
    val_loss: float = math.nan
    all_windows: float = math.nan
    verdict: dict = field(default_factory=dict)

    @cached_property
    def window_losses(self):
        """float64 [windows]: the losses after the last update in the order of the text; empty where not recorded."""
        try:
            step, losses = read_window_losses(self.path) or (None, np.zeros(0))
        except UserError as error:
            self.reason, step = str(error), None
        return losses.astype(np.float64) if step is not None and step == self.last_step else np.zeros(0)

    @property
    def learning_rate(self):
        return self.config["learning_rate"]

    @property
    def seed(self):
        return self.config["seed"]

    @property
    def draw(self):
        """(seed of the weights, seed of the data order): what two runs must share to be a pair."""
        return self.seed, self.config["data_seed"]

    @property
    def ended(self):
        return self.state in (FINISHED, LOST)


# ---------------------------------------------------------------------------------------------------- finding


def find(paths):
    """Folders of the runs at or below `paths`, by their paths, each once; UserError for a path that is no folder.

    Links are followed. A link to nothing is given too: it can be named, and not read.
    """
    found, seen = {}, set()
    for path in map(Path, paths):
        if not path.is_dir():
            raise UserError(f"{path} is not a folder: give run folders, or folders that hold run folders")
        for folder, below, files in os.walk(path, followlinks=True):
            real = os.path.realpath(folder)
            if real in seen or MANIFEST in files or METRICS in files:
                below.clear()  # checkpoints, and links that lead back
            if MANIFEST in files or METRICS in files:
                found.setdefault(real, Path(folder))
            elif real not in seen:
                links = [Path(folder, name) for name in files if Path(folder, name).is_symlink()]
                found |= {str(link): link for link in links if not link.exists()}
            seen.add(real)
            below[:] = sorted(name for name in below if not name.startswith("."))
    return [found[key] for key in sorted(found)]


def _names(folders):
    """Short names that tell the folders apart: the last component, or as many as it takes."""
    names = {}
    for folder in folders:
        parts = folder.resolve().parts
        for n in range(1, len(parts) + 1):
            names.setdefault(folder, [])
            names[folder].append("/".join(parts[-n:]))
    counts = Counter(name for candidates in names.values() for name in candidates)
    return [
        next(name for name in [*names[folder], str(folder)] if counts[name] <= 1 or name == str(folder))
        for folder in folders
    ]


# ---------------------------------------------------------------------------------------------------- reading


def read_curves(run_dir):
    """(steps, losses, val_steps, val_losses, last step) of the rows that have a loss or a validation loss."""
    losses, validation, last = [], [], -1
    for row in read_rows(run_dir, ("loss", "val_loss")):
        last = row["step"]
        for key, pairs in (("loss", losses), ("val_loss", validation)):
            if key in row:
                pairs.append((last, row[key]))

    def columns(pairs):
        return np.array([s for s, _ in pairs], np.int64), np.array([v for _, v in pairs], np.float32)

    return *columns(losses), *columns(validation), last


def read_statistics(run_dir):
    """{"step": int64 [rows], name: float32 [rows]} of the metrics in STATISTICS; NaN where a row has none."""
    history = read_history(run_dir)
    return {name: values for name, values in history.items() if name == "step" or name.partition("/")[0] in STATISTICS}


def read_codes(run_dir):
    """(step, {(layer, operand): (format, int64 [256])}) of the last diagnosis with codes, or (None, {})."""
    if not (run_dir / DIAGNOSTICS).exists():
        return None, {}
    lines = [line for line in read_diagnostics(run_dir) if "codes" in line]
    last = max((line["step"] for line in lines), default=None)
    of_last = [line for line in lines if line["step"] == last]
    return last, {(line["layer"], line["operand"]): (line["format"], line["codes"]) for line in of_last}


def _refuse_settings(path, config):
    """UserError unless every setting is there, with a value that it can have."""
    missing = [name for name in settings.FIELDS if name not in config]
    if missing:
        raise UserError(f"{path} lacks the setting {missing[0]}: restore it from a copy")
    if wrong := settings.wrong_values(config):
        raise UserError(f"{path} is damaged, {wrong[0]}: restore it from a copy")


def _read_run(folder, name):
    run = Run(folder, name)
    if not folder.exists():
        run.reason = f"{folder} is a link to {os.readlink(folder)}, which does not exist: mend or remove it"
        return run
    try:
        run.manifest = read_manifest(folder)
        run.config = settings.upgraded(run.manifest["config"])
        _refuse_settings(folder / MANIFEST, run.config)
        run.arm = _arm_of(run)
        run.steps, run.losses, run.val_steps, run.val_losses, run.last_step = read_curves(folder)
    except UserError as error:
        run.reason = str(error)
        return run
    except (KeyError, TypeError, AttributeError) as error:
        run.reason = f"{folder / MANIFEST} does not describe a run ({type(error).__name__}: {error})"
        return run
    _judge(run)
    return run


def _judge(run):
    """Sets state, reason, sound and val_loss."""
    path, max_steps = run.path / VERDICT, run.config["max_steps"]
    try:
        if not os.path.lexists(path):
            raise FileNotFoundError
        verdict = read_json(path, "delete it and resume the run, which writes it anew")
        steps, stopped, run.sound = verdict["steps"], verdict["stopped"], bool(verdict["sound"])
        ended_early, alerts = not verdict["finished"], set(verdict["alerts"])
        if type(steps) is not int:
            raise TypeError("steps is no whole number")
    except FileNotFoundError:
        run.state, run.reason = UNFINISHED, f"step {max(run.last_step, 0)} of {max_steps}, no verdict"
        return
    except UserError as error:
        run.reason = str(error)
        return
    except (KeyError, TypeError) as error:
        run.reason = (
            f"{path} cannot be read ({type(error).__name__}): delete it and resume the run, which writes it anew"
        )
        return
    if run.last_step < steps:
        run.reason = (
            f"{run.path / METRICS} ends at step {run.last_step}, its verdict speaks of {steps}: restore it from a copy"
        )
    elif run.last_step > steps or verdict["max_steps"] != max_steps and not ended_early:
        run.state, run.reason = UNFINISHED, f"step {run.last_step} of {max_steps}, resumed after its verdict"
    else:
        run.verdict = verdict
        last = run.val_losses[-1] if len(run.val_losses) and run.val_steps[-1] == run.last_step else math.nan
        reasons = [f"stopped after {steps} of {max_steps} steps ({stopped})"] if ended_early else []
        if not ended_early and not math.isfinite(last):
            reasons.append("its last validation loss is not a number")
        if "divergence" in alerts:
            reasons.append(UNSOUND_ALERTS["divergence"])
        if verdict.get("loss_fell") is False:
            reasons.append("the loss did not fall")
        run.state, run.reason = (LOST, "; ".join(reasons)) if reasons else (FINISHED, "")
        run.val_loss = math.inf if reasons else float(last)
        every = verdict.get("all_windows")
        over_all = every.get("mean_loss") if isinstance(every, dict) else None
        run.all_windows = math.inf if reasons else over_all if isinstance(over_all, float) else math.nan
        if not reasons and not run.sound:
            run.reason = str(verdict.get("verdict", "not sound"))


class Reader:
    """Reads run folders and keeps what it read, so that a second look reads only files whose size or time changed."""

    def __init__(self):
        self._kept = {}

    def _cached(self, kind, paths, read):
        def mark(path):
            try:
                status = path.stat()
            except OSError:
                return None
            return status.st_size, status.st_mtime_ns

        now = tuple(map(mark, paths))
        kept = self._kept.get((kind, paths))
        if kept is None or kept[0] != now:
            # Marked before it is read: what is written meanwhile is read again at the next look.
            kept = self._kept[kind, paths] = now, read()
        return kept[1]

    def runs(self, paths):
        """Every run at or below `paths`, as `find` orders them. Arms have no variants yet: `name_variants`."""
        folders = find(paths)
        found = []
        for folder, name in zip(folders, _names(folders), strict=True):
            files = tuple(folder / file for file in (MANIFEST, METRICS, VERDICT))
            run = self._cached("run", files, lambda: _read_run(folder, name))
            run.name = name
            found.append(run)
        return found

    def statistics(self, run):
        """`read_statistics` of a run; {} where its record turns out to be damaged inside a row."""
        return self._readable(run, METRICS, read_statistics, {})

    def codes(self, run):
        """`read_codes` of a run; (None, {}) where its diagnostics.jsonl is damaged."""
        return self._readable(run, DIAGNOSTICS, read_codes, (None, {}))

    def _readable(self, run, file, read, otherwise):
        try:
            return self._cached(file, (run.path / file,), lambda: read(run.path))
        except UserError as error:
            run.reason = str(error)
            return otherwise


# ------------------------------------------------------------------------------------------------- identifying


def _operands(layers):
    """({format}, operands) of the manifest's list of layers: the one format that is not BF16, and who has it in all of
    them; (all of them, None) where the layers do not fit that."""
    found = {name for layer in layers for name in (layer["w"], layer["a"], layer["g"])} - {None, REFERENCE}
    if len(found) != 1:
        return found, "" if not found else None
    (name,) = found
    have = "".join(operand for operand in OPERANDS if all(layer[operand.lower()] == name for layer in layers))
    some = any(layer[operand.lower()] == name for layer in layers for operand in OPERANDS if operand not in have)
    return found, None if some or not have else have


def _arm_of(run):
    config = run.config
    rest = {"at_rest": config.get("weights_at_rest", "float32"), "optimizer": config.get("optimizer", "adamw")}
    recipe = config.get("recipe") or ["bf16"]
    if recipe != ["bf16"]:  # that one quantizes nothing
        return Arm(RECIPE + ", ".join(recipe), **rest)
    if not config.get("use_fp8", False):
        return Arm(REFERENCE if config["compute_dtype"] == "bfloat16" else config["compute_dtype"], **rest)
    formats, operands = _operands((run.manifest.get("formats") or {}).get("layers") or [])
    if operands:
        (name,) = formats
        return Arm(name, operands, **rest)
    if operands is None:  # named by one of its runs; runs of equal rules are one arm whatever they are called
        return Arm("mixed: " + ", ".join(config["formats"]), **rest)
    stored = {rule.rpartition("=")[2] for rule in config.get("store_formats", ())} - {REFERENCE}
    if stored and rest["at_rest"] != "float32":
        return Arm("+".join(sorted(stored)), "", **rest)
    return Arm(f"{REFERENCE} as a format", **rest)


def _show(value):
    return (
        f"{value:g}"
        if isinstance(value, float)
        else ",".join(map(str, value))
        if isinstance(value, list)
        else str(value)
    )


def name_variants(runs):
    """Gives arms their variants: the settings of VARIANTS that differ from what most of the runs have."""

    def value(run, key):
        got = run.config.get(key)
        return json.dumps(got)

    def has(run, key):
        return key in run.config and (key not in FORMAT_VARIANTS or run.config.get("use_fp8", False))

    usual = {}
    for key in VARIANTS:
        counts = Counter(value(run, key) for run in runs if has(run, key))
        if counts:
            usual[key] = max(counts, key=lambda text: (counts[text], text))
    for run in runs:
        differs = [
            f"{key}={_show(run.config[key])}" for key in VARIANTS if has(run, key) and value(run, key) != usual[key]
        ]
        run.arm = Arm(run.arm.format, run.arm.operands, run.arm.at_rest, run.arm.optimizer, ", ".join(differs))


def check_comparable(runs):
    """UserError, one sentence, unless the runs differ only in what they may differ in.

    A setting that one record has and another lacks (it is of a later version) is not compared.
    """

    def refuse(run, other, name, value, other_value):
        raise UserError(
            f"{run.path} and {other.path} cannot be compared, for {name} is {value} in the one and "
            f"{other_value} in the other: report them separately, or leave one of the folders out"
        )

    def facts(run):
        meta = run.manifest["data"].get("meta") or {}
        yield "the data's fingerprint", run.manifest["data"]["fingerprint"]
        yield "the data's tokenizer", meta.get("tokenizer", run.config.get("tokenizer"))
        if "recorder" in run.manifest:
            yield "the model's products (name, layers, K, N, kept)", run.manifest["recorder"]["products"]
        for name, value in run.config.items():
            free = name in FREE or name.endswith("_interval") or name.startswith("wandb_")
            if not free and name not in IDENTITY and name not in VARIANTS:
                yield name, value

    first = {}
    for run in runs:
        for name, value in facts(run):
            other, other_value = first.setdefault(name, (run, value))
            if value != other_value:
                refuse(other, run, name, _show(other_value), _show(value))
