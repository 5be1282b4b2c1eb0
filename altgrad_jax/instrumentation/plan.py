"""Which matrix products of a jaxpr can be computed in a number format, and why the others cannot.

`find` walks a jaxpr once, carrying the origin of every value (`origins`), into jit, remat, scan, while, cond and
shard_map. It makes a `Plan`: at which equation stands which product, and in which loops. A `Product` has one operand
that is a weight, or is one of two activations, as in attention. All other products are `Note`s with a reason.

A product inside loops is computed once per round, and a batched product once per batch index, each time with a scale of
its own. Where the weight differs (loops over stacked layers, experts) each is a *layer* with a name of its own; where
it is the same (a recurrent net, devices of a shard_map) the rounds are one layer.
"""

import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

from jax.extend import core, source_info_util

from altgrad_jax.instrumentation.origins import (
    DATA,
    DERIVED,
    LAYOUT,
    WEIGHT,
    Origin,
    either,
    in_loop,
    joined,
    laid_out,
    out_of_loop,
    union,
)

# Primitives that call a jaxpr with their own inputs, and the parameter that holds it.
CALLS = {"jit": "jaxpr", "pjit": "jaxpr", "remat2": "jaxpr", "remat": "jaxpr", "checkpoint": "jaxpr"} | dict.fromkeys(
    ("closed_call", "core_call"), "call_jaxpr"
)
OTHER_PRODUCTS = ("conv_general_dilated", "ragged_dot", "ragged_dot_general", "scaled_dot")


PAIR = "activations"  # the name of a product of two activations


class Product(NamedTuple):
    """A product of data and one weight.

    Y[M,N] = X[M,K] W[K,N] for each entry of `axes`. In a product of two activations W is the second, and in that of
    attention's weights with values the values; its batch axes are `heads`, which are one layer.
    """

    name: str  # of the leaf; of its second product with #2
    leaf: str  # PAIR where there is no weight
    side: int  # which operand is W
    loops: tuple[tuple[int, bool], ...]  # (rounds, whether the weight differs between them), from the outermost
    batch: tuple[int, ...]  # sizes of the batch axes
    M: int
    K: int
    N: int
    dtypes: tuple[str, str, str]  # of weight, input and result
    order: tuple[int | None, ...]  # indices of equations on the way to it; None stands for the round of a loop
    where: str  # file and line
    heads: tuple[int, ...] = ()  # sizes of the batch axes of a product of two activations

    @property
    def is_pair(self) -> bool:
        """Whether it is a product of two activations."""
        return self.leaf == PAIR

    @property
    def axes(self) -> tuple[int, ...]:
        """Sizes of loops and batch: how often it is computed in a pass."""
        return (*(rounds for rounds, _ in self.loops), *self.batch)

    @property
    def differs(self) -> tuple[bool, ...]:
        """For each of `axes`, whether the weight differs along it."""
        return (*(differs for _, differs in self.loops), *(True for _ in self.batch))

    @property
    def layers(self) -> tuple[int, ...]:
        """The axes along which the weight differs."""
        return tuple(n for n, differs in zip(self.axes, self.differs) if differs)

    @property
    def reused(self) -> tuple[int, ...]:
        """Which of `axes` are rounds with the same weight."""
        return tuple(i for i, differs in enumerate(self.differs) if not differs)

    @property
    def flops(self) -> int:
        """Floating-point operations of a forward pass."""
        return 2 * self.M * self.K * self.N * math.prod((*self.axes, *self.heads))

    def position(self, index: Sequence[int]) -> tuple[int, ...]:
        """Sorts layers by when they are first computed. index: along `layers`."""
        left = iter(index)
        rounds = iter([next(left) if differs else 0 for _, differs in self.loops])
        return (*(next(rounds) if entry is None else entry for entry in self.order), *left)


class Note(NamedTuple):
    """A product that stays as it is. kind: "activations" (of two of them), "constant" or "uncovered"."""

    kind: str
    name: str  # the parameters that have a part in it
    why: str
    where: str
    flops: int


