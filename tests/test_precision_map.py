"""Maps of what to keep in bfloat16: cells and costs, names of recipes with them, intervals of what they close."""

import ast
import json
import math
import re

import jax
import numpy as np
import pytest
import yaml
from test_training import tiny

from altgrad_jax.config import problems, values_of
from altgrad_jax.errors import UserError
from altgrad_jax.inference import map_trainings as trainings
from altgrad_jax.inference import precision_map as maps
from altgrad_jax.numerics.recipes import PRODUCTS, SLOTS, get_recipe, in_layers, kept_high
from altgrad_jax.report import draw_map
from altgrad_jax.report.figures import map_curve
from altgrad_jax.step import recipe

SIZES = {"n_layer": 7, "n_embd": 64, "n_head": 4, "n_kv_head": 0, "model": "gpt2"}
COSTS = maps.costs_of(SIZES)


def test_costs_are_shares_of_the_multiplications():
    assert sum(COSTS.values()) == pytest.approx(1) and len(COSTS) == 7 * 4 * 3
    # 3, 1, 4 and 4 matrices of 64 x 64 in a block.
    assert COSTS["block_3/attn_out", "wgrad"] == pytest.approx(1 / (12 * 7 * 3))
    assert COSTS["block_3/mlp_down", "fprop"] == pytest.approx(4 / (12 * 7 * 3))
    thumb = maps.rules_of_thumb(7)
    assert sum(COSTS[cell] for cell in thumb["last 15%"]) == pytest.approx(2 / 7)
    assert {layer[:7] for layer, _ in thumb["first and last"]} == {"block_0", "block_6"}


def test_a_map_holds_what_has_most_score_per_cost():
    score = dict.fromkeys(COSTS, 0.0) | {("block_0/attn_out", "fprop"): 1.0, ("block_0/mlp_up", "dgrad"): 2.0}
    kept = maps.best_map(score, COSTS, 1 / 252)
    assert kept == (("block_0/attn_out", "fprop"),)
    # Twice the score at four times the cost comes later, and no longer fits.
    kept = maps.best_map(score, COSTS, 4 / 252)
    assert ("block_0/attn_out", "fprop") in kept and ("block_0/mlp_up", "dgrad") not in kept
    for share in (0.1, 0.5, 1.0):
        for cells in (maps.best_map(score, COSTS, share), maps.random_map(COSTS, share, 3)):
            assert share - 4 / 252 < sum(COSTS[cell] for cell in cells) <= share + 1e-9
    assert maps.random_map(COSTS, 0.3, 0) != maps.random_map(COSTS, 0.3, 1)


def test_a_map_is_a_recipe_whose_slots_are_data():
    """The last 15% by their cells are nvfp4 itself, and a cell alone leaves the rest of its layer quantized."""
    cells = maps.rules_of_thumb(7)["last 15%"]
    item = maps.item_of("nvfp4", cells)
    assert item.count("~") == 1 + 2 * 4
    assert kept_high(get_recipe(item), 7) == kept_high(get_recipe("nvfp4"), 7)
    config = tiny(**SIZES, block_size=32, recipe=(item,), recipe_program=("nvfp4~head~block_2/mlp_*:fprop",))
    assert problems(values_of(config)) == []
    tables = [
        recipe.table_of(recipe.options_of(tiny(**SIZES, recipe=(name,)))) for name in (item, "nvfp4", "nvfp4~head")
    ]
    jax.tree.map(np.testing.assert_array_equal, *tables[:2])
    assert tables[2].slots.high.sum() == 0 < tables[0].slots.high.sum() == 2 * 4 * 6

    of = in_layers(get_recipe("nvfp4~head~block_2/mlp_*:fprop~block_1/*:dgrad~block_1/*:wgrad"), 7)
    high = {layer: [slot for slot, spec in zip(SLOTS, own.slots) if spec.high] for layer, own in of.items()}
    assert high["block_2/mlp_up"] == ["fprop.x", "fprop.w"] and high["block_2/attn_out"] == []
    assert high["block_1/attn_qkv"] == list(SLOTS[2:]) and len(high["head"]) == 6
    # The copy that dgrad shared with fprop is now made of the weight itself.
    assert of["block_2/mlp_up"].dgrad_w.source == "original" and of["block_2/mlp_up"].dgrad_w.block == "16x16"
    assert of["block_2/attn_out"].dgrad_w.source == "shared"


@pytest.mark.parametrize("item", ["nvfp4~", "nvfp4~head:up", "nvfp4~head~blok_0/*", "nvfp4~block_9/*"])
def test_what_a_recipe_keeps_must_exist(item):
    (sentence,) = problems(values_of(tiny(**SIZES, block_size=32, recipe=(item,))))
    assert "keeps" in sentence and ": give " in sentence
    with pytest.raises(UserError, match="no recipe"):
        get_recipe("~head")


def test_the_interval_of_what_a_map_closes_covers_it():
    """95% of Fieller's intervals hold the true share, for an uncertain gap too."""
    rng, hits, widths = np.random.default_rng(0), 0, []
    for _ in range(400):
        base, n = rng.normal(2.0, 0.1, 5), range(5)
        full, mapped = base + rng.normal(0.1, 0.02, 5), base + rng.normal(0.04, 0.02, 5)
        of = maps.closed(*(dict(zip(n, losses)) for losses in (full, mapped, base)))
        hits += of.low <= 0.6 <= of.high
        widths.append(of.high - of.low)
    assert 0.92 < hits / 400 < 0.98 and np.median(widths) < 1
    nothing = maps.closed({0: 2.0, 1: 2.2}, {0: 2.0, 1: 2.1}, {0: 2.1, 1: 2.05})
    assert (nothing.low, nothing.high) == (-math.inf, math.inf)


