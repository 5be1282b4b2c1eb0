"""Sweeps: many runs that differ in some settings, trained in as few compiled programs as there can be.

A *member* is a run like any other: its config, its folder, its record, its checkpoints; scripts/train.py could make
it, and could go on with it. Members whose configs differ only in what is data to the program (name and folder, seeds,
learning rate, which formats of at most 7 mantissa bits) form a *group*, which compiles once. A group's members are
trained side by side, as many at once as its *width* says: those are a chunk.

What is finished is skipped, what is unfinished goes on from its own checkpoint, to the bit: a sweep that was killed is
continued with the command that began it. Machines that share a folder each take a slice of the members (`shard_of`);
merging is having the folders in one place, for a report reads run folders and nothing else.
"""

import contextlib
import dataclasses
import itertools
import json
import math
import os
import re
import statistics
import sys
import time
from collections.abc import Iterable, Mapping
from pathlib import Path

import jax
import numpy as np

from altgrad_jax import config as settings
from altgrad_jax.errors import UserError
from altgrad_jax.files import write_atomically, writing
from altgrad_jax.numerics import rules
from altgrad_jax.numerics.formats import get_format
from altgrad_jax.numerics.recipes import get_recipe
from altgrad_jax.run.console import make_console, show_duration, tell
from altgrad_jax.run.device import use_compilation_cache, use_deterministic_operations
from altgrad_jax.run.dry_run import program_bytes
from altgrad_jax.run.environment import fixed_options
from altgrad_jax.run.folder import NOT_SAVED, claim, has_ended, open_run
from altgrad_jax.run.goodput import Goodput, describe
from altgrad_jax.run.lock import locked
from altgrad_jax.run.loop import loop
from altgrad_jax.run.record import MANIFEST, read_manifest
from altgrad_jax.run.setup import Feed, Setup, open_data, set_up
from altgrad_jax.run.signals import Interrupted, StopRequest
from altgrad_jax.run.train import compile_program, disk_failures_as_one_sentence
from altgrad_jax.step.from_config import flops_per_step
from altgrad_jax.step.program import Program

SWEEP = "sweep.json"
MEMBER_LOOPS = ("auto", "map", "vmap")
# Side by side on a CPU there is little to gain from more; on a GPU memory and use of the device decide.
MOST_SIDE_BY_SIDE = 64
MEMORY_SHARE = 0.8
# Settings that the compiled program does not see, or sees as data.
_NOT_COMPILED = frozenset(
    "seed data_seed init_from learning_rate formats emergency_formats recipe recipe_program run_name checkpoint_dir "
    "tags project wandb_mode wandb_entity wandb_group wandb_keys console".split()
)


@dataclasses.dataclass(frozen=True)
class Member:
    """One run of a sweep: a validated ConfigDict, whose run_name and checkpoint_dir are its own."""

    config: settings.Config

    @property
    def name(self) -> str:
        return self.config.run_name

    @property
    def folder(self) -> Path:
        return Path(self.config.checkpoint_dir)


# -------------------------------------------------------------------------------------------------- what to train


def axis(name, values, label=None):
    """Points along one setting: [{name: value, "run_name": part of the member's name}, ...].

    Args:
      label: function of a value to its part of the name; default `name` and the value.
    """
    label = label or (lambda value: f"{name}{'+'.join(value) if isinstance(value, tuple) else value}")
    return [{name: value, "run_name": label(value)} for value in values]


def grid(*axes: Iterable[Mapping]):
    """Every combination of one point from each axis; the parts of their names are joined by `-`."""
    points = []
    for combination in itertools.product(*axes):
        merged = {}
        for point in combination:
            twice = (merged.keys() & point.keys()) - {"run_name"}
            if twice:
                raise UserError(f"two axes of a grid set {sorted(twice)[0]}: give each setting one axis")
            name = "-".join(part for part in (merged.get("run_name"), point.get("run_name")) if part)
            merged |= {**point, "run_name": name}
        points.append(merged)
    return points


def only(operands, name):
    """Rules that give some operands of every linear layer of the blocks the format `name`, and the others BF16.

    BF16 as a format changes nothing (its product equals that without formats to the bit), and makes an ablation share
    its program with the runs in which all operands have a format. `operands`: some of "W", "A", "G", as in "WA".
    """
    return tuple(f"block_*:{operand}={name if operand in operands else 'BF16'}" for operand in rules.OPERANDS)


