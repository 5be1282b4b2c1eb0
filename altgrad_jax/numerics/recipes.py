"""Quantization recipes: how each operand of each of a linear layer's three products is quantized. No jax.

Y[M,N] = X[M,K] W[K,N] and G = dY[M,N]. The products are fprop Y = X W, dgrad dX = G W^T and wgrad dW = X^T G. Each has
two operands, so a recipe has six *slots*; the blocks of a slot run along the axis that its product contracts:

    fprop.x along K    fprop.w along K    dgrad.g along N    dgrad.w along N    wgrad.x along M    wgrad.g along M

A slot whose element is BF16 is not quantized: it is in the compute dtype. `docs/recipes.md` has the definitions.
"""

import dataclasses
import difflib
import fnmatch
import math
import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace
from typing import NamedTuple

from altgrad_jax.errors import UserError
from altgrad_jax.numerics import formats
from altgrad_jax.numerics.layers import all_products, is_attention
from altgrad_jax.numerics.scales import LARGEST_SCALED, RULES

SLOTS = ("fprop.x", "fprop.w", "dgrad.g", "dgrad.w", "wgrad.x", "wgrad.g")
PRODUCTS = ("fprop", "dgrad", "wgrad")
CONTRACTED = ("K", "K", "N", "N", "M", "M")  # by slot
FIRST_COPY = {3: 1, 4: 0, 5: 2}  # the slot that quantizes the same tensor before
# (along the contracted axis, across it); 0 is all of it.
BLOCKS = {
    "1x16": (16, 1),
    "1x32": (32, 1),
    "1x64": (64, 1),
    "1x128": (128, 1),
    "16x16": (16, 16),
    "32x32": (32, 32),
    "128x128": (128, 128),
    "rowwise": (0, 1),
    "tensor": (0, 0),
}
ROTATIONS = (16, 32, 64, 128)
SOURCES = ("original", "fprop", "shared")
CORRECTIONS = ("none", "four_six", "ms_eden")
EDEN_GROUP = 128  # elements along the contracted axis that share MS-EDEN's correction
PARTS = ("fprop", "dgrad", "wgrad", "backward")
HIGH = "BF16"
WITH_ATTENTION = "_attention"  # ends the name of a recipe that quantizes the products of attention too
GAINS = ("mxfp8", "mxfp8_floor", "mxfp6", "mxfp4")  # recipes in whose blocks of weights gains of norms can be kept
NEVER = 2**31 - 1  # the update from which a phase holds that waits for bad updates
_CHOICES = {"block": tuple(BLOCKS), "rule": RULES, "rounding": ("nearest", "stochastic"), "source": SOURCES,
            "correction": CORRECTIONS, "amax": ("current", "delayed")}  # fmt: skip
_TRANSFORM = re.compile(r"none|rht(16|32|64|128)_(fixed|redrawn)")


@dataclass(frozen=True)
class SlotSpec:
    """How one operand of one product is quantized.

    element: a number format; BF16 leaves the operand in the compute dtype, whatever the other fields say.
    scale: what block scales are kept in: a scale format, 'float32' or 'power_of_two'.
    block: '1x32' has 32 elements along the contracted axis; 'rowwise' one scale per row of the product; or 'tensor'.
    rule: a name of scales.RULES. rounding: of elements, 'nearest' (ties to even) or 'stochastic'.
    transform: 'none', or a random Hadamard transform such as 'rht16_fixed' or 'rht16_redrawn' (signs of every step).
    source: 'original'; 'fprop', the dequantized forward copy; 'shared', the tensor's first copy itself.
    headroom: factor on the largest number that an amax is mapped to. bound: what the largest block scale becomes, under
      two levels. shrink: what elements are divided by after scaling, and results multiplied by.
    correction: 'four_six' chooses for each block between amaxes of 6 and 4; 'ms_eden' corrects block scales.
    amax: 'current', or 'delayed', from earlier steps.
    """

    element: str = HIGH
    scale: str = "power_of_two"
    block: str = "tensor"
    rule: str = "rceil"
    rounding: str = "nearest"
    transform: str = "none"
    source: str = "original"
    headroom: float = 1.0
    bound: float = 448.0
    shrink: float = 1.0
    correction: str = "none"
    amax: str = "current"

    @property
    def high(self) -> bool:
        """Whether the operand stays in the compute dtype."""
        return formats.get_format(self.element).name == HIGH and self.source != "shared"

    @property
    def rotation(self) -> int:
        """Size of the Hadamard blocks, 0 without a transform."""
        return int(re.sub(r"\D", "", self.transform) or 0)

    @property
    def target(self) -> float:
        """What an amax is mapped to."""
        return min(formats.get_format(self.element).max_finite, LARGEST_SCALED) * self.headroom

    @property
    def sides(self) -> tuple[int, int]:
        """Elements of a block along the contracted axis and across it; 0 is all of it."""
        return BLOCKS[self.block]


