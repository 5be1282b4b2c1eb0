"""One page from many runs: which formats train, how far from BF16, where each fails first, and what the optimizer
changed.

    python scripts/report.py runs/formats -o report.html
    python scripts/report.py runs/formats more/runs/E4M3 -o report.html -o report.md --data report_data
    python scripts/report.py runs/sweep -o report.html --live            # made anew while runs go on

RUNS are run folders, or folders that hold run folders at any depth. The page needs no other file and no network; the
numbers of every table and figure are in it as CSV. Runs of other data, another model or another schedule are refused.
"""

from pathlib import Path

from altgrad_jax import report
from altgrad_jax.cli import ArgumentParser, run_script, whole_number
from altgrad_jax.errors import UserError
from altgrad_jax.report import tables


def parse_args(argv=None):
    parser = ArgumentParser(__doc__)
    parser.add_argument("runs", nargs="+", help="run folders, or folders of run folders")
    parser.add_argument(
        "-o",
        "--output",
        action="append",
        help="report.html, or a name that ends in .md; may be repeated (default: report.html)",
    )
    parser.add_argument("--data", metavar="DIR", help="write the CSV files there too")
    parser.add_argument("--live", action="store_true", help="make the page anew until every run is finished")
    parser.add_argument("--seconds", type=whole_number, default=30, help="between two pages of --live (default: 30)")
    return parser.parse_args(argv)


def main(args):
    outputs = args.output or ["report.html"]
    for path in outputs:
        if Path(path).suffix not in (".html", ".md"):
            raise UserError(f"--output={path} cannot be used: give a name that ends in .html or .md")
    if args.seconds < 1:
        raise UserError(f"--seconds={args.seconds} cannot be used: give a whole number from 1")
    if args.live:
        report.live(args.runs, outputs, args.data, seconds=args.seconds, say=lambda text: print(text, flush=True))
    else:
        page = report.build(args.runs)
        report.write(page, outputs, args.data)
        for heading, sentence in tables.answer(page.c):
            print(f"{heading}: {sentence}")
    print("written: " + ", ".join(outputs))


if __name__ == "__main__":
    run_script(lambda: main(parse_args()))