def make_members(config, points, out):
    """The members of a sweep: `config` with the settings of each point changed, in folders of their names below `out`,
    and in one W&B group, named by `out` unless the config names one.

    UserError if a setting is wrong, or two members have one name or one set of settings.
    """
    members, names, seen = [], set(), {}
    for point in points:
        if not point.get("run_name"):
            raise UserError(
                f"a member of the sweep has no name: give its point {settings.show(dict(point))} a run_name"
            )
        name = point["run_name"]
        if name in names or not re.fullmatch(r"[^/\\]+", name) or name in (".", ".."):
            why = "is the name of two members" if name in names else "cannot name a folder"
            raise UserError(f"run_name={name!r} {why} of the sweep: give each point a name of its own")
        names.add(name)
        member = config.copy_and_resolve_references()
        if "wandb" in point.get("loggers", config.loggers) and not config.wandb_group:
            point = {"wandb_group": Path(out).name, **point}
        with member.unlocked():
            member.update({"checkpoint_dir": str(Path(out).absolute() / name), **point})
        if unknown := set(point) - set(settings.FIELDS):
            raise UserError(f"member {name}: {settings.unknown_field(sorted(unknown)[0])}")
        member, said = settings.fitted(member)
        for sentence in said:
            print(f"note: member {name}: {sentence}", file=sys.stderr)
        try:
            settings.validate(member)
        except UserError as error:
            raise UserError(f"member {name}: {error}") from None
        member.lock()
        same = json.dumps(
            {
                key: value
                for key, value in settings.to_dict(member).items()
                if key not in ("run_name", "checkpoint_dir", "tags")
            }
        )
        if same in seen:
            raise UserError(f"members {seen[same]} and {name} have the same settings: leave one out")
        seen[same] = name
        members.append(Member(member))
    if not members:
        raise UserError("the sweep has no members: give it points with get_sweep() in the config file, or with --axes")
    for group in make_groups(members):
        _share_program(group)
    return members


def _share_program(group):
    """Gives the members of a group that follow recipes one program, which can follow all of them.

    A member that was begun keeps the program that its folder names: other machinery may round its neighbourhood
    otherwise, and a resumed run is to go on to the bit.
    """
    names = sorted({item.partition("@")[0] for member in group for item in member.config.recipe})
    for member in group:
        program = tuple(names) if len(names) > 1 else ()
        manifest = member.folder / MANIFEST
        if manifest.exists():
            program = tuple(read_manifest(member.folder)["config"].get("recipe_program", ()))
        if member.config.recipe:
            with member.config.unlocked():
                member.config.recipe_program = program


def parse_axes(text):
    """Points from text such as "formats=none,E4M3,mxfp8;seed=0,1".

    Rules that make one value of `formats` are joined by +. In place of formats `none` is a member without any, and the
    name of a recipe one that follows it.
    """
    from altgrad_jax.cli import parse_value

    axes = []
    for part in text.split(";"):
        name, equals, values = part.strip().partition("=")
        if not equals or not values:
            raise UserError(f"--axes={text} cannot be used: give SETTING=VALUE,VALUE with `;` between settings")
        if name not in settings.FIELDS:
            raise UserError(f"--axes: {settings.unknown_field(name)}")
        field = settings.FIELDS[name]
        points = axis(name, [parse_value(field, value.replace("+", ",")) for value in values.split(",")])
        axes.append([_numbers(point) for point in points] if name == "formats" else points)
    return grid(*axes)


def _numbers(point):
    """A point of the axis `formats` with every setting that says in which numbers its members compute."""
    rules_ = point["formats"]
    if rules_ == ("none",):
        return {**point, "formats": (), "use_fp8": False}
    with contextlib.suppress(UserError):
        get_recipe(rules_[0].partition("@")[0])
        return {**point, "formats": (), "use_fp8": False, "recipe": rules_}
    return {**point, "use_fp8": True}


# --------------------------------------------------------------------------------------------------------- the plan


