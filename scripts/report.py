"""One page from many runs: how far each format is from BF16, what each test says of it, and what the optimizer changed.

    python scripts/report.py runs/formats -o report.html
    python scripts/report.py runs/formats more/runs/E4M3 -o report.html -o report.md --data report_data
    python scripts/report.py runs/sweep -o report.html --live            # made anew while runs go on

RUNS are run folders, or folders that hold run folders at any depth. The page needs no other file and no network; the
numbers of every table and figure are in it as CSV. Runs of other data, another model or another schedule are refused.
Choose --margin, the difference in loss that matters to you, before you look (docs/report.md).
"""

from pathlib import Path

import installed  # noqa: F401
from absl import flags

from altgrad_jax import cli, report
from altgrad_jax.errors import UserError
from altgrad_jax.report import tables
from altgrad_jax.report.statistics import MARGIN

ARGUMENTS = ("runs...",)
FLAGS = cli.new_flags()
flags.DEFINE_multi_string(
    "output",
    ["report.html"],
    "a name that ends in .html or .md, or in .svg or .png for the forest plot alone; may be repeated",
    short_name="o",
    flag_values=FLAGS,
)
flags.DEFINE_string("data", None, "write the CSV files to this folder too", flag_values=FLAGS)
flags.DEFINE_float(
    "margin", MARGIN, "nats per token within which two losses count as equivalent; above 0", flag_values=FLAGS
)
flags.DEFINE_bool("live", False, "make the page anew until every run is finished", flag_values=FLAGS)
flags.DEFINE_integer("seconds", 30, "between two pages of --live", 1, flag_values=FLAGS)


def run(*, runs, output, data, margin, live, seconds):
    for path in output:
        if Path(path).suffix not in (*report.PAGES, *report.PICTURES):
            allowed = ", ".join((*report.PAGES, *report.PICTURES))
            raise UserError(f"--output={path} cannot be used: give a name that ends in one of {allowed}")
    if live:
        report.live(runs, output, data, seconds=seconds, margin=margin, say=lambda text: print(text, flush=True))
    else:
        page = report.build(runs, margin=margin)
        report.write(page, output, data)
        for heading, sentence in tables.answer(page.c):
            print(f"{heading}: {sentence}")
    print("written: " + ", ".join(output))


if __name__ == "__main__":
    cli.main(run, FLAGS, usage=__doc__, arguments=ARGUMENTS)
