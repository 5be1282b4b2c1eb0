"""What the training step is made of when it is compiled for an NVIDIA GPU that need not exist: docs/gpu-program.md.

  python scripts/inspect_program.py --config configs/bf16_baseline.py --target=h100
  python scripts/inspect_program.py --config configs/fp8.py:E4M3 --target=h200 --json=e4m3.json
  python scripts/inspect_program.py --config configs/bf16_baseline.py --config.batch_size=96 --devices=8 --config.fsdp=8

It needs jax's CUDA plugin, and no driver: pip install -e ".[gpu-program]". A program takes minutes to compile.
"""

import os

import installed  # noqa: F401
from absl import flags

from altgrad_jax import cli
from altgrad_jax.bench import gpu_report
from altgrad_jax.bench.cards import CARDS, ENVIRONMENT, card
from altgrad_jax.files import write_atomically

FLAGS = cli.new_flags()
flags.DEFINE_enum("target", "h100", tuple(CARDS), "the card to compile for", flag_values=FLAGS)
flags.DEFINE_integer("devices", 1, "how many of them train the run", 1, 2**16, flag_values=FLAGS)
flags.DEFINE_integer("per_host", 8, "how many of them a host has", 1, 2**10, flag_values=FLAGS)
PROGRAM = "run = training steps; evaluate; diagnose = rank of the weights and use of the formats"
flags.DEFINE_enum("program", "run", tuple(gpu_report.UNITS), PROGRAM, flag_values=FLAGS)
flags.DEFINE_integer("lines", 25, "source lines to list", 0, 10**6, flag_values=FLAGS)
flags.DEFINE(cli.OUTPUT_FILE, "json", None, "also write all of it into this file", flag_values=FLAGS)
flags.DEFINE(cli.OUTPUT_FILE, "hlo", None, "also write XLA's optimized program into this file", flag_values=FLAGS)


def run(config, *, target, devices, per_host, program, lines, json, hlo):
    # Only now: --help and every complaint about a setting come without waiting for jax.
    os.environ.update(ENVIRONMENT)
    from altgrad_jax.bench import gpu_program

    gpu_program.require_plugin()
    setup = gpu_program.set_up_for(config, gpu_program.devices_of(card(target), devices, per_host))
    compiled = gpu_program.compile_for(setup, program)
    report = gpu_report.report_of(compiled, card(target), n_devices=devices, per_host=per_host)
    if hlo:
        write_atomically(hlo, compiled.text.encode())
    if json:
        write_atomically(json, gpu_report.as_json(report))
    for line in gpu_report.lines(report, lines):
        print(line)


if __name__ == "__main__":
    cli.main(run, FLAGS, usage=__doc__, config=True)