def program_key(config):
    """What members of one group have in common: every setting that shapes the program or the loop around it."""

    def kind(name):
        if name is None or config.products == "native":
            return name
        # Operands with more mantissa bits than bfloat16 are computed by another program.
        return "wide" if get_format(name).mantissa_bits > 7 else "narrow"

    layers = ()
    if config.use_fp8:
        resolved = rules.resolve_rules(config.formats, config.n_layer, config.model)
        layers = tuple((layer.layer, *map(kind, layer.wag)) for layer in resolved)
    followed = [get_recipe(item.partition("@")[0]) for item in config.recipe]
    # Sums over tiles are another program. So is another number of phases, one that waits for bad updates, and a program
    # that a folder names.
    waits = [any(f"@{what}" in item for item in config.recipe) for what in ("bad", "exhausted")]
    recipe = len(followed), waits, any(recipe.tiled for recipe in followed), list(config.recipe_program)
    # Batches from the host are one stream for all lanes.
    order = config.data_seed if config.data_placement == "host" else None
    common = {name: value for name, value in settings.to_dict(config).items() if name not in _NOT_COMPILED}
    return json.dumps([common, layers, list(map(kind, config.emergency_formats)), recipe, order], sort_keys=True)


def make_groups(members):
    """[[Member]]: the members by program, in the order in which they are given."""
    groups = {}
    for member in members:
        groups.setdefault(program_key(member.config), []).append(member)
    return list(groups.values())


def shard_of(text, environ=os.environ):
    """(i, n): this process trains slice i (from 0) of n. `text`: "i/n", counted from 1, or "auto": from the variables
    of a SLURM array or step, or of a JAX cluster; else the whole."""
    if text == "auto":
        for index, count, first in (
            ("SLURM_ARRAY_TASK_ID", "SLURM_ARRAY_TASK_COUNT", "SLURM_ARRAY_TASK_MIN"),
            ("SLURM_PROCID", "SLURM_NTASKS", ""),
            ("JAX_PROCESS_ID", "JAX_NUM_PROCESSES", ""),
        ):
            if index in environ and count in environ:
                numbers = environ[index], environ[count], environ.get(first, "0")
                i, n, least = map(int, numbers) if all(map(str.isdigit, numbers)) else (0, 0, 0)
                if not 0 <= i - least < n:
                    raise UserError(f"{index}={numbers[0]} of {count}={numbers[1]} names no slice: give --shard=i/n")
                return i - least, n
        return 0, 1
    match = re.fullmatch(r"([0-9]{1,6})/([0-9]{1,6})", text)
    if not match or not 1 <= int(match[1]) <= int(match[2]):
        raise UserError(f"--shard={text} cannot be used: give i/n with 1 <= i <= n, such as 2/8, or auto")
    return int(match[1]) - 1, int(match[2])


def take_shard(members, i, n):
    """Slice i of n: neighbours in the order of their groups, so that a slice compiles as few programs as it can."""
    ordered = [member for group in make_groups(members) for member in group]
    return ordered[len(ordered) * i // n : len(ordered) * (i + 1) // n]


def lane_bytes(setup, *, member_loop):
    """(bytes that every run side by side takes, bytes that a program takes once), estimated before compiling.

    The state is counted exactly, twice where it is not updated in place; the activations of a step by formula: per
    token and layer 24 numbers a unit of width and 2 a head and position, per token 4 of the vocabulary, in 4 bytes.
    """
    config, step = setup.config, setup.functions.step
    abstract = setup.functions.abstract_state
    state = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(abstract))
    rows = 4 * step.options.steps_per_dispatch * len(setup.functions.metric_names)
    tokens = config.batch_size // config.grad_accum_steps * config.block_size
    per_token = config.n_layer * (24 * config.n_embd + 2 * config.n_head * config.block_size) + 4 * config.vocab_size
    gradients = 4 * sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(abstract.params))
    step = 4 * tokens * per_token + 2 * gradients
    data = 2 * len(setup.data.tokens.train_T) if setup.on_device else 0
    if member_loop == "vmap":
        return 2 * state + rows + step, data
    return 2 * state + rows, data + step


