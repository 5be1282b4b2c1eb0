"""Training in every format, with every way to keep the weights, and what each run's record says, as a table.

The runs of a campaign differ from a given config in the settings that define them and in nothing else: same batches,
same initial weights. Each is an ordinary run folder, so an interrupted campaign continues where it stopped.

What fails first is read from ablations: only W, only A or only G in the format, the weights in a float32 master, each
against the same run in bfloat16. What storing the weights adds is the difference between the stored and the master run.
"""

import math
from typing import cast

import numpy as np

from altgrad_jax.numerics.formats import DEFAULT_8BIT
from altgrad_jax.numerics.rules import AT_REST
from altgrad_jax.run import verdict
from altgrad_jax.run.record import read_history
from altgrad_jax.run.train import train

ABLATIONS = ("W", "A", "G")
STORED = AT_REST[1:]  # without the float32 master
LAST = 0.1  # of the steps: statistics are means over them
# Column heading -> metric; {at_rest} is "lost" or "not_flipped".
STATISTICS = {
    **{
        f"{title} {operand}": f"{name}/all/{operand}"
        for title, name in (("overflow", "overflow"), ("underflow", "underflow"), ("SQNR dB", "sqnr_db"))
        for operand in ABLATIONS
    },
    "shadow cosine": "grad_cosine",
    "shadow SQNR dB": "grad_sqnr_db",
    "flushed": "grad_flushed",
    "bf16's cosine": "grad_cosine_bfloat16",
    "bf16's SQNR dB": "grad_sqnr_db_bfloat16",
    "lost": "lost",
    "not flipped": "not_flipped",
    "effective lr": "effective_lr",
    "lost energy": "lost_energy",
    "ULPs moved": "ulps_moved",
    "code age": "code_age",
}


def plan(formats=DEFAULT_8BIT, *, shadow_interval, seeds):
    """{run name: settings}: references first, then formats with a master, with stored weights, and ablations."""
    runs = {"bf16": {}, "float32": {"compute_dtype": "float32"}}
    runs |= {f"bf16-seed{seed}": {"seed": seed} for seed in seeds}
    shadow = {"use_shadow": True, "shadow_interval": shadow_interval}
    for name in formats:
        runs[name] = {"use_fp8": True, "formats": (name,), **shadow}
        for at_rest in STORED:
            runs[f"{name}-{at_rest}"] = runs[name] | {"weights_at_rest": at_rest}
        runs[f"{name}-nearest-ulp_adamw"] = runs[f"{name}-nearest"] | {"optimizer": "ulp_adamw"}
        for operand in ABLATIONS:
            runs[f"{name}-only{operand}"] = {
                "use_fp8": True,
                "formats": (f"block_*:{operand}={name}",),
                "metrics": "grad,format",
            }
    return runs


def run(config, out, runs, *, data_dir, say=print):
    """Trains every run of the plan that is not finished; {run name: verdict}."""
    results = {}
    for number, (name, changes) in enumerate(runs.items(), 1):
        changed = config.copy_and_resolve_references()
        with changed.unlocked():
            changed.update({"run_name": name, "wandb_mode": "disabled", "console": "quiet", **changes})
        changed.checkpoint_dir = str(out / name)
        result = train(changed, data_dir=data_dir)
        assert result.verdict is not None, "one process writes the record and the verdict"
        results[name] = result.verdict
        say(f"{number}/{len(runs)} {name}: {result.verdict['verdict']}; validation {result.verdict['final_val_loss']}")
    return results


def summarize(out, name) -> dict[str, float]:
    """{column: number} of one run: losses, and the mean of each statistic over the last LAST of the steps."""
    result = cast(dict, verdict.make_verdict(out / name))
    history = read_history(out / name, list(STATISTICS.values()))
    n = max(1, round(LAST * len(history["step"])))

    def mean(values):
        finite = values[-n:][np.isfinite(values[-n:])]
        return float(finite.mean()) if finite.size else math.nan

    # The mean over the last 5% of the steps; a run that ended early or was not finite has no such number.
    return {
        "steps": result["steps"],
        "train": _number(result["loss_last"]),
        "val": _number(result["final_val_loss"]),
        "nonfinite": result["nonfinite_steps"],
        **{column: mean(history[metric]) for column, metric in STATISTICS.items()},
    }


def _number(value):
    return value if isinstance(value, float) else math.nan


