"""Kill a sweep with SIGKILL at random moments, continue it, and compare it with one that was left alone, to the bit.

    python tests/kill_sweep.py --kills 5 --seed 0 --data_dir data/bytes

One sweep of ten members in three programs (bfloat16; E4M3 and E5M2 with a float32 master, and stored stochastically;
two seeds each, a shrunk smoke config) is killed when a random number of rows has been written by all members together
and up to a tenth of a second more has passed, and continued with the same command; again and again. Then every member's
metrics.jsonl and diagnostics.jsonl are compared byte by byte with those of a sweep that was not killed, every array of
its last checkpoint by its sha256, and the two reports number by number. Exits with 1 if anything differs.
"""

import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from absl import flags

from altgrad_jax import cli

CONFIG = """
from altgrad_jax.cli import load_config
from altgrad_jax.run.sweep import axis, grid

def get_config():
    config = load_config({smoke!r})
    with config.unlocked():
        config.update(dict(max_steps=60, checkpoint_interval=10, eval_interval=20, steps_per_dispatch=2,
                           layer_interval=5, wandb_mode="disabled", n_layer=1))
    return config

def get_sweep(config):
    arms = [{{"run_name": "bf16"}}]
    arms += [{{"run_name": f"{{name}}{{'-' * bool(kept)}}{{kept}}", "use_fp8": True, "formats": (name,),
               "weights_at_rest": kept or "float32"}} for name in ("E4M3", "E5M2") for kept in ("", "stochastic")]
    return grid(arms, axis("seed", (1, 2)))
"""


ROOT = Path(__file__).resolve().parent.parent


def rows_of_all(out):
    return sum(path.read_bytes().count(b"\n") for path in out.glob("*/metrics.jsonl"))


def report_of(out):
    """What the report says of these runs, without what depends on the clock or the folder."""
    data = out.parent / f"{out.name}-data"
    subprocess.run(
        [
            sys.executable,
            str(ROOT / "scripts" / "report.py"),
            str(out),
            "-o",
            str(data / "report.md"),
            "--data",
            str(data),
        ],
        check=True,
        stdout=subprocess.DEVNULL,
    )
    return {path.name: path.read_text() for path in sorted(data.glob("*.csv")) if "time" not in path.name}


FLAGS = cli.new_flags()
flags.DEFINE_integer("kills", 5, "how often it is killed", 1, 500, flag_values=FLAGS)  # the sweep has some 600 rows
flags.DEFINE_integer("seed", 0, "chooses the moments", flag_values=FLAGS)
flags.DEFINE(cli.FOLDER, "data_dir", "data/bytes", "token files of the byte tokenizer", flag_values=FLAGS)


def run(*, kills, seed, data_dir):
    from campaigns.runs import fingerprint

    from altgrad_jax.data.dataset import load_token_data
    from altgrad_jax.run.checkpoint import list_steps

    load_token_data(data_dir, vocab_size=256, block_size=64, tokenizer="bytes")
    rng = random.Random(seed)
    with tempfile.TemporaryDirectory() as temporary:
        temporary = Path(temporary)
        config = temporary / "config.py"
        config.write_text(CONFIG.format(smoke=str(ROOT / "configs" / "smoke.py")))

        def command(out):
            return [
                sys.executable,
                str(ROOT / "scripts" / "sweep.py"),
                f"--config={config}",
                f"--out={out}",
                f"--data_dir={data_dir}",
            ]

        whole, out = temporary / "whole", temporary / "killed"
        subprocess.run(command(whole), check=True, stdout=subprocess.DEVNULL)
        members = sorted(path.name for path in whole.iterdir() if path.is_dir())
        total = rows_of_all(whole)
        print(f"{len(members)} members, {total} rows\n")
        print("| kill | at row | lived s | rows left | checkpoints | members at their end |")
        print("|---|---|---|---|---|---|", flush=True)
        for number, row in enumerate(sorted(rng.sample(range(1, total), kills)), 1):
            started = time.monotonic()
            process = subprocess.Popen(command(out), stdout=subprocess.DEVNULL, start_new_session=True)
            while process.poll() is None and (not out.exists() or rows_of_all(out) < row):
                time.sleep(0.002)
            time.sleep(rng.uniform(0, 0.1))
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            checkpoints = sum(len(list_steps(out / name)) for name in members)
            ended = sum((out / name / "verdict.json").exists() for name in members)
            print(
                f"| {number} | {row} | {time.monotonic() - started:.1f} | {rows_of_all(out)} | {checkpoints} | "
                f"{ended} |",
                flush=True,
            )
        subprocess.run(command(out), check=True, stdout=subprocess.DEVNULL)
        equal = [name for name in members if fingerprint(out / name) == fingerprint(whole / name)]
        arrays = sum(len(fingerprint(whole / name).arrays) for name in members)
        print(
            f"\n{len(equal)} of {len(members)} members equal those of the sweep that was not killed, to the bit: "
            f"records and {arrays} arrays"
        )
        reports = [report_of(each) for each in (whole, out)]
        different = sorted(
            name for name in reports[0].keys() | reports[1].keys() if reports[0].get(name) != reports[1].get(name)
        )
        numbers = json.dumps(reports[0]).count(",")
        print(
            f"the reports' {len(reports[0])} tables ({numbers} cells) are "
            + (f"different in {', '.join(different)}" if different else "identical")
        )
    return len(equal) < len(members) or bool(different)


if __name__ == "__main__":
    cli.main(run, FLAGS, usage=__doc__)
