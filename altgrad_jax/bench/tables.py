"""The measurements as tables in Markdown. No jax."""

from altgrad_jax.bench.roofline import GIB


def _table(header, rows):
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def _scaled(value, unit, digits=3):
    return "-" if value is None else f"{value / unit:.{digits}g}"


def _ratio(row, name="ratio"):
    return f"{row[name]:.3f} ({row[f'{name}_low']:.3f}-{row[f'{name}_high']:.3f})" if name in row else "-"


def times_table(rows, base):
    """Times and their ratios to the row `base`."""
    return _table(
        ("row", "ms/step", "tokens/s", f"/ {base} (quartiles)", "/ all metrics", "metrics", "compile s", "first s"),
        [
            (
                row["name"],
                f"{row['ms_per_step']:.2f}",
                f"{row['tokens_per_s']:,.0f}",
                _ratio(row),
                f"{row['baseline_ratio']:.3f}" if "baseline_ratio" in row else "-",
                str(row.get("n_metrics", "-")),
                f"{row['compile_s']:.1f}",
                f"{row['first_dispatch_s']:.2f}",
            )
            for row in rows
        ],
    )


def limits_table(rows):
    """Work and memory of a step, and how far it is from what the device could do."""
    return _table(
        (
            "row",
            "GFLOP",
            "GB least",
            "memory GiB",
            "MFU",
            "floor ms",
            "floor by",
            "step / floor (quartiles)",
        ),
        [
            (
                row["name"],
                _scaled(row["flops"], 1e9),
                _scaled(row["bytes_least"], 1e9),
                _scaled(row.get("memory_bytes"), GIB),
                f"{100 * row['mfu']:.1f}% of {row['mfu_of']}",
                f"{row['floor_ms']:.4g}",
                row["floor_by"],
                f"{row['gap']:.2f} ({row['gap_low']:.2f}-{row['gap_high']:.2f})",
            )
            for row in rows
        ],
    )


def fit_table(rows, fit):
    """Points and a straight line through them."""
    r2 = "-" if fit["r2"] is None else f"{fit['r2']:.4f}"
    points = [
        (
            f"{x:,}",
            f"{row['ms_per_step']:.2f}",
            f"{row['ms_per_step'] - left:.2f}",
            f"{100 * left / row['ms_per_step']:+.1f}%",
        )
        for x, row, left in zip(fit["x"], rows, fit["residuals"], strict=True)
    ]
    return f"ms/step = {fit['a']:.4g} + {fit['b']:.4g} x, R^2 = {r2}\n\n" + _table(
        (f"x: {fit['x_name']}", "ms/step", "line", "residual"), points
    )


def section_text(section):
    """A measured section (suites.measure) as Markdown."""
    parts = [f"## {section['name']}"]
    if section["note"]:
        parts.append(section["note"])
    rates = []
    for name, rate in section["probes"].items():
        rates.append(f"{name} {rate / 1e9:,.1f} {'GB/s' if name.startswith('copy') else 'GFLOP/s'}")
    if section["rows"]:
        parts.append(f"{section['rounds']} rounds. Measured beside them: {', '.join(rates)}")
        parts += [times_table(section["rows"], section["base"]), limits_table(section["rows"])]
    if section["fit"]:
        parts.append(fit_table(section["rows"], section["fit"]))
    if section["skipped"]:
        by_reason = {}
        for one in section["skipped"]:
            by_reason.setdefault(one["why"], []).append(one["name"])
        parts.append("Left out: " + "; ".join(f"{', '.join(names)} ({why})" for why, names in by_reason.items()))
    return "\n\n".join(parts)


def members_table(rows):
    """The rows of programs.bench_members."""
    return _table(
        ("program", "s a step of all", "/ one run alone (quartiles)", "/ as many alone", "compile s"),
        [
            (
                row["name"],
                f"{row['s_per_step']:.4f}",
                f"{row['ratio']:.2f} ({row['ratio_low']:.2f}-{row['ratio_high']:.2f})",
                f"{row['ratio'] / row['width']:.2f}",
                f"{row['compile_s']:.1f}",
            )
            for row in rows
        ],
    )


def rounding_table(rows):
    """The rows of programs.bench_rounding."""
    return _table(
        ("elements", "variant", "ms", "/ multiply (quartiles)"),
        [
            (
                f"{row['elements']:,}",
                row["name"],
                f"{row['ms']:.3f}",
                f"{row['ratio']:.2f} ({row['ratio_low']:.2f}-{row['ratio_high']:.2f})",
            )
            for row in rows
        ],
    )