def table(columns, rows):
    """Markdown: {row name: {column: number or text}}; an empty cell where a number does not apply."""
    lines = ["| | " + " | ".join(columns) + " |", "|" + "---|" * (len(columns) + 1)]
    for name, row in rows.items():
        lines.append(f"| {name} | " + " | ".join(_show(row.get(column), column) for column in columns) + " |")
    return "\n".join(lines)


def _show(value, column):
    if value is None or isinstance(value, float) and math.isnan(value):
        return ""
    if isinstance(value, str):
        return value
    if column.startswith(("overflow", "underflow", "flushed", "lost", "not flipped")) and column != "lost energy":
        return f"{100 * value:.3g}%"
    return (
        f"{value:.5f}"
        if "cosine" in column
        else f"{value:.1f}"
        if "dB" in column or column == "code age"
        else f"{value:+.4f}"
        if column.startswith("gap")
        else f"{value:.4f}"
    )


def costs_most(gaps, noise):
    """Which of forward pass (W, A), gradient (G) and update the gaps of one format blame; see `report`."""
    causes = {
        "forward, weights": gaps["gap only W"],
        "forward, activations": gaps["gap only A"],
        "gradient": gaps["gap only G"],
    }
    if gaps["gap stored, nearest"] is not None and gaps["gap all"] is not None:
        causes["update"] = gaps["gap stored, nearest"] - gaps["gap all"]
    # A run that did not end has no loss: worse than any number.
    causes = {name: math.inf if math.isnan(gap) else gap for name, gap in causes.items() if gap is not None}
    worst = max(causes, key=lambda cause: causes[cause], default=None)
    return worst if worst and causes[worst] > noise else "not separated"


def report(out, formats, seeds):
    """The campaign as Markdown, from its run folders."""
    found = {path.name: summarize(out, path.name) for path in sorted(out.iterdir()) if (path / "verdict.json").exists()}
    bf16 = found["bf16"]
    for row in found.values():
        row["gap"] = row["val"] - bf16["val"]
    noise = [found[f"bf16-seed{seed}"]["gap"] for seed in seeds if f"bf16-seed{seed}" in found]
    parts = [
        "### Loss: nats per token, training (mean of the last 5% of the steps) and validation at the end\n",
        "The gap is to bfloat16 with the same seed and batches. Between seeds, bfloat16 itself differs by "
        + (", ".join(f"{gap:+.4f}" for gap in noise) or "(not measured)")
        + ".\n",
    ]
    losses = {name: found[name] for name in ("bf16", "float32") if name in found}
    kinds = ["", *(f"-{at_rest}" for at_rest in STORED), "-nearest-ulp_adamw"]
    losses |= {name + kind: found[name + kind] for name in formats for kind in kinds if name + kind in found}
    parts.append(table(["train", "val", "gap", "nonfinite"], losses))
    parts.append("\n### Where each format costs: gap of the validation loss with one operand in the format\n")
    ablations = {}
    for name in formats:
        ablations[name] = {
            f"only {operand}": found.get(f"{name}-only{operand}", {}).get("gap") for operand in ABLATIONS
        }
        ablations[name] |= {"all": found.get(name, {}).get("gap")}
        ablations[name] |= {f"stored, {at_rest}": found.get(f"{name}-{at_rest}", {}).get("gap") for at_rest in STORED}
        ablations[name] = {f"gap {key}": value for key, value in ablations[name].items()}
        ablations[name]["costs most"] = costs_most(ablations[name], max(map(abs, noise), default=0.0))
    columns = [f"only {operand}" for operand in ABLATIONS] + ["all"] + [f"stored, {at_rest}" for at_rest in STORED]
    parts.append(
        "`costs most`: the largest of the three operands' gaps and of what storing the weights to nearest "
        "adds to the gap of all three, where it exceeds the largest difference between two seeds of bfloat16; "
        "`not separated` where none does. Above 0 is worse than bfloat16.\n"
    )
    parts.append(table([*(f"gap {column}" for column in columns), "costs most"], ablations))
    for title, kind, columns in (
        ("Operands and gradients, float32 master", "", list(STATISTICS)[:14]),
        ("The update, float32 master", "", list(STATISTICS)[15:]),
        *(
            (
                f"The update, weights stored, {at_rest}",
                f"-{at_rest}",
                [*list(STATISTICS)[9:12], "lost", *list(STATISTICS)[16:]],
            )
            for at_rest in STORED
        ),
    ):
        parts.append(f"\n### {title}\n")
        parts.append(table(columns, {name: found[name + kind] for name in formats if name + kind in found}))
    return "\n".join(parts) + "\n"
