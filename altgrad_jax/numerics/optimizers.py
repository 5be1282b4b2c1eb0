"""Learning-rate schedules, gradient clipping, AdamW, and optimizers that know the number format of the weights.

The optimizers here are optax transformations that end *before* the learning rate: the step multiplies by -lr itself, so
that the rate is a value it can log and a sweep can vary, instead of a constant inside the optimizer state.
What they return is called a *direction*; the update is -lr times it.

An 8-bit weight can only lie at the numbers of its format, and their distance, one unit in the last place (ULP), grows
with the weight. Three optimizers take that into account, each in another place:

    ulp_precondition_before_adam   scales the gradient, before Adam's moments; which then divide the scaling out again
    ulp_adamw                      scales Adam's step, after the moments
    grid                           has no second moment and moves each weight by a whole number of codes

They need the grid of each tensor. `grids` is a tree of the params' structure that holds for each array
a rounding.Grid, or None where there is no format, and then the array gets exactly AdamW. It is given at construction;
or with each call, which wins, where format and scale are data that change from step to step:

    opt = ulp_adamw(beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.1)
    direction, state = opt.update(grads, state, params, grids=grids)
    params = jax.tree.map(lambda p, d: p - learning_rate * d, params, direction)

All are deterministic and run under jit, and under vmap with grids that carry a leading axis, so that formats can be
trained side by side. Tensors that have a grid are float32.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from altgrad_jax.errors import UserError
from altgrad_jax.numerics.rounding import (
    FormatParams,
    Grid,
    from_codes,
    round_to_format,
    stochastic_seed,
    to_codes,
    to_grid,
    ulp,
)
from altgrad_jax.numerics.rules import OPTIMIZERS

_STREAMS = 2**16  # more than a model has arrays: the streams of random bits of a stack's tensors lie that far apart
_MOST_CODES = 2**22  # round_to_format takes at most 22 mantissa bits


def learning_rate(
    step,
    *,
    peak,
    warmup_steps: int,
    max_steps: int,
    schedule: str,
    min_lr_ratio: float,
    decay_steps: int,
) -> jax.Array:
    """Learning rate of the update made from state `step` (counted from 0), float32.

    Warm-up is linear, peak * (step + 1) / warmup_steps, reaching the peak at update warmup_steps - 1. After it:
      constant: the peak.
      cosine: half a cosine from the peak down to min_lr_ratio * peak at the last update.
      wsd (warm-up, stable, decay): the peak, then linear to min_lr_ratio * peak over the last decay_steps updates
        (Hu et al. 2024, "MiniCPM").
    """
    step = jnp.asarray(step, jnp.float32)
    warm = jnp.minimum(1.0, (step + 1.0) / max(1, warmup_steps))
    if schedule == "constant":
        shape = 1.0
    else:
        start = warmup_steps if schedule == "cosine" else max_steps - decay_steps
        done = jnp.clip((step - start) / max(1, max_steps - 1 - start), 0.0, 1.0)
        fall = 0.5 * (1.0 + jnp.cos(jnp.pi * done)) if schedule == "cosine" else 1.0 - done
        shape = min_lr_ratio + (1.0 - min_lr_ratio) * fall
    return jnp.float32(peak) * warm * shape


# Which arrays of the parameters are several tensors, stacked along a first axis: a function of the tree that gives a
# tree of booleans, or None where none is.
Stacked = Callable[[Any], Any] | None


def is_decayed(params, stacked: Stacked = None) -> Any:
    """Tree of booleans: weight decay applies to every array with two or more axes, the embeddings included; the axis of
    stacked tensors does not count."""
    return jax.tree.map(lambda leaf, several: leaf.ndim - several >= 2, params, _several(params, stacked))


def _several(params, stacked: Stacked):
    return jax.tree.map(lambda leaf: False, params) if stacked is None else stacked(params)


def adamw(
    *, beta1: float, beta2: float, eps: float, weight_decay: float, stacked: Stacked = None
) -> optax.GradientTransformation:
    """AdamW (Loshchilov & Hutter 2019) up to the learning rate: the update is -lr times what this returns."""
    return optax.chain(*_adam_and_decay(beta1, beta2, eps, weight_decay, stacked))


def _adam_and_decay(beta1, beta2, eps, weight_decay, stacked):
    decayed = partial(is_decayed, stacked=stacked)
    return (optax.scale_by_adam(b1=beta1, b2=beta2, eps=eps), optax.add_decayed_weights(weight_decay, mask=decayed))


def ulp_precondition_before_adam(
    *,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    clamp=(2.0**-16, 1.0),
    grids=None,
    stacked: Stacked = None,
) -> optax.GradientTransformationExtraArgs:
    """AdamW on gradients multiplied by S = 2^(floor(log2 |w|) - M), M the mantissa bits of the tensor's format.

    S is the ULP of w in a format of unlimited range. It changes little: where S is constant over Adam's memory,

        mean(S g) / sqrt(mean((S g)^2)) = mean(g) / sqrt(mean(g^2))

    so what is left of S is what its own changes do (of a factor 2, as a weight passes a power of two), and eps, which
    weighs 1/S times as much. It is here to be compared with, as `ulp_adamw` is what it was meant to be.

    Args:
      beta1, beta2, eps, weight_decay: as in `adamw`.
      clamp: smallest and largest S, from 2^-126 up; w = 0 gets the smallest. The default leaves S as it is for |w| from
        2^(M - 16) to 2^M. A smaller S only brings S g closer to eps, which damps the step instead of scaling it.
      grids: see the top of this module; only the mantissa bits are used.

    Raises:
      UserError: from here for a clamp that is no range, from update for missing or unfit grids or params.
    """
    low, high = clamp
    if not 2.0**-126 <= low <= high < float("inf"):
        raise UserError(f"clamp={clamp!r} cannot be used: give the smallest and the largest factor, 2**-126 or more")

    def scale(g, w, grid):
        # The exponent field is floor(log2 |w|) exactly. Zero and subnormals have field 0 and end at the lower clamp.
        field = (lax.bitcast_convert_type(w, jnp.int32) & 0x7FFFFFFF) >> 23
        power = lax.bitcast_convert_type(jnp.maximum(field - grid.format.mantissa_bits, 1) << 23, jnp.float32)
        return g * jnp.clip(power, low, high)

    return optax.chain(
        _where_gridded(scale, "ulp_precondition_before_adam", grids, stacked),
        *_adam_and_decay(beta1, beta2, eps, weight_decay, stacked),
    )


def ulp_adamw(
    *,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    floor: float = 2.0**-8,
    equal: str = "rms",
    grids=None,
    stacked: Stacked = None,
) -> optax.GradientTransformationExtraArgs:
    """AdamW whose step is measured in ULPs of the weight: far where the format is coarse, short where it is fine.

    With d the direction of Adam, before weight decay, and for each tensor

        u = max(ulp(w), floor * max(ulp))        max and rms over the tensor
        direction = d * u / rms(u) + weight_decay * w

    so a weight above the floor moves by lr * d / rms(u) of its own ULPs, whatever its size. Dividing by rms(u) keeps
    the RMS of the step what it is in AdamW where d and u are unrelated, so that learning rates can be compared. Where
    all ULPs are equal (E0M7, or a tensor whose weights are all subnormal in their format) this is AdamW up to rounding.

    Args:
      beta1, beta2, eps, weight_decay: as in `adamw`; weight decay as there, on arrays with two or more axes.
      floor: smallest u as a share of the tensor's largest ULP, from 0 to 1. Without it a weight at zero is stuck: in
        E4M3, with a scale that uses its range, its step would be 2^-14 of the largest weight's.
      equal: "mean" divides by mean(u) instead, which keeps the mean of |step| and makes its RMS larger, 1.27 times in
        E4M3: `ulp_adamw_mean`, the `ulp_adamw` of records before schema version 6.
      grids: see the top of this module.

    Raises:
      UserError: from here for a floor outside its range, from update for missing or unfit grids or params.
    """
    if not 0 <= floor <= 1:
        raise UserError(f"floor={floor!r} cannot be used: give a share of the largest ULP, from 0 to 1")
    if equal not in ("rms", "mean"):
        raise UserError(f"equal={equal!r} cannot be used: give rms or mean")

    def scale(d, w, grid):
        ulps = ulp(w, grid)
        u = jnp.maximum(ulps / jnp.max(ulps), floor)  # in units of the largest, so that their sum cannot overflow
        return d * (u / (jnp.mean(u) if equal == "mean" else jnp.sqrt(jnp.mean(jnp.square(u)))))

    adam, decay = _adam_and_decay(beta1, beta2, eps, weight_decay, stacked)
    return optax.chain(adam, _where_gridded(scale, "ulp_adamw", grids, stacked), decay)


class GridState(NamedTuple):
    """State of `grid`. Both trees have the params' structure, with optax.MaskedNode, which has no arrays, elsewhere."""

    momentum: Any  # moving average of the gradient of the tensors that have a grid, float32, not bias-corrected
    adamw: Any  # state of `adamw` for the other tensors; its count is that of all


