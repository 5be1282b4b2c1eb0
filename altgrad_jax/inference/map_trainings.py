"""A precision map shown, and confirmed by trainings: which of them, and what they say."""

import json
import math
from collections.abc import Mapping
from pathlib import Path

from altgrad_jax import config as settings
from altgrad_jax.errors import UserError
from altgrad_jax.files import write_atomically
from altgrad_jax.inference import precision_map as maps
from altgrad_jax.inference.precision_map import Cell, Closed
from altgrad_jax.numerics.recipes import PRODUCTS, get_recipe
from altgrad_jax.run.record import read_manifest
from altgrad_jax.run.sweep import axis, grid, make_members, sweep
from altgrad_jax.run.verdict import read_verdict

MAP = "map.json"
SHARES = (0.05, 0.15, 0.3, 0.5)
RANDOM_MAPS = 2
_OF_A_RUN = (
    *("checkpoint_dir", "run_name", "tags", "recipe", "recipe_program", "certify_draws", "init_from"),
    *("seed", "data_seed"),
)


def _recipe_of(run, name: str | None) -> tuple[str, dict]:
    """(the recipe's name without what it keeps high, the run's settings)."""
    values = settings.upgraded(read_manifest(run)["config"])
    if name is None and not values["recipe"]:
        raise UserError(f"the run {run} has no recipe: give one with --recipe, such as nvfp4")
    own = str(name or values["recipe"][0]).partition("~")[0]
    get_recipe(own)
    return own, values


def show(run, name, share, draws, **choices) -> None:
    """Prints the scores of a checkpoint's cells, and the map of this share that they give."""
    name, values = _recipe_of(run, name)
    scores = maps.scores_of(run, name, draws=draws, **choices)
    print("\n".join(lines_of(scores, name, values, share)))


def lines_of(scores: maps.Scores, name: str, values: Mapping, share: float, forward_weight: float = 0.5) -> list[str]:
    """Lines of text: cells by score per cost, the map as a picture and as settings."""
    costs, score = maps.costs_of(values), maps.combined(scores, forward_weight)
    lines = [f"{name}: cells by score per cost", f"{'layer':<22}{'product':<8}{'cost':>8}{'score':>8}  measured"]
    for cell in sorted(costs, key=lambda cell: -score[cell] / costs[cell]):
        measured = f"error {scores.error[cell]:.2e}" if cell in scores.error else ""
        if cell in scores.harm:
            measured = "harm {:+.2e} +- {:.1e} nats (standard error)".format(*scores.harm[cell])
        lines.append(f"{cell[0]:<22}{cell[1]:<8}{costs[cell]:>8.2%}{score[cell]:>8.3f}  {measured}")
    kept = maps.best_map(score, costs, share)
    lines += ["", f"kept in bfloat16, {sum(costs[cell] for cell in kept):.1%} of the multiplications:", ""]
    lines += maps.picture(kept, values["n_layer"], values["model"])
    return [*lines, "", *maps.settings_lines(name, kept, values["n_layer"], values["model"])]


def planned(name: str, scores: maps.Scores, values: Mapping, n_cells: int) -> dict[str, tuple[str, tuple[Cell, ...]]]:
    """{what is trained: (item of `recipe`, kept cells)}.

    Beside the recipe, bfloat16 and the recipe in one part only: maps of SHARES, the rules of thumb, random maps of the
    cost of `last 15%`, and the best cells, left out of the recipe by themselves (`out:`) and left in alone (`in:`).
    """
    n_layer, model = values["n_layer"], values["model"]
    costs, score = maps.costs_of(values), maps.combined(scores)
    every = maps.cells_of(n_layer, model)
    kept = {f"map {share:g}": maps.best_map(score, costs, share) for share in SHARES}
    thumb = maps.rules_of_thumb(n_layer, model)
    kept |= thumb
    cost = sum(costs[cell] for cell in thumb["last 15%"])
    kept["map as last 15%"] = maps.best_map(score, costs, cost)
    kept |= {f"random {i}": maps.random_map(costs, cost, i) for i in range(RANDOM_MAPS)}
    best = sorted(every, key=lambda cell: -score[cell] / costs[cell])[:n_cells]
    kept |= {f"out: {cell[0]}:{cell[1]}": (cell,) for cell in best}
    kept |= {f"in: {cell[0]}:{cell[1]}": tuple(other for other in every if other != cell) for cell in best}
    found = {"bf16": ("bf16", tuple(every)), "recipe": (maps.item_of(name, ()), ())}
    for part in ("fprop", "backward"):
        high = tuple(cell for cell in every if (cell[1] == PRODUCTS[0]) != (part == "fprop"))
        found[f"only {part}"] = (maps.item_of(f"{name}:{part}", ()), high)
    return found | {what: (maps.item_of(name, cells), cells) for what, cells in kept.items()}


