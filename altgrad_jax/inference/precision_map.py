"""Which products of which layers to keep in bfloat16: scores from one checkpoint, and trainings that confirm them.

A *cell* is one product of one layer of the blocks. A *map* is a set of cells that stay in the compute dtype; the recipe
holds for all others. Its cost is its share of the multiplications of all cells.

Scores, from one checkpoint and no training:

fprop          harm: loss by the recipe minus loss with this cell in bfloat16, on the run's evaluation windows
dgrad, wgrad   relative squared error that an update sees: bias + variance x (windows looked at / windows of an update)

Both kinds are scaled to a sum of 1 and weighted, for no pass over one checkpoint tells what an error of the gradient
costs in loss. Trainings do: those of the recipe in one part only give the weights.
"""

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import jax
import numpy as np
from scipy.special import stdtrit

from altgrad_jax.inference.certify import load, table_with
from altgrad_jax.numerics.layers import HEAD, linear_layers, matrix_sizes
from altgrad_jax.numerics.recipes import PRODUCTS
from altgrad_jax.step import program, recipe, update
from altgrad_jax.step.certify import biases, certify, windows_of

Cell = tuple[str, str]  # layer, product
CONFIDENCE = 0.95
# The linear layers of a block by the names that they have elsewhere. Transformer Engine has one product, fc1, for `up`
# and `gate`; its names are regular expressions that fit its TransformerLayer (and, by memory, Megatron-LM's layers).
TRANSFORMER_ENGINE = {"attn_qkv": "self_attention.*qkv", "attn_out": "self_attention.*proj", "mlp_up": "mlp.*fc1",
                      "mlp_gate": "mlp.*fc1", "mlp_down": "mlp.*fc2"}  # fmt: skip
TORCHTITAN = {"attn_qkv": "attention.qkv_linear", "attn_out": "attention.wo", "mlp_up": "feed_forward.w3",
              "mlp_gate": "feed_forward.w1", "mlp_down": "feed_forward.w2"}  # fmt: skip


def cells_of(n_layer: int, model: str = "gpt2") -> list[Cell]:
    """All cells, in the order of the model."""
    return [(layer, product) for layer in linear_layers(n_layer, model) if layer != HEAD for product in PRODUCTS]


def costs_of(settings: Mapping) -> dict[Cell, float]:
    """{cell: share of the multiplications of all cells}; the three products of a layer cost the same."""
    sizes = matrix_sizes(
        n_embd=settings["n_embd"],
        vocab_size=1,
        model=settings["model"],
        n_head=settings["n_head"],
        n_kv_head=settings["n_kv_head"],
    )
    cells = cells_of(settings["n_layer"], settings["model"])
    of = {cell: float(np.prod(sizes[cell[0].rpartition("/")[2]])) for cell in cells}
    return {cell: cost / sum(of.values()) for cell, cost in of.items()}


def item_of(name: str, kept: Iterable[Cell]) -> str:
    """The item of the setting `recipe` that holds for all cells but the kept ones (and not for the head)."""
    products: dict[str, list[str]] = {}
    for layer, product in sorted(kept):
        products.setdefault(layer, []).append(product)
    whole = [layer for layer, found in products.items() if len(found) == len(PRODUCTS)]
    parts = [f"{layer}:{p}" for layer, found in products.items() if layer not in whole for p in found]
    return "~".join([name, HEAD, *whole, *parts])


# ------------------------------------------------------------------------------------------------------------- scores


class Scores(NamedTuple):
    """What one checkpoint says of every cell."""

    harm: dict[Cell, tuple[float, float]]  # of fprop: nats per token, and its standard error over windows
    error: dict[Cell, float]  # of dgrad and wgrad, relative energy


