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
import subprocess
import sys
from pathlib import Path

import numpy as np
import vl_convert

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from altgrad_jax.errors import UserError  # noqa: E402
from altgrad_jax.report import figures  # noqa: E402
from altgrad_jax.report.analysis import Comparison  # noqa: E402
from altgrad_jax.report.runs import FINISHED, RECIPE, Arm, Reader, Run  # noqa: E402
from altgrad_jax.report.statistics import rank_correlation  # noqa: E402


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


def comparison_of(*tables):
    """The Comparison of the runs in the runs.csv of one or several reports: their last losses, and nothing else."""
    runs = []
    for row in (row for path in tables for row in csv.DictReader(Path(path).read_text().splitlines())):
        loss, rate = float(row["validation_loss"]), float(row["learning_rate"])
        run = Run(Path(row["run"]), row["run"], FINISHED, sound=True, arm=Arm(row["arm"]), val_loss=loss)
        draw = {name: int(row[name]) for name in ("seed", "data_seed")}
        run.config = draw | {"learning_rate": rate, "use_fp8": False, "recipe": (), "max_steps": 1, "eval_windows": 0}
        run.manifest = {"data": {"fingerprint": ""}}
        run.val_steps, run.val_losses = np.array([1]), np.array([loss], np.float32)
        runs.append(run)
    return Comparison(runs)


def shown(judged, words):
    """Two cells of a table: the mean with its interval, and `words`."""
    return [f"{judged.d.mean:+.3f} [{judged.d.low:+.3f}, {judged.d.high:+.3f}] (n={judged.d.n})", words]


def again(first, second, out):
    """Tables of every gap and claim in two sweeps with other seeds and in both together, and the picture of both."""
    looks = [comparison_of(first), comparison_of(second), comparison_of(first, second)]
    gaps = [{arm.format.removeprefix(RECIPE): (of, of.kind) for arm, of in c.gaps.items()} for c in looks]
    claims = [{f.claim.words: (f.judged, f.verdict) for f in c.findings} for c in looks]
    lines = []
    for kind, found in (("gap to bfloat16", gaps), ("claim", claims)):
        lines += [f"| {kind} | first | | second | | both | | p, Holm |", "|---|---|---|---|---|---|---|---|"]
        for name, (judged, _) in sorted(found[2].items(), key=lambda item: item[1][0].d.mean):
            cells = [shown(*of[name]) if name in of else ["", ""] for of in found]
            cells = [name, *(cell for two in cells for cell in two), f"{judged.p:.2g}, {judged.holm_p:.2g}"]
            lines.append(f"| {' | '.join(cells)} |")
        twice = [(found[0][name], found[1][name]) for name in found[0].keys() & found[1].keys()]
        same = sum(one[1] == other[1] for one, other in twice)
        signs = sum(one[0].d.mean * other[0].d.mean > 0 for one, other in twice)
        lines += ["", f"Of {len(twice)} in both sweeps {same} end in the same class, {signs} with the same sign.", ""]
    (out / "again.md").write_text("\n".join(lines))
    (out / "both.png").write_bytes(vl_convert.vegalite_to_png(figures.gaps(looks[2]).standalone, scale=2))
    print("\n".join(lines))


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
