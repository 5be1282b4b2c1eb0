"""`instrument`: a loss function whose products with weights are computed by a recipe or in number formats.

The loss function is traced to a jaxpr, the products are found in it (`plan`), and it is evaluated with other products
in their place (`rewrite`, `numbers`). The model is not touched, so it may be of any library. Without a recipe the loss
and the gradients are those of jax.value_and_grad to the bit.
"""

import fnmatch
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np

from altgrad_jax.errors import UserError
from altgrad_jax.instrumentation import numbers as of_numbers
from altgrad_jax.instrumentation.measure import by_name, name_of
from altgrad_jax.instrumentation.numbers import Formats, InFormats, Numbers
from altgrad_jax.instrumentation.origins import DATA, WEIGHT, Origin
from altgrad_jax.instrumentation.plan import Plan, Product, find, layers_of, named, without_pairs
from altgrad_jax.instrumentation.rewrite import evaluate
from altgrad_jax.instrumentation.sites import Sites, sites_of
from altgrad_jax.instrumentation.table import Layers, table_of
from altgrad_jax.numerics.bias import Bias, Sums, bias_of, unpacked
from altgrad_jax.numerics.formats import FORMATS, get_format
from altgrad_jax.numerics.histograms import observed
from altgrad_jax.numerics.products import named_statistics, push_amax
from altgrad_jax.numerics.recipes import RECIPES, WITH_ATTENTION, Recipe, get_recipe
from altgrad_jax.step.metrics import Columns, gradient_fidelity, scalars
from altgrad_jax.step.program import Observed


class State(NamedTuple):
    """What is carried from step to step."""

    amax_history: jax.Array | None  # float32 [layers, operands, history], oldest first; None where none is delayed


class _Trace(NamedTuple):
    """A loss function for arguments of some shapes."""

    jaxpr: Any  # jax.extend.core.ClosedJaxpr
    plan: Plan  # of all products with a weight
    outputs: Any  # the tree that the function returns


