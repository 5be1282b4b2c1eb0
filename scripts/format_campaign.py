"""Train in every 8-bit format, with float32 master and stored weights and with one operand at a time; print a table.

  python scripts/format_campaign.py --config configs/small.py --out runs/formats
  python scripts/format_campaign.py --config configs/small.py --out runs/formats --formats=E4M3,E5M2 --report=table.md

Every run is a folder below --out, as scripts/train.py writes it; a campaign that was stopped continues with the same
command. All runs see the same batches; only the settings that a run's name says differ from the config.
"""

import re
from pathlib import Path

from altgrad_jax import cli
from altgrad_jax.config import INT32_MAX
from altgrad_jax.errors import UserError
from altgrad_jax.numerics.formats import DEFAULT_8BIT, get_format


def formats(text):
    return tuple(get_format(name).name for name in text.split(","))


def seeds(text):
    numbers = text.split(",") if text else []
    if not all(re.fullmatch("[0-9]{1,10}", number) and int(number) <= INT32_MAX for number in numbers):
        raise UserError(
            f"--seeds={text} cannot be used: give whole numbers from 0 to {INT32_MAX} joined by commas, such as 1,2"
        )
    return tuple(map(int, numbers))


def interval(text):
    if not re.fullmatch("[0-9]{1,9}", text) or not int(text):
        raise UserError(f"--shadow_interval={text} cannot be used: give a whole number from 1 to 999999999")
    return int(text)


def run(config, *, out, formats, seeds, shadow_interval, data_dir, report):
    from altgrad_jax.bench import campaign

    out = Path(out).absolute()
    campaign.run(
        config,
        out,
        campaign.plan(formats, shadow_interval=shadow_interval, seeds=seeds),
        data_dir=data_dir,
        say=lambda text: print(text, flush=True),
    )
    text = campaign.report(out, formats, seeds)
    print("\n" + text)
    if report:
        Path(report).write_text(text)
    return 0


FLAGS = (
    cli.Flag("out", "runs/formats", "folder of the run folders", cli.folder("out")),
    cli.Flag("formats", ",".join(DEFAULT_8BIT), "names joined by commas", formats),
    cli.Flag("seeds", "1,2", "further seeds of the bfloat16 run, for the noise floor", seeds),
    cli.Flag("shadow_interval", "10", "updates between two comparisons with the float32 gradient", interval),
    cli.Flag("data_dir", "data/{tokenizer}", "folder of the token files", cli.folder("data_dir")),
    cli.Flag("report", None, "file for the tables, Markdown", cli.output_file("report")),
)

if __name__ == "__main__":
    cli.main(run, flags=FLAGS, usage=__doc__)