@dataclass(frozen=True)
class Recipe:
    """Six slots, the layers that stay in the compute dtype, and where it is from. UserError if it cannot be computed.

    keep_high: shell patterns of layer names (`head`, `block_0/*`), 'first N' or 'last N' blocks, or 'last 15%'; each
      for all products, or with one of them behind it, `block_*/mlp_up:wgrad`.
    attention: whether the two products of attention have these slots too; else they are in the compute dtype.
    """

    name: str
    fprop_x: SlotSpec = SlotSpec()
    fprop_w: SlotSpec = SlotSpec()
    dgrad_g: SlotSpec = SlotSpec()
    dgrad_w: SlotSpec = SlotSpec()
    wgrad_x: SlotSpec = SlotSpec()
    wgrad_g: SlotSpec = SlotSpec()
    keep_high: tuple[str, ...] = ()
    source: str = ""
    attention: bool = False

    def __post_init__(self):
        for i in range(len(SLOTS)):
            _check_slot(self, i)
        for product, x, w in zip(PRODUCTS, self.slots[::2], self.slots[1::2], strict=True):
            if not (x.source == "shared" or w.source == "shared") and x.transform != w.transform:
                raise UserError(
                    f"recipe {self.name} transforms one operand of {product} by {x.transform} and the other by "
                    f"{w.transform}, which does not cancel: give both the same"
                )

    @property
    def slots(self) -> tuple[SlotSpec, ...]:
        """The six slots in the order of SLOTS."""
        return tuple(getattr(self, name.replace(".", "_")) for name in SLOTS)

    @property
    def tiled(self) -> bool:
        """Whether some float32 scale varies along a contracted axis, which takes the program of K-tiles."""
        return any(s.rule == "float32" and s.sides[0] and not s.high for s in self.slots)


def _check_slot(recipe, i):
    """Raises UserError unless the recipe's slot has choices that exist and fit each other."""
    spec, where = recipe.slots[i], f"recipe {recipe.name} has for {SLOTS[i]}"
    for name, choices in _CHOICES.items():
        if getattr(spec, name) not in choices:
            raise UserError(f"{where} the {name} {getattr(spec, name)!r}: give one of {', '.join(choices)}")
    fmt = formats.get_format(spec.element)
    if fmt.mantissa_bits > 7:
        raise UserError(f"{where} the element {fmt.name}, which is not exact in bfloat16: give at most 7 mantissa bits")
    if spec.rule == "two_level" and fmt.mantissa_bits > 3:
        raise UserError(
            f"{where} the element {fmt.name}, which times an 8-bit scale is not exact in bfloat16: give E2M1"
        )
    if not _TRANSFORM.fullmatch(spec.transform):
        raise UserError(
            f"{where} the transform {spec.transform!r}: give none or one such as rht16_fixed, rht64_redrawn"
        )
    scales = {"float32": ("float32",), "two_level": ("UE4M3", "UE5M3")}.get(spec.rule, ("E8M0", "power_of_two"))
    if not spec.high and spec.scale not in scales:
        raise UserError(f"{where} the rule {spec.rule} with scales in {spec.scale}: give {' or '.join(scales)}")
    if spec.correction != "none" and spec.rule != "two_level":
        raise UserError(
            f"{where} the correction {spec.correction}, which needs two levels of scales: set rule=two_level"
        )
    if spec.amax == "delayed" and spec.block != "tensor":
        raise UserError(
            f"{where} a delayed amax and blocks of {spec.block}: an amax of earlier steps needs block=tensor"
        )
    if i not in FIRST_COPY and spec.source != "original" or i == 5 and spec.source == "fprop":
        raise UserError(f"{where} the source {spec.source}, but no copy comes before it: set source=original")
    if spec.source == "shared":
        first = recipe.slots[FIRST_COPY[i]]
        if replace(spec, source="original") != first:
            raise UserError(f"{where} the copy of {SLOTS[FIRST_COPY[i]]} and another spec: give it that slot's fields")
        if first.rule == "float32" and first.block != "tensor" and not first.high:
            raise UserError(
                f"{where} the copy of {SLOTS[FIRST_COPY[i]]}, whose float32 scales ({first.block}) vary along the axis "
                "contracted here: set source=original"
            )
        if first.transform != "none":
            raise UserError(
                f"{where} the copy of {SLOTS[FIRST_COPY[i]]}, which is rotated along another axis: set source=original"
            )