@dataclass(frozen=True)
class Instrument:
    """A loss function under a recipe; made by `instrument`.

    layers: table of the products, which prints.
    """

    loss_fn: Callable
    layers: Layers
    _numbers: Numbers | None
    _kept: frozenset[str]  # names of the layers that stay as the model has them
    _sites: Sites
    _params: Any  # structure of the parameters, with their shapes

    @property
    def choice(self) -> Recipe | Formats | None:
        """The recipe or the formats."""
        if self._numbers is None:
            return None
        return self._numbers.formats if isinstance(self._numbers, InFormats) else self._numbers.recipe

    @property
    def quantized(self) -> tuple[str, ...]:
        """Names of the layers that the recipe or the formats are used for."""
        return tuple(name for name in self._sites.names if name not in self._kept)

    @property
    def parameters(self) -> int:
        """How many numbers the parameters are."""
        return sum(math.prod(shape) for shape, _ in jax.tree.leaves(self._params, is_leaf=_is_shape))

    def init(self, params) -> State:
        """The state of a first step. params: of the structure and shapes that `instrument` was given."""
        self._check_params(params)
        numbers = self._numbers
        if numbers is None or not numbers.delayed:
            return State(None)
        return State(jnp.zeros((len(self._sites.names), len(numbers.operands), numbers.history), jnp.float32))

    def value_and_grad(self, params, batch, state: State, *args, key=None) -> tuple[tuple, Any, State, Columns]:
        """Loss, gradients and statistics of a step.

        A pure function of its arguments: it can be jitted, mapped and sharded as jax.value_and_grad can.

        Args:
          params, batch, args: what the loss function takes. Shapes of the batch may differ from those at the start.
          state: from `init` or the step before.
          key: a jax.random key, other for every step; needed where the recipe draws random numbers.

        Returns:
          ((loss, aux), gradients, the next state, statistics). aux is None where the loss function returns none.
          Gradients have the structure and the dtypes of the parameters. statistics: float32 by names as those of the
          built-in step, `sqnr_db/LAYER/W` or `sqnr_db/LAYER/dgrad.g`, where LAYER is a name of `layers`, of stacked
          layers and experts with the index behind it. A step that is not finite leaves the state as it was.

        Raises:
          UserError: parameters of another structure, no key, or blocks that do not divide an axis of this batch.
        """
        value, aux, grads, statistics = self._pass(self._numbers, params, batch, state, args, key)
        if self._numbers is None or statistics is None:
            return (value, aux), grads, state, scalars({})
        state = self._after(state, statistics, value, grads)
        return (value, aux), grads, state, self._numbers.columns(self._sites.names, statistics)

    def fidelity(self, params, batch, grads, *args) -> Columns:
        """How close gradients are to those of the loss function itself, as the model has it; a second pass.

        A pure function, for the inside of a jit, in every step or in some.

        Args:
          grads: from `value_and_grad` of the same parameters and batch.

        Returns:
          `grad_cosine/ARRAY`, `grad_sqnr_db/ARRAY`, `grad_flushed/ARRAY` for every array of the parameters, and over
          all of them, as the built-in step's reference gradient gives them (metrics.gradient_fidelity).
        """
        reference = jax.grad(partial(_only_loss, self.loss_fn))(params, batch, *args)
        return gradient_fidelity(by_name(grads), by_name(reference))

    def histograms(self, params, batch, state: State, *args) -> Observed:
        """How the operands use their formats: codes and magnitudes of every operand in one pass, rounded to nearest.

        A pure function of its arguments, for `Recorder.diagnose`; arrays [layers, 3 operands, ...].

        Raises:
          UserError: the instrument has no number formats. (A recipe's scales are in its statistics.)
        """
        if not isinstance(self._numbers, InFormats):
            raise UserError(
                "histograms are of operands in number formats, and this instrument has none: give instrument a format, "
                "such as recipe='E4M3'"
            )
        numbers = self._numbers.observing
        vectors_Q3S = self._pass(numbers, params, batch, state, args, None)[3]
        fields_Q3S, rest_Q3 = jnp.split(vectors_Q3S, [len(numbers.fields)], axis=-1)
        named = named_statistics(fields_Q3S)
        return Observed(*observed(rest_Q3), named["encode_scale"], named["amax"])

    def _pass(self, numbers: Numbers | None, params, batch, state: State, args, key) -> tuple[Any, Any, Any, Any]:
        """(loss, aux, gradients, statistics float32 [Q, O, S] or None)."""
        self._check_params(params)
        trace = _traced(self.loss_fn, _pairs(self.choice), params, batch, *args)
        plan = trace.plan.map(partial(_unless_kept, self._kept, numbers))
        sites = sites_of(plan.products())
        self._check_sites(sites)
        extras, probes = self._given(numbers, sites, state, key)
        loss = partial(_loss, trace._replace(plan=plan), numbers, extras, (batch, *args))
        (value, (aux, forward)), (grads, of_g) = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(params, probes)
        if numbers is None or not numbers.measured:
            return value, aux, grads, None
        return value, aux, grads, of_numbers.combined(numbers, sites, forward, of_g)

    def certify(self, params, batch, *args, key, state: State | None = None, draws: int = 16) -> dict[str, Bias]:
        """What of each product's error averages out and what stays (docs/bias.md): {layer: Bias}.

        Every layer is measured by itself, at the operands of one forward and backward pass that hands on exact
        gradients. It cannot be jitted: what it returns is NumPy.

        Args:
          params, batch, args, key: as in `value_and_grad`. state: for amaxes of earlier steps; None: of a first step.
          draws: of every product.

        Raises:
          UserError: as `value_and_grad`; fewer than 2 draws; number formats, or a recipe of attention.
        """
        numbers = self._numbers
        if not isinstance(numbers, of_numbers.InRecipe):
            raise UserError("only a recipe has a certificate: give instrument one, such as recipe='nvfp4'")
        if numbers.recipe.attention:
            raise UserError(
                f"a certificate is of products with weights, and {numbers.recipe.name} quantizes attention too: give "
                f"instrument the recipe without {WITH_ATTENTION}"
            )
        if draws < 2:
            raise UserError(f"draws={draws} cannot tell bias from variance: give 2 or more")
        self._check_params(params)
        certified = of_numbers.InCertificate(numbers.recipe, False, numbers.lazy, draws)
        trace = _traced(self.loss_fn, False, params, batch, *args)
        plan = trace.plan.map(partial(_unless_kept, self._kept, certified))
        sites = sites_of(plan.products())
        self._check_sites(sites)
        extras, probes = self._given(certified, sites, state or self.init(params), key)
        loss = partial(_loss, trace._replace(plan=plan), certified, extras, (batch, *args), params)
        of_g = jax.grad(lambda probes: loss(probes)[0])(probes)
        sums_Q = unpacked(of_numbers.combined(certified, sites, {}, of_g)[:, 0], draws)
        return {name: bias_of(Sums(*(leaf[q] for leaf in sums_Q)), draws) for q, name in enumerate(sites.names)}

    def _given(self, numbers: Numbers | None, sites: Sites, state: State, key) -> tuple[dict, dict]:
        """({product: Extra}, {product: probes [*axes, ...]})."""
        if numbers is None:
            return {}, {}
        kept_Q = np.array([name in self._kept for name in sites.names], bool)
        words = None
        if numbers.random:
            if key is None:
                raise UserError("the recipe draws random numbers: give value_and_grad a key, another for every step")
            words = _words(key)
        extras = numbers.extras(sites, state.amax_history, words, kept_Q)
        probe, probes = numbers.probe(), {}
        if probe is not None:
            probes = {p.name: jnp.broadcast_to(probe, (*p.axes, *probe.shape)) for p in sites.products}
        return extras, probes

    def _after(self, state: State, statistics_QOS, value, grads) -> State:
        if state.amax_history is None or self._numbers is None:
            return state
        finite = jnp.isfinite(value)
        for leaf in jax.tree.leaves(grads):
            finite &= jnp.all(jnp.isfinite(leaf))
        amax_QO = statistics_QOS[..., list(self._numbers.fields).index("amax")]
        return State(jnp.where(finite, push_amax(state.amax_history, amax_QO), state.amax_history))

    def _check_params(self, params) -> None:
        shapes = _shapes(params)
        if shapes != self._params:
            raise UserError(
                "the parameters have another structure, shape or dtype than those that instrument was given: "
                "instrument the loss function again"
            )

    def _check_sites(self, sites: Sites) -> None:
        if sites.names != self._sites.names:
            raise UserError(
                f"for this batch the loss function has the products {_some(sites.names)}, and had "
                f"{_some(self._sites.names)} when it was instrumented: instrument it for such a batch"
            )
        _check_dimensions(self._numbers, sites, self._kept)


