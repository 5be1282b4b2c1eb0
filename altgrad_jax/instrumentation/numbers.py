"""In which numbers a product is computed: by a recipe (slot_dot), or in number formats (quant_dot).

Both kinds, `InRecipe` and `InFormats`, hold static choices only and offer the same methods: how many operands a layer
has, what a site is given (`extras`), the product itself (`product`), and the statistics of layers by the names that the
built-in step gives them.

Axes: Q layers, O operands of a layer (6 slots, or W, A and G), S fields of statistics, H steps of an amax history.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from altgrad_jax.config import for_operands
from altgrad_jax.errors import UserError
from altgrad_jax.instrumentation import sites as of_sites
from altgrad_jax.instrumentation.matrices import as_matrices, as_result
from altgrad_jax.instrumentation.plan import Product
from altgrad_jax.instrumentation.rewrite import axes_of, varying
from altgrad_jax.instrumentation.sites import Extra, Sites
from altgrad_jax.numerics import bias, histograms, products, slot_statistics, slots
from altgrad_jax.numerics.certified_products import Certified, Draws, certified_dot
from altgrad_jax.numerics.formats import get_format
from altgrad_jax.numerics.products import Operand, Operands, Rule, quant_dot
from altgrad_jax.numerics.recipes import SLOTS, Recipe, check_dimensions, get_recipe, rows_needed
from altgrad_jax.numerics.rounding import FormatParams, format_params
from altgrad_jax.numerics.rules import BLOCK_SIZES, OPERANDS, ROUNDINGS, LayerFormats
from altgrad_jax.numerics.slot_quantization import Features, Slot
from altgrad_jax.numerics.slots import slot_dot, slot_dots
from altgrad_jax.step import quantization, recipe
from altgrad_jax.step.metrics import Columns

# Where the slots of a forward and of a backward vector stand among SLOTS.
_ORDER = np.argsort([*slots.FORWARD, *slots.BACKWARD])


@dataclass(frozen=True)
class Formats:
    """Number formats of the operands W (weight), A (input) and G (output gradient) of every product.

    None leaves an operand in the model's dtype. scaling: of numerics.products, one name, or three for W, A and G as in
    'current,current,delayed'; with `delayed` the scale comes from the largest amax of the last `amax_history` updates,
    which the state carries. rounding: 'nearest' or 'stochastic', one or three. UserError names what does not exist.
    """

    w: str | None = None
    a: str | None = None
    g: str | None = None
    scaling: str = "current"
    rounding: str = "nearest"
    amax_history: int = 16

    def __post_init__(self):
        for operand, name in zip("wag", self.wag):
            object.__setattr__(self, operand, None if name is None else get_format(name).name)
        if not any(self.wag):
            raise UserError("Formats() gives no operand a format: name one, such as Formats(w='E4M3')")
        for setting, value in (("scaling", self.scaling), ("rounding", self.rounding)):
            if value.count(",") not in (0, 2):
                raise UserError(f"{setting}={value!r} cannot be read: give one name, or three for W, A and G")
        for name in self.roundings:
            if name not in ROUNDINGS:
                raise UserError(f"there is no rounding {name!r}: give one of {', '.join(ROUNDINGS)}")
        if self.amax_history < 1:
            raise UserError(f"amax_history={self.amax_history} keeps no amax: give 1 or more")
        Rule(*self.scalings)  # complains of a name that does not exist

    @property
    def wag(self) -> tuple[str | None, str | None, str | None]:
        """The formats of the three operands."""
        return self.w, self.a, self.g

    @property
    def scalings(self) -> tuple[str, str, str]:
        """Of the three operands."""
        return for_operands(self.scaling)

    @property
    def roundings(self) -> tuple[str, str, str]:
        """Of the three operands."""
        return for_operands(self.rounding)

    def __str__(self):
        names = list(dict.fromkeys(self.wag))
        if len(names) == 1:
            return str(names[0])
        return " ".join(f"{operand}={name}" for operand, name in zip(OPERANDS, self.wag) if name)


def compute_dtype(product: Product) -> Any:
    """The dtype of the operands: bfloat16 where the model multiplies bfloat16, else float32."""
    return jnp.dtype(jnp.bfloat16 if set(product.dtypes[:2]) == {"bfloat16"} else jnp.float32)


@dataclass(frozen=True)
class InFormats:
    """Products by quant_dot. Static."""

    formats: Formats
    measured: bool
    observe: bool = False  # whether histograms stand behind the statistics
    operands = OPERANDS
    fields = products.FIELDS

    @property
    def delayed(self) -> bool:
        """Whether some scale comes from earlier steps."""
        return "delayed" in [s for s, name in zip(self.formats.scalings, self.formats.wag) if name]

    @property
    def random(self) -> bool:
        """Whether a step needs random numbers."""
        return "stochastic" in [r for r, name in zip(self.formats.roundings, self.formats.wag) if name]

    @property
    def nothing(self) -> np.ndarray:
        """float32 [S] that changes nothing when combined."""
        counts = 2 * histograms.HISTOGRAMS if self.observe else 0
        return np.pad(products.empty_statistics(), (0, counts))

    @property
    def observing(self) -> "InFormats":
        """The same formats with histograms, rounded to nearest."""
        return InFormats(dataclasses.replace(self.formats, rounding="nearest"), measured=True, observe=True)

    @property
    def rule(self) -> Rule:
        """The static choices of quant_dot."""
        wide = any(get_format(name).mantissa_bits > 7 for name in self.formats.wag if name)
        observe = histograms.observe if self.observe else None
        return Rule(*self.formats.scalings, float32_operands=wide, observe=observe)

    @property
    def history(self) -> int:
        """Steps of an amax history."""
        return self.formats.amax_history

    def check(self, product: Product, name: str) -> None:
        """UserError unless blocks divide the axes that they lie along."""
        for operand, scaling, size in zip("WAG", self.formats.scalings, (product.K, product.K, product.N)):
            block = BLOCK_SIZES.get(scaling, 1)
            if size % block:
                raise UserError(
                    f"{scaling} cannot scale {operand} of {name}, whose contracted axis has {size} elements: name the "
                    "layer in keep, or give another scaling"
                )

    def extras(self, sites: Sites, history_QOH, words, kept_Q) -> dict[str, Extra]:
        """{product: what its sites are given}; no layer of a stack is kept."""
        assert not kept_Q.any(), "instrument refuses formats for a part of a stack"
        given, seeds = {}, {}
        if self.delayed:
            table: Any = jax.tree.map(lambda *leaves: np.stack(leaves), *[_params(name) for name in self.formats.wag])
            given = of_sites.of_rows(sites, products.delayed_scale(history_QOH, table))
        if self.random:
            seeds = of_sites.seeds(sites, words, 3)
        return {p.name: Extra(seed=seeds.get(p.name), given=given.get(p.name)) for p in sites.products}

    def probe(self) -> np.ndarray | None:
        """float32 [S], of one site; None where nothing is measured of the backward pass."""
        return self.nothing if self.measured and self.formats.g else None

    def dot(self, x, w, extra: Extra, w_is_NK: bool, dtype, is_pair: bool) -> tuple[jax.Array, Any]:
        """(Y float32 [M, N], statistics) of one site."""
        assert not is_pair, "instrument gives products of two activations recipes only"
        operands = []
        for i, name in enumerate(self.formats.wag):
            if name is None:
                operands.append(None)
                continue
            scale = extra.given[i] if extra.given is not None else 0.0
            seed = extra.seed[i] if extra.seed is not None and self.formats.roundings[i] == "stochastic" else None
            operands.append(Operand(_params(name), scale, seed))
        return quant_dot(
            x,
            w,
            operands=Operands(*operands),
            g_probe=extra.probe,
            w_is_NK=w_is_NK,
            compute_dtype=dtype,
            rule=self.rule,
        )

    def gather(self, forward, backward) -> jax.Array:
        """float32 [..., O, S] of a product from what `dot` returned and its probe's gradient."""
        found = (forward.w, forward.a, backward)
        shape = next(v for v in found if v is not None).shape
        return jnp.stack([jnp.broadcast_to(self.nothing, shape) if v is None else v for v in found], axis=-2)

    def columns(self, names, statistics_QOS) -> Columns:
        """`statistic/layer/W|A|G` and `statistic/all/W|A|G`, as quantization.format_metrics has them."""
        rows = tuple(LayerFormats(name, *self.formats.wag) for name in names)
        options = quantization.QuantOptions(rows, self.formats.scalings)
        return quantization.format_metrics(options, statistics_QOS)


