"""The tables of named recipes, and what is refused."""

import json
from dataclasses import replace

import numpy as np
import pytest

from altgrad_jax.errors import UserError
from altgrad_jax.numerics import recipes
from altgrad_jax.numerics.formats import from_facts, get_format
from altgrad_jax.numerics.layers import is_attention
from altgrad_jax.numerics.recipes import RECIPES, SLOTS, Recipe, SlotSpec, check_dimensions, get_recipe, kept_high, only

NAMES = (
    "bf16 te_delayed te_current rowwise rowwise_gw_hp deepseek_v3 deepseek_pow2 mxfp8 mxfp8_floor mxfp8_e5m2g mxfp6 "
    "mxfp4 mxfp4_tseng nvfp4 nvfp4_redrawn tetrajet_v2 quartet_2 fp4_all_the_way ufp4 "
    "nvfp4_headroom nvfp4_w1x16 ufp4_no_rht ufp4_e2m1 ufp4_e2m1_no_rht quartet_2_sr"
).split()
ROW = RECIPES["rowwise"].fprop_x
NV = RECIPES["nvfp4"].fprop_x


def test_the_names():
    assert list(RECIPES) == NAMES


def test_nvfp4_is_the_table_of_the_paper():
    """arXiv 2509.25149: 2D scales of weights, one copy; stochastic gradients; RHT on the operands of wgrad only."""
    slots = dict(zip(SLOTS, get_recipe("nvfp4").slots, strict=True))
    assert {spec.element for spec in slots.values()} == {"E2M1"} and {spec.scale for spec in slots.values()} == {
        "UE4M3"
    }
    assert [name for name, spec in slots.items() if spec.block == "16x16"] == ["fprop.w", "dgrad.w"]
    assert [name for name, spec in slots.items() if spec.rounding == "stochastic"] == ["dgrad.g", "wgrad.g"]
    assert [name for name, spec in slots.items() if spec.rotation] == ["wgrad.x", "wgrad.g"]
    assert [name for name, spec in slots.items() if spec.source == "shared"] == ["dgrad.w"]
    assert slots["wgrad.g"].target == 6 and get_recipe("nvfp4_redrawn").wgrad_g.target == pytest.approx(6 * 16 / 17)


@pytest.mark.parametrize(
    ("control", "base", "changed"),
    [
        ("nvfp4_headroom", "nvfp4", {"dgrad.g": {"headroom"}, "wgrad.g": {"headroom"}}),
        ("nvfp4_redrawn", "nvfp4_headroom", {"wgrad.x": {"transform"}, "wgrad.g": {"transform"}}),
        ("nvfp4_w1x16", "nvfp4", {"fprop.w": {"block"}, "dgrad.w": {"block", "source"}}),
        ("ufp4_no_rht", "ufp4", dict.fromkeys(SLOTS, {"transform"})),
        ("ufp4_e2m1", "ufp4", dict.fromkeys(SLOTS, {"element"})),
        ("ufp4_e2m1_no_rht", "ufp4_e2m1", dict.fromkeys(SLOTS, {"transform"})),
        ("mxfp8_floor", "mxfp8", dict.fromkeys(SLOTS, {"rule"})),
        ("quartet_2_sr", "quartet_2", dict.fromkeys(SLOTS[2:], {"rounding", "headroom", "bound", "correction"})),
    ],
)
def test_a_control_differs_from_its_base_in_what_it_says(control, base, changed):
    """Claims of the report rest on such pairs: nothing else may differ."""
    mine, its = RECIPES[control], RECIPES[base]
    found = {}
    for name, one, other in zip(SLOTS, mine.slots, its.slots, strict=True):
        fields = {field for field, value in vars(one).items() if value != vars(other)[field]}
        found |= {name: fields} if fields else {}
    assert found == changed and mine.keep_high == its.keep_high and mine.attention == its.attention


def test_targets_and_bounds():
    assert get_recipe("ufp4").fprop_x.target == 3.5 and get_recipe("ufp4").fprop_x.bound == 448
    assert get_recipe("quartet_2").fprop_x.bound == 256
    eden = get_recipe("quartet_2").wgrad_g
    assert eden.target == pytest.approx(6 / (17 / 16 * 0.93)) and eden.bound == 255.99
    assert (
        get_recipe("mxfp4_tseng").dgrad_g.shrink == pytest.approx(4 / 3) and get_recipe("mxfp8").fprop_x.target == 448
    )
    assert get_recipe("mxfp8_e5m2g").dgrad_g.target == 57344


@pytest.mark.parametrize("name", NAMES)
def test_a_manifest_holds_the_recipe_and_its_formats(name):
    held = json.loads(json.dumps(recipes.facts(get_recipe(name))))
    slots = [SlotSpec(**held["slots"][slot]) for slot in SLOTS]
    assert Recipe(name, *slots, keep_high=tuple(held["keep_high"]), source=held["source"]) == get_recipe(name)
    for fmt, facts in held["formats"].items():
        assert from_facts(facts) == get_format(fmt)
    lines = recipes.describe(get_recipe(name))
    assert len(lines) == 10 and lines[0] == f"recipe {name}" and lines[-1] == f"source: {held['source']}"
    assert all(line.startswith(slot) for line, slot in zip(lines[2:8], SLOTS, strict=True))


