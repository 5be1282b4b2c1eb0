"use strict";
const unpack = async (name) => {
  const bytes = Uint8Array.from(atob(document.getElementById(name).textContent), (c) => c.charCodeAt(0));
  return new Response(new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"))).text();
};

const draw = async (place) => {
  const spec = JSON.parse(document.getElementById(place.dataset.chart + "-spec").textContent);
  spec.data.values = await unpack(place.dataset.chart + ".csv");
  const { view } = await vegaEmbed(place, spec, { renderer: "svg", actions: false, logLevel: 1, config: { background: "transparent" } });
  return view;
};

// Each chart's view, for whoever wants to look into it.
const charts = {};
const ready = (async () => {
  for (const place of document.querySelectorAll(".chart")) charts[place.dataset.chart] = await draw(place);
})();

document.addEventListener("click", async (event) => {
  const link = event.target.closest("[data-csv]"), head = event.target.closest("th");
  if (link) {
    event.preventDefault();
    const url = URL.createObjectURL(new Blob([await unpack(link.dataset.csv)], { type: "text/csv" }));
    Object.assign(document.createElement("a"), { href: url, download: link.dataset.csv }).click();
  } else if (head) {
    const table = head.closest("table"), up = head.ariaSort !== "ascending" ? 1 : -1;
    const key = (row) => row.cells[head.cellIndex].textContent.replace("\u2212", "-");
    const compare = (a, b) => {
      const [x, y] = [parseFloat(key(a)), parseFloat(key(b))];
      return isNaN(x) || isNaN(y) ? isNaN(x) - isNaN(y) || key(a).localeCompare(key(b)) : x - y;
    };
    const rows = [...table.tBodies[0].rows].sort((a, b) => up * compare(a, b));
    for (const other of head.parentNode.cells) other.ariaSort = null;
    head.ariaSort = up > 0 ? "ascending" : "descending";
    table.tBodies[0].append(...rows);
  }
});

// Paper shows what is folded.
const folded = new Set();
addEventListener("beforeprint", () => document.querySelectorAll("details:not([open])").forEach((d) => (folded.add(d), (d.open = true))));
addEventListener("afterprint", () => (folded.forEach((d) => (d.open = false)), folded.clear()));
