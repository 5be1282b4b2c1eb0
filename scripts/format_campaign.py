"""Train in every 8-bit format, with float32 master and stored weights and with one operand at a time; print a table.

  python scripts/format_campaign.py --config configs/small.py --out runs/formats
  python scripts/format_campaign.py --config configs/small.py --out runs/formats --formats=E4M3,E5M2 --report=table.md

Every run is a folder below --out, as scripts/train.py writes it; a campaign that was stopped continues with the same
command. All runs see the same batches; only the settings that a run's name says differ from the config.
"""

from pathlib import Path

from absl import flags

from altgrad_jax import cli
from altgrad_jax.numerics.formats import DEFAULT_8BIT, get_format

FLAGS = cli.new_flags(device=True, data_dir=True)
flags.DEFINE(cli.FOLDER, "out", "runs/formats", "folder of the run folders", flag_values=FLAGS)
FORMATS = cli.Parser(
    lambda text: tuple(get_format(name).name for name in text.split(",")),
    f"names of formats joined by commas, such as {','.join(DEFAULT_8BIT)}",
)
flags.DEFINE(FORMATS, "formats", DEFAULT_8BIT, "names joined by commas", flag_values=FLAGS)
flags.DEFINE(
    cli.WHOLE_NUMBERS,
    "seeds",
    [1, 2],
    "further seeds of the bfloat16 run, for the noise floor",
    flag_values=FLAGS,
)
flags.DEFINE_integer(
    "shadow_interval", 10, "updates between two comparisons with the float32 gradient", 1, flag_values=FLAGS
)
flags.DEFINE(cli.OUTPUT_FILE, "report", None, "file for the tables, Markdown", flag_values=FLAGS)


def run(config, *, device, out, formats, seeds, shadow_interval, data_dir, report):
    from altgrad_jax.bench import campaign
    from altgrad_jax.run.device import use_device

    use_device(device)
    out = Path(out).absolute()
    plan = campaign.plan(formats, shadow_interval=shadow_interval, seeds=tuple(seeds))
    campaign.run(config, out, plan, data_dir=data_dir, say=lambda text: print(text, flush=True))
    text = campaign.report(out, formats, tuple(seeds))
    print("\n" + text)
    if report:
        Path(report).write_text(text)


if __name__ == "__main__":
    cli.main(run, FLAGS, usage=__doc__, config=True)