def instrument(
    loss_fn: Callable,
    params,
    batch,
    *args,
    recipe: str | Recipe | Formats | None = None,
    keep: Sequence[str] | None = None,
    statistics: bool = True,
) -> Instrument:
    """Puts the products of a loss function with its weights under a recipe, or number formats.

    A product is covered where one operand is one leaf of the parameters, changed in nothing but its layout and dtype,
    also inside jit, scan, remat, cond and shard_map. `Instrument.layers` names all others with the reason.

    Args:
      loss_fn: loss_fn(params, batch, *args) -> scalar loss, or (loss, aux).
      params, batch, args: arrays or jax.ShapeDtypeStruct, for their shapes.
      recipe: a name of a recipe (`nvfp4`, also `nvfp4:wgrad`; `nvfp4_attention`: in products of two activations, too),
        a Recipe, a name of a number format (`E4M3`: all three
        operands, scaled per tensor), a Formats, or None to change nothing.
      keep: patterns (*, ?, [...]) of layers that stay as they are: whole names or whole parts of one, `lm_head` or
        `blocks/*/11`. They take the place of the layers that the recipe keeps in the built-in model, which has names
        of its own; a recipe that keeps some needs them, () for none.
      statistics: whether the statistics of the operands are computed.

    Returns:
      An Instrument.

    Raises:
      UserError: no recipe or format of that name, a pattern that fits no layer, no layer left, a layer whose axes the
        recipe's blocks do not divide.
    """
    choice = _choice_of(recipe)
    trace = _traced(loss_fn, _pairs(choice), params, batch, *args)
    products = trace.plan.products()
    kept = _kept(choice, products, keep)
    mixed = _mixed(products, kept)
    numbers = None
    if choice is not None:
        lazy = jax.default_backend() == "cpu"  # as step.recipe.for_platform
        numbers = of_numbers.numbers_of(choice, measured=statistics, lazy=lazy)
        if mixed and isinstance(choice, Formats):
            raise UserError(
                f"keep names a part of the stacked layers {_some(mixed)}, but formats hold for all of a stack: name "
                "all of them, or give a recipe"
            )
    sites = sites_of([p for p in products if _unless_kept(kept, numbers, p)])
    if numbers is not None and not sites.products:
        raise UserError(
            f"the loss function has no product that {recipe} could be used for:\n{table_of(trace.plan, {})}"
        )
    _check_dimensions(numbers, sites, kept)
    chosen = {} if choice is None else {p.name: _chosen(choice, p, kept) for p in products}
    return Instrument(loss_fn, table_of(trace.plan, chosen), numbers, kept, sites, _shapes(params))


def _pairs(choice: Recipe | Formats | None) -> bool:
    """Whether products of two activations have slots."""
    return isinstance(choice, Recipe) and choice.attention


def _traced(loss_fn, pairs: bool, params, *args) -> _Trace:
    jaxpr, outputs = jax.make_jaxpr(loss_fn, return_shape=True)(params, *args)
    paths = [path for path, _ in jax.tree_util.tree_flatten_with_path(params)[0]]
    names = [name_of(path) for path in paths]
    origins = [Origin(WEIGHT, frozenset([name])) for name in names]
    origins += [Origin(DATA)] * len(jax.tree.leaves(args))
    plan = find(jaxpr.jaxpr, origins)[1]
    return _Trace(jaxpr, named(plan if pairs else without_pairs(plan)), jax.tree.structure(outputs))


