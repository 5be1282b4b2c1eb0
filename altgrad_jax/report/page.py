"""The report as one HTML page that needs nothing else, and as Markdown."""

import base64
import html
from collections import Counter

from altgrad_jax.report import figures, panels, tables
from altgrad_jax.report.analysis import ADAMW

TITLE = "In which number format can this model be trained?"
# Colours that stay apart for the colour-blind (Okabe & Ito 2008), lighter on dark.
CSS = """
:root{--bg:#fff;--fg:#1b1f24;--soft:#5b636d;--rule:#d9dee4;--card:#f6f8fa;--grid:#e4e8ec;--margin:#8b949e;
--float32:#0072b2;--nearest:#d55e00;--stochastic:#00805d;--error_feedback:#a5478f;--other:#7a6a00;--ref:#444c56;
color-scheme:light dark}
@media(prefers-color-scheme:dark){:root{--bg:#14171b;--fg:#e3e7eb;--soft:#9aa4af;--rule:#343b44;--card:#1c2127;
--grid:#2b323a;
--margin:#8b949e;--float32:#56b4e9;--nearest:#ff8a3d;--stochastic:#2fc59b;--error_feedback:#e08cc6;--other:#d8c84a;
--ref:#c3cad2}}
*{box-sizing:border-box}
body{margin:0 auto;max-width:1480px;padding:16px;background:var(--bg);color:var(--fg);
font:15px/1.45 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif}
h1{font-size:1.5rem;line-height:1.2;margin:.2em 0 .3em}h2{font-size:1.15rem;margin:1.8em 0 .2em}h3{font-size:1rem;
margin:1.2em 0 .2em}
p,ul{margin:.3em 0;max-width:105ch}ul{padding-left:1.2em}.aid{color:var(--soft);font-size:.9rem}
a{color:var(--float32)}nav{font-size:.9rem;display:flex;flex-wrap:wrap;gap:.2em 1em;margin:.6em 0}
.answer{background:var(--card);border-left:4px solid var(--float32);padding:.5em .9em .6em;margin:.6em 0}
.answer p{margin:.35em 0}
.trouble{background:var(--card);border-left:4px solid var(--nearest);padding:.5em .9em;margin:.8em 0;
font-size:.92rem;overflow-wrap:anywhere}
.box{overflow-x:auto;margin:.5em 0;border:1px solid var(--rule);border-radius:6px}
table{border-collapse:collapse;font-size:.84rem;font-variant-numeric:tabular-nums}
th,td{text-align:left;vertical-align:top;padding:5px 9px;border-bottom:1px solid var(--rule);min-width:3.5em;
max-width:25em}
th{background:var(--card);font-weight:600;line-height:1.25}
.many{min-width:1180px}table{min-width:min(620px,180vw)}td.key{position:sticky;left:0;background:var(--bg)}
tr:last-child td{border-bottom:0}td.key{white-space:nowrap}
td.name{min-width:13em;overflow-wrap:anywhere}td.key,td.name{font-weight:600}
.panels{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,310px),1fr));gap:10px 14px;margin:.6em 0}
.panels svg{width:100%;max-width:480px;height:auto;display:block}
.legend{display:flex;flex-wrap:wrap;gap:.1em 1.2em;font-size:.86rem;margin:.3em 0}.legend svg{width:26px;height:10px;
margin-right:.4em}
.bars-legend{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,330px),1fr));gap:0 14px;
font-size:.86rem}
.bars-legend svg{width:100%;max-width:340px;display:block}
details{margin:.5em 0;border:1px solid var(--rule);border-radius:6px;padding:.4em .8em}
summary{cursor:pointer;font-weight:600;overflow-wrap:anywhere}
svg text{font-size:11px;fill:var(--soft)}svg .title{font-size:12.5px;font-weight:600;fill:var(--fg)}
svg .note{font-size:10.5px}svg .layer{font-size:10px}
.grid{stroke:var(--grid);fill:none}.zero{stroke:var(--soft);stroke-width:1;fill:none}
.line{fill:none;stroke:var(--c);stroke-width:1.7;stroke-linejoin:round}.dashed{stroke-dasharray:5 3}
.dot{fill:var(--c)}
.hollow{fill:var(--bg);stroke:var(--c);stroke-width:1.8}.cross{stroke:var(--c);stroke-width:2;fill:none}
.band{fill:var(--c);fill-opacity:.16;stroke:none}.margin{fill:var(--margin);fill-opacity:.2}
.bars{fill:var(--float32)}.missing{fill:var(--card);stroke:var(--rule)}.pixels{image-rendering:pixelated}
.s-float32{--c:var(--float32)}.s-nearest{--c:var(--nearest)}.s-stochastic{--c:var(--stochastic)}
.s-error_feedback{--c:var(--error_feedback)}.s-other{--c:var(--other)}.s-ref{--c:var(--ref)}
.data{font-size:.84rem}.yes{color:var(--stochastic);font-weight:600}.no{color:var(--nearest);font-weight:600}
"""


