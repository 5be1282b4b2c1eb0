"""What the report's tests promise, by simulation, and what they say of the published runs.

PYTHONPATH=tests python -m campaigns.report_statistics > numbers.md
"""

from pathlib import Path

import numpy as np
from scipy import signal

from altgrad_jax.report import statistics, tables
from altgrad_jax.report.analysis import Comparison
from altgrad_jax.report.page import markdown_table, notes
from altgrad_jax.report.runs import AT_REST_LABELS, FINISHED, Arm, Run

DRAWS, SD = 20_000, 0.02  # experiments a line; nats
PUBLISHED = Path(__file__).parents[2] / "docs" / "results" / "matrix-first" / "report.md"
STEPS, COMMON = 400, {"data_seed": 1337, "eval_windows": 128}


# ------------------------------------------------------------------------------------------------- simulation


def samples(rng, mean, n, draws):
    """(mean, standard error, degrees of freedom) of n normal differences; the first two are [draws]."""
    values_DN = rng.normal(mean, SD, (draws, n))
    return values_DN.mean(1), values_DN.std(1, ddof=1) / np.sqrt(n), n - 1


def any_rejected(p_DT):
    """Share of families [D, T] in which a test rejects: (corrected, uncorrected)."""
    corrected = np.array([statistics.holm(row) for row in p_DT])
    return tuple(float(np.mean((ps <= statistics.ALPHA).any(1))) for ps in (corrected, p_DT))


def coverage(rng, n, draws):
    """Share of intervals that hold the true mean."""
    mean, se, df = samples(rng, 0.05, n, draws)
    return float(np.mean(np.abs(mean - 0.05) <= statistics.half_width(se, df)))


def false_equivalence(rng, n, size, draws, tests=1):
    """`any_rejected` of families whose true gaps are all the margin, `size` standard deviations."""
    p = statistics.p_equivalence(*samples(rng, size * SD, n, draws * tests), size * SD)
    return any_rejected(p.reshape(draws, tests))


def false_difference(rng, n, tests, true, draws):
    """`any_rejected` among the `true` gaps of 0 in families of `tests`; the others are found without fail."""
    p = statistics.p_difference(*samples(rng, 0.0, n, draws * true)).reshape(draws, true)
    corrected = np.array([statistics.holm(row)[:true] for row in np.pad(p, ((0, 0), (0, tests - true)))])
    return tuple(float(np.mean((ps <= statistics.ALPHA).any(1))) for ps in (corrected, p))


def coverage_on_a_grid(rng, a, b, draws):
    """(share of intervals that hold the true mean, the same for a t interval that takes all pairs as independent).

    a seeds x b data seeds; half of the variance is the seed's, a quarter the data seed's, a quarter both together.
    """
    of_seed, of_data = rng.normal(0, SD, (draws, a, 1)), rng.normal(0, SD, (draws, 1, b))
    values = np.sqrt(0.5) * of_seed + 0.5 * of_data + 0.5 * rng.normal(0, SD, (draws, a, b))
    pairs = [(i, j) for i in range(a) for j in range(b)]
    se, df = np.array([statistics.standard_error(grid.ravel(), pairs) for grid in values]).T
    mean, naive = np.abs(values.mean((1, 2))), values.std((1, 2), ddof=1) / np.sqrt(a * b)
    return tuple(float(np.mean(mean <= statistics.half_width(*error))) for error in ((se, df), (naive, a * b - 1)))


def coverage_over_windows(rng, n, windows, sd_windows, run, draws):
    """(share of intervals over pairs and windows that hold the true gap, the same for the t interval of the pairs).

    A gap is SD times (a pair's number + sd_windows times a window's + both together's); neighbouring windows have a
    correlation of 0.5 over about `run` of them, as those of one document.
    """
    held = np.zeros((draws, 2), bool)
    keep = 0.5 ** (1 / run)
    for i in range(draws):
        shocks = rng.normal(size=windows + 20 * run)
        of_window = signal.lfilter([np.sqrt(1 - keep**2)], [1, -keep], shocks)[20 * run :]
        of_pair, both = rng.normal(size=(n, 1)), rng.normal(size=(n, windows))
        gaps_PE = SD * (of_pair + sd_windows * of_window + both)
        first = {(k, k): gap for k, gap in enumerate(gaps_PE.mean(1))}
        d = statistics.paired(first, dict.fromkeys(first, 0.0))
        over_all = statistics.spread(d, gaps_PE)
        held[i] = over_all.low <= 0 <= over_all.high, d.low <= 0 <= d.high
    return tuple(held.mean(0))


def clusters(rng, n, share, distance, draws):
    """(share of samples flagged, coverage of the interval) where each pair is `distance` sd off with P = share."""
    values = rng.normal(0, SD, (draws, n)) + distance * SD * (rng.random((draws, n)) < share)
    flagged = np.array([statistics.has_two_clusters(row) for row in values])
    half = statistics.half_width(values.std(1, ddof=1) / np.sqrt(n), n - 1)
    return float(flagged.mean()), float(np.mean(np.abs(values.mean(1) - distance * SD * share) <= half))