class _Shape(NamedTuple):
    """Of a parameter."""

    shape: tuple[int, ...]
    dtype: str


def _is_shape(node) -> bool:
    return isinstance(node, _Shape)


def _shapes(params):
    return jax.tree.map(lambda leaf: _Shape(jnp.shape(leaf), jnp.result_type(leaf).name), params)


def _loss(trace: _Trace, numbers: Numbers | None, extras, args, params, probes):
    """(loss, (aux, {product: statistics})) of the evaluated jaxpr."""
    names = [product.name for product in trace.plan.products()]
    given = [extras[name]._replace(probe=probes.get(name)) for name in names]
    replace = partial(of_numbers.replace, cast(Numbers, numbers))  # of no numbers there is no product
    leaves = jax.tree.leaves((params, *args))
    outs, found = evaluate(trace.plan, trace.jaxpr.jaxpr, trace.jaxpr.consts, leaves, replace, given)
    out = jax.tree.unflatten(trace.outputs, outs)
    value, aux = out if isinstance(out, tuple) else (out, None)
    return value, (aux, dict(zip(names, found)))


def _only_loss(loss_fn, *args):
    out = loss_fn(*args)
    return out[0] if isinstance(out, tuple) else out


def _words(key) -> jax.Array:
    """uint32 [2] of a jax.random key, new or old style."""
    data = jax.random.key_data(key) if jnp.issubdtype(key.dtype, jax.dtypes.prng_key) else key
    if data.ndim != 1:
        raise UserError(f"key has the shape {key.shape}: give a single jax.random key")
    return data[-2:]


def _choice_of(recipe) -> Recipe | Formats | None:
    if recipe is None or isinstance(recipe, Formats):
        return recipe
    name = str(recipe)
    if isinstance(recipe, Recipe) or name.partition(":")[0].removesuffix(WITH_ATTENTION) in RECIPES:
        return recipe if isinstance(recipe, Recipe) else get_recipe(name)
    try:
        fmt = get_format(name).name
    except UserError:
        raise UserError(
            f"there is no recipe or number format {name[:40]!r}: give a recipe, {', '.join(RECIPES)}, or a format, "
            f"such as {', '.join(list(FORMATS)[:6])}"
        ) from None
    return Formats(fmt, fmt, fmt)


def _kept(choice, products: Sequence[Product], keep: Sequence[str] | None) -> frozenset[str]:
    """Names of the layers that `keep` fits."""
    names = [layer.name for layer in layers_of(products)]
    if isinstance(keep, str):
        raise UserError(f"keep is the text {keep!r}: give patterns in brackets, keep=({keep!r},)")
    if keep is None and isinstance(choice, Recipe) and choice.keep_high:
        raise UserError(
            f"recipe {choice.name} keeps {', '.join(choice.keep_high)} in the compute dtype, and this model has names "
            f"of its own: name such layers, keep=('lm_head',), or none, keep=(); the layers are {_some(names)}"
        )
    found = set()
    for pattern in keep or ():
        hit = [name for name in names if fits(pattern, name)]
        if not hit:
            raise UserError(f"keep has a pattern {pattern!r} that fits no layer: the layers are {_some(names)}")
        found |= set(hit)
    return frozenset(found)


def fits(pattern: str, name: str) -> bool:
    """Whether a shell pattern fits a layer's name, or whole parts of it: `head` fits `params/head/kernel`."""
    return fnmatch.fnmatchcase(f"/{name}/", f"*/{pattern}/*")


def _some(names: Sequence[str]) -> str:
    return ", ".join(names) if len(names) < 8 else f"{', '.join(names[:6])}, ... {names[-1]}"


def _layers_of(product: Product) -> list[str]:
    return [layer.name for layer in layers_of([product])]


def _mixed(products, kept) -> list[str]:
    """Products of which some layers are kept and others not."""
    return [p.name for p in products if 0 < sum(name in kept for name in _layers_of(p)) < len(_layers_of(p))]


def _unless_kept(kept: frozenset[str], numbers: Numbers | None, product: Product) -> Product | None:
    """The product, or None where it stays as the model has it."""
    return None if numbers is None or all(name in kept for name in _layers_of(product)) else product


def _check_dimensions(numbers: Numbers | None, sites: Sites, kept: frozenset[str]) -> None:
    for layer in sites.layers:
        if numbers is not None and layer.name not in kept:
            numbers.check(layer.product, layer.name)


def _chosen(choice: Recipe | Formats, product: Product, kept: frozenset[str]) -> str:
    name = choice.name if isinstance(choice, Recipe) else str(choice)
    layers = _layers_of(product)
    others = sum(layer in kept for layer in layers)
    if others == len(layers):
        return "kept"
    return f"{name} ({len(layers) - others} of {len(layers)})" if others else name
