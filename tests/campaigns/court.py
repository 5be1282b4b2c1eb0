"""What goes with the loss gaps of a sweep over recipes; its members against runs alone; a second sweep beside it.

    python tests/campaigns/court.py explain RUNS DATA OUT [--seeds=3] [--draws=16]
    python tests/campaigns/court.py alone RUNS DATA OUT [--members=5]
    python tests/campaigns/court.py again FIRST_CSV SECOND_CSV OUT

explain   certificates of every recipe at the weights of the bfloat16 runs, the same for all; Spearman's rank
          correlation of each number with the gap, over the recipes, with a bootstrap interval over recipes
again     every gap to bfloat16 and every claim in two sweeps with other seeds, by the runs.csv of their reports: each
          by itself, which conclusions hold, and both together
alone     trains members, drawn at random, each as the only one of a process; compares losses and last arrays to the bit
"""

import argparse
import csv
import dataclasses
import subprocess
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from altgrad_jax.errors import UserError  # noqa: E402
from altgrad_jax.report.analysis import Comparison  # noqa: E402
from altgrad_jax.report.claims import CLAIMS  # noqa: E402
from altgrad_jax.report.runs import RECIPE, REFERENCE, Reader  # noqa: E402
from altgrad_jax.report.statistics import Judged, judge, paired, rank_correlation  # noqa: E402


def predictors(found):
    """{name: number} of one certificate; errors are relative energies, against the unquantized operands."""
    of, whole = found.biases["all"], found.metrics
    numbers = {}
    for p, product in enumerate(("fprop", "dgrad", "wgrad")):
        bias, variance = of.bias[1, p], of.variance[1, p]
        numbers |= {f"bias, {product}": bias, f"variance, {product}": variance, f"error, {product}": bias + variance}
    bias, variance = whole["grad_total_bias"], whole["grad_total_variance"]
    numbers |= {"persistent bias, wgrad": of.persistent[1, 2], "shrinkage, wgrad": of.shrinkage[1, 2]}
    return numbers | {"bias, gradient": bias, "variance, gradient": variance, "error, gradient": bias + variance}


