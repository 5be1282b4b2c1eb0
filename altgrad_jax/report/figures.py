"""Small SVG panels, drawn without a library: crisp at any size, coloured by the page's own CSS, so that one drawing
serves light and dark. Every panel is as wide as a phone; a grid of them fills a wide page.

A series is {"class": CSS class of its colour, "label": words, "x", "y": [points], "low", "high": band or None,
"dashed", "dots": bool, "crosses": [(x, y)] where a run was lost}. Colours mean the same thing in all figures of a
page.
"""

import base64
import html
import math
import struct
import zlib

import numpy as np

WIDTH, HEIGHT = 340, 210
LEFT, RIGHT, TOP, BOTTOM = 46, 10, 26, 30

# Anchors of matplotlib's viridis, evenly spaced: monotone in lightness, and so readable without colours too.
VIRIDIS = np.array(
    [
        [68, 1, 84],
        [72, 40, 120],
        [62, 73, 137],
        [49, 104, 142],
        [38, 130, 142],
        [31, 158, 137],
        [53, 183, 121],
        [110, 206, 88],
        [181, 222, 43],
        [253, 231, 37],
    ],
    float,
)


def ticks(low, high, n=5):
    """Round numbers from low to high, about n of them."""
    if not high > low:
        return [low]
    raw = (high - low) / n
    size = 10.0 ** math.floor(math.log10(raw))
    step = next(size * factor for factor in (1, 2, 5, 10) if size * factor >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [step * k for k in range(first, math.floor(high / step + 1e-9) + 1)]


def tick_label(value, step):
    digits = max(0, -math.floor(math.log10(step) + 1e-9)) if step > 0 else 2
    return f"{value:.{min(digits, 6)}f}" if abs(value) < 1e5 else f"{value:.0e}"


def text(x, y, words, anchor="start", cls=""):
    cls = f' class="{cls}"' if cls else ""
    anchor = "" if anchor == "start" else f' text-anchor="{anchor}"'
    return f'<text x="{x:.1f}" y="{y:.1f}"{anchor}{cls}>{html.escape(str(words))}</text>'


def svg(body, width, height, label):
    return f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{html.escape(label, quote=True)}">{body}</svg>'


def _axes(x_range, y_range, x_label, width=WIDTH, height=HEIGHT):
    """(marks, x -> pixels, y -> pixels): grid, ticks and labels."""
    (x0, x1), (y0, y1) = x_range, y_range

    def px(x):
        return LEFT + (np.asarray(x, float) - x0) / (x1 - x0 or 1) * (width - LEFT - RIGHT)

    def py(y):
        return height - BOTTOM - (np.asarray(y, float) - y0) / (y1 - y0 or 1) * (height - TOP - BOTTOM)

    parts = []
    at = ticks(y0, y1)
    for tick in at:
        parts.append(f'<path class="grid" d="M{LEFT} {py(tick):.1f}H{width - RIGHT}"/>')
        parts.append(text(LEFT - 5, py(tick) + 3.5, tick_label(tick, at[1] - at[0] if len(at) > 1 else 0), "end"))
    at = ticks(x0, x1, 4)
    for tick in at:
        anchor = "end" if px(tick) > width - RIGHT - 8 else "middle"
        parts.append(
            text(
                px(tick) + (4 if anchor == "end" else 0),
                height - BOTTOM + 14,
                tick_label(tick, at[1] - at[0] if len(at) > 1 else 0),
                anchor,
            )
        )
    parts.append(text((LEFT + width - RIGHT) / 2, height - 3, x_label, "middle"))
    return parts, px, py


def _path(xs, ys):
    """Path data through the finite points; a gap where one is not finite."""
    out, pen = [], False
    for x, y in zip(xs, ys):
        if math.isfinite(x) and math.isfinite(y):
            out.append(f"{'L' if pen else 'M'}{x:.1f} {y:.1f}")
            pen = True
        else:
            pen = False
    return "".join(out)


def lines(title, series, *, y_range, x_range, zero=False):
    """A panel of lines over steps."""
    parts, px, py = _axes(x_range, y_range, "step")
    parts.insert(0, text(LEFT, 14, title, cls="title"))
    clipped = []

    def area(xs, low, high, cls):
        keep = np.isfinite(low) & np.isfinite(high)
        if keep.sum() > 1:
            xs, low, high = np.asarray(xs)[keep], np.asarray(low)[keep], np.asarray(high)[keep]
            forth, back = _path(px(xs), py(low)), _path(px(xs[::-1]), py(high[::-1]))
            clipped.append(f'<path class="{cls}" d="{forth}L{back[1:]}Z"/>')

    if zero and y_range[0] < 0 < y_range[1]:
        clipped.append(f'<path class="zero" d="M{LEFT} {py(0):.1f}H{WIDTH - RIGHT}"/>')
    for one in series:
        if one.get("low") is not None:
            area(one["x"], np.asarray(one["low"]), np.asarray(one["high"]), f"band {one['class']}")
    for one in series:
        dash = " dashed" if one.get("dashed") else ""
        words = html.escape(one["label"])
        clipped.append(
            f'<path class="line {one["class"]}{dash}" d="{_path(px(one["x"]), py(one["y"]))}">'
            f"<title>{words}</title></path>"
        )
        if one.get("dots"):
            clipped += [
                f'<circle class="dot {one["class"]}" cx="{px(x):.1f}" cy="{py(y):.1f}" r="2.2"/>'
                for x, y in zip(one["x"], one["y"])
                if math.isfinite(y)
            ]
        for x, y in one.get("crosses", ()):
            cx, cy = float(px(x)), min(max(float(py(y)), TOP + 5), HEIGHT - BOTTOM - 5)
            clipped.append(
                f'<path class="cross {one["class"]}" d="M{cx - 4:.1f} {cy - 4:.1f}l8 8m0 -8l-8 8">'
                f"<title>{words}: a run was lost at step {x}</title></path>"
            )
    inner = (
        f'<svg x="{LEFT}" y="{TOP}" width="{WIDTH - LEFT - RIGHT}" height="{HEIGHT - TOP - BOTTOM}" '
        f'viewBox="{LEFT} {TOP} {WIDTH - LEFT - RIGHT} {HEIGHT - TOP - BOTTOM}">{"".join(clipped)}</svg>'
    )
    return svg("".join(parts) + inner, WIDTH, HEIGHT, f"{title}: {', '.join(one['label'] for one in series)}")


def intervals(title, rows, *, x_range, margin=None, x_label="gap to BF16 (nats per token)"):
    """A panel with a dot and an interval per row.

    rows: [{"label", "class", "mean", "low", "high", "hollow", "note"}], from the top; a mean that is NaN shows its note
    only; what lies beyond x_range is an arrow at the edge with its number. margin: half width of the band around 0.
    """
    left, row_height = 84, 19
    height = TOP + row_height * len(rows) + BOTTOM
    x0, x1 = x_range

    def px(x):
        return left + (min(max(x, x0), x1) - x0) / (x1 - x0) * (WIDTH - left - RIGHT)

    parts = [text(LEFT if not title else 6, 14, title, cls="title")]
    bottom = height - BOTTOM
    if margin is not None:
        parts.append(
            f'<rect class="band margin" x="{px(-margin):.1f}" y="{TOP}" width="{px(margin) - px(-margin):.1f}" '
            f'height="{bottom - TOP}"/>'
        )
    at = ticks(x0, x1)
    for tick in at:
        cls = "zero" if abs(tick) < 1e-12 else "grid"
        parts.append(f'<path class="{cls}" d="M{px(tick):.1f} {TOP}V{bottom}"/>')
        parts.append(text(px(tick), bottom + 14, tick_label(tick, at[1] - at[0] if len(at) > 1 else 0), "middle"))
    parts.append(text((left + WIDTH - RIGHT) / 2, height - 3, x_label, "middle"))
    for i, row in enumerate(rows):
        y = TOP + row_height * (i + 0.5)
        parts.append(text(left - 8, y + 4, row["label"], "end"))
        words = html.escape(row["note"])
        if not math.isfinite(row["mean"]):
            parts.append(text(px(max(x0, 0)) + 6, y + 4, row["note"], cls="note"))
            continue
        if math.isfinite(row["low"]):
            parts.append(f'<path class="line {row["class"]}" d="M{px(row["low"]):.1f} {y}H{px(row["high"]):.1f}"/>')
        if row["mean"] > x1:
            parts.append(
                f'<path class="dot {row["class"]}" d="M{WIDTH - RIGHT - 6} {y - 5}l8 5l-8 5Z"/>'
                + text(WIDTH - RIGHT - 10, y + 4, f"{row['mean']:+.2f}", "end", "note")
            )
        else:
            hollow = " hollow" if row.get("hollow") else ""
            parts.append(
                f'<circle class="dot {row["class"]}{hollow}" cx="{px(row["mean"]):.1f}" cy="{y}" r="4">'
                f"<title>{words}</title></circle>"
            )
    return svg("".join(parts), WIDTH, height, title)


def png(pixels_HWC):
    """PNG bytes of uint8 RGBA pixels [height, width, 4]."""
    height, width, _ = pixels_HWC.shape
    rows = np.concatenate([np.zeros((height, 1), np.uint8), pixels_HWC.reshape(height, -1)], 1).tobytes()

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 6, 0, 0, 0))
        + chunk(b"IDAT", zlib.compress(rows, 9))
        + chunk(b"IEND", b"")
    )