def _mx(element, rule="rceil", **more):
    """A slot of OCP MX: 32 elements share a power of two."""
    return SlotSpec(element, "E8M0", "1x32", rule, **more)


def _nv(block="1x16", element="E2M1", **more):
    """A slot of NVFP4: E2M1 elements, E4M3 scales of 16, one float32 scale of the tensor."""
    return SlotSpec(element, "UE4M3", block, "two_level", **more)


def _float32(element, block="tensor", **more):
    return SlotSpec(element, "float32", block, "float32", **more)


def _tensors(**more):
    """Slots with E4M3 forward and E5M2 gradients, a float32 scale per tensor, and one copy for both its products."""
    x, g = _float32("E4M3", **more), _float32("E5M2", **more)
    again = replace(x, source="shared")
    return x, x, g, again, again, replace(g, source="shared")


def _tiles(*scale_and_rule):
    """DeepSeek-V3's slots: tiles of 1x128 of activations and gradients, of 128x128 of weights, E4M3 everywhere."""
    scale, rule = scale_and_rule
    x, w = SlotSpec("E4M3", scale, "1x128", rule), SlotSpec("E4M3", scale, "128x128", rule)
    return x, w, x, w, x, x


_NVFP4 = "arXiv 2509.25149 (NVIDIA, NVFP4 pretraining)"
_MXFP8 = "arXiv 2506.08027 (MXFP8 pretraining recipes), Transformer Engine MXFP8BlockScaling"
_MX = "arXiv 2310.10537 (Microscaling), OCP MX 1.0"
_BF16, _SR, _ROOM = SlotSpec(), "stochastic", 16 / 17  # with the headroom, rounding up by a step clips nothing
_ROW, _MX8, _MX8_G = _float32("E4M3", "rowwise"), _mx("E4M3"), _mx("E5M2")
_TSENG = _mx("E2M1", "floor", rounding=_SR, shrink=4 / 3, transform="rht64_redrawn")
_FOUR_SIX = _nv(correction="four_six", bound=256.0)
_EDEN = _nv(correction="ms_eden", headroom=1 / (17 / 16 * 0.93), bound=255.99, transform="rht128_redrawn")
_TETRA = _nv(rounding=_SR, headroom=_ROOM, transform="rht16_redrawn")
_U4 = _nv(element="E1M2", transform="rht16_fixed")
_U4_G = replace(_U4, rounding=_SR)
_QUARTET_SR = _nv(rounding=_SR, headroom=_ROOM, transform="rht128_redrawn")

