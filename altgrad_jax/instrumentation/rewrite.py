"""A jaxpr evaluated with other products in place of those of a Plan.

Equations without such a product are evaluated as they are, whatever they are: with an empty plan the program is the
plain one. Calls and loops that hold products are made anew by jax's own lax.scan, jax.checkpoint and so on.

A product's *extra* is what its replacement is given besides the operands: arrays with an axis for each loop around it,
of which a scan gives every round its own, and its *statistics* leave the loops in the same way, stacked. So no two
products, rounds or devices share a probe, whose cotangents would be added.

A model that computes in bfloat16 casts its float32 weights in front of a product. To round what it cast would round
twice, so a replacement is given the operand as it was before the cast, where the jaxpr or a caller shows it (`_wide`).
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend import core
from jax.sharding import PartitionSpec as P

from altgrad_jax.instrumentation.origins import LAYOUT
from altgrad_jax.instrumentation.plan import CALLS, Plan, Product, manual_axes, parts_of_scan

# (product, its equation, [left, right operand], extra) -> (result, statistics)
Replace = Callable[[Product, Any, Sequence[Any], Any], tuple[jax.Array, Any]]


class _Frame(NamedTuple):
    """A jaxpr while it is evaluated."""

    jaxpr: Any
    env: dict  # of variables
    made: dict  # the equation that made a variable
    wide: Mapping  # of inputs: their value before the caller rounded it

    def read(self, v):
        return v.val if isinstance(v, core.Literal) else self.env[v]


def evaluate(plan: Plan, jaxpr, consts, args, replace: Replace, extras, wide=()) -> tuple[list, list]:
    """(outputs, statistics) of a jaxpr with other products.

    Args:
      plan: what to replace. jaxpr: jax.extend.core.Jaxpr. consts, args: its inputs.
      replace: makes the result and the statistics of a product.
      extras: pytrees, one for each of plan.products(), with an axis for each loop of this jaxpr and further inside.
      wide: for each of args its value before it was rounded to its dtype, or None; empty where none is known.

    Returns:
      statistics: pytrees, one for each of plan.products(), with the loops' axes.
    """
    env = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*consts, *args)))
    known = {v: value for v, value in zip(jaxpr.invars, wide) if value is not None}
    frame = _Frame(jaxpr, env, {v: eqn for eqn in jaxpr.eqns for v in eqn.outvars}, known)
    left, statistics, start = iter(extras), [], 0
    for i in sorted(plan.inner):
        _as_they_are(frame, jaxpr.eqns[start:i])
        start, eqn, found = i + 1, jaxpr.eqns[i], plan.inner[i]
        stack = str(eqn.source_info.name_stack)
        with jax.named_scope(stack) if stack else nullcontext():
            if isinstance(found, Product):
                out, own = replace(found, eqn, [_operand(frame, v) for v in eqn.invars], next(left))
                outs, more = [out], [own]
            else:
                own = [[next(left) for _ in inner.products()] for inner in found]
                outs, more = _ANEW[eqn.primitive.name](found, eqn, frame, replace, own)
        env.update(zip(eqn.outvars, outs))
        statistics += more
    _as_they_are(frame, jaxpr.eqns[start:])
    return [frame.read(v) for v in jaxpr.outvars], statistics


def _as_they_are(frame, eqns):
    """Evaluates neighbouring equations, and enters what they make into the frame."""
    made = {v: None for eqn in eqns for v in eqn.outvars}
    used = list(
        dict.fromkeys(v for eqn in eqns for v in eqn.invars if not isinstance(v, core.Literal) and v not in made)
    )
    defined = [v for v in made if type(v).__name__ != "DropVar"]
    debug = frame.jaxpr.debug_info._replace(arg_names=("",) * len(used), result_paths=("",) * len(defined))
    part = frame.jaxpr.replace(constvars=(), invars=used, outvars=defined, eqns=eqns, debug_info=debug)
    frame.env.update(zip(defined, core.jaxpr_as_fun(core.ClosedJaxpr(part, ()))(*map(frame.read, used))))


def _operand(frame, v):
    wide = _wide(frame, v)
    return frame.read(v) if wide is None else wide


def _wide(frame, v):
    """The value of a variable as it was in float32 before it was rounded to a narrower dtype; None where that is not
    to be seen. A variable of float32 is taken as it is: a rounding on its way is the model's own."""
    if isinstance(v, core.Literal) or v.aval.dtype not in (jnp.bfloat16, jnp.float16):
        return None
    chain = []
    while v in frame.made and frame.made[v].primitive.name in LAYOUT - {"split"} and v.aval.dtype != jnp.float32:
        chain.append(frame.made[v])
        v = frame.made[v].invars[0]
        if isinstance(v, core.Literal):
            return None
    value = frame.read(v) if v.aval.dtype == jnp.float32 else frame.wide.get(v)
    if value is None:
        return None
    for eqn in reversed(chain):
        if eqn.primitive.name != "convert_element_type":
            value = eqn.primitive.bind(value, *map(frame.read, eqn.invars[1:]), **eqn.params)
    return value