def memory_limit(device):
    """Bytes that a program may take on each device: MEMORY_SHARE of the device's, or its part of what the host has
    free."""
    stats = device.memory_stats() or {}
    if "bytes_limit" in stats:
        return MEMORY_SHARE * stats["bytes_limit"]
    with contextlib.suppress(OSError, ValueError, IndexError):
        available = re.findall(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())
        return MEMORY_SHARE * 1024 * int(available[0]) / jax.device_count()
    return MEMORY_SHARE * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / jax.device_count()


def choose_width(n_members, n_devices, per_lane, once, limit, asked=0):
    """Runs side by side: as asked, or as many as fit; a multiple of the devices, no more than there are members.

    Bytes are of one device. UserError where not even one run a device fits.
    """
    fits = int((limit - once) // per_lane) if limit > once else 0
    if asked:
        width = asked
    else:
        if fits < 1:
            raise UserError(
                f"a member needs about {(per_lane + once) / 2**30:.1f} GiB and {limit / 2**30:.1f} GiB may "
                "be used: make the model or batch smaller, or give --width=1 to try all the same"
            )
        width = min(n_members, fits * n_devices, MOST_SIDE_BY_SIDE)
        # Even chunks: 10 members of which 8 fit are trained 5 and 5.
        width = math.ceil(n_members / math.ceil(n_members / width))
    return math.ceil(min(width, n_members) / n_devices) * n_devices


# ------------------------------------------------------------------------------------------------------- training


class _Watch:
    """What the writers of a chunk tell: their steps move one progress, their alerts are counted."""

    def __init__(self, console):
        self.console, self.alerts, self.before, self._steps, self._told = console, 0, 0, {}, 0

    def begin(self, runs):
        self.before += sum(self._steps.values())
        self._steps = {run.config.run_name: run.step for run in runs}
        self._told = min(self._steps.values())

    def update(self, name, step, loss, tokens_per_s):
        self._steps[name] = step
        slowest = min(self._steps.values())
        if slowest > self._told:
            self._told = slowest
            # A run's rate is over its share of the time, which is the rate of all of them together.
            self.console.update(self.before + sum(self._steps.values()), loss, None, tokens_per_s)


@dataclasses.dataclass(frozen=True)
class _Lane:
    """What the writer of one member tells, passed on with its name."""

    watch: _Watch
    name: str

    def update(self, step, loss=None, val_loss=None, tokens_per_s=None):
        self.watch.update(self.name, step, loss, tokens_per_s)

    def alert(self, text):
        self.watch.alerts += 1


class _Quiet:
    """The console of a member: what it says about itself is left out, what went wrong is said with its name."""

    def __init__(self, name, console):
        self.name, self.console = name, console

    def message(self, text):
        pass

    def alert(self, text):
        self.console.message(f"{self.name}: {text}")


@dataclasses.dataclass(frozen=True)
class Planned:
    """A group of the plan: its members that are not finished, and how they are trained."""

    setup: Setup
    members: list
    n_finished: int
    width: int
    lane_bytes: float
    once_bytes: float
    flops: float

    @property
    def chunks(self):
        return [self.members[i : i + self.width] for i in range(0, len(self.members), self.width)]

    @property
    def n_bytes(self):
        return self.once_bytes + self.width * self.lane_bytes


def resolve_member_loop(member_loop):
    """ "auto" is map on a CPU and vmap on a GPU."""
    if member_loop not in MEMBER_LOOPS:
        raise UserError(f"--member_loop={member_loop} cannot be used: give auto, map or vmap")
    if member_loop == "auto":
        return "map" if jax.default_backend() == "cpu" else "vmap"
    return member_loop


@fixed_options()
def sweep(
    members,
    out,
    *,
    data_dir=None,
    member_loop="auto",
    width=0,
    memory=0.0,
    shard=(0, 1),
    cpu_devices=1,
    dry_run=False,
    age=0.0,
):
    """Trains every member of this shard that is not finished. Returns the exit code.

    Args:
      members: from make_members.
      out: folder of the sweep, in which sweep.json tells its members.
      member_loop: see step.over_members; "auto" is map on a CPU and vmap on a GPU.
      width: runs side by side; 0: as many as fit.
      memory: GiB that a program may take on each device; 0: most of what there is.
      shard: (i, n): the slice of the members that this process trains.
      cpu_devices: where jax computes on a CPU, the devices that it is divided into. A small model keeps one core busy;
        two devices then train two members at a time. Sums may round otherwise than on one, though always alike.
      dry_run: only says what would be done: compiles every program and times a few of its steps.
      age: as for training.train.

    Returns:
      0; 1 if a last checkpoint could not be saved; 128 + signal number if interrupted. A member that stopped because it
      was not finite is a result, and is told.
    """
    goodput = Goodput(age)
    if cpu_devices > 1:
        _divide_cpu(cpu_devices)
    if any(member.config.deterministic for member in members):
        use_deterministic_operations()  # before anything asks which backend there is, which starts it
    use_compilation_cache()
    member_loop = resolve_member_loop(member_loop)
    out = Path(out).absolute()
    mine = take_shard(members, *shard)
    left = {member.name for member in mine if not has_ended(member.folder, member.config)}
    console = make_console(members[0].config.console, sum(m.config.max_steps for m in mine if m.name in left))
    say = console.message
    if shard[1] > 1:
        say(f"slice {shard[0] + 1} of {shard[1]}: {len(mine)} of {len(members)} members; the others are other slices'")
    if not dry_run:
        with writing(out, "give another folder with --out"):
            out.mkdir(parents=True, exist_ok=True)
            write_plan(out, members)
    started, watch, code = time.monotonic(), _Watch(console), 0
    try:
        with StopRequest() as stop, disk_failures_as_one_sentence(lambda: "the same command goes on where it stopped"):
            groups = make_groups(mine)
            for number, group in enumerate(groups, 1):
                todo = [member for member in group if member.name in left]
                if not todo or stop.number:
                    continue
                planned = _plan_group(group, todo, data_dir, say, member_loop, width, memory)
                title = f"group {number} of {len(groups)}"
                say(f"{title}: {_describe(planned)}")
                program = planned.setup.program(planned.width, member_loop)
                seconds = compile_program(program, console, goodput)
                say(
                    f"{title}: compiled in {show_duration(seconds)}"
                    + (f"; {_predict(program, planned)}" if dry_run else "")
                )
                if not dry_run:
                    code = _train_group(program, planned, console, watch, stop, goodput, seconds) or code
            if stop.number:
                code = 128 + stop.number
    except Interrupted as interruption:
        code = 128 + interruption.number
    finally:
        console.close()
    if not dry_run:
        tell(describe(goodput.account()))
        tell(_summary(mine, time.monotonic() - started, watch.alerts, interrupted=code > 128))
    return code


def _divide_cpu(n_devices):
    try:
        jax.config.update("jax_num_cpu_devices", n_devices)
    except RuntimeError:
        raise UserError(
            f"cpu_devices={n_devices} came too late: jax has already started; set it before the first jax "
            "computation of the process"
        ) from None
    if jax.default_backend() != "cpu":
        raise UserError(
            f"cpu_devices={n_devices} divides a CPU, and jax computes on {jax.default_backend()} here: "
            "leave it out, or set JAX_PLATFORMS=cpu"
        )


def write_plan(out, members):
    """sweep.json: every member of the sweep with its settings, those of other slices included."""
    plan = {"schema_version": 1, "members": {member.name: settings.to_dict(member.config) for member in members}}
    write_atomically(Path(out) / SWEEP, (json.dumps(plan, indent=1) + "\n").encode())


def _plan_group(group, todo, data_dir, say, member_loop, width, memory) -> Planned:
    config = group[0].config
    setup = set_up(config, open_data(config, data_dir, say), say, side_by_side=True)
    if not setup.on_device and len({member.config.data_seed for member in group}) > 1:
        raise UserError(
            "the members have several data_seed, and the tokens are too many for the device, so that all members side "
            "by side would be given the batches of one: set data_placement=host, which trains each data_seed apart"
        )
    per_lane, once = lane_bytes(setup, member_loop=member_loop)
    limit = memory * 2**30 if memory else memory_limit(setup.device)
    # With map a run's numbers do not depend on those beside it. With vmap they may, by rounding: a sweep that goes on
    # computes with the width that it began with.
    n_members = len(todo) if member_loop == "map" else len(group)
    width = choose_width(n_members, len(setup.devices), per_lane, once, limit, width)
    flops = len(todo) * config.max_steps * flops_per_step(config)
    return Planned(setup, todo, len(group) - len(todo), width, per_lane, once, flops)


def _describe(planned: Planned) -> str:
    config = planned.setup.config
    names = [member.name for member in planned.members]
    shown = ", ".join(names[:3]) + (f" ... {names[-1]}" if len(names) > 3 else "")
    return (
        f"{_count(len(names), 'member')} ({shown})"
        + (f", {planned.n_finished} finished" if planned.n_finished else "")
        + f", {planned.width} side by side in {_count(len(planned.chunks), 'chunk')}, about "
        f"{planned.n_bytes / 2**20:,.0f} MiB, {planned.flops / 1e12:,.3g} TFLOP; "
        f"{config.max_steps} steps of {config.batch_size} x {config.block_size} tokens"
    )


def _count(n, what):
    return f"{n} {what}{'' if n == 1 else 's'}"


def _predict(program, planned, n_steps=3):
    """Memory as compiled, and the time the group takes by a few steps of its program."""
    n_bytes = program_bytes(program.compiled["run"])
    seconds = time_steps(planned.setup, program, n_steps)
    steps = len(planned.chunks) * planned.setup.config.max_steps
    # With map a lane without a run costs nothing, with vmap as much as any.
    share = len(planned.members) / (planned.width * len(planned.chunks)) if program.member_loop == "map" else 1
    return (
        f"{n_bytes / 2**20:,.0f} MiB as compiled; {seconds:.3g} s for a step of {planned.width}, so about "
        f"{show_duration(seconds * steps * share)} without evaluations"
    )


def time_steps(setup: Setup, program: Program, n_steps: int) -> float:
    """Seconds of a step of all lanes of a compiled program: the median of n_steps, after one that warms up."""
    functions = setup.functions
    state = program.stack([functions.init(setup.config.seed, functions.inputs.formats)])
    inputs, n_R, taken = program.stack([functions.inputs]), np.ones(program.width or 1, np.int32), []
    with contextlib.closing(Feed(setup, program)) as feed:
        tokens = feed.at(0, 1)
        for _ in range(n_steps + 1):
            started = time.perf_counter()
            state, _ = program.advance(state, tokens, n_R, inputs)
            taken.append(time.perf_counter() - started)
    return statistics.median(taken[1:])


def _train_group(program, planned, console, watch, stop, goodput, compile_seconds):
    """Trains the chunks of a group; exit code of the worst member, 0 where all is well."""
    worst, setup = 0, planned.setup
    for number, chunk in enumerate(planned.chunks):
        if stop.number:
            break
        with contextlib.ExitStack() as resources:
            runs, states = [], []
            for member in chunk:
                run_dir = member.folder.absolute()
                resources.enter_context(locked(run_dir))
                run, state = resources.enter_context(
                    open_run(
                        claim(member.config, run_dir),
                        setup,
                        _Quiet(member.name, console),
                        goodput,
                        program.width,
                        _Lane(watch, member.name),
                    )
                )
                if number == 0:
                    run.event("compiled", run.step, seconds=round(compile_seconds / len(chunk), 3))
                runs.append(run)
                states.append(state)
            watch.begin(runs)
            with stop.deferred():
                loop(setup, program, runs, states, stop, goodput)
            for run in runs:
                # A plot takes longer than all else at the end of a small run, and a report draws every curve.
                if run.finish(stop.number, plot=False) == NOT_SAVED:
                    worst = NOT_SAVED
                if run.verdict is not None and not run.verdict["sound"]:
                    console.message(f"{run.config.run_name}: {run.verdict['verdict']}")
    return worst


def _summary(members, seconds, alerts, *, interrupted):
    ended = [member for member in members if has_ended(member.folder, member.config)]
    if interrupted or len(ended) < len(members):
        return (
            f"stopped after {show_duration(seconds)} with {len(ended)} of {len(members)} members at their end; "
            "the same command goes on"
        )
    return (
        f"{_count(len(members), 'member')} of {len(members)} at their end, after {show_duration(seconds)}; "
        f"{_count(alerts, 'alert')} in their records"
    )