def grid(
    *,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    max_codes: int = 1,
    is_quantized=None,
    grids=None,
    stacked: Stacked = None,
) -> optax.GradientTransformationExtraArgs:
    """Momentum that moves every weight of a tensor with a grid by a whole number of codes; AdamW for the others.

    For a tensor w with a grid, at the t-th update, with mean and rms over the tensor:

        m = beta1 * m + (1 - beta1) * g
        m_hat = m / (1 - beta1^t)
        c = lr * (m_hat / (rms(m_hat) + eps) / mean(ulp) + weight_decay * w / ulp(w))    codes, clipped to +-max_codes
        n = -c, rounded stochastically to a whole number
        w_new = the number n codes above w on its grid, or the largest there where that lies beyond

    There is no second moment: rms(m_hat) takes its place, one number for a tensor, which halves the optimizer's memory
    for these tensors. The rms of c * mean(ulp) is thus lr, while Adam's steps have one between 0.2 lr (noise,
    beta1 = 0.9) and lr. As c counts codes, the step grows with the weight, as in `ulp_adamw` without its floor.
    Stochastic rounding gives n the mean -c even where c is far below one code, so that weights need no finer copy. That
    is a mean in codes: from a power of two one code down is half as far as one code up (in E7M0 always), so that steps
    of mean 0 in codes let the size of such weights grow. And from zero the first codes are the format's smallest
    numbers: in a format with a wide range (E5M2, E7M0, BF16) a tensor that begins at zero stays there for very long.

    A weight that is not on its grid, a float32 master weight or one beyond the largest number, goes n * ulp(w) instead.

    update(updates, state, params, grids=..., learning_rate=..., seed=...) takes the learning rate because the size of
    the step decides the rounding. The direction is -(w_new - w) / lr, 0 where lr is 0. The caller's sum
    w + (-lr * direction) can miss w_new by one float32 ulp of the larger of w and w_new; rounding it onto the grid, to
    nearest, repairs that.

    Args:
      beta1, eps, weight_decay: see above; weight decay acts on arrays with two or more axes. Also of AdamW's part.
      beta2: of AdamW's part only.
      max_codes: most codes a weight moves in an update, a whole number from 1 to 2^22. At 1 it goes to a neighbour or
        stays. In the 8-bit formats one code is 2% (E0M7) to 100% (E7M0) of a typical weight, and c is below 1 at usual
        rates: only outliers of the momentum are cut, which the missing second moment would have damped. Formats of more
        bits (BF16, FP16) need more, for at 1 their weights move by one fine code at most, whatever the rate.
      is_quantized: which tensors have a grid, as it decides the state's shape: a tree of booleans of the params'
        structure, or a function that makes it from the params. None: those to which `grids`, given here, gives one.
      grids: see the top of this module.

    The extra arguments of update:
      learning_rate: float32 scalar.
      seed: uint32 [2], as from rounding.stochastic_seed; another one for each update. Every tensor derives its own.

    Raises:
      UserError: from here for unusable settings, from update for missing or unfit arguments.
    """
    if is_quantized is None and grids is None:
        raise UserError(
            "the optimizer grid must know which tensors have a grid to make its state: give is_quantized or grids"
        )
    if not (1 <= max_codes <= _MOST_CODES and max_codes == int(max_codes)):
        raise UserError(f"max_codes={max_codes!r} cannot be used: give a whole number from 1 to {_MOST_CODES}")
    for_others = adamw(beta1=beta1, beta2=beta2, eps=eps, weight_decay=weight_decay, stacked=stacked)
    settings = _GridSettings(beta1, eps, weight_decay, int(max_codes), for_others, is_quantized, grids, stacked)
    return optax.GradientTransformationExtraArgs(partial(_grid_init, settings), partial(_grid_update, settings))