def explain(runs, data, out, seeds, draws):
    from altgrad_jax.inference.certify import certify_recipes
    from altgrad_jax.run.device import use_compilation_cache

    use_compilation_cache()  # one program for all the runs
    c = Comparison(Reader().runs([runs]))
    arms = [arm for arm in c.gaps if arm.format.startswith(RECIPE)]
    items = [arm.format.removeprefix(RECIPE) for arm in arms]
    cell = c.cell(c.reference, c.choice(c.reference).rate)
    looks = []
    for run in list(cell.values())[:seeds]:
        found = certify_recipes(run.path, items, draws, data_dir=data)
        looks.append({item: predictors(one) for item, one in found.items()})
        print(f"certified at the weights of {run.name}", flush=True)
    gap = np.array([c.gaps[arm].d.mean for arm in arms])
    names = list(looks[0][items[0]])
    table = {name: np.array([np.mean([look[item][name] for look in looks]) for item in items]) for name in names}
    with open(out / "explain.csv", "w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["recipe", "gap", *names])
        writer.writerows([item, gap[i], *(table[name][i] for name in names)] for i, item in enumerate(items))
    lines = [f"| over {len(gap)} recipes | Spearman | 95% interval |", "|---|---|---|"]
    for name, values in table.items():
        if of := rank_correlation(values, gap):
            lines.append(f"| {name} | {of.rho:+.2f} | {of.low:+.2f} to {of.high:+.2f} |")
    (out / "explain.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


@dataclasses.dataclass(frozen=True)
class Twice:
    """One comparison in a first sweep, in a second one, and in both together."""

    words: str
    first: Judged
    second: Judged
    both: Judged

    def cells(self):
        """A row of a table: means and intervals, classes, and the p of a difference over both, raw and corrected."""
        looks = [(f"{of.d.mean:+.3f} [{of.d.low:+.3f}, {of.d.high:+.3f}]", of.kind) for of in self.looks]
        return [self.words, *(cell for look in looks for cell in look), f"{self.both.p:.2g}, {self.both.holm_p:.2g}"]

    @property
    def looks(self):
        return self.first, self.second, self.both


def losses_of(path):
    """{arm: {(seed, data seed): last validation loss}} of a report's runs.csv."""
    losses = {}
    with open(path, newline="") as file:
        for row in csv.DictReader(file):
            draw = int(row["seed"]), int(row["data_seed"])
            losses.setdefault(row["arm"].removeprefix(RECIPE), {})[draw] = float(row["validation_loss"] or "nan")
    return losses


def judged_twice(first, second, pairs):
    """[Twice] of the pairs of arms {words: (arm, arm)}; the tests of one sweep are corrected together."""
    both = {arm: first[arm] | second[arm] for arm in first.keys() & second.keys()}
    looks = [judge([paired(of[a], of[b]) for a, b in pairs.values()]) for of in (first, second, both)]
    return [Twice(words, *three) for words, *three in zip(pairs, *looks, strict=True)]


def again(first, second, out):
    first, second = losses_of(first), losses_of(second)
    arms = sorted((first.keys() & second.keys()) - {REFERENCE})
    if overlap := {*first[REFERENCE]} & {*second[REFERENCE]}:
        raise UserError(f"both sweeps have the seeds {sorted(overlap)}; a second court takes others")
    claims = {f"{claim.words}: {a} - {b}": (a, b) for claim, a, b in claims_of(arms)}
    lines = []
    for pairs in ({arm: (arm, REFERENCE) for arm in arms}, claims):
        found = judged_twice(first, second, pairs)
        found.sort(key=lambda one: one.both.d.mean)
        lines += ["| | first | class | second | class | both | class | p, Holm |", "|---|---|---|---|---|---|---|---|"]
        lines += ["| " + " | ".join(one.cells()) + " |" for one in found] + [""]
        same = sum(one.first.kind == one.second.kind for one in found)
        signs = sum(one.first.d.mean * one.second.d.mean > 0 for one in found)
        lines += [f"{same} of {len(found)} have the same class in both sweeps, {signs} the same sign.", ""]
    (out / "again.md").write_text("\n".join(lines))
    print("\n".join(lines))


def claims_of(arms):
    """[(claim, arm, arm)] of the published claims of which both arms are there; `~head` on both counts as neither."""
    return [
        (claim, claim.higher + kept, claim.lower + kept)
        for claim in CLAIMS
        for kept in ("", "~head")
        if {claim.higher + kept, claim.lower + kept} <= {*arms}
    ]


def alone(runs, data, out, members):
    chosen = np.random.default_rng(0).choice(sorted(path.parent for path in Path(runs).glob("*/verdict.json")), members)
    for folder in map(Path, dict.fromkeys(chosen)):
        made = subprocess.run([sys.executable, __file__, "one", str(folder), data, str(out / folder.name)], check=False)
        if made.returncode:
            raise UserError(f"{folder.name} could not be trained alone: exit code {made.returncode}")
        same, differ = compared(folder, out / folder.name)
        print(
            f"{folder.name}: {same} arrays and the losses equal to the bit"
            if not differ
            else f"{folder.name}: {differ}"
        )


def one(folder, data, out):
    """Trains the member of a folder again, as the only one, with the program that its settings name."""
    from altgrad_jax.config import from_dict
    from altgrad_jax.run.record import read_manifest
    from altgrad_jax.run.sweep import Member, sweep

    config = from_dict(read_manifest(folder)["config"] | {"checkpoint_dir": str(out), "console": "quiet"})
    raise SystemExit(sweep([Member(config)], out.parent, data_dir=data, cpu_devices=2))


def compared(folder, other):
    """(equal arrays, what differs) of the last checkpoints and the losses of two run folders."""
    from altgrad_jax.run.checkpoint import load_arrays
    from altgrad_jax.run.record import read_rows

    def losses(path):
        return [(row["step"], row.get("loss"), row.get("val_loss")) for row in read_rows(path, ("loss", "val_loss"))]

    differ = [] if losses(folder) == losses(other) else ["losses"]
    (first, _), (second, _) = (load_arrays(path, None, ("",)) for path in (folder, other))
    first, second = flat(first), flat(second)
    differ += [name for name in first if first[name].tobytes() != second[name].tobytes()]
    return len(first) - len(differ), differ


def flat(tree, path=""):
    """{path: array} of nested dicts."""
    if not isinstance(tree, dict):
        return {path: np.asarray(tree)}
    return {name: array for key, value in tree.items() for name, array in flat(value, f"{path}/{key}").items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("explain", "alone", "again", "one"))
    parser.add_argument("runs")
    parser.add_argument("data")
    parser.add_argument("out", type=Path)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--draws", type=int, default=16)
    parser.add_argument("--members", type=int, default=5)
    args = parser.parse_args()
    if args.what == "one":
        return one(Path(args.runs), args.data, args.out)
    args.out.mkdir(parents=True, exist_ok=True)
    if args.what == "again":
        again(args.runs, args.data, args.out)
    elif args.what == "explain":
        explain(args.runs, args.data, args.out, args.seeds, args.draws)
    else:
        alone(args.runs, args.data, args.out, args.members)


if __name__ == "__main__":
    main()
