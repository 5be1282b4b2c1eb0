"""One page from many run folders: how far each format is from BF16, and what each test says of it.

Only run folders are read (manifest, record, diagnostics, losses of windows, verdict), never a checkpoint, and jax is
not imported.

    runs        finds, identifies and reads run folders, and refuses those that cannot be compared
    statistics  paired differences, their tests, corrections and classes
    analysis    gaps, learning rates, costs of parts, early warnings;  claims: published ones, held against them
    predictors  what of the record goes with the gaps
    tables      the words and tables;  figures: the charts and their numbers
    page        HTML and Markdown, by the templates beside it
    needs       what a report will lack, said before the runs are made
"""

import json
import math
import time
from pathlib import Path

from altgrad_jax.errors import UserError
from altgrad_jax.files import write_atomically, writing
from altgrad_jax.report.analysis import Comparison
from altgrad_jax.report.page import Report, picture
from altgrad_jax.report.runs import UNFINISHED, Reader
from altgrad_jax.report.statistics import MARGIN

PAGES, PICTURES = (".html", ".md"), (".svg", ".png")


def build(paths, reader=None, seconds=None, margin=MARGIN):
    """The Report of the runs at or below `paths`. UserError where there is none, or they cannot be compared.

    margin: nats per token within which two losses count as equivalent; UserError unless it is a number above 0.
    """
    if not 0 < margin < math.inf:
        raise UserError(
            f"--margin={margin:g} cannot be used: give a number of nats per token above 0, such as {MARGIN}"
        )
    reader = reader or Reader()
    runs = reader.runs(paths)
    if not runs and seconds is None:
        raise UserError(
            f"there is no run folder in {', '.join(map(str, paths))}: give folders that hold a manifest.json, or "
            "folders of such folders"
        )
    return Report(Comparison(runs, margin), reader, seconds)


def write(report, outputs, data_dir=None):
    """Writes the page to each of `outputs`, each whole or not at all, and its CSV files to data_dir.

    outputs: names that end in .html or .md, or in .svg or .png for the forest plot alone; UserError without a gap.
    """
    files = report.data() if data_dir else ()
    contents = {Path(path): _content(report, Path(path).suffix) for path in outputs}
    # The folders come first: a place that cannot be written leaves no other half-done.
    if data_dir:
        with writing(data_dir, "give another folder with --data"):
            Path(data_dir).mkdir(parents=True, exist_ok=True)
    for path, content in contents.items():
        with writing(path, "give another place with --output"):
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, content)
    if data_dir:
        with writing(data_dir, "give another folder with --data"):
            for name, content in files:
                write_atomically(Path(data_dir) / name, content)


def _content(report, suffix):
    if suffix in PICTURES:
        return report.picture(suffix)
    return (report.markdown() if suffix == ".md" else report.html()).encode()


def draw_map(path):
    """Draws a map.json of scripts/precision_map.py as map.png beside it."""
    from altgrad_jax.report.figures import map_curve  # Altair takes a second to import

    path = Path(path)
    figure = map_curve(**json.loads(path.read_text()))
    with writing(path.parent, "give another folder with --train"):
        write_atomically(path.with_suffix(".png"), picture(figure, ".png"))


def live(paths, outputs, data_dir=None, *, seconds, margin=MARGIN, say=print, sleep=time.sleep):
    """Writes the page every `seconds` until every run found is finished at two looks in a row; then once more, as
    final.

    Two looks, since a sweep is between two runs for a moment. Only files that changed are read again.
    """
    reader, done = Reader(), 0
    while done < 2:
        started = time.monotonic()
        report = build(paths, reader, seconds, margin)
        write(report, outputs, data_dir)
        runs = report.c.all_runs
        going = [run for run in runs if run.state == UNFINISHED]
        done = done + 1 if runs and not going else 0
        say(f"{len(runs)} runs, {len(going)} unfinished; {time.monotonic() - started:.1f} s")
        if done < 2:
            sleep(seconds)
    write(build(paths, reader, margin=margin), outputs, data_dir)
    say("all runs are finished")