def test_what_is_trained_and_what_it_says():
    """A loss that falls by what each kept cell would cost: the best map closes its share, and weights follow."""
    harm = {cell: (0.01 + 0.01 * i, 0.001) for i, cell in enumerate(c for c in COSTS if c[1] == "fprop")}
    scores = maps.Scores(harm, {cell: 1e-3 for cell in COSTS if cell[1] != "fprop"})
    plan = trainings.planned("nvfp4", scores, SIZES, 2)
    assert {"bf16", "recipe", "only fprop", "last 15%", "random 1", "map 0.15"} <= plan.keys()
    gap = {cell: harm[cell][0] if cell in harm else 0.02 for cell in COSTS}

    def loss(item, seed):
        own = in_layers(get_recipe(item), 7)
        left = [c for c in COSTS if not own[c[0]].slots[2 * PRODUCTS.index(c[1])].high]
        return 2.0 + 0.1 * seed + sum(gap[cell] for cell in left)

    losses = {item: {seed: loss(item, seed) for seed in range(5)} for item, _ in plan.values()}
    rows = {row["what"]: row for row in trainings.results(plan, losses, COSTS)}
    total = sum(gap.values())
    assert rows["recipe"]["gap"] == pytest.approx(total) and rows["bf16"]["closed"] == pytest.approx(1)
    for what in ("map 0.3", "random 0", "first and last"):
        assert rows[what]["closed"] == pytest.approx(sum(gap[cell] for cell in plan[what][1]) / total)
    assert rows["map as last 15%"]["cost"] <= rows["last 15%"]["cost"] + 1e-9
    (best,) = plan[next(what for what in plan if what.startswith("in:"))][1][:1]
    assert best in COSTS
    weight = trainings.forward_weight(plan, losses)
    assert weight == pytest.approx(sum(h for h, _ in harm.values()) / total)
    text = "\n".join([*trainings.curve_lines(list(rows.values())), *trainings.lines_of(scores, "nvfp4", SIZES, 0.2)])
    assert "--config.recipe='nvfp4~head~" in text and "gemms: [fprop]" in text
    assert rows["only fprop"]["cost"] == pytest.approx(2 / 3) and rows["only fprop"]["losses"]["4"] > 2.4


def test_a_map_in_the_words_of_transformer_engine():
    """Its tools search a layer's name for each section's pattern, and refuse a layer that two sections fit."""
    kept = [("block_0/mlp_up", "wgrad"), ("block_0/mlp_gate", "fprop"), ("block_0/attn_out", "dgrad")]
    lines = maps.settings_lines("mxfp4", [*kept, ("block_10/attn_qkv", "fprop")], 12, "llama")
    sections = yaml.safe_load("\n".join(lines[lines.index("") + 1 : lines.index("", 2)]))
    # As TransformerLayer and, by memory, Megatron-LM's layers call them; the first counts from 1.
    names = {
        "model.layers.1.layernorm_mlp.fc1": ["fprop", "wgrad"],
        "model.decoder.layers.1.mlp.linear_fc1": ["fprop", "wgrad"],
        "model.decoder.layers.1.mlp.linear_fc2": None,
        "model.decoder.layers.1.self_attention.linear_proj": ["dgrad"],
        "model.layers.11.self_attention.layernorm_linear_qkv": ["fprop"],
        "model.layers.11.layernorm_mlp.fc1": None,
        "model.layers.10.self_attention.layernorm_linear_qkv": None,
    }
    for name, gemms in names.items():
        fitting = [of for of in sections.values() if re.search(of["layers"]["layer_name_regex_pattern"], name)]
        found = [of["transformer_engine"]["DisableQuantizationGEMM"]["gemms"] for of in fitting]
        assert found == ([gemms] if gemms else [])


def test_a_map_in_the_words_of_torchtitan():
    """Its converters convert layers whose name holds one of `fqns`, or none of `filter_fqns`."""
    kept = [(f"block_1/{part}", product) for part in ("attn_qkv", "mlp_gate") for product in PRODUCTS]
    lines = maps.settings_lines("mxfp8", [*kept, ("block_1/mlp_up", "fprop")], 12, "llama")
    lists = {
        line.partition(" = ")[0]: ast.literal_eval(line.partition(" = ")[2]) for line in lines if "fqns = " in line
    }
    high = {"lm_head", "layers.1.attention.qkv_linear.wqkv", "layers.1.feed_forward.w1"}
    low = {"layers.11.attention.qkv_linear.wqkv", "layers.1.feed_forward.w3", "layers.1.attention.wo"}
    for name in high | low:
        assert any(part in name for part in lists["filter_fqns"]) == (name in high)
        assert any(part in name for part in lists["fqns"]) == (name in low)
    assert "none of GPT-2" in maps.settings_lines("mxfp8", kept, 12)[-1]


def test_the_curve_of_a_map_is_drawn(tmp_path):
    rows = [{"what": what, "cost": cost, "closed": 0.5, "low": None, "high": 0.9} for what, cost in
            (("recipe", 0.0), ("bf16", 1.0), ("map 0.15", 0.15), ("last 15%", 0.25), ("random 0", 0.2499))]  # fmt: skip
    shown = map_curve("mxfp4", rows).rows
    assert [row["what"] for row in shown] == ["map 0.15", "random 0", "last 15%"]  # those that say something
    assert shown[1]["at"] == 0.2499 and shown[2]["at"] > 0.26  # of equal cost: beside one another
    assert shown[0]["low"] < 0 and shown[0]["high"] == 0.9
    (tmp_path / "map.json").write_text(json.dumps({"recipe": "mxfp4", "trained": rows}))
    draw_map(tmp_path / "map.json")
    assert (tmp_path / "map.png").read_bytes().startswith(b"\x89PNG")