class _GridSettings(NamedTuple):
    """The arguments of `grid`, and AdamW for the tensors without a grid."""

    beta1: float
    eps: float
    weight_decay: float
    max_codes: int
    for_others: optax.GradientTransformation
    is_quantized: Any
    grids: Any
    stacked: Stacked


def _quantized_leaves(settings: _GridSettings, params) -> list[bool]:
    """Which tensors have a grid, in the order of the leaves."""
    if settings.is_quantized is None:
        return [leaf is not None for leaf in _grid_leaves("grid", params, settings.grids)]
    tree = settings.is_quantized(params) if callable(settings.is_quantized) else settings.is_quantized
    return _leaves_like(params, tree, "is_quantized")


def _grid_init(settings: _GridSettings, params) -> GridState:
    quantized = _quantized_leaves(settings, params)
    zeros = jax.tree.map(jnp.zeros_like, params)
    others = _masked(params, [not q for q in quantized])
    return GridState(_masked(zeros, quantized), settings.for_others.init(others))


def _grid_update(
    settings: _GridSettings, updates, state, params=None, *, grids=None, learning_rate=None, seed=None, **_
):
    leaves = _grid_leaves("grid", params, settings.grids if grids is None else grids)
    quantized = _quantized_leaves(settings, params)
    for wanted, given in zip(quantized, leaves, strict=True):
        if wanted != (given is not None):
            raise UserError(
                "grids does not fit is_quantized: give a Grid for the tensors it names and None for the others"
            )
    if learning_rate is None or seed is None:
        raise UserError(
            "the optimizer grid needs learning_rate and seed: call update(updates, state, params, "
            "grids=..., learning_rate=..., seed=...)"
        )
    lr = jnp.asarray(learning_rate, jnp.float32)
    others = [not q for q in quantized]
    directions, adamw_state = settings.for_others.update(_masked(updates, others), state.adamw, _masked(params, others))
    beta1 = settings.beta1
    momentum = jax.tree.map(lambda m, g: beta1 * m + (1 - beta1) * g, state.momentum, _masked(updates, quantized))
    correction = 1 - beta1 ** jnp.asarray(adam_moments(adamw_state).count, jnp.float32)
    several = _several(params, settings.stacked)
    trees = (_leaves_like(params, tree) for tree in (directions, momentum, params, several))
    out = []
    for i, (direction, m, w, is_stack, grid) in enumerate(zip(*trees, leaves, strict=True)):
        if grid is not None:
            stream = i + _STREAMS * np.arange(len(w), dtype=np.uint32) if is_stack else i
            words: Any = seed[0], seed[1]
            of_tensor = partial(_grid_direction, settings, words, lr)
            of_one: Any = jax.vmap(of_tensor) if is_stack else of_tensor
            direction = of_one(stream, m / correction, w, grid)
        out.append(direction)
    return jax.tree.structure(params).unflatten(out), GridState(momentum, adamw_state)