# Name: (fprop.x, fprop.w, dgrad.g, dgrad.w, wgrad.x, wgrad.g), what is kept in the compute dtype, source.
_TABLE = {
    "bf16": ((_BF16,) * 6, (), "the baseline: no operand is quantized"),
    "te_delayed": (_tensors(amax="delayed"), ("head",), "arXiv 2209.05433, Transformer Engine DelayedScaling"),
    "te_current": (
        _tensors(),
        ("head", "first 1", "last 1"),
        "Transformer Engine Float8CurrentScaling, Megatron-Bridge",
    ),
    "rowwise": ((_ROW,) * 6, ("head",), "torchao float8 rowwise"),
    "rowwise_gw_hp": ((_ROW, _ROW, _ROW, _ROW, _BF16, _BF16), ("head",), "torchao float8 rowwise_with_gw_hp"),
    "deepseek_v3": (_tiles("float32", "float32"), ("head",), "arXiv 2412.19437, 3.3 (fine-grained quantization)"),
    "deepseek_pow2": (_tiles("power_of_two", "rceil"), ("head",), "arXiv 2412.19437, scales of powers of two"),
    "mxfp8": ((_MX8,) * 6, ("head",), _MXFP8),
    "mxfp8_floor": ((_mx("E4M3", "floor"),) * 6, ("head",), "control: OCP MX 1.0, 6.3; 2506.08027 reports divergence"),
    "mxfp8_e5m2g": ((_MX8, _MX8, _MX8_G, _MX8, _MX8, _MX8_G), ("head",), _MXFP8),
    "mxfp6": ((_mx("E2M3", "floor"),) * 6, ("head",), _MX),
    "mxfp4": ((_mx("E2M1", "floor"),) * 6, ("head",), _MX),
    "mxfp4_tseng": ((_BF16, _BF16, _TSENG, _TSENG, _TSENG, _TSENG), ("head",), "arXiv 2502.20586, blocks of g = 64"),
    "nvfp4": (
        (
            _nv(),
            _nv("16x16"),
            _nv(rounding=_SR),
            _nv("16x16", source="shared"),
            _nv(transform="rht16_fixed"),
            _nv(transform="rht16_fixed", rounding=_SR),
        ),
        ("head", "last 15%"),
        _NVFP4,
    ),
    "nvfp4_redrawn": (
        (
            _nv(),
            _nv("16x16"),
            _nv(rounding=_SR, headroom=_ROOM),
            _nv("16x16", source="shared"),
            _nv(transform="rht16_redrawn"),
            _nv(transform="rht16_redrawn", rounding=_SR, headroom=_ROOM),
        ),
        ("head", "last 15%"),
        f"control: {_NVFP4} with signs of every step and headroom",
    ),
    "tetrajet_v2": (
        (_nv(), _nv(), _TETRA, replace(_TETRA, source="fprop"), replace(_TETRA, source="fprop"), _TETRA),
        ("head",),
        "arXiv 2510.27527 (TetraJet-v2)",
    ),
    "quartet_2": (
        (_FOUR_SIX, _FOUR_SIX, _EDEN, replace(_EDEN, source="fprop"), replace(_EDEN, source="fprop"), _EDEN),
        ("head",),
        "arXiv 2601.22813 (Quartet II), 4/6 of arXiv 2512.02010",
    ),
    "fp4_all_the_way": ((_nv(), _nv(), *(_nv(rounding=_SR),) * 4), ("head",), "arXiv 2505.19115"),
    "ufp4": ((_U4, _U4, _U4_G, _U4, _U4, _U4_G), ("head",), "arXiv 2606.20381 (uniform 4-bit)"),
}


def _each(slots, **changes):
    """These slots with some fields changed, where they are not in the compute dtype."""
    return tuple(replace(slot, **changes) for slot in slots)


def _controls():
    """Recipes that differ from a published one in one thing, which its name says: {name: a row as in _TABLE}."""
    nvfp4, kept, _ = _TABLE["nvfp4"]
    ufp4 = _TABLE["ufp4"][0]
    rounded = [replace(slot, headroom=_ROOM) if slot.rounding == _SR else slot for slot in nvfp4]
    plain = {"transform": "none"}
    return {
        "nvfp4_headroom": (tuple(rounded), kept, "control: nvfp4 with headroom 16/17 where it rounds stochastically"),
        "nvfp4_w1x16": (
            (nvfp4[0], _nv(), nvfp4[2], _nv(), *nvfp4[4:]),
            kept,
            "control: nvfp4 with weights in blocks of 1x16, quantized for each product",
        ),
        "ufp4_no_rht": (_each(ufp4, **plain), ("head",), "control: ufp4 without Hadamard transforms"),
        "ufp4_e2m1": (_each(ufp4, element="E2M1"), ("head",), "control: ufp4 with elements in E2M1"),
        "ufp4_e2m1_no_rht": (
            _each(ufp4, element="E2M1", **plain),
            ("head",),
            "control: ufp4 with elements in E2M1 and without Hadamard transforms",
        ),
        "quartet_2_sr": (
            (
                _FOUR_SIX,
                _FOUR_SIX,
                *(replace(_QUARTET_SR, source=s) for s in ("original", "fprop", "fprop", "original")),
            ),
            ("head",),
            "control: quartet_2 with stochastic rounding and headroom in place of MS-EDEN",
        ),
    }


