"""The report as one HTML page that needs nothing else, and as Markdown: Jinja templates over tables and charts."""

import base64
import gzip
import json
from collections import Counter
from functools import cache

import jinja2

from altgrad_jax.errors import UserError
from altgrad_jax.report import statistics, tables
from altgrad_jax.report.predictors import predictors

ENVIRONMENT = jinja2.Environment(
    loader=jinja2.PackageLoader("altgrad_jax.report"),
    autoescape=jinja2.select_autoescape(["html"]),
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)


@cache
def vega():
    """Vega, Vega-Lite and Vega-Embed as one script."""
    import vl_convert

    return vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;").replace("</script", "<\\/script")


def in_script(value):
    """JSON that can stand inside a script element."""
    return json.dumps(value, separators=(",", ":")).replace("<", "\\u003c")


def packed(content):
    """Text as base64 of gzip, equal for equal text."""
    return base64.b64encode(gzip.compress(content.encode(), mtime=0)).decode()


def _bars(text):
    return text.replace("|", "\\|")


ENVIRONMENT.filters |= {"in_script": in_script, "packed": packed, "bars": _bars}


def notes(c):
    """What to know before believing the page: lines."""
    return ENVIRONMENT.get_template("notes.txt").render(c=c, tables=tables, statistics=statistics).splitlines()


class Report:
    """Everything a page shows, computed once from a Comparison. seconds: how often it is made anew; None: once."""

    def __init__(self, c, reader, seconds=None):
        self.c, self.reader, self.seconds = c, reader, seconds
        first, every = tables.early_warnings(c, reader)
        self.ranking = tables.ranking_table(c, first)
        related = tables.predictors_table(predictors(c, reader))
        shown = tables.claims_table, tables.gaps_table, tables.spread_table, tables.costs_table, tables.effects_table
        self.tables = [table for table in (*(make(c) for make in shown), related) if table.rows]
        last = tables.rates_table(c), tables.pairwise_table(c), tables.warnings_table(c, every)
        self.details = [table for table in (*last, tables.runs_table(c)) if table.rows]

    def figures(self):
        """The figures that these runs have numbers for; the first is the answer."""
        from altgrad_jax.report import figures  # Altair takes a second to import, and Markdown has no charts

        c = self.c
        over_steps = figures.gaps_over_steps(c, True), figures.gaps_over_steps(c, False), figures.losses(c)
        of_layers = (make(c, self.reader) for make in (figures.heat, figures.code_use, figures.rank_health))
        return [figure for figure in (figures.gaps(c), *over_steps, *of_layers) if figure]

    def picture(self, suffix):
        """The forest plot as bytes of a file, ".svg" or ".png"; UserError where there is no gap."""
        from altgrad_jax.report import figures

        forest = figures.gaps(self.c)
        if forest is None:
            raise UserError(
                "these runs have no gap to draw: leave .svg and .png out until a bfloat16 run is among them"
            )
        return picture(forest, suffix)

    def data(self):
        """[(file name, bytes)] of every table's and figure's numbers."""
        found = [one.data for one in (self.ranking, *self.tables, *self.details, *self.figures())]
        return [(name, content.encode()) for name, content in found]

    def _facts(self):
        """What both templates show."""
        states = Counter(run.state for run in self.c.all_runs)
        one = next((run for run in self.c.all_runs if run.arm), None)
        return {
            "report": self,
            "c": self.c,
            "tables": tables,
            "states": ", ".join(f"{n} {state}" for state, n in sorted(states.items())),
            "config": one.config if one else None,
            "parameters": one and (one.manifest.get("model") or {}).get("parameters"),
            "recorder": one and one.manifest.get("recorder"),
            "notes": notes(self.c),
        }

    def html(self):
        """The page, as text."""
        return ENVIRONMENT.get_template("page.html").render(figures=self.figures(), vega=vega(), **self._facts())

    def markdown(self):
        """The same words and tables, without the figures."""
        return ENVIRONMENT.get_template("page.md").render(**self._facts())


def picture(figure, suffix):
    """A Figure as bytes of a file, ".svg" or ".png"."""
    import vl_convert

    if suffix == ".svg":
        return vl_convert.vegalite_to_svg(figure.standalone).encode()
    return vl_convert.vegalite_to_png(figure.standalone, scale=2)


def markdown_table(table):
    """A Table in Markdown."""
    return ENVIRONMENT.get_template("table.md").render(table=table)