def simulation_rows(seed=0, draws=DRAWS):
    """[(words, promise or "none", share)] of every simulation; `draws` experiments a row."""
    rng = np.random.default_rng(seed)
    rows = [(f"interval of {n} pairs holds the true gap", "94% to 96%", coverage(rng, n, draws)) for n in (3, 5, 8, 20)]
    for n, size in ((5, 0.5), (5, 1), (5, 3), (20, 1)):
        share, _ = false_equivalence(rng, n, size, draws)
        rows.append((f"{n} pairs, true gap = margin = {size:g} sd: called equivalent", "at most 5%", share))
    corrected, raw = false_equivalence(rng, 5, 3, draws // 4, tests=28)
    rows.append(("28 gaps of 5 pairs, all = margin = 3 sd: any called equivalent", "at most 5%", corrected))
    rows.append(("the same without the correction", "none", raw))
    for true in (28, 14):
        corrected, raw = false_difference(rng, 5, 28, true, draws // 4)
        rows.append(
            (f"28 gaps of 5 pairs, {true} of them 0: any of these called worse or better", "at most 5%", corrected)
        )
        rows.append((f"the same without the correction, {true} of 28 are 0", "none", raw))
    for a, b in ((8, 2), (4, 4)):
        combined, naive = coverage_on_a_grid(rng, a, b, draws // 4)
        rows.append((f"{a} seeds x {b} data seeds: the interval holds the true gap", "about 95%", combined))
        rows.append((f"the same, all {a * b} pairs taken as independent", "none", naive))
    for n, windows, sd, run in ((5, 200, 10, 1), (8, 400, 10, 3), (8, 400, 0, 3), (5, 40, 10, 3)):
        both, pairs = coverage_over_windows(rng, n, windows, sd, run, draws // 20)
        words = f"{n} pairs x {windows} windows of {sd} sd, alike over {run}"
        promise = "about 95%" if windows > 100 else "none"
        rows.append((f"{words}: the interval over windows too holds the true gap", promise, both))
        rows.append((f"{words}: the t interval of the pairs holds it", "none", pairs))
    for n, share in ((4, 0), (5, 0), (8, 0), (16, 0), (5, 0.2)):
        flagged, held = clusters(rng, n, share, 20, draws)
        words = f"{n} pairs, {'one in five 20 sd off' if share else 'normal'}"
        rows.append((f"{words}: called two clusters", "none" if share else "about 1%", flagged))
        rows.append((f"{words}: the interval holds the true gap", "none" if share else "94% to 96%", held))
    return rows


# --------------------------------------------------------------------------------------------- published runs


def _arm(label):
    """The Arm of a label such as `E4M3, only W, stored, nearest, ulp_adamw`."""
    rest = {words: name for name, words in AT_REST_LABELS.items() if words in label}
    name = label.partition(",")[0]
    operands = label.partition("only ")[2][:1] or "WAG"
    optimizer = "ulp_adamw" if label.endswith("ulp_adamw") else "adamw"
    return Arm(name, operands, next(iter(rest.values()), "float32"), optimizer)


def published():
    """The Comparison of the 591 published runs: their last validation losses, in 4 decimals, and nothing else."""
    lines = PUBLISHED.read_text().partition("## All runs")[2].splitlines()
    runs = []
    for line in [line for line in lines if line.startswith("| ")][1:]:
        name, label, rate, seed, _, loss, _ = (cell.strip() for cell in line[1:].split("|")[:7])
        run = Run(Path(name), name, FINISHED, sound=True, arm=_arm(label), val_loss=float(loss))
        run.config = {**COMMON, "learning_rate": float(rate), "seed": int(seed), "use_fp8": False}
        run.manifest = {"data": {"fingerprint": ""}}
        run.val_steps, run.val_losses = np.array([STEPS]), np.array([loss], np.float32)
        runs.append(run)
    return Comparison(runs)


def main():
    print("| simulated | promised | found |\n|---|---|---|")
    for words, promise, share in simulation_rows():
        print(f"| {words} | {promise} | {share:.1%} |")
    c = published()
    print("\n" + "\n\n".join(f"**{heading}:** {sentence}" for heading, sentence in tables.answer(c)) + "\n")
    print("\n".join(f"- {text}" for text in notes(c)) + "\n")
    print("Groups: " + ", ".join(f"{arm.label} {group}" for group, arm in c.ranking()) + "\n")
    for make in (
        tables.gaps_table,
        tables.costs_table,
        tables.effects_table,
        tables.rates_table,
        tables.pairwise_table,
    ):
        print(markdown_table(make(c)) + "\n")


if __name__ == "__main__":
    main()