def colours(shares):
    """uint8 RGBA of numbers from 0 to 1, clipped; transparent where NaN."""
    shares = np.asarray(shares, float)
    place = np.clip(np.nan_to_num(shares), 0, 1) * (len(VIRIDIS) - 1)
    low = np.minimum(place.astype(int), len(VIRIDIS) - 2)
    rgb = VIRIDIS[low] + (VIRIDIS[low + 1] - VIRIDIS[low]) * (place - low)[..., None]
    return np.concatenate([rgb.round(), np.where(np.isnan(shares), 0, 255)[..., None]], -1).astype(np.uint8)


def image(x, y, width, height, pixels_HWC):
    data = base64.b64encode(png(pixels_HWC)).decode()
    return (
        f'<image class="pixels" x="{x}" y="{y}" width="{width}" height="{height}" preserveAspectRatio="none" '
        f'href="data:image/png;base64,{data}"/>'
    )


def heat_map(title, steps, layers, shares_LS):
    """A panel: rows are layers, from the top, columns the steps, colours shares from 0 (fine) to 1 (bad)."""
    left, top, bottom, row_height = 92, 22, 18, 10 if len(layers) > 30 else 12
    inside = row_height * len(layers)
    height = top + inside + bottom
    width = WIDTH - left - RIGHT
    parts = [
        text(left, 14, title, cls="title"),
        f'<rect class="missing" x="{left}" y="{top}" width="{width}" height="{inside}"/>',
        image(left, top, width, inside, colours(shares_LS)),
    ]
    parts += [
        text(left - 5, top + row_height * (i + 0.5) + 3.5, layer, "end", "layer") for i, layer in enumerate(layers)
    ]
    parts += [text(left, height - 4, f"step {steps[0]}"), text(left + width, height - 4, steps[-1], "end")]
    return svg("".join(parts), WIDTH, height, title)