def _grid_direction(settings: _GridSettings, words, lr, stream, m_hat, w, grid: Grid):
    """The direction of one tensor from its bias-corrected momentum. `words`, `stream`: of its random bits."""
    seed = stochastic_seed(words[0], words[1], stream)
    rms = jnp.sqrt(jnp.mean(jnp.square(m_hat)))
    rms = jnp.where(jnp.isfinite(rms), rms, jnp.nan)  # else one infinite element would divide all others to 0
    codes = m_hat / (rms + settings.eps) / jnp.mean(ulp(w, grid))
    if is_decayed(w):
        # At scale 1, because BF16's smallest ULP divided by a scale is zero in float32.
        x = w * grid.scale
        codes = codes + settings.weight_decay * (x / ulp(x, Grid(grid.format, 1.0)))
    most = settings.max_codes
    n = round_to_format(-jnp.clip(lr * codes, -most, most), _whole_numbers(most), seed=seed)
    # A number that is not finite would become some code; the caller must see it.
    moved = jnp.where(jnp.isnan(n), n, _moved(w, n, grid))
    return -(moved - w) / jnp.where(lr == 0, 1.0, lr)


def _whole_numbers(largest):
    """A format whose numbers up to `largest` are the whole numbers, for round_to_format.

    With M mantissa bits and a smallest normal exponent of M, the even spacing below 2^M is 1, and 2^M is a number too.
    Stochastic rounding then resolves 2^(M - 30) of a code.
    """
    bits = (largest - 1).bit_length()
    return FormatParams(
        mantissa_bits=np.int32(bits),
        min_exponent=np.int32(bits),
        max_finite=np.float32(2**bits),
        overflow=np.float32(2**bits),
        flip_parity=np.int32(0),
        zero_sign=np.int32(0),
    )