RECIPES = {
    name: Recipe(name, *slots, keep_high=keep_high, source=source)
    for name, (slots, keep_high, source) in (_TABLE | _controls()).items()
}


def get_recipe(name: str) -> Recipe:
    """The recipe of a name `NAME[_attention][:PART][~KEEP ...]`; UserError lists the names.

    `_attention`: in the products of attention too. PART: in one part only (`only`). KEEP: what takes the place of
    `Recipe.keep_high`, as in `nvfp4~head~last 15%~block_0/attn_qkv:fprop`.
    """
    before, *kept = str(name).split("~")
    if kept:
        return replace(get_recipe(before), name=str(name), keep_high=tuple(map(_kept_item, kept)))
    full, colon, part = before.partition(":")
    own = full.removesuffix(WITH_ATTENTION)
    if own not in RECIPES:
        near = difflib.get_close_matches(own.lower(), RECIPES, n=3, cutoff=0.5)
        listed = ", ".join([*near, *(other for other in RECIPES if other not in near)])
        raise UserError(f"there is no recipe {own[:40]!r}: give one of {listed}")
    recipe = RECIPES[own] if own == full else replace(RECIPES[own], name=full, attention=True)
    return only(recipe, part) if colon else recipe


def _kept_item(item):
    """One KEEP of a recipe's name; UserError unless it is one."""
    pattern, colon, product = item.partition(":")
    if not pattern or colon and product not in PRODUCTS:
        raise UserError(
            f"a recipe keeps {item[:80]!r} in the compute dtype, which is no layer: give a pattern of layers such as "
            f"head, block_0/* or last 15%, alone or with a product behind it, :{', :'.join(PRODUCTS)}"
        )
    return item


class Phase(NamedTuple):
    """A recipe of a schedule: it holds from the update `start`, or after `bad` bad updates in a row, or after
    `exhausted` certificates in a row that found the format exhausted (numerics.bias)."""

    recipe: str
    start: int
    bad: int = 0
    exhausted: int = 0

    @property
    def waits(self) -> bool:
        """Whether it begins by what happens, and not by a number."""
        return bool(self.bad or self.exhausted)

    @property
    def when(self) -> str:
        """Since when it holds, in words."""
        if self.bad:
            return f"after {self.bad} bad updates in a row"
        if self.exhausted:
            return f"after {self.exhausted} certificates of an exhausted format in a row"
        return f"from update {self.start}" if self.start else "at first"


def parse_schedule(items: tuple[str, ...], max_steps: int) -> tuple[Phase, ...]:
    """The phases of items `NAME[_attention][:PART][@WHEN]`, in their order.

    WHEN is a number of updates, with a point a share of max_steps, `bad3`: after three bad updates in a row, or
    `exhausted3`: after three certificates in a row that found the format exhausted. The first item has none. UserError,
    one sentence.
    """
    found: list[Phase] = []
    for item in items:
        name, at, when = item.partition("@")
        get_recipe(name)
        if not found and at or found and not re.fullmatch(r"\d+|0?\.\d+|(bad|exhausted)[1-9]\d{0,5}", when):
            raise UserError(
                f"recipe has an item {item!r}: give the first recipe alone, such as nvfp4, and each later one with the "
                "update from which it holds, bf16@1600, the share of max_steps, bf16@0.8, a number of bad updates in a "
                "row, bf16@bad3, or of certificates in a row that found the format exhausted, bf16@exhausted3"
            )
        if waits := re.fullmatch(r"(bad|exhausted)(\d+)", when):
            found.append(Phase(name, NEVER, **{waits[1]: int(waits[2])}))
            continue
        start = (round(float(when) * max_steps) if "." in when else int(when)) if at else 0
        before = max((phase.start for phase in found if not phase.waits), default=-1)
        if not before < start < max_steps:
            raise UserError(
                f"recipe has an item {item!r} that begins at update {start}, which is not after {before} and "
                f"before max_steps={max_steps}: give another"
            )
        found.append(Phase(name, start))
    return tuple(found)