def test_a_recipe_in_one_part_only():
    nvfp4 = get_recipe("nvfp4")
    forward, backward = only(nvfp4, "fprop"), get_recipe("nvfp4:backward")
    assert forward.slots[:2] == nvfp4.slots[:2] and all(spec.high for spec in forward.slots[2:])
    assert all(spec.high for spec in backward.slots[:2]) and backward.name == "nvfp4:backward"
    # Its first copy is gone, so it is made of the original, by the same spec.
    assert backward.dgrad_w == nvfp4.fprop_w and backward.wgrad_g == nvfp4.wgrad_g
    assert only(get_recipe("te_current"), "wgrad").wgrad_g == get_recipe("te_current").dgrad_g
    assert only(get_recipe("te_current"), "backward").wgrad_g.source == "shared"
    assert only(get_recipe("quartet_2"), "dgrad").dgrad_w == get_recipe("quartet_2").dgrad_g
    for name in NAMES:
        for part in recipes.PARTS:
            only(get_recipe(name), part)


def high_matrices(recipe, n_layer):
    """The layers with weights that stay high; the products of attention do so unless a recipe asks for them."""
    kept = kept_high(recipe, n_layer)
    assert sum(map(is_attention, kept)) == 2 * n_layer
    return [layer for layer in kept if not is_attention(layer)]


def test_layers_that_stay_high():
    assert high_matrices(get_recipe("bf16"), 6) == [] and high_matrices(get_recipe("mxfp8"), 6) == ["head"]
    nvfp4, te = (high_matrices(get_recipe(name), 12) for name in ("nvfp4", "te_current"))
    assert {layer.split("/")[0] for layer in nvfp4} == {"block_10", "block_11", "head"}
    assert {layer.split("/")[0] for layer in te} == {"block_0", "block_11", "head"}
    own = replace(get_recipe("mxfp8"), keep_high=("block_1/mlp_*",))
    assert high_matrices(own, 2) == ["block_1/mlp_up", "block_1/mlp_down"]
    assert len(high_matrices(replace(own, keep_high=("first 9",)), 2)) == 8


@pytest.mark.parametrize(
    "name, sizes, words",
    [
        (
            "mxfp8",
            (48, 64, 64),
            "wgrad.x of head, for blocks of 1x32 needs multiples of 32 and M is 48: change the tokens",
        ),
        (
            "nvfp4",
            (64, 40, 64),
            "fprop.x of head, for blocks of 1x16 needs multiples of 16 and K is 40: change the widths",
        ),
        ("quartet_2", (64, 64, 64), "dgrad.g of head, for rht128_redrawn needs multiples of 128 and N is 64"),
        ("deepseek_v3", (128, 192, 128), "fprop.x of head, for blocks of 1x128 needs multiples of 128 and K is 192"),
    ],
)
def test_dimensions_that_blocks_do_not_divide(name, sizes, words):
    with pytest.raises(UserError, match=f"recipe {name} cannot quantize {words}"):
        check_dimensions(get_recipe(name), "head", *sizes)
    check_dimensions(get_recipe(name), "head", 256, 384, 128)
    for free in ("bf16", "te_current", "rowwise"):
        check_dimensions(get_recipe(free), "head", *sizes)


@pytest.mark.parametrize(
    "slots, words",
    [
        ({"fprop_x": replace(ROW, block="1x33")}, "for fprop.x the block '1x33': give one of 1x16, 1x32"),
        ({"fprop_x": replace(ROW, element="FP16")}, "the element FP16, which is not exact in bfloat16"),
        ({"fprop_x": replace(NV, element="E3M4")}, "the element E3M4, which times an 8-bit scale is not exact"),
        ({"fprop_x": replace(ROW, transform="rht24_fixed")}, "the transform 'rht24_fixed': give none or one such as"),
        ({"fprop_x": replace(ROW, scale="E8M0")}, "the rule float32 with scales in E8M0: give float32"),
        ({"fprop_x": replace(NV, scale="float32")}, "the rule two_level with scales in float32: give UE4M3 or UE5M3"),
        ({"fprop_x": replace(ROW, correction="four_six")}, "the correction four_six, which needs two levels"),
        ({"fprop_x": replace(ROW, amax="delayed")}, "a delayed amax and blocks of rowwise"),
        ({"fprop_w": replace(ROW, source="shared")}, "for fprop.w the source shared, but no copy comes before it"),
        ({"wgrad_g": replace(ROW, source="fprop")}, "for wgrad.g the source fprop, but no copy"),
        ({"fprop_w": ROW, "dgrad_w": replace(ROW, source="shared")}, r"of fprop.w, whose float32 scales \(rowwise\)"),
        ({"fprop_w": NV, "dgrad_w": replace(ROW, source="shared")}, "the copy of fprop.w and another spec"),
        (
            {name: replace(NV, transform="rht16_fixed", source=source) for name, source in
             (("fprop_x", "original"), ("fprop_w", "original"), ("dgrad_w", "shared"))},
            "the copy of fprop.w, which is rotated along another axis",
        ),
        ({"fprop_x": replace(NV, transform="rht16_fixed")}, "one operand of fprop by rht16_fixed and the other"),
        ({"fprop_x": replace(NV, element="E8M0")}, "E8M0' is a format of block scales"),
    ],
)  # fmt: skip
def test_slots_that_cannot_be_computed(slots, words):
    with pytest.raises(UserError, match=words) as error:
        Recipe("mine", **slots)
    assert "\n" not in str(error.value)


def test_wrong_names():
    with pytest.raises(UserError, match="no recipe 'nvfp': give one of nvfp4, .*bf16, te_delayed"):
        get_recipe("nvfp")
    with pytest.raises(UserError, match="recipe nvfp4 has no part 'fwd': give one of fprop, dgrad, wgrad, backward"):
        get_recipe("nvfp4:fwd")


def test_only_float32_tiles_need_their_own_program():
    assert [name for name in NAMES if get_recipe(name).tiled] == ["deepseek_v3"]
    assert np.all([spec.high for spec in get_recipe("bf16").slots])
