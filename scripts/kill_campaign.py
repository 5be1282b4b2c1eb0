"""Kill a run with SIGKILL at random moments, resume it, and compare with an uninterrupted one, to the bit.

    python scripts/kill_campaign.py --kills 20 --seed 0 --data_dir data/bytes

Every trial starts a fresh run of a shrunk smoke config, kills it at a moment drawn uniformly from the time an
uninterrupted one takes, resumes it and compares metrics.jsonl byte by byte and every array of the last
checkpoint by its sha256. Prints a table; exits with 1 if any trial differs.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def command(data_dir, run_dir):
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
    ]


def fingerprint(run_dir):
    """(record, sha256 of every array of the newest checkpoint)."""
    newest = max(int(path.name) for path in run_dir.iterdir() if path.name.isdecimal())
    meta = json.loads((run_dir / str(newest) / "meta" / "meta.json").read_text())
    return (run_dir / "metrics.jsonl").read_bytes(), {name: a["sha256"] for name, a in meta["arrays"].items()}


def what_lies_there(run_dir):
    """What the kill left: (rows, complete checkpoints, whether a save was under way)."""
    record = run_dir / "metrics.jsonl"
    rows = record.read_bytes().count(b"\n") if record.exists() else 0
    names = [path.name for path in run_dir.iterdir()] if run_dir.exists() else []
    return rows, sum(name.isdecimal() for name in names), any("tmp" in name for name in names)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--data_dir", default="data/bytes", help="token files of the byte tokenizer")
    args = parser.parse_args()
    rng = random.Random(args.seed)
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        subprocess.run(command(args.data_dir, folder / "warm"), check=True, stdout=subprocess.DEVNULL)
        started = time.monotonic()
        subprocess.run(command(args.data_dir, folder / "whole"), check=True, stdout=subprocess.DEVNULL)
        duration = time.monotonic() - started
        # Start-up takes most of so short a run; the moments are drawn over what comes after the first row.
        expected = fingerprint(folder / "whole")
        timing = [json.loads(line) for line in (folder / "whole" / "timing.jsonl").read_text().splitlines()]
        begins = duration - (timing[-1]["time"] - next(e["time"] for e in timing if e.get("event") == "compiled"))
        print(f"an uninterrupted run takes {duration:.1f} s, {begins:.1f} s of them before its first step")
        print("| kill | after s | rows | checkpoints | saving | resumed run equal |\n|---|---|---|---|---|---|")
        unequal = 0
        for i in range(args.kills):
            run_dir = folder / f"run{i}"
            # One kill in five anywhere, the others between the first step and the end.
            moment = rng.uniform(0.2, duration) if i % 5 == 0 else rng.uniform(begins, duration)
            process = subprocess.Popen(
                command(args.data_dir, run_dir), stdout=subprocess.DEVNULL, start_new_session=True
            )
            try:
                process.wait(timeout=moment)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, 9)
                process.wait()
            rows, checkpoints, saving = what_lies_there(run_dir)
            subprocess.run(command(args.data_dir, run_dir), check=True, stdout=subprocess.DEVNULL)
            equal = fingerprint(run_dir) == expected
            unequal += not equal
            print(
                f"| {i + 1} | {moment:.2f} | {rows} | {checkpoints} | {'yes' if saving else ''} | "
                f"{'yes' if equal else 'NO'} |",
                flush=True,
            )
        print(f"\n{args.kills - unequal} of {args.kills} resumed runs equal the uninterrupted one to the bit")
    return bool(unequal)


if __name__ == "__main__":
    sys.exit(main())