def scores_of(path, name: str, *, draws: int = 16, **choices) -> Scores:
    """Scores of a checkpoint under the recipe `name`, in all layers of the blocks.

    Args:
      choices: `checkpoint`, `data_dir` of certify.load.
    """
    loaded = load(path, items=[item_of(name, ())], draws=draws, **choices)
    step, settings = loaded.step, loaded.settings
    cells = cells_of(settings["n_layer"], settings["model"])
    forward = [cell for cell in cells if cell[1] == PRODUCTS[0]]
    # One program for all: what differs is the table.
    items = [item_of(name, ()), *(item_of(name, [cell]) for cell in forward)]
    own = recipe.options_of(settings | {"recipe_program": items, "certify_draws": 0, "metrics": "none"})
    assert own is not None and step.recipe is not None, "made for a recipe"
    own = recipe.for_platform(own, jax.devices()[0].platform)
    model = recipe.quantized_model(step.plain, own)
    operands_of = partial(update.operands_at, step.plain, None, own)
    losses = jax.jit(partial(program.window_losses, model, step.eval_batch_size, step.mesh, operands_of))
    state = recipe.init_state(own)
    found = [np.asarray(losses(loaded.params, loaded.windows, state, table_with(own, item)), float) for item in items]
    harm = {cell: _mean_and_se(found[0] - without) for cell, without in zip(forward, found[1:], strict=True)}
    share = windows_of(step) / step.options.batch_size
    measured = jax.jit(partial(certify, step, draws))(
        loaded.params,
        loaded.windows[: step.eval_batch_size],
        np.int32(settings["seed"]),
        loaded.quant,
        update.numbers_table(step.options),
    )
    of_layers = biases(jax.device_get(measured), step.recipe, draws)
    error = {}
    for layer, product in cells:
        p = PRODUCTS.index(product)
        if p:
            of = of_layers[layer]
            error[layer, product] = float(max(of.bias[1, p], 0) + share * max(of.variance[1, p], 0))
    return Scores(harm, error)


def _mean_and_se(values):
    return float(values.mean()), float(values.std(ddof=1) / np.sqrt(len(values)))


def combined(scores: Scores, forward_weight: float = 0.5) -> dict[Cell, float]:
    """{cell: score}, sums of fprop and of the backward products scaled to forward_weight and 1 - forward_weight."""
    harm = {cell: max(mean, 0.0) for cell, (mean, _) in scores.harm.items()}
    found = {}
    for part, weight in ((harm, forward_weight), (scores.error, 1 - forward_weight)):
        total = sum(part.values()) or 1.0
        found |= {cell: weight * value / total for cell, value in part.items()}
    return found


# --------------------------------------------------------------------------------------------------------------- maps


def best_map(score: Mapping[Cell, float], costs: Mapping[Cell, float], share: float) -> tuple[Cell, ...]:
    """The cells of most score per cost that cost at most `share` together."""
    return _fill(sorted(costs, key=lambda cell: -score[cell] / costs[cell]), costs, share)


def random_map(costs: Mapping[Cell, float], share: float, seed: int) -> tuple[Cell, ...]:
    """Cells in random order that cost at most `share` together."""
    cells = list(costs)
    np.random.default_rng(seed).shuffle(cells)
    return _fill([(layer, product) for layer, product in cells], costs, share)


def _fill(cells, costs, share):
    kept, left = [], share * (1 + 1e-9)
    for cell in cells:
        if costs[cell] <= left:
            kept.append(cell)
            left -= costs[cell]
    return tuple(sorted(kept))


def blocks_map(n_layer: int, model: str, blocks: Iterable[int]) -> tuple[Cell, ...]:
    """All cells of these blocks."""
    whole = {f"block_{b}" for b in blocks}
    return tuple(cell for cell in cells_of(n_layer, model) if cell[0].partition("/")[0] in whole)