class Plan(NamedTuple):
    """What stands in a jaxpr. inner: {index of an equation: its Product, or the Plans of its jaxprs}."""

    inner: dict[int, Any]
    notes: tuple[Note, ...] = ()

    def products(self) -> list[Product]:
        """All of them, those of inner jaxprs in place."""
        found = []
        for item in self.inner.values():
            found += [item] if isinstance(item, Product) else [p for plan in item for p in plan.products()]
        return found

    def map(self, change: Callable[[Product], Product | None]) -> "Plan":
        """The plan with change(product) for each. None leaves a product out, and equations then without any."""
        inner = {
            i: change(item) if isinstance(item, Product) else tuple(plan.map(change) for plan in item)
            for i, item in self.inner.items()
        }
        return Plan({i: item for i, item in inner.items() if _holds_products(item)}, self.notes)


def _holds_products(item) -> bool:
    return isinstance(item, Product) or item is not None and any(plan.inner for plan in item)


class _Place(NamedTuple):
    """Where in the program a jaxpr stands."""

    loops: tuple[int, ...] = ()  # rounds of the loops around it
    order: tuple[int | None, ...] = ()
    times: int = 1  # how often it runs

    def at(self, *index: int) -> "_Place":
        return self._replace(order=(*self.order, *index))

    def looped(self, rounds: int) -> "_Place":
        return _Place((*self.loops, rounds), (*self.order, None), self.times * rounds)


_OUTSIDE = _Place()


def find(jaxpr, origins: Sequence[Origin], place: _Place = _OUTSIDE) -> tuple[list[Origin], Plan]:
    """(origins of the outputs, the Plan) of a jaxpr whose inputs have these origins."""
    env, inner, notes = dict(zip(jaxpr.invars, origins)), {}, []
    for i, eqn in enumerate(jaxpr.eqns):
        ins = [_read(env, v) for v in eqn.invars]
        of_eqn = _OF_PRIMITIVE.get(eqn.primitive.name, _of_other)
        outs, found, more = of_eqn(eqn, ins, place.at(i))
        if found is not None:
            inner[i] = found
        notes += more
        env.update(zip(eqn.outvars, outs))
    plan = Plan(inner, tuple(notes)).map(_same)
    return [_read(env, v) for v in jaxpr.outvars], plan


def _same(product):
    return product


def _read(env, v) -> Origin:
    return Origin() if isinstance(v, core.Literal) else env.get(v, Origin())


def _notes(plans) -> list[Note]:
    return [note for plan in plans for note in plan.notes]


def where_of(eqn) -> str:
    """The line of the program that made an equation, `file.py:12 (function)`."""
    return source_info_util.summarize(eqn.source_info).rpartition("/")[2]


def _flops(eqn, times: int) -> int:
    """Floating-point operations of any product, as often as it runs."""
    left, right, out = eqn.invars[0].aval, eqn.invars[1].aval, eqn.outvars[0].aval
    if eqn.primitive.name == "conv_general_dilated":
        of_output = right.size // right.shape[eqn.params["dimension_numbers"].rhs_spec[0]]
    elif "dimension_numbers" in eqn.params:
        of_output = math.prod(left.shape[d] for d in eqn.params["dimension_numbers"][0][0])
    else:
        of_output = left.shape[-1]
    return 2 * out.size * of_output * times


# One function for each kind of equation: (origins of its outputs, what Plan.inner has of it or None, Notes).


def _of_dot(eqn, ins, place):
    kinds = [o.kind for o in ins]
    outs = [joined(ins, "dot_general")._replace(scores=kinds == [DATA, DATA])]
    names = ", ".join(sorted(union(o.leaves for o in ins)))
    note = Note("uncovered", names, "", where_of(eqn), _flops(eqn, place.times))
    if kinds.count(WEIGHT) == 1 and DERIVED not in kinds:
        return outs, _product(eqn, ins, kinds.index(WEIGHT), place), []
    if kinds.count(WEIGHT) == 2:
        return outs, None, [note._replace(why="product of two parameters")]
    if DERIVED in kinds:
        return outs, None, [note._replace(why=f"used after {ins[kinds.index(DERIVED)].through}")]
    if kinds == [DATA, DATA]:
        if names and eqn.params["dimension_numbers"][1][0]:
            return outs, None, [note._replace(why="rows chosen by data")]
        values = int(not (ins[1].scores and not ins[0].scores))
        return outs, _product(eqn, ins, values, place), []
    return outs, None, [note._replace(kind="constant")] if DATA in kinds else []