def _params(name: str | None) -> FormatParams:
    """The format as data; of an operand without one BF16's, which are not read."""
    return format_params(get_format(name or "BF16"))


@dataclass(frozen=True)
class InRecipe:
    """Products by slot_dot. Static.

    Which layers of a stack are kept is data, and so, within a loop, is the whole recipe, as in the built-in step: with
    constants XLA would fuse otherwise, and last digits differ.
    """

    recipe: Recipe
    measured: bool
    lazy: bool
    operands = SLOTS
    fields = slot_statistics.FIELDS
    history = 16

    @property
    def delayed(self) -> bool:
        """Whether some amax comes from earlier steps."""
        return any(spec.amax == "delayed" for spec in self.recipe.slots)

    @property
    def random(self) -> bool:
        """Whether a step needs random numbers."""
        return any(s.rounding == "stochastic" or s.transform.endswith("redrawn") for s in self.recipe.slots)

    @property
    def nothing(self) -> np.ndarray:
        """float32 [S] that changes nothing when combined."""
        return slot_statistics.empty()

    @cached_property
    def slots(self) -> Slot:
        """The recipe as data: NumPy leaves [6, ...]."""
        return slots.slots_of(self.recipe)

    @cached_property
    def high(self) -> Slot:
        """Six slots that quantize nothing."""
        return slots.slots_of(get_recipe("bf16"))

    @property
    def features(self) -> tuple[Features, ...]:
        """What the program of each slot can do."""
        return slots.features_of([self.slots, self.high], lazy=self.lazy, statistics=self.measured)

    def check(self, product: Product, name: str) -> None:
        """UserError unless blocks and transforms divide the axes that they lie along."""
        try:
            check_dimensions(self.recipe, name, product.M, product.K, product.N)
        except UserError as error:
            raise UserError(f"{error}, or name the layer in keep") from None

    def extras(self, sites: Sites, history_QOH, words, kept_Q) -> dict[str, Extra]:
        """{product: what its sites are given}. kept_Q: bool, layers that stay in the compute dtype."""
        given, drawn, kept = {}, {}, of_sites.of_rows(sites, kept_Q)
        if self.delayed:
            flags = np.array([spec.amax == "delayed" for spec in self.recipe.slots])
            given = of_sites.of_rows(sites, jnp.where(flags, jnp.max(history_QOH, axis=-1), 0.0))
        if self.random:
            drawn = {name: self._drawn(seed) for name, seed in of_sites.seeds(sites, words, 1).items()}
        nothing = Extra()
        return {
            p.name: drawn.get(p.name, nothing)._replace(given=given.get(p.name), kept=kept[p.name])
            for p in sites.products
        }

    def _drawn(self, seeds) -> Extra:
        """What slots.redraw makes of seeds [*axes, 1, 2]."""
        axes = seeds.shape[:-2]
        drawn = jax.vmap(partial(slots.redraw, self.slots))(seeds.reshape(-1, 2))
        signs = drawn.signs.reshape(*axes, *drawn.signs.shape[1:]) if self.slots.redrawn.any() else None
        return Extra(seed=drawn.seed.reshape(*axes, *drawn.seed.shape[1:]), signs=signs)

    def probe(self) -> np.ndarray | None:
        """float32 [3, S], of one site; None where nothing is measured."""
        return slots.empty_statistics() if self.measured else None

    def dot(self, x, w, extra: Extra, w_is_NK: bool, dtype, is_pair: bool) -> tuple[jax.Array, Any]:
        """(Y float32 [M, N], statistics) of one site; with `is_pair` [heads, M, N]."""
        own = {"seed": extra.seed, "signs": extra.signs, "given": extra.given}
        of_site = self.slots._replace(**{name: value for name, value in own.items() if value is not None})
        assert extra.kept is not None, "every site of a recipe is told whether it is kept"
        of_site = jax.tree.map(partial(jnp.where, extra.kept), self.high, of_site)
        dot = slot_dots if is_pair else slot_dot
        return dot(x, w, of_site, self.features, extra.probe, w_is_NK, dtype)

    def gather(self, forward, backward) -> jax.Array:
        """float32 [..., O, S] of a product from what `dot` returned and its probe's gradient."""
        return jnp.concatenate([forward, backward], axis=-2)[..., _ORDER, :]

    def columns(self, names, statistics_QOS) -> Columns:
        """`statistic/layer/slot` and `statistic/all/slot`, as recipe.format_metrics has them."""
        return recipe.format_metrics(tuple(names), statistics_QOS)