def rules_of_thumb(n_layer: int, model: str = "gpt2") -> dict[str, tuple[Cell, ...]]:
    """Maps that recipes come with: the last 15% of the blocks (NVFP4), and the first and the last block."""
    last = -(-15 * n_layer // 100)
    return {
        "last 15%": blocks_map(n_layer, model, range(n_layer - last, n_layer)),
        "first and last": blocks_map(n_layer, model, {0, n_layer - 1}),
    }


# -------------------------------------------------------------------------------------------------- what they closed


class Closed(NamedTuple):
    """Share of the loss gap that a map closes, with its interval; NaN where there are fewer than two pairs."""

    share: float
    low: float
    high: float
    n: int


def closed(full: Mapping[int, float], mapped: Mapping[int, float], baseline: Mapping[int, float]) -> Closed:
    """(loss by the recipe - loss with the map) / (loss by the recipe - loss of bfloat16), paired by seed.

    The interval is Fieller's of a ratio of means (1954): of an uncertain gap it is wide, and of one that cannot be told
    from 0 it has no ends.
    """
    seeds = sorted(full.keys() & mapped.keys() & baseline.keys())
    a = np.array([full[s] - mapped[s] for s in seeds])
    b = np.array([full[s] - baseline[s] for s in seeds])
    n = len(seeds)
    if n == 0 or b.mean() == 0:
        return Closed(np.nan, np.nan, np.nan, n)
    ratio = float(a.mean() / b.mean())
    if n < 2:
        return Closed(ratio, np.nan, np.nan, n)
    t2 = stdtrit(n - 1, (1 + CONFIDENCE) / 2) ** 2 / n
    (aa, ab), (_, bb) = np.cov(a, b)
    # The ratios r for which mean(a - r b) cannot be told from 0.
    p, q, c = b.mean() ** 2 - t2 * bb, a.mean() * b.mean() - t2 * ab, a.mean() ** 2 - t2 * aa
    root = q * q - p * c
    if p <= 0 or root < 0:
        return Closed(ratio, -np.inf, np.inf, n)
    return Closed(ratio, float((q - np.sqrt(root)) / p), float((q + np.sqrt(root)) / p), n)


# ----------------------------------------------------------------------------------------------------------- as text


def picture(kept: Sequence[Cell], n_layer: int, model: str = "gpt2") -> list[str]:
    """A line for each block, from the last to the first, with the kept products (f, d, w) of each layer."""
    parts = [layer.partition("/")[2] for layer in linear_layers(1, model) if layer != HEAD]
    lines = [f"{'':<10}" + "".join(f"{part:<10}" for part in parts) + "   f fprop, d dgrad, w wgrad kept high"]
    for b in reversed(range(n_layer)):
        marks = ["".join(p[0] if (f"block_{b}/{part}", p) in kept else "." for p in PRODUCTS) for part in parts]
        lines.append(f"{f'block_{b}':<10}" + "".join(f"{mark:<10}" for mark in marks))
    return lines


def settings_lines(name: str, kept: Sequence[Cell], n_layer: int, model: str = "gpt2") -> list[str]:
    """The map as settings of this project, of Transformer Engine's precision debug tools, and of torchtitan."""
    item = f"--config.recipe='{item_of(name, kept)}'"
    return [item, "", *_transformer_engine_lines(kept), "", *_torchtitan_lines(kept, n_layer, model)]


def _transformer_engine_lines(kept):
    """A section for each layer, for Transformer Engine refuses a layer that two sections name. Where it has one product
    for two layers, what either keeps is kept."""
    gemms: dict[tuple[int, str], set[str]] = {}
    for layer, product in kept:
        block, _, part = layer.partition("/")
        # Layers are numbered from 1 there.
        of = int(block.removeprefix("block_")) + 1, TRANSFORMER_ENGINE[part]
        gemms.setdefault(of, set()).add(product)
    lines = ["# Transformer Engine 2.13 or newer, config of nvdlfw_inspect (YAML); layers are numbered from 1:"]
    for i, ((number, pattern), products) in enumerate(sorted(gemms.items())):
        of = ", ".join(product for product in PRODUCTS if product in products)
        lines += [
            f"keep_{i}:",
            "  enabled: True",
            f"  layers: {{layer_name_regex_pattern: 'layers\\.{number}\\..*{pattern}'}}",
            f"  transformer_engine: {{DisableQuantizationGEMM: {{enabled: True, gemms: [{of}]}}}}",
        ]
    return lines


def _torchtitan_lines(kept, n_layer, model):
    """Layers all of whose products are kept: its Float8LinearConverter names those that it leaves out, its
    MXFP8LinearConverter and NVFP4LinearConverter those that they convert."""
    if model != "llama":
        return ["# torchtitan has Llama's blocks and none of GPT-2"]
    layers = [layer for layer in linear_layers(n_layer, model) if layer != HEAD]
    names: dict[bool, list[str]] = {True: ["lm_head"], False: []}
    for layer in layers:
        block, _, part = layer.partition("/")
        whole = all((layer, product) in kept for product in PRODUCTS)
        names[whole].append(f"layers.{block.removeprefix('block_')}.{TORCHTITAN[part]}")
    return [
        "# torchtitan, whole layers only; of Float8LinearConverter.Config:",
        f"filter_fqns = {names[True]!r}",
        "# of MXFP8LinearConverter.Config and NVFP4LinearConverter.Config:",
        f"fqns = {names[False]!r}",
    ]
