"""What every number format would have done to a tensor, from one stored histogram of its magnitudes.

Whether an element flushes to zero or is clipped depends on its magnitude alone, by two thresholds per format and scale:

    underflow    0 < |v| <= smallest subnormal / (2 scale)    a power of two; the tie goes to the even code, which is 0
    overflow     |v| > largest finite number / scale          a power of two times 2 - 2^-b, b from 0 to 6 in 8 bits

(b is the number of leading ones in the mantissa of the largest finite number: 0 in E7M0, 2 in E4M3, 6 in E1M6.) So the
histogram has its bin edges at 2^e (2 - 2^-b) for b = 0 to 7, eight bins per power of two, open below and closed above
as both thresholds are. A power-of-two scale moves edges onto edges. Every 8-bit format's thresholds are then edges at
every scale and the shares are exact, from a histogram that knows neither formats nor scales; plain mantissa bits would
take 64 bins per power of two for the same. b = 7 is BF16.

Bins (`N_BINS` in all):

    0                zero
    1                2^-149, the smallest float32
    2 + 8 x + j      |v| in 2^(x - 149) times (2 - 2^-j, 2 - 2^-(j+1)], and up to 2 for j = 7; x = 0 to 276
    2218             infinity
    2219             NaN

Formats with b > 7 (FP16, E4M11, E7M8, E0M15) are not exact: of their overflow, magnitudes less than 2^-7 of themselves
beyond the largest number are missed, so the share is never too large. Their underflow is exact.

Sources: the shares are those of `altgrad_jax.numerics.products` (overflow, underflow). Choosing scales from histograms:
Migacz 2017, "8-bit inference with TensorRT".
"""

import math
from collections.abc import Mapping, Sequence

import numpy as np

from altgrad_jax.errors import UserError
from altgrad_jax.numerics import formats
from altgrad_jax.numerics.formats import FloatFormat
from altgrad_jax.numerics.scales import scale_for

ZERO_BIN, INFINITY_BIN, NAN_BIN, N_BINS = 0, 2218, 2219, 2220
_SHORTEST_GAP = 4  # so many empty bins in a row take more room than the start of a new run


def _upper_edges():
    """float64 [2217], rising: the largest magnitude that bin 1 + i may hold."""
    x, j = np.divmod(np.arange(INFINITY_BIN - 1) - 1, 8)
    return np.ldexp(np.where(j < 7, 2 - 0.5 ** (j + 1), 2.0), x - 149)


_EDGES = _upper_edges()


def sparse(counts) -> dict:
    """A histogram as a small JSON value: {"bins": length, "first": [bins], "counts": [[whole numbers]]}.

    Run number i holds the bins from first[i] on; bins in no run are empty. Several runs, because zero, NaN and the
    magnitudes between lie far apart, as do the codes of the two signs.

    Args:
      counts: whole numbers [bins].
    """
    counts = np.asarray(counts)
    used = np.flatnonzero(counts)
    runs = np.split(used, np.flatnonzero(np.diff(used) > _SHORTEST_GAP) + 1) if len(used) else []
    return {
        "bins": len(counts),
        "first": [int(run[0]) for run in runs],
        "counts": [counts[run[0] : run[-1] + 1].tolist() for run in runs],
    }


def dense(stored: dict) -> np.ndarray:
    """int64 [bins]: the inverse of `sparse`."""
    counts = np.zeros(stored["bins"], np.int64)
    for first, run in zip(stored["first"], stored["counts"], strict=True):
        counts[first : first + len(run)] = run
    return counts


def _shares(counts, fmt, scales):
    """Shares of underflow and overflow (float64, of the shape of scales) by a histogram, dense or as stored."""
    counts = dense(counts) if isinstance(counts, dict) else np.asarray(counts).astype(np.int64)
    if counts.shape != (N_BINS,):
        raise UserError(
            f"a histogram of shape {counts.shape} cannot be read: give the {N_BINS} bins of "
            "histograms.magnitude_histogram"
        )
    up_to = np.cumsum(counts)
    small = np.searchsorted(_EDGES, fmt.smallest_subnormal / 2 / scales, side="right")  # bins at or below the threshold
    fitting = 1 + np.searchsorted(_EDGES, fmt.max_finite / scales, side="left")  # bins below it, or cut by it
    flushed = up_to[small] - counts[ZERO_BIN]
    clipped = up_to[INFINITY_BIN] - up_to[np.minimum(fitting, INFINITY_BIN - 1)]
    total = up_to[-1] if up_to[-1] else np.nan
    return flushed / total, clipped / total


def what_if(counts, fmt: FloatFormat, scale: float) -> dict:
    """Shares of a tensor's elements that a format would lose at either end of its range.

    Args:
      counts: whole numbers [N_BINS] from `histograms.magnitude_histogram`, or what `sparse` made of them.
      fmt: any format; see the top of this module for the few that are not exact.
      scale: a power of two, by which the tensor is multiplied before it is rounded.

    Returns:
      {"underflow": share of elements that are not 0 and would become 0, "overflow": share of elements, infinities
      included, beyond the largest finite number}, of all elements; NaN where there are none.

    Raises:
      UserError: the scale is not a power of two, or the histogram has another number of bins.
    """
    if math.frexp(scale)[0] != 0.5:
        raise UserError(f"scale={scale!r} cannot be used: give a power of two")
    underflow, overflow = _shares(counts, fmt, np.float64(scale))
    return {"underflow": float(underflow), "overflow": float(overflow)}