def only(recipe: Recipe, part: str) -> Recipe:
    """The recipe in 'fprop', 'dgrad', 'wgrad' or 'backward' (dgrad and wgrad) only; all else in the compute dtype.

    A copy whose first copy is no longer quantized is made of the original, by the spec of that first copy if it shared
    it.
    """
    if part not in PARTS:
        raise UserError(f"recipe {recipe.name} has no part {part[:40]!r}: give one of {', '.join(PARTS)}")
    products = ("dgrad", "wgrad") if part == "backward" else (part,)
    return replace(without(recipe, set(PRODUCTS) - set(products)), name=f"{recipe.name}:{part}")


def without(recipe: Recipe, products: Collection[str]) -> Recipe:
    """The recipe with these of a layer's products in the compute dtype; copies as in `only`."""
    slots = list(recipe.slots)
    for i, spec in enumerate(recipe.slots):
        first = FIRST_COPY.get(i)
        if SLOTS[i].partition(".")[0] in products:
            slots[i] = SlotSpec()
        elif first is not None and SLOTS[first].partition(".")[0] in products and spec.source != "original":
            slots[i] = replace(spec, source="original")  # of a shared copy the fields are those of the first one
    return Recipe(recipe.name, *slots, keep_high=recipe.keep_high, source=recipe.source, attention=recipe.attention)


def kept_products(recipe: Recipe, n_layer: int, model: str = "gpt2") -> dict[str, frozenset[str]]:
    """{layer: those of its PRODUCTS that stay in the compute dtype}, layers with some, in the order of the model."""
    layers = all_products(n_layer, model)
    kept = {layer: set() for layer in layers}
    if not recipe.attention:
        kept |= {layer: set(PRODUCTS) for layer in layers if is_attention(layer)}
    for rule in recipe.keep_high:
        pattern, _, product = rule.partition(":")
        fitting = _layers_of(pattern, layers, n_layer)
        if not fitting:
            raise UserError(
                f"recipe {recipe.name[:80]} keeps {pattern!r} in the compute dtype, which fits no layer of {n_layer} "
                f"block{'s' * (n_layer > 1)}: give a pattern of {', '.join(layers[:6])}, ..."
            )
        for layer in fitting:
            kept[layer] |= {product} if product else set(PRODUCTS)
    return {layer: frozenset(found) for layer, found in kept.items() if found}


def _layers_of(pattern, layers, n_layer):
    """The layers that a pattern of Recipe.keep_high names."""
    words = re.fullmatch(r"(first|last) (\d+)(%?)", pattern)
    if not words:
        return [layer for layer in layers if fnmatch.fnmatchcase(layer, pattern)]
    count = math.ceil(n_layer * int(words[2]) / 100) if words[3] else int(words[2])
    blocks = range(min(count, n_layer)) if words[1] == "first" else range(max(n_layer - count, 0), n_layer)
    return [layer for layer in layers for b in blocks if layer.startswith(f"block_{b}/")]


def kept_high(recipe: Recipe, n_layer: int, model: str = "gpt2") -> list[str]:
    """Names of the layers all of whose products stay in the compute dtype, in the order of the model."""
    return [layer for layer, kept in kept_products(recipe, n_layer, model).items() if len(kept) == len(PRODUCTS)]


def in_layers(recipe: Recipe, n_layer: int, model: str = "gpt2") -> dict[str, Recipe]:
    """{layer: the recipe without the products that stay in the compute dtype there}, of all layers."""
    kept = kept_products(recipe, n_layer, model)
    known = {products: without(recipe, products) for products in {frozenset(), *kept.values()}}
    return {layer: known[kept.get(layer, frozenset())] for layer in all_products(n_layer, model)}