def _link(name, content):
    kind = "application/gzip" if name.endswith(".gz") else "text/csv"
    return (
        f'<a class="data" download="{html.escape(name)}" href="data:{kind};base64,'
        f'{base64.b64encode(content).decode()}">{html.escape(name)}</a>'
    )


def _table(table, heading="h2"):
    head = "".join(f"<th>{html.escape(column)}</th>" for column in table.columns)
    body = "".join(
        "<tr>" + "".join(f"<td{_cell_class(table, i)}>{html.escape(cell)}</td>" for i, cell in enumerate(row)) + "</tr>"
        for row in table.rows
    )
    return (
        f"<{heading}>{html.escape(table.title)}</{heading}><p class=aid>{html.escape(table.aid)} "
        f"{_link(table.data[0], table.data[1].encode())}</p>"
        f"<div class=box tabindex=0><table{' class=many' if len(table.columns) > 8 else ''}>"
        f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def _cell_class(table, i):
    """The cell that names the row: formats stay on one line, longer names wrap."""
    if "format" in table.columns:
        return " class=key" if table.columns[i] == "format" else ""
    return "" if i else " class=name"


def _swatch(cls, dashed, words):
    shape = f'<path class="line {cls}{" dashed" if dashed else ""}" d="M0 5H26"/>'
    return f'<span><svg viewBox="0 0 26 10" aria-hidden="true">{shape}</svg>{html.escape(words)}</span>'


def _figure(figure):
    legend = "".join(_swatch(*entry) for entry in figure.legend)
    links = " ".join(_link(*item) for item in figure.data)
    return (
        f"<h2>{html.escape(figure.title)}</h2><p class=aid>{html.escape(figure.aid)} {links}</p>"
        + (f"<div class=legend>{legend}</div>" if legend else "")
        + f"<div class=panels>{''.join(figure.panels)}</div>"
    )


class Report:
    """Everything a page shows, computed once from a Comparison. seconds: how often it is made anew; None: once."""

    def __init__(self, c, reader, seconds=None):
        self.c, self.seconds = c, seconds
        first, every = tables.early_warnings(c, reader)
        self.ranking = tables.ranking_table(c, first)
        first_tables = tables.tests_table, tables.costs_table, tables.treatments_table, tables.optimizer_table
        self.tables = [table for table in (make(c) for make in first_tables) if table.rows]
        last = tables.rates_table(c), tables.pairwise_table(c), tables.warnings_table(every), tables.thresholds_table(c)
        self.details = [table for table in last if table.rows]
        self.speed, self.kinds = tables.speed_table(c, reader)
        self.runs = tables.runs_table(c)
        over_steps = panels.gaps_over_steps(c, True), panels.gaps_over_steps(c, False)
        self.figures = [figure for figure in (panels.gaps(c), panels.losses(c), *over_steps) if figure]
        self.late_figures = [figure for figure in (panels.code_use(c, reader), panels.rank_health(c, reader)) if figure]
        self.heat = []
        for arm in self._heat_arms():
            drawn, rows = panels.heat(c, reader, arm)
            if drawn:
                warning = tables.show_crossing(first[arm][1] if first.get(arm) else None)
                self.heat.append((arm, panels.representative(c, arm), warning, drawn, panels.heat_csv(arm, rows)))

    def _heat_arms(self):
        """Whole formats with AdamW, in the order of the ranking, the primary treatment of each first."""
        c, arms = self.c, []
        for name in dict.fromkeys([arm.format for arm in c.ranked if arm.format in c.formats] + c.formats):
            own = [arm for arm in c.arms if arm.format == name and arm.plain and arm.optimizer == ADAMW]
            arms += sorted(own, key=lambda arm: (arm.at_rest, arm.optimizer) != c.primary)
        return arms

    def data(self):
        """[(file name, bytes)] of every table's and figure's numbers."""
        every_table = self.ranking, *self.tables, *self.details, self.speed, self.runs
        of_figures = [item for figure in (*self.figures, *self.late_figures) for item in figure.data]
        of_tables = [(table.data[0], table.data[1].encode()) for table in every_table]
        return of_tables + of_figures + [csv for *_, csv in self.heat]

    def _counts(self):
        states = Counter(run.state for run in self.c.all_runs)
        words = ", ".join(f"{n} {state}" for state, n in sorted(states.items()))
        one = next((run for run in self.c.all_runs if run.arm), None)
        if one is None:
            return f"{len(self.c.all_runs)} runs ({words})."
        model, config = one.manifest.get("model") or {}, one.config
        size = f"{model['parameters']:,} parameters, " if "parameters" in model else ""
        if "recorder" in one.manifest:
            own = one.manifest["recorder"]
            given = ", ".join(f"{name}={config[name]}" for name in own["settings"] if name not in ("seed", "run_name"))
            return (
                f"{len(self.c.all_runs)} runs ({words}), recorded by a loop of their own. The model: {size}"
                f"{len(own['products'])} products with weights, in {own['loss']}; {config['max_steps']} steps; {given}."
            )
        return (
            f"{len(self.c.all_runs)} runs ({words}). The model: {size}{config['n_layer']} blocks, "
            f"width {config['n_embd']}; {config['max_steps']} steps of {config['batch_size']} x "
            f"{config['block_size']} tokens ({config['tokenizer']}), {config['schedule']} "
            f"learning rate after {config['warmup_steps']} steps of warm-up."
        )

    # ------------------------------------------------------------------------------------------------- HTML

    def html(self):
        c = self.c
        parts = [
            "<!doctype html><html lang=en><head><meta charset=utf-8>",
            '<meta name=viewport content="width=device-width,initial-scale=1">',
            f'<meta http-equiv=refresh content="{self.seconds}">' if self.seconds else "",
            f"<title>{TITLE}</title><style>{CSS}</style></head><body>",
            f"<h1>{TITLE}</h1>",
        ]
        if self.seconds:
            parts.append(f"<p class=aid>Runs are going on: this page is made anew every {self.seconds} s.</p>")
        parts.append(
            "<div class=answer>"
            + "".join(
                f"<p><b>{html.escape(heading)}:</b> {html.escape(text)}</p>" for heading, text in tables.answer(c)
            )
            + "</div>"
        )
        parts.append(f"<p class=aid>{html.escape(self._counts())}</p>")
        if self.ranking.rows:
            parts.append(_table(self.ranking))
        parts.append(self._html_troubles())
        parts.append(
            "<ul class=aid>" + "".join(f"<li>{html.escape(text)}</li>" for text in tables.caveats(c)) + "</ul>"
        )
        parts += [
            f"<p>{html.escape(words)}: <span class={result}>{result}</span></p>" for words, result in tables.checks(c)
        ]
        body = [
            *map(_table, self.tables),
            *map(_figure, self.figures),
            self._html_heat(),
            *map(_figure, self.late_figures),
        ]
        if self.speed.rows:
            body.append(_table(self.speed) + f"<div class=panels>{''.join(self._speed_panels())}</div>")
        titles = [part.partition("<h2>")[2].partition("</h2>")[0] for part in body if part]
        parts.append("<nav>" + "".join(f"<a href=#s{i}>{title}</a>" for i, title in enumerate(titles)) + "</nav>")
        parts += [part.replace("<h2>", f"<h2 id=s{i}>", 1) for i, part in enumerate(filter(None, body))]
        parts.append("<h2>Details</h2>")
        for table in (*self.details, self.runs):
            parts.append(
                f"<details><summary>{html.escape(table.title)}</summary>"
                + _table(table).partition("</h2>")[2]
                + "</details>"
            )
        return "".join(parts) + "</body></html>\n"

    def _html_troubles(self):
        found = tables.troubles(self.c)
        if not found:
            return ""
        lines = [
            f"<b>{html.escape(name)}</b>: {html.escape(state)}{html.escape(': ' + reason) if reason else ''}"
            for name, state, reason in found
        ]
        shown, rest = "<br>".join(lines[:8]), lines[8:]
        more = f"<details><summary>{len(rest)} more</summary>{'<br>'.join(rest)}</details>" if rest else ""
        return f"<div class=trouble>{shown}{more}</div>"

    def _html_heat(self):
        if not self.heat:
            return ""
        bars = "".join(
            f"<div>{html.escape(words)}{figures.colour_bar(low, high)}</div>"
            for words, _, low, high in panels.HEAT.values()
        )
        parts = [
            "<h2>Where and when: layer by step</h2><p class=aid>Rows are layers, columns steps, one run per arm; "
            "yellow is bad, dark is fine, empty is not measured or not applicable. Overflow is absent where the scale "
            f"comes from the tensor's own amax.</p><div class=bars-legend>{bars}</div>"
        ]
        by_format = {}
        for entry in self.heat:
            by_format.setdefault(entry[0].format, []).append(entry)
        for i, (first, *others) in enumerate(by_format.values()):
            inside = "".join(self._html_heat_of(*entry) for entry in others)
            parts.append(self._html_heat_of(*first, inside=inside, opened=i == 0))
        return "".join(parts)

    def _html_heat_of(self, arm, run, warning, drawn, csv, inside="", opened=False):
        how = tables.treatment(arm.at_rest, arm.optimizer, arm.variant)
        summary = f"{arm.format}, {how}: run {run.name}, learning rate {run.learning_rate:g}; "
        summary += f"first warning of all its seeds: {warning}"
        return (
            f"<details{' open' if opened else ''}><summary>{html.escape(summary)}</summary><p>{_link(*csv)}</p>"
            f"<div class=panels>{''.join(drawn)}</div>{inside}</details>"
        )

    def _speed_panels(self):
        rows = [
            {"label": f"row {i + 1}", "class": "s-float32", "mean": middle, "low": low, "high": high, "note": kind}
            for i, (kind, middle, low, high) in enumerate(self.kinds)
        ]
        top = max(high for *_, high in self.kinds)
        return [figures.intervals("by row of the table", rows, x_range=(0, 1.05 * top), x_label="ms per step")]

    # --------------------------------------------------------------------------------------------- Markdown

    def markdown(self):
        c = self.c
        parts = [f"# {TITLE}", *(f"**{heading}:** {text}" for heading, text in tables.answer(c)), self._counts()]
        troubles = tables.troubles(c)
        if troubles:
            parts.append(
                "\n".join(
                    f"- **{name}**: {state}" + (f": {reason}" if reason else "") for name, state, reason in troubles
                )
            )
        parts += [markdown_table(self.ranking), "\n".join(f"- {text}" for text in tables.caveats(c))]
        parts += [f"{words}: {result}" for words, result in tables.checks(c)]
        parts += map(
            markdown_table, [*self.tables, *self.details, *([self.speed] if self.speed.rows else []), self.runs]
        )
        return "\n\n".join(parts) + "\n"


def markdown_table(table):
    def cells(row):
        return "| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |"

    return "\n".join(
        [
            f"## {table.title}",
            "",
            table.aid,
            "",
            cells(table.columns),
            "|" + "---|" * len(table.columns),
            *map(cells, table.rows),
        ]
    )