def _product(eqn, ins, side, place) -> Product:
    contract, batch = eqn.params["dimension_numbers"]
    shapes = [v.aval.shape for v in eqn.invars]
    free = [
        math.prod(n for d, n in enumerate(shape) if d not in (*contract[s], *batch[s]))
        for s, shape in enumerate(shapes)
    ]
    dtypes = [v.aval.dtype.name for v in (*eqn.invars, *eqn.outvars)]
    is_pair = ins[side].kind == DATA
    leaf = PAIR if is_pair else next(iter(ins[side].leaves))
    sizes = tuple(shapes[side][d] for d in batch[side])
    return Product(
        name=leaf,
        leaf=leaf,
        side=side,
        loops=tuple((rounds, not is_pair and depth in ins[side].loops) for depth, rounds in enumerate(place.loops)),
        batch=() if is_pair else sizes,
        M=free[1 - side],
        K=math.prod(shapes[side][d] for d in contract[side]),
        N=free[side],
        dtypes=(dtypes[side], dtypes[1 - side], dtypes[2]),
        order=place.order,
        where=where_of(eqn),
        heads=sizes if is_pair else (),
    )


def _of_call(eqn, ins, place):
    outs, plan = find(body_of(eqn), ins, place)
    return outs, (plan,), plan.notes


def body_of(eqn):
    """The jaxpr that an equation of CALLS calls, without its constants."""
    body = eqn.params[CALLS[eqn.primitive.name]]
    return getattr(body, "jaxpr", body)


def parts_of_scan(params, values) -> list[list]:
    """[fixed, carried, scanned] of what a scan is given: jax 0.12 has `ft_in` for it, earlier ones numbers."""
    if "ft_in" in params:
        return [list(part) for part in params["ft_in"].update(values).unpack()]
    n, k = params["num_consts"], params["num_carry"]
    return [values[:n], values[n : n + k], values[n + k :]]


def _of_scan(eqn, ins, place):
    depth = len(place.loops)
    fixed, carried, scanned = parts_of_scan(eqn.params, ins)
    xs = [in_loop(o, depth) for o in scanned]
    body, place = eqn.params["jaxpr"].jaxpr, place.looped(eqn.params["length"])
    outs, plan = _loop(body, fixed, carried, xs, place, depth)
    if any(p.loops[depth][1] for p in plan.products()):  # a loop over layers, so each has an attention of its own
        plan = plan.map(partial(_of_layers, depth))
    return [out_of_loop(o, depth) for o in outs], (plan,), plan.notes


def _of_layers(depth: int, product: Product) -> Product:
    if not product.is_pair:
        return product
    rounds = [(n, differs or i == depth) for i, (n, differs) in enumerate(product.loops)]
    return product._replace(loops=tuple(rounds))


def _of_while(eqn, ins, place):
    c, b = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
    outs, plan = _loop(eqn.params["body_jaxpr"].jaxpr, ins[c : c + b], ins[c + b :], [], place, None)
    of_condition = find(eqn.params["cond_jaxpr"].jaxpr, [*ins[:c], *outs], place)[1]
    # Reverse-mode derivatives of such a loop do not exist, so its products are outside of what is trained.
    notes = _unreached(plan, "while") + _unreached(of_condition, "the condition of a while")
    return outs, None, notes


def _loop(body, fixed, carry, xs, place, depth):
    """(origins of the outputs, Plan) of a loop, whose carried values may get another origin from round to round."""
    kept = [body.outvars[i] is body.invars[len(fixed) + i] for i in range(len(carry))]
    if depth is not None:
        carry = [o if same else in_loop(o, depth) for o, same in zip(carry, kept)]
    while True:
        outs, plan = find(body, [*fixed, *carry, *xs], place)
        after = [a if same else either(a, b) for a, b, same in zip(carry, outs, kept)]
        if after == carry:
            return [*carry, *outs[len(carry) :]], plan
        carry = after