def _moved(w, n, grid):
    """w moved by n codes, whole numbers as float32: along its grid, or by ULPs where w is not on it."""
    inverse = 1 / jnp.asarray(grid.scale, jnp.float32)
    on_grid = from_codes(to_codes(w * grid.scale, grid.format) + n.astype(jnp.int32), grid.format) * inverse
    return jnp.where(to_grid(w, grid) == w, on_grid, w + n * ulp(w, grid))


def _where_gridded(transform, name, default_grids, stacked: Stacked):
    """A transformation without state: transform(update, param, grid) where there is a grid, else the update as it is.

    `name`: the optimizer's, for its messages.
    """

    def update(updates, state, params=None, *, grids=None, **_):
        leaves = _grid_leaves(name, params, default_grids if grids is None else grids)
        several = jax.tree.leaves(_several(params, stacked))
        out = [
            g if grid is None else (jax.vmap(transform) if is_stack else transform)(g, w, grid)
            for g, w, is_stack, grid in zip(
                _leaves_like(params, updates), jax.tree.leaves(params), several, leaves, strict=True
            )
        ]
        return jax.tree.structure(params).unflatten(out), state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)


def _grid_leaves(name, params, grids):
    """The Grid, or None, of every array of params, in their order; UserError where they are missing or do not fit."""
    if params is None:
        raise UserError(f"the optimizer {name} needs the parameters: call update(updates, state, params)")
    if grids is None:
        raise UserError(
            f"the optimizer {name} needs the grids of the weights: give grids, a tree of the params' "
            "structure with a rounding.Grid or None for each array, at construction or to update"
        )
    leaves = _leaves_like(params, grids, "grids")
    for w, leaf in zip(jax.tree.leaves(params), leaves, strict=True):
        if not (leaf is None or isinstance(leaf, Grid)):
            raise UserError(f"grids holds a {type(leaf).__name__}: give a rounding.Grid or None for each array")
        if leaf is not None and w.dtype != jnp.float32:
            raise UserError(f"a tensor with a grid has dtype {w.dtype}: give float32 parameters, or None as its grid")
    return leaves