# One function for each primitive that holds jaxprs: (plans, equation, frame, replace, extras of each plan) ->
# (outputs, statistics).


def _inputs(eqn, frame):
    return [frame.read(v) for v in eqn.invars]


def _call(plans, eqn, frame, replace, extras):
    params = eqn.params
    body = params[CALLS[eqn.primitive.name]]
    run = partial(_run_call, plans[0], getattr(body, "jaxpr", body), getattr(body, "consts", ()), replace)
    ins, wide = _inputs(eqn, frame), [_wide(frame, v) for v in eqn.invars]
    if "policy" in params:
        run = jax.checkpoint(run, prevent_cse=params["prevent_cse"], policy=params["policy"])
        return run(ins, wide, extras[0])
    if "in_shardings" not in params:
        return run(ins, wide, extras[0])
    outs, statistics = jax.jit(run, inline=params["inline"])(_pinned(ins, params["in_shardings"]), wide, extras[0])
    return _pinned(outs, params["out_shardings"]), statistics


def _run_call(plan, jaxpr, consts, replace, ins, wide, extras):
    return evaluate(plan, jaxpr, consts, ins, replace, extras, wide)


def _pinned(values, shardings):
    return [
        v if type(s).__name__ == "UnspecifiedValue" else lax.with_sharding_constraint(v, s)
        for v, s in zip(values, shardings)
    ]


def _scan(plans, eqn, frame, replace, extras):
    params = eqn.params
    fixed, carried, scanned = parts_of_scan(params, _inputs(eqn, frame))
    options = {key: params[key] for key in ("length", "reverse", "unroll", "_split_transpose") if key in params}
    step = partial(_round, plans[0], params["jaxpr"], len(carried), fixed, replace)
    carry, (ys, statistics) = lax.scan(step, carried, (scanned, extras[0]), **options)
    return [*carry, *ys], statistics


def _round(plan, body, n_carry, fixed, replace, carry, xs):
    outs, statistics = evaluate(plan, body.jaxpr, body.consts, [*fixed, *carry, *xs[0]], replace, xs[1])
    return outs[:n_carry], (outs[n_carry:], statistics)


def _cond(plans, eqn, frame, replace, extras):
    which, *ins = _inputs(eqn, frame)
    runs = [partial(_run_branch, plan, body, replace) for plan, body in zip(plans, eqn.params["branches"])]
    shapes = [jax.eval_shape(run, ins, own)[1] for run, own in zip(runs, extras)]
    branches = [partial(_branch, b, run, shapes) for b, run in enumerate(runs)]
    return lax.switch(which, branches, ins, extras)


def _run_branch(plan, body, replace, ins, extras):
    return evaluate(plan, body.jaxpr, body.consts, ins, replace, extras)


def _branch(b, run, shapes, ins, extras):
    """A branch that returns the statistics of every branch; zeros, whose count is 0, for those not taken."""
    outs, own = run(ins, extras[b])
    statistics = []
    for i, of_branch in enumerate(shapes):
        statistics += own if i == b else jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), of_branch)
    return outs, statistics


def _shard_map(plans, eqn, frame, replace, extras):
    params, axes = eqn.params, manual_axes(eqn.params)
    run = partial(_of_device, plans[0], params["jaxpr"], axes, params["check_vma"], replace)
    mapped = jax.shard_map(
        run,
        mesh=params["mesh"],
        in_specs=(list(params["in_specs"]), P(axes)),
        out_specs=(list(params["out_specs"]), P(axes)),
        check_vma=params["check_vma"],
        axis_names=set(axes),
    )
    return mapped(_inputs(eqn, frame), extras[0])


def _of_device(plan, jaxpr, axes, checked, replace, ins, extras):
    outs, statistics = evaluate(plan, jaxpr, (), ins, replace, jax.tree.map(lambda leaf: leaf[0], extras))
    if checked:
        statistics = jax.tree.map(lambda leaf: varying(leaf, axes), statistics)
    return outs, jax.tree.map(lambda leaf: leaf[None], statistics)


def axes_of(v) -> frozenset:
    """The manual axes of the mesh over which a value varies: `vma` until jax 0.9, `mat.varying` in 0.10."""
    kind: Any = jax.typeof(v)
    return frozenset(kind.mat.varying if hasattr(kind, "mat") else getattr(kind, "vma", ()))


def varying(v, axes) -> jax.Array:
    """The value as one that varies over these axes, too."""
    missing = tuple(axis for axis in axes if axis not in axes_of(v))
    return lax.pcast(v, missing, to="varying") if missing else v


_ANEW = dict.fromkeys(CALLS, _call) | {"scan": _scan, "cond": _cond, "shard_map": _shard_map}
