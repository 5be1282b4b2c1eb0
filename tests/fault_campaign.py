"""Puts the program under faults of every kind, counts how it answers, and writes a table.

    python tests/fault_campaign.py                                  # everything, about 35 minutes on two CPU cores
    python tests/fault_campaign.py --quick                          # a little of everything, ten minutes
    python tests/fault_campaign.py --parts kills,corruption --folder /scratch/me/faults --seed 7

Parts: kills (kill -9 in every phase, then equal to the bit), corruption (damaged checkpoints), environment (full and
read-only disks, a clock set back, two processes, signals), inputs (bad settings, files, flags), numerics (NaN and
infinity in a loss, gradient, parameter, moment, amax history), soak (a long run: memory, files, threads). They run on
the disk that --folder lies on, so that a cluster's own file system can be put to the test. The same seed makes the
same faults. Exits with 1 if anything was not answered as it should be, or not everything was done within the budget.
"""

import os
import platform
import shutil
import signal
import sys
import tempfile
import time
import types
from pathlib import Path

from absl import flags

from altgrad_jax import cli
from altgrad_jax.errors import UserError
from altgrad_jax.files import writing

# The campaign is about one machine's CPU: its runs are small, and a GPU would be shared by all of them.
os.environ.setdefault("JAX_PLATFORMS", "cpu")

TITLES = {
    "kills": "kill -9",
    "corruption": "Damaged checkpoints",
    "environment": "Disk, clock, company, signals",
    "inputs": "Bad input",
    "numerics": "Numerical faults",
    "soak": "Soak",
}
FULL = dict(kills=200, corruptions=200, inputs=300, soak_steps=60_000)
QUICK = dict(kills=12, corruptions=25, inputs=100, soak_steps=2_000)


FLAGS = cli.new_flags()
flags.DEFINE_list("parts", list(TITLES), "some of them", flag_values=FLAGS)
flags.DEFINE_integer("seed", 0, "decides every random choice", 0, 2**31 - 1, flag_values=FLAGS)
flags.DEFINE_bool("quick", False, "a little of everything", flag_values=FLAGS)
for name, meaning in {
    "kills": "moments of kill -9",
    "corruptions": "damaged checkpoints",
    "inputs": "generated bad settings",
    "soak_steps": "steps of the long run",
}.items():
    meaning = f"{meaning} (default: {FULL[name]}, with --quick {QUICK[name]})"
    flags.DEFINE_integer(name, None, meaning, 1, flag_values=FLAGS)
flags.DEFINE_float(
    "budget_minutes",
    None,
    "begin nothing new after this time; inputs and numerics, once begun, are done whole (default: no end)",
    0.0,
    1e6,
    flag_values=FLAGS,
)
flags.DEFINE(cli.FOLDER, "data_dir", None, "token files of the byte tokenizer (default: made up)", flag_values=FLAGS)
flags.DEFINE(
    cli.FOLDER,
    "folder",
    None,
    "where the runs lie while they are needed (default: a temporary folder)",
    flag_values=FLAGS,
)
flags.DEFINE(cli.OUTPUT_FILE, "out", None, "file that gets the report (default: printed only)", flag_values=FLAGS)


def run_part(name, folder, data_dir, args, deadline):
    from campaigns import corruption, environment, inputs, kills, numerics, runs, soak

    if deadline.is_over():
        return runs.Part(TITLES[name], ["The budget was spent before."], 0, 1, [])
    common = dict(deadline=deadline, say=say)
    if name == "kills":
        return kills.run(folder, data_dir, kills=args.kills, seed=args.seed, **common)
    if name == "corruption":
        return corruption.run(folder, data_dir, trials=args.corruptions, seed=args.seed, **common)
    if name == "environment":
        return environment.run(folder, data_dir, seed=args.seed, **common)
    if name == "soak":
        return soak.run(folder, data_dir, steps=args.soak_steps, **common)
    if name == "inputs":
        return inputs.run(folder, seed=args.seed, n=args.inputs, every=12 if args.quick else 1, say=say).part()
    if name == "numerics":
        return numerics.part(numerics.run(folder, seed=args.seed, quick=args.quick, say=say))
    raise AssertionError(name)


def say(text):
    print(f"  {text}", file=sys.stderr, flush=True)


def run(**values):
    for name, default in (QUICK if values["quick"] else FULL).items():
        values[name] = values[name] or default
    args = types.SimpleNamespace(**values)
    if not args.parts or not set(args.parts) <= set(TITLES):
        raise UserError(f"--parts={','.join(args.parts)} cannot be used: give some of {', '.join(TITLES)}")
    data_dir, folder, out = (
        None if values[name] is None else Path(values[name]).absolute() for name in ("data_dir", "folder", "out")
    )
    return campaign(args, data_dir, folder, out)


def campaign(args, data_dir, folder, out):
    # A shell starts background jobs with SIGINT ignored, and the runs that are interrupted would inherit that.
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    # Not before the arguments are known to be good: jax takes seconds to start.
    from campaigns import runs

    from altgrad_jax.data.dataset import load_token_data
    from altgrad_jax.run.device import git_commit, versions

    if data_dir:
        load_token_data(data_dir, vocab_size=256, block_size=runs.SMALL["block_size"], tokenizer="bytes")
    commit = git_commit() or {}  # now: somebody may commit while it runs
    deadline = runs.Deadline(None if args.budget_minutes is None else 60 * args.budget_minutes)
    with writing(folder or tempfile.gettempdir(), "give another --folder"):
        if folder:
            folder.mkdir(parents=True, exist_ok=True)
        root = Path(tempfile.mkdtemp(prefix="faults-", dir=folder))
    try:
        data_dir = data_dir or runs.make_tokens(root / "data", args.seed)
        parts = []
        for name in args.parts:
            place = root / name
            place.mkdir()
            print(f"{name} ...", file=sys.stderr, flush=True)
            started = time.monotonic()
            part = run_part(name, place, data_dir, args, deadline)
            part.seconds = time.monotonic() - started
            parts.append(part)
            shutil.rmtree(place, ignore_errors=True)
        machine = f"{os.cpu_count()} CPU cores, {platform.system()}, Python {platform.python_version()}"
        text = "\n".join(
            [
                f"{time.strftime('%Y-%m-%d')}, {machine}, jax {versions()['jax']}, commit "
                f"{commit.get('commit', 'unknown')[:10]}: `python tests/fault_campaign.py {' '.join(sys.argv[1:])}`",
                "",
                *runs.summary(parts),
            ]
        )
        print(text, flush=True)
        if out:
            out.write_text(text + "\n")
        return any(part.failures or part.done < part.wanted for part in parts)
    finally:
        shutil.rmtree(root, ignore_errors=True)


if __name__ == "__main__":
    cli.main(run, FLAGS, usage=__doc__)