def rows_needed(recipes: Iterable[Recipe]) -> int:
    """Of what number the rows of a product must be a multiple, for wgrad contracts them."""
    specs = [spec for recipe in recipes for spec in recipe.slots[4:] if not spec.high]
    groups = [EDEN_GROUP if spec.correction == "ms_eden" else 1 for spec in specs]
    return math.lcm(*groups, *(spec.sides[0] or 1 for spec in specs), *(spec.rotation or 1 for spec in specs))


def half_batch(recipes: Iterable[Recipe], batch_size: int, block_size: int) -> int:
    """Windows in each half of the batch that a certificate looks at: a twelfth of an update's, and so many that the
    blocks of these recipes divide their tokens."""
    needed = rows_needed(recipes)
    step = needed // math.gcd(needed, block_size)
    return math.ceil(math.ceil(batch_size / 12) / step) * step


def check_dimensions(recipe: Recipe, layer: str, m: int, k: int, n: int) -> None:
    """UserError, one sentence, unless every contracted axis is a multiple of the blocks and rotations along it.

    layer: for the message. m: tokens of a micro-batch; k, n: the layer's inputs and outputs; for a product of attention
    `rules.attention_sizes`.
    """
    sizes = {"M": m, "K": k, "N": n}
    for name, axis, spec in zip(SLOTS, CONTRACTED, recipe.slots, strict=True):
        if spec.high:
            continue
        group = EDEN_GROUP if spec.correction == "ms_eden" else 1
        asked = {
            f"blocks of {spec.block}": spec.sides[0] or 1,
            f"{spec.transform}": spec.rotation or 1,
            "MS-EDEN": group,
        }
        what, size = max(asked.items(), key=lambda item: item[1])
        if sizes[axis] % size:
            whose = "tokens of a micro-batch" if axis == "M" else "widths of the model"
            if is_attention(layer):
                whose = "block_size, or the width of a head, n_embd / n_head"
            raise UserError(
                f"recipe {recipe.name} cannot quantize {name} of {layer}, for {what} needs multiples of {size} and "
                f"{axis} is {sizes[axis]}: change the {whose}"
            )


def describe(recipe: Recipe) -> list[str]:
    """Lines of text: a heading, the six slots as a table, the layers kept high, and the source."""
    names = ("slot", "element", "scale", "block", "rule", "rounding", "transform", "source", "target", "more")
    rows = [names, *(_row(name, spec) for name, spec in zip(SLOTS, recipe.slots, strict=True))]
    widths = [max(len(row[i]) for row in rows) for i in range(len(names))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]
    kept = ", ".join([*recipe.keep_high, *([] if recipe.attention else ["products of attention"])]) or "nothing"
    return [f"recipe {recipe.name}", *lines, f"kept in the compute dtype: {kept}", f"source: {recipe.source}"]


def _row(name, spec):
    if spec.high:
        return name, "compute dtype", *[""] * 5, spec.source, "", ""
    more = (
        f"bound {spec.bound:g}" if spec.rule == "two_level" else "",
        f"shrink {spec.shrink:.4g}" if spec.shrink != 1 else "",
        spec.correction if spec.correction != "none" else "",
        f"amax {spec.amax}" if spec.amax != "current" else "",
    )
    return (name, spec.element, spec.scale, spec.block, spec.rule, spec.rounding, spec.transform, spec.source,
            f"{spec.target:.6g}", ", ".join(filter(None, more)))  # fmt: skip


def facts(recipe: Recipe) -> dict:
    """What a manifest keeps: the recipe's fields, its slots by name, and the facts of their element formats."""
    used = {formats.get_format(spec.element) for spec in recipe.slots}
    return {
        "name": recipe.name,
        "source": recipe.source,
        "keep_high": list(recipe.keep_high),
        "attention": recipe.attention,
        "slots": {name: dataclasses.asdict(spec) for name, spec in zip(SLOTS, recipe.slots, strict=True)},
        "formats": {fmt.name: formats.facts(fmt) for fmt in sorted(used, key=lambda fmt: fmt.name)},
    }