@dataclass(frozen=True)
class InCertificate(InRecipe):
    """Products by a recipe that measure themselves in the backward pass (certified_dot).

    The one vector of a layer is packed bias.Sums.
    """

    draws: int = 16
    operands = ("all",)

    @property
    def random(self) -> bool:
        """Draws always are."""
        return True

    @property
    def fields(self) -> dict[str, Any]:
        """Sums add up. The first one is an energy: above 0 wherever the product was computed."""
        return {"count": jnp.add} | {f"sum_{i}": jnp.add for i in range(1, bias.n_fields(self.draws))}

    @property
    def nothing(self) -> np.ndarray:
        """float32 [F] that changes nothing when combined."""
        return np.zeros(bias.n_fields(self.draws), np.float32)

    def probe(self) -> np.ndarray:
        """float32 [F], of one site."""
        return self.nothing

    def dot(self, x, w, extra: Extra, w_is_NK: bool, dtype, is_pair: bool) -> tuple[jax.Array, Any]:
        """(Y float32 [M, N], nothing) of one site. A batch that cannot be halved for its blocks is measured whole."""
        assert not is_pair, "a certificate is of products with weights"
        own = self.slots if extra.given is None else self.slots._replace(given=extra.given)
        assert extra.kept is not None and extra.seed is not None, "every site of a certificate is given both"
        own = jax.tree.map(partial(jnp.where, extra.kept), self.high, own)
        rows = x.size // x.shape[-1]
        halves = 1 if rows % (2 * rows_needed([self.recipe])) else 2
        given = Certified(own, extra.seed[0], jnp.int32(0))
        y = certified_dot(x, w, given, Draws(self.draws, halves, self.features), extra.probe, w_is_NK, dtype)
        return y, jnp.zeros(())

    def gather(self, forward, backward) -> jax.Array:
        """float32 [..., 1, F] of a product: its probe's gradient."""
        return backward[..., None, :]


