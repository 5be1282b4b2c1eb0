"""What training many runs as one program saves: whole processes side by side with a sweep, and a step of many with one.

  python scripts/bench_sweep.py --config configs/small.py --axes="seed=1,2,3,4,5,6"
  python scripts/bench_sweep.py --config configs/bf16_baseline.py --axes="seed=1,2" --noprocesses --widths=1,4,16

Processes: the members of --axes are trained by scripts/train.py one after the other, then all by scripts/sweep.py, in
alternating rounds, each in fresh folders; programs come from the compilation cache, which one round before the first
fills. Steps: a compiled step of so many runs, against that of one run alone, in the same rounds.
"""

import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from absl import flags

from altgrad_jax import cli

ROOT = Path(__file__).resolve().parent.parent


FLAGS = cli.new_flags(device=True, data_dir=True)
flags.DEFINE_string("axes", "seed=1,2,3,4", "members: SETTING=VALUE,VALUE;SETTING=VALUE,...", flag_values=FLAGS)
flags.DEFINE_integer("rounds", 3, "times that everything is timed", 1, 4096, flag_values=FLAGS)
flags.DEFINE_bool("processes", True, "time whole processes too, not only steps", flag_values=FLAGS)
flags.DEFINE(
    cli.WHOLE_NUMBERS, "widths", None, "runs side by side whose step is timed, such as 1,4,16", flag_values=FLAGS
)
flags.DEFINE_list("member_loops", "map,vmap", "for those: map, vmap or both", flag_values=FLAGS)
flags.DEFINE(
    cli.WHOLE_NUMBERS, "cpu_devices", None, "sweeps with a CPU divided into so many devices, too", flag_values=FLAGS
)
flags.DEFINE(cli.OUTPUT_FILE, "json", None, "file for every timing", flag_values=FLAGS)


def time_processes(config, axes, rounds, data_dir, cpu_devices, device):
    """[{"alone": seconds, "map": ..., ...}] a round, for the members of the axes."""
    from altgrad_jax import config as settings
    from altgrad_jax.run import sweep

    points = sweep.parse_axes(axes)
    script = {name: str(ROOT / "scripts" / f"{name}.py") for name in ("train", "sweep")}
    found = []
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "config.py"
        file.write_text(
            "from altgrad_jax.config import from_dict\n\n\ndef get_config():\n"
            f"    return from_dict({settings.to_dict(config)!r})\n"
        )
        common = [f"--config={file}", f"--data_dir={data_dir}", f"--device={device}"]
        ways = {"alone": None, "sweep": [], **{f"sweep, {n} CPU devices": [f"--cpu_devices={n}"] for n in cpu_devices}}
        for number in range(rounds + 1):
            row = {}
            for way, flags in ways.items():
                out = Path(folder) / f"{number}-{way.replace(' ', '-')}"
                started = time.perf_counter()
                if flags is None:
                    for point in points:
                        changes = [
                            f"--config.{name}={','.join(value) if isinstance(value, tuple) else value}"
                            for name, value in point.items()
                        ]
                        subprocess.run(
                            [
                                sys.executable,
                                script["train"],
                                *common,
                                *changes,
                                f"--workdir={out / point['run_name']}",
                            ],
                            check=True,
                            stdout=subprocess.DEVNULL,
                        )
                else:
                    subprocess.run(
                        [sys.executable, script["sweep"], *common, f"--out={out}", f"--axes={axes}", *flags],
                        check=True,
                        stdout=subprocess.DEVNULL,
                    )
                row[way] = time.perf_counter() - started
            print(
                f"round {number} of {rounds}: "
                + ", ".join(f"{way} {seconds:.1f} s" for way, seconds in row.items())
                + (" (fills the compilation cache)" if number == 0 else ""),
                flush=True,
            )
            found += [row] * (number > 0)
    return len(points), found


def run(config, *, device, axes, rounds, processes, widths, member_loops, cpu_devices, data_dir, **paths):
    from altgrad_jax.run.device import use_device

    use_device(device)
    with config.unlocked():
        config.wandb_mode, config.console = "disabled", "quiet"
    result = {}
    if processes:
        n, rows = time_processes(config, axes, rounds, data_dir, cpu_devices or [], device)
        print(f"\n| {n} members | seconds | / one after the other |\n|---|---|---|")
        for way in rows[0]:
            ratio = statistics.median(row[way] / row["alone"] for row in rows)
            print(f"| {way} | {statistics.median(row[way] for row in rows):.1f} | {ratio:.2f} |")
        result["processes"] = rows
    if widths:
        from altgrad_jax.bench import programs, tables

        rows = programs.bench_members(
            config,
            widths,
            member_loops,
            data_dir=data_dir,
            rounds=rounds,
            say=lambda text: print(text, flush=True),
        )
        print("\n" + tables.members_table(rows))
        result["steps"] = rows
    if paths["json"]:
        Path(paths["json"]).write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    cli.main(run, FLAGS, usage=__doc__, config=True)
