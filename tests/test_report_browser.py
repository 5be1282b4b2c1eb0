"""The report in a browser: headless Chromium opens it, clicks, and says what it sees. `make browser` runs these.

A script is added to the page; it works when the page is ready, and leaves what it found in the document, which Chromium
prints (--dump-dom). So nothing but a Chromium is needed.
"""

import html
import json
import os
import re
import shutil
import subprocess

import pytest
from report_folders import study

from altgrad_jax import report

pytestmark = pytest.mark.browser
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
HEAD = """<script>
const errors = [];
addEventListener("error", (event) => errors.push(event.message));
addEventListener("unhandledrejection", (event) => errors.push(String(event.reason)));
addEventListener("securitypolicyviolation", (event) => errors.push(event.violatedDirective + " " + event.blockedURI));
const harmless = "because spec has discrete height"; // so much is known: the rows have a height each
for (const name of ["error", "warn"])
  console[name] = (...words) => words.join(" ").includes(harmless) || errors.push(name + ": " + words.join(" "));
</script>"""
PROBE = """<script>
(async () => {
  const found = {};
  await ready;
  const [place] = document.querySelectorAll(".chart"), view = charts[place.dataset.chart];
  const shown = (css) => [...place.querySelectorAll(css)].map((mark) => Number(mark.getAttribute("opacity") ?? 1));
  const dots = () => shown(".mark-symbol.role-mark path");
  const click = async (css) => {
    place.querySelector(css).dispatchEvent(new MouseEvent("click", { bubbles: true }));
    await view.runAsync();
    return dots();
  };
  const choose = async (number, value) => {
    const menu = place.querySelectorAll("select")[number];
    menu.value = value;
    menu.dispatchEvent(new Event("change"));
    await view.runAsync();
    return [...place.querySelectorAll(".role-axis-label text")].map((text) => text.textContent);
  };
  found.charts = Object.keys(charts);
  found.sizes = [...document.querySelectorAll(".chart svg")].map((svg) => svg.getBoundingClientRect().width);
  found.background = [...document.querySelectorAll(".chart svg")].map((svg) => getComputedStyle(svg).backgroundColor);
  found.top = place.getBoundingClientRect().top;
  found.wide = [document.documentElement.scrollWidth, innerWidth];
  found.before = dots();
  found.clicked = await click(".role-legend-symbol path");
  found.again = await click(".role-legend-symbol path");
  found.menus = [...place.querySelectorAll("select")].map((menu) => [...menu.options].map((option) => option.value));
  found.variant = await choose(0, "float32 master, scale_rounding=float32");
  const table = document.querySelector("table"), heading = table.querySelectorAll("th")[2];
  const column = () => [...table.tBodies[0].rows].map((row) => row.cells[2].textContent.slice(0, 6));
  for (const order of ["up", "down"]) heading.firstChild.click(), (found[order] = column());
  found.csv = (await unpack("ranking.csv")).split("\\n")[0];
  return found;
})()
  .catch((error) => (errors.push(String(error.stack)), {}))
  .then((found) => (document.body.dataset.found = JSON.stringify({ ...found, errors })));
</script>"""


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    return report.build([study(tmp_path_factory.mktemp("runs"))]).html()


def look(page, folder, *, width, height=900):
    """What the probe found in the page, in a window of this size."""
    chromium = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)
    assert chromium, f"there is no Chromium: install one of {', '.join(NAMES)}, or name it in CHROMIUM"
    before, _, after = page.replace("<head>", "<head>" + HEAD, 1).rpartition("</body>")  # scripts hold that word too
    (folder / "page.html").write_text(before + PROBE + "</body>" + after)
    command = [chromium, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-sync"]
    command += ["--disable-background-networking", "--disable-component-update", f"--window-size={width},{height}"]
    command += [f"--user-data-dir={folder / 'profile'}", "--virtual-time-budget=30000", "--dump-dom"]
    done = subprocess.run([*command, f"file://{folder / 'page.html'}"], capture_output=True, text=True, timeout=120)
    match = re.search(r'<body[^>]* data-found="([^"]*)"', done.stdout)
    assert match, f"the page did not become ready: {done.stderr[-2000:]}"
    return json.loads(html.unescape(match[1]))


@pytest.mark.parametrize("width", [1400, 390])
def test_the_page_works_in_a_browser(page, tmp_path, width):
    found = look(page, tmp_path, width=width)
    assert found["errors"] == []
    assert found["charts"] == ["gap-intervals", "gap-validation", "gap-training", "losses"]
    page_width, window = found["wide"]  # a window of Chromium is 500 wide at least
    assert len(found["sizes"]) == 4 and all(0.4 * min(window, 900) < size < window for size in found["sizes"])
    assert found["top"] < 400 and page_width <= window  # on the first screen, and nothing is too wide
    assert set(found["background"]) <= {"rgba(0, 0, 0, 0)"}  # the page's own colour, light or dark
    # The first entry of the legend is "worse", two of three: a click leaves those, the next shows all.
    assert found["before"] == [1, 1, 1] == found["again"] and sorted(found["clicked"]) == [0.08, 1, 1]
    assert found["menus"] == [
        ["float32 master", "float32 master, scale_rounding=float32"],
        ["its own best", "0.0006 for all"],
    ]
    assert {"E4M3", "E5M2", "E0M7"} <= set(found["variant"])
    ordered = [float(text.replace("\N{MINUS SIGN}", "-")) for text in found["up"] if text]
    assert ordered == sorted(ordered) and len(ordered) == 6 and found["up"] != found["down"]
    assert found["csv"].startswith("group,format,gap_mean,")


def test_an_error_in_the_page_is_seen(page, tmp_path):
    broken = page.replace('"type":"csv"', '"type":"nothing"', 1)
    assert broken != page and look(broken, tmp_path, width=1400)["errors"]