def confirm(run, name, share, draws, out, seeds, n_cells, max_steps, **choices) -> int:
    """Trains what is `planned`, prints what each closed of the gap, and writes MAP. Returns a sweep's exit code."""
    name, values = _recipe_of(run, name)
    scores = maps.scores_of(run, name, draws=draws, **choices)
    plan = planned(name, scores, values, n_cells)
    own = {key: value for key, value in values.items() if key not in _OF_A_RUN}
    config = settings.from_dict(settings.to_dict(settings.default_config()) | own | _shorter(own, max_steps))
    by_item = {item: what for what, (item, _) in plan.items()}  # maps that are the same are trained once
    labels = {item: f"r{i:02d}" for i, item in enumerate(by_item)}
    items = axis("recipe", [(item,) for item in by_item], label=lambda value: labels[value[0]])
    pairs = [{"seed": seed, "data_seed": seed, "run_name": f"s{seed}"} for seed in seeds]
    members = make_members(config, grid(items, pairs), out)
    code = sweep(members, out, data_dir=choices.get("data_dir") or read_manifest(run)["data"]["dir"])
    if code:
        return code
    losses: dict[str, dict[int, float]] = {item: {} for item in by_item}
    for member in members:
        loss = (read_verdict(member.folder) or {}).get("final_val_loss")
        if isinstance(loss, float):
            losses[member.config.recipe[0]][member.config.seed] = loss
    result = results(plan, losses, maps.costs_of(values))
    weight = forward_weight(plan, losses)
    print("\n".join([*curve_lines(result), "", *lines_of(scores, name, values, share, weight)]))
    finite = [{key: None if _is_infinite(value) else value for key, value in row.items()} for row in result]
    write_atomically(Path(out) / MAP, (json.dumps({"recipe": name, "trained": finite}, indent=2) + "\n").encode())
    return 0


def _is_infinite(value) -> bool:
    """Whether JSON has no number for it."""
    return isinstance(value, float) and not math.isfinite(value)


def _shorter(values, max_steps):
    if max_steps is None:
        return {}
    return {"max_steps": max_steps, "warmup_steps": min(values["warmup_steps"], max_steps)}


def results(plan: Mapping, losses: Mapping[str, Mapping[int, float]], costs: Mapping[Cell, float]) -> list[dict]:
    """A row for each training that was planned: what, cost, mean gap to bfloat16, and share of the gap closed."""
    full, baseline = losses[plan["recipe"][0]], losses[plan["bf16"][0]]
    rows = []
    for what, (item, kept) in plan.items():
        own = losses[item]
        gaps = [own[seed] - baseline[seed] for seed in own.keys() & baseline.keys()]
        of: Closed = maps.closed(full, own, baseline)
        gap = sum(gaps) / len(gaps) if gaps else math.nan  # all of its runs may have diverged
        row = {"what": what, "item": item, "cost": sum(costs[cell] for cell in kept), "closed": of.share}
        row |= {"low": of.low, "high": of.high, "pairs": of.n, "gap": gap}
        rows.append(row | {"losses": {str(seed): own[seed] for seed in sorted(own)}})
    return rows


def forward_weight(plan: Mapping, losses: Mapping[str, Mapping[int, float]]) -> float:
    """Share of the gap that the forward pass alone costs, of that and the backward pass's; from 0 to 1."""
    baseline, costs = losses[plan["bf16"][0]], []
    for part in ("fprop", "backward"):
        own = losses[plan[f"only {part}"][0]]
        costs.append(max(sum(own[seed] - baseline[seed] for seed in own.keys() & baseline.keys()), 0.0))
    return costs[0] / sum(costs) if sum(costs) > 0 else 0.5


def curve_lines(rows: list[dict]) -> list[str]:
    """The table: share of the multiplications in bfloat16, and share of the loss gap closed with its 95% interval."""
    lines = [f"{'':<34}{'cost':>7}{'gap, nats':>11}{'closed':>9}   95% interval (pairs)"]
    for row in sorted(rows, key=lambda row: row["cost"]):
        interval = f"{row['low']:.2f} to {row['high']:.2f} ({row['pairs']})"
        lines.append(f"{row['what']:<34}{row['cost']:>7.1%}{row['gap']:>+11.4f}{row['closed']:>9.2f}   {interval}")
    return lines