def _leaves_like(params, tree, what="tree"):
    """What `tree` has at the places of the arrays of params, in their order: subtrees, or None, are taken whole."""
    try:
        return jax.tree.structure(params).flatten_up_to(tree)
    except ValueError as error:
        raise UserError(
            f"{what} has another structure than the params: give one entry for each array ({error})"
        ) from None


def _masked(tree, keep):
    """The tree with MaskedNode in place of the arrays for which `keep`, booleans in their order, is false."""
    leaves, structure = jax.tree.flatten(tree)
    return structure.unflatten([leaf if kept else optax.MaskedNode() for leaf, kept in zip(leaves, keep, strict=True)])


def make(
    name: str,
    *,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    is_quantized,
    stacked: Stacked = None,
) -> optax.GradientTransformationExtraArgs:
    """The optimizer of this name, one of OPTIMIZERS, with its own defaults and grids to be given to update.

    Every one takes the extra arguments grids, learning_rate and seed and leaves alone what it does not need; "adamw" is
    `adamw`, bit for bit and with the same state. `is_quantized`: as in `grid`; the others do not need it. `stacked`:
    which arrays are several tensors along a first axis (Stacked); their Grids have that axis too.

    Raises:
      UserError: there is no optimizer of this name.
    """
    settings: dict[str, Any] = dict(beta1=beta1, beta2=beta2, eps=eps, weight_decay=weight_decay, stacked=stacked)
    if name == "adamw":
        return optax.with_extra_args_support(adamw(**settings))
    if name == "ulp_precondition_before_adam":
        return ulp_precondition_before_adam(**settings)
    if name in ("ulp_adamw", "ulp_adamw_mean"):
        return ulp_adamw(**settings, equal="mean" if name == "ulp_adamw_mean" else "rms")
    if name == "grid":
        return grid(**settings, is_quantized=is_quantized)
    raise UserError(f"there is no optimizer {name!r}: give one of {', '.join(OPTIMIZERS)}")


def adam_moments(opt_state) -> optax.ScaleByAdamState:
    """The (count, mu, nu) inside the state of an optimizer of this module, mu and nu of the params' structure.

    `grid` has no second moment for tensors with a grid: there nu is 0, which metrics.gradient_snr counts as no signal,
    and mu is the momentum. In `ulp_precondition_before_adam` the moments are those of the scaled gradients.
    """
    if isinstance(opt_state, GridState):
        adam = adam_moments(opt_state.adamw)

        def of_all(with_grid, without):
            return jax.tree.map(
                lambda m, a: a if isinstance(m, optax.MaskedNode) else m,
                with_grid,
                without,
                is_leaf=lambda node: isinstance(node, optax.MaskedNode),
            )

        zeros = jax.tree.map(jnp.zeros_like, opt_state.momentum)
        return optax.ScaleByAdamState(adam.count, of_all(opt_state.momentum, adam.mu), of_all(zeros, adam.nu))
    return next(part for part in opt_state if isinstance(part, optax.ScaleByAdamState))


def with_moments(opt_state, moments: optax.ScaleByAdamState) -> Any:
    """The state of an optimizer of this module, but `grid`, with other moments; see `adam_moments`."""
    return tuple(moments if isinstance(part, optax.ScaleByAdamState) else part for part in opt_state)


def clip_factor(norm, max_norm: float) -> jax.Array:
    """What a gradient of global L2 norm `norm` is multiplied with so that it is at most `max_norm`; 0 turns it off."""
    return jnp.minimum(1.0, max_norm / jnp.maximum(norm, 1e-30)) if max_norm > 0 else jnp.ones_like(norm)