Numbers = InFormats | InRecipe


@partial(jax.jit, static_argnames=("numbers", "n_batch", "w_is_NK", "dtype", "again", "is_pair"))
def _dot(x, w, extra: Extra, *, numbers: Numbers, n_batch: int, w_is_NK: bool, dtype, again: bool, is_pair: bool):
    """Numbers.dot over batch axes. Jitted, so that products that are alike are traced and lowered once."""
    dot = partial(numbers.dot, w_is_NK=w_is_NK, dtype=dtype, is_pair=is_pair)
    if again:  # or every round of the loop would save a rounded copy of the same weight
        dot = jax.checkpoint(dot)
    for _ in range(n_batch):
        dot = partial(_one_by_one, dot)
    return dot(x, w, extra)


def _one_by_one(dot, x, w, extra):
    """dot over a leading axis. Not by vmap: where the statistics of a custom_vjp's function and of its forward rule are
    batched along different axes, jax 0.10 mixes them up. And lax.cond would compute both its branches."""
    return lax.map(partial(_of_tuple, dot), (x, w, extra))


def _of_tuple(dot, args):
    return dot(*args)


def replace(numbers: Numbers, product: Product, eqn, operands, extra: Extra) -> tuple[jax.Array, Any]:
    """A product in these numbers, as rewrite.evaluate asks for it."""
    found = as_matrices(product, eqn, [v.astype(jnp.float32) for v in operands])
    axes = tuple(axes_of(found.x) | axes_of(found.w))
    x, w, extra = jax.tree.map(partial(varying, axes=axes), (found.x, found.w, extra))
    y, statistics = _dot(
        x,
        w,
        extra,
        numbers=numbers,
        n_batch=len(product.batch),
        w_is_NK=found.w_is_NK,
        dtype=compute_dtype(product),
        again=bool(product.reused),
        is_pair=product.is_pair,
    )
    return as_result(product, eqn, operands, y), statistics


def combined(numbers: Numbers, sites: Sites, forward: Mapping[str, Any], backward: Mapping[str, Any]) -> jax.Array:
    """float32 [Q, O, S] from what the products returned and the gradients of their probes."""
    found = {p.name: numbers.gather(forward.get(p.name), backward.get(p.name)) for p in sites.products}
    return of_sites.combined(sites, numbers.fields, numbers.nothing, found)


def numbers_of(choice: Any, *, measured: bool, lazy: bool) -> Numbers:
    """The numbers that a Recipe or Formats stands for."""
    numbers = InFormats(choice, measured) if isinstance(choice, Formats) else InRecipe(choice, measured, lazy)
    # Scales of later steps come from the amaxes among the statistics.
    return dataclasses.replace(numbers, measured=measured or numbers.delayed)