def colour_bar(low, high):
    """The scale of a heat map: words for fine and bad at its ends."""
    bar = image(120, 3, 100, 11, colours(np.linspace(0, 1, 64)[None]))
    return svg(text(114, 12, low, "end") + bar + text(226, 12, high), WIDTH, 17, f"colours from {low} to {high}")


def bars(title, x_values, counts, *, x_label, note=""):
    """A panel of adjoining bars with a logarithmic height, as one filled outline. counts: from 0; 0 draws nothing."""
    shares = np.asarray(counts, float) / max(1, np.sum(counts))
    low = -6.0
    height = 150
    with np.errstate(divide="ignore"):
        logs = np.maximum(np.log10(shares), low)
    parts = [text(LEFT, 14, title, cls="title")]
    if note:
        parts.append(text(WIDTH - RIGHT, 14, note, "end", "note"))
    x0, x1 = x_values[0] - 0.5, x_values[-1] + 0.5

    def px(x):
        return LEFT + (x - x0) / (x1 - x0) * (WIDTH - LEFT - RIGHT)

    def py(v):
        return height - BOTTOM - (v - low) / -low * (height - TOP - BOTTOM)

    for tick, words in ((0, "100%"), (-2, "1%"), (-4, "0.01%"), (-6, "0")):
        parts.append(
            f'<path class="grid" d="M{LEFT} {py(tick):.1f}H{WIDTH - RIGHT}"/>'
            + text(LEFT - 5, py(tick) + 3.5, words, "end")
        )
    outline = [f"M{px(x0):.1f} {py(low):.1f}"]
    outline += [f"V{py(value):.1f}H{px(x + 0.5):.1f}" for x, value in zip(x_values, logs)]
    parts.append(f'<path class="bars" d="{"".join(outline)}V{py(low):.1f}Z"/>')
    for x in (x_values[0], 0, x_values[-1]):
        parts.append(
            text(
                px(x),
                height - BOTTOM + 14,
                f"{x:+d}" if x else "0",
                {x_values[0]: "start", x_values[-1]: "end"}.get(x, "middle"),
            )
        )
    parts.append(text((LEFT + WIDTH - RIGHT) / 2, height - 3, x_label, "middle"))
    return svg("".join(parts), WIDTH, height, title)