def _of_cond(eqn, ins, place):
    found = [find(branch.jaxpr, ins[1:], place.at(b)) for b, branch in enumerate(eqn.params["branches"])]
    outs = found[0][0]
    for others, _ in found[1:]:
        outs = [either(a, b) for a, b in zip(outs, others)]
    outs = [o if o.kind == WEIGHT else joined([o, ins[0]], "cond") for o in outs]
    plans = tuple(plan for _, plan in found)
    return outs, plans, _notes(plans)


def manual_axes(params) -> tuple[str, ...]:
    """The mesh axes over which a shard_map splits its work."""
    axes = params.get("newly_manual_axes", params.get("manual_axes"))
    return tuple(axis for axis in params["mesh"].axis_names if axis in axes)


def _of_shard_map(eqn, ins, place):
    devices = math.prod(eqn.params["mesh"].shape[axis] for axis in manual_axes(eqn.params))
    outs, plan = find(eqn.params["jaxpr"], ins, place.looped(devices))
    return outs, (plan,), plan.notes


def _of_layout(eqn, ins, place):
    return [laid_out(eqn, ins)] * len(eqn.outvars), None, []


def _unchanged(eqn, ins, place):
    return ins, None, []


def _of_other(eqn, ins, place):
    """Arithmetic, other products, and what calls jaxprs in ways of its own: custom_jvp, custom_vjp, Pallas."""
    name, notes = eqn.primitive.name, []
    outs = [joined(ins, name)] * len(eqn.outvars)
    leaves = union(o.leaves for o in ins)
    if name in OTHER_PRODUCTS:
        kind = "uncovered" if leaves else "activations"
        notes.append(Note(kind, ", ".join(sorted(leaves)), name, where_of(eqn), _flops(eqn, place.times)))
    for body in _jaxprs(eqn.params):
        same = len(body.invars) == len(ins)
        inner = ins if same else [joined(ins, name)] * len(body.invars)
        found, plan = find(body, inner, place)
        if same and name.startswith("custom_") and len(found) == len(outs):
            outs = found
        notes += _unreached(plan, name)
    return outs, None, notes


def _jaxprs(params) -> Iterator[Any]:
    for value in params.values():
        for v in value if isinstance(value, (tuple, list)) else [value]:
            if isinstance(v, (core.Jaxpr, core.ClosedJaxpr)):
                yield v.jaxpr if isinstance(v, core.ClosedJaxpr) else v


def _unreached(plan, name) -> list[Note]:
    """The notes of a plan whose products are out of reach."""
    return [*plan.notes, *(_note(p, f"inside {name}") for p in plan.products())]


def _note(product: Product, why: str) -> Note:
    kind, name = ("activations", "") if product.is_pair else ("uncovered", product.leaf)
    return Note(kind, name, why, product.where, product.flops)


def without_pairs(plan: Plan) -> Plan:
    """The plan whose products of two activations stay as they are."""
    notes = [_note(product, "") for product in plan.products() if product.is_pair]
    plan = plan.map(lambda product: None if product.is_pair else product)
    return plan._replace(notes=(*plan.notes, *notes))


_OF_PRIMITIVE = (
    {name: _of_layout for name in LAYOUT}
    | {name: _of_call for name in CALLS}
    | {
        "dot_general": _of_dot,
        "scan": _of_scan,
        "while": _of_while,
        "cond": _of_cond,
        "shard_map": _of_shard_map,
        "optimization_barrier": _unchanged,
    }
)


class Layer(NamedTuple):
    """One weight matrix and its product: an entry of Product.layers."""

    name: str  # of the product, with the index of stacked layers or experts behind it
    product: Product
    index: tuple[int, ...]


def layers_of(products: Sequence[Product]) -> list[Layer]:
    """Every layer, in the order in which they are first computed."""
    found = []
    for product in products:
        for index in itertools.product(*map(range, product.layers)):
            found.append(Layer("/".join([product.name, *map(str, index)]), product, index))
    return sorted(found, key=lambda layer: layer.product.position(layer.index))


def named(plan: Plan) -> Plan:
    """The plan whose products have different names: a leaf's second product has `#2` behind it."""
    seen: Counter[str] = Counter()

    def with_name(product):
        seen[product.leaf] += 1
        count = seen[product.leaf]
        return product if count == 1 else product._replace(name=f"{product.leaf}#{count}")

    return plan.map(with_name)