def what_if_table(counts, amax: float) -> list[dict]:
    """What each of the eight formats would have done to a tensor, and the scale that would have lost least.

    Args:
      counts: as in `what_if`.
      amax: largest magnitude of the tensor.

    Returns:
      One row per format, in the order of formats.DEFAULT_8BIT: `name`; `scale`, as `scale_for` gives it for this amax;
      `underflow` and `overflow` at that scale; `best_scale`, the power of two from 2^-126 to 2^126 with the least
      underflow + overflow, and `best_underflow` and `best_overflow` there. Of several the nearest to `scale` is given
      (the smaller of two), so that it is `scale` itself unless another loses fewer elements.
    """
    rows = []
    counts = dense(counts) if isinstance(counts, dict) else counts
    exponents = np.arange(-126, 127)
    for fmt in map(formats.get_format, formats.DEFAULT_8BIT):
        scale = float(scale_for(amax, fmt))
        underflow, overflow = _shares(counts, fmt, 2.0**exponents)
        best = np.lexsort((np.abs(exponents - math.log2(scale)), underflow + overflow))[0]
        rows.append(
            {
                "name": fmt.name,
                "scale": scale,
                **what_if(counts, fmt, scale),
                "best_scale": float(2.0 ** exponents[best]),
                "best_underflow": float(underflow[best]),
                "best_overflow": float(overflow[best]),
            }
        )
    return rows


def operand_row(codes, magnitudes, scale, amax, fmt: FloatFormat):
    """A quantized operand at a diagnosis, for the record.

    Args:
      codes: whole numbers [256] by code, of histograms.code_histogram. magnitudes: [N_BINS].
      scale, amax: of the operand at that pass. fmt: the format in use.

    Returns:
      (line, use). line: JSON values: format, scale, amax, `magnitudes` and, for a format of 8 bits, `codes`, as
      `sparse` gives them. use: for a format of 8 bits `codes_used` (how many different codes occur),
      `codes_used_share` (of the format's finite numbers) and `code_entropy` (Shannon entropy in bits); else empty.
    """
    amax = float(amax)
    line = {
        "format": fmt.name,
        "scale": float(scale),
        "amax": amax if math.isfinite(amax) else "NaN" if math.isnan(amax) else "Infinity",
        "magnitudes": sparse(magnitudes),
    }
    if fmt.bits != 8:
        return line, {}
    codes = np.asarray(codes).astype(np.int64)
    share = codes[codes > 0] / max(1, codes.sum())
    used = int(np.count_nonzero(codes))
    return line | {"codes": sparse(codes)}, {
        "codes_used": used,
        "codes_used_share": used / fmt.n_finite,
        "code_entropy": float(-np.sum(share * np.log2(share))),
    }


def of_diagnoses(lines: Sequence[Mapping], step: int | None = None) -> tuple[int, list[dict]]:
    """What the eight formats would have done to the operands of a run at one diagnosis.

    Args:
      lines: of the run's diagnostics.jsonl, `magnitudes` dense: run.record.read_diagnostics.
      step: None is the last diagnosis.

    Returns:
      (step, [{layer, operand, format, and per format name (underflow, overflow)}]): shares at the scale that the
      operand's own amax gives each format; last for each operand `all`: over the elements of all layers together.

    Raises:
      UserError: there is no such diagnosis.
    """
    steps = sorted({line["step"] for line in lines})
    if not steps:
        raise UserError("diagnostics.jsonl holds no diagnosis yet: give it after the run's first diagnostic_interval")
    wanted = steps[-1] if step is None else step
    if wanted not in steps:
        raise UserError(
            f"diagnostics.jsonl holds no diagnosis at step {wanted}: give one of {', '.join(map(str, steps))}"
        )
    rows, totals = [], {}
    for line in lines:
        if line["step"] != wanted or not isinstance(line["amax"], float):
            continue
        counts = line["magnitudes"]
        total = totals.setdefault(line["operand"], {})
        row = {"layer": line["layer"], "operand": line["operand"], "format": line["format"]}
        for found in what_if_table(counts, line["amax"]):
            row[found["name"]] = found["underflow"], found["overflow"]
            lost = total.setdefault(found["name"], np.zeros(3))
            lost += np.array([found["underflow"] * counts.sum(), found["overflow"] * counts.sum(), counts.sum()])
        rows.append(row)
    for operand, total in totals.items():
        rows.append(
            {
                "layer": "all",
                "operand": operand,
                "format": "",
                **{name: (float(u / n), float(o / n)) for name, (u, o, n) in total.items()},
            }
        )
    return wanted, rows
