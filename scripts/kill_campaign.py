"""Kill a run with SIGKILL at random moments, resume it, and compare with an uninterrupted one, to the bit.

    python scripts/kill_campaign.py --kills 20 --seed 0 --data_dir data/bytes
    python scripts/kill_campaign.py --kills 20 --setting use_fp8=true --setting formats=E4M3 \
        --setting weights_at_rest=stochastic

Every trial starts a fresh run of a shrunk smoke config, kills it, resumes it, and compares metrics.jsonl (and
diagnostics.jsonl, where there is one) byte by byte and every array of the last checkpoint by its sha256. One kill in
five comes at a random time during start-up; the others when a random row has been written and up to a tenth of a second
more has passed. (Rows, not seconds, so that a slow machine does not move all kills to one end.) Prints a table; exits
with 1 if any trial differs.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def command(data_dir, run_dir, settings):
    return [
        sys.executable,
        str(ROOT / "scripts" / "train.py"),
        "--config",
        str(ROOT / "configs" / "smoke.py"),
        f"--data_dir={data_dir}",
        f"--workdir={run_dir}",
        "--config.wandb_mode=disabled",
        "--config.checkpoint_interval=10",
        "--config.steps_per_dispatch=2",
        *(f"--config.{setting}" for setting in settings),
    ]


def fingerprint(run_dir):
    """(record, histograms, sha256 of every array of the newest checkpoint)."""
    newest = max(int(path.name) for path in run_dir.iterdir() if path.name.isdecimal())
    meta = json.loads((run_dir / str(newest) / "meta" / "meta.json").read_text())
    files = [run_dir / name for name in ("metrics.jsonl", "diagnostics.jsonl")]
    record = [file.read_bytes() for file in files if file.exists()]
    return record, {name: a["sha256"] for name, a in meta["arrays"].items()}


def what_lies_there(run_dir):
    """What the kill left: (rows, complete checkpoints, whether a save was under way)."""
    record = run_dir / "metrics.jsonl"
    rows = record.read_bytes().count(b"\n") if record.exists() else 0
    names = [path.name for path in run_dir.iterdir()] if run_dir.exists() else []
    return rows, sum(name.isdecimal() for name in names), any("tmp" in name for name in names)


def kill(data_dir, run_dir, settings, rng, row, startup_s):
    """Starts a run and kills it: when `row` rows are written, or, with row None, within startup_s seconds. Returns
    the seconds it lived."""
    started = time.monotonic()
    process = subprocess.Popen(command(data_dir, run_dir, settings), stdout=subprocess.DEVNULL, start_new_session=True)
    if row is None:
        time.sleep(rng.uniform(0, startup_s))
    else:
        record = run_dir / "metrics.jsonl"
        while process.poll() is None and (not record.exists() or record.read_bytes().count(b"\n") < row):
            time.sleep(0.001)
        time.sleep(rng.uniform(0, 0.1))
    ended_before = process.poll() is not None
    if not ended_before:
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    return time.monotonic() - started, ended_before


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--data_dir", default="data/bytes", help="token files of the byte tokenizer")
    parser.add_argument("--setting", action="append", default=[], metavar="NAME=VALUE", help="of the runs' config")
    args = parser.parse_args()
    rng = random.Random(args.seed)
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        whole = folder / "whole"
        subprocess.run(command(args.data_dir, whole, args.setting), check=True, stdout=subprocess.DEVNULL)
        expected = fingerprint(whole)
        print(f"{len(expected[1])} arrays in a checkpoint\n")
        print("| kill | at row | lived s | rows left | checkpoints | save under way | resumed run equal |")
        print("|---|---|---|---|---|---|---|", flush=True)
        equal_runs = too_late = 0
        for i in range(args.kills):
            run_dir = folder / f"run{i}"
            row = None if i % 5 == 0 else rng.randrange(1, 200)
            lived, ended_before = kill(args.data_dir, run_dir, args.setting, rng, row, startup_s=5.0)
            rows, checkpoints, saving = what_lies_there(run_dir)
            subprocess.run(command(args.data_dir, run_dir, args.setting), check=True, stdout=subprocess.DEVNULL)
            equal = fingerprint(run_dir) == expected
            equal_runs += equal
            too_late += ended_before
            print(f"| {i + 1} | {'start-up' if row is None else row} | {lived:.2f} | {rows} | {checkpoints} | "
                  f"{'yes' if saving else 'no'} | {'yes' if equal else 'NO'} |", flush=True)
        print(f"\n{equal_runs} of {args.kills} resumed runs equal the uninterrupted one to the bit"
              + (f" ({too_late} had ended before the kill)" if too_late else ""))
    return equal_runs < args.kills


if __name__ == "__main__":
    sys.exit(main())
