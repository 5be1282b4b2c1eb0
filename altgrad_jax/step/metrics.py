"""Every statistic of the step, as float32 reductions inside the jit.

A metric's name is `statistic` or `statistic/layer`. A layer is a module of the model: its statistics run over all its
arrays together (kernel and bias, scale and bias), so a norm is the norm of the concatenation and a share is a share of
all its elements.

A ratio of energies over all layers together is weighted by energy: a layer with large numbers decides it. Beside it
stands NAME_by_size, a mean over the layers weighted by their numbers of elements.

The reductions are grouped by what they read, because at small batch their cost is memory traffic. One pass reads the
gradients before the update. Others read the parameters, and the update with its moments; the compiler can merge them
with the update.
The arrays of neighbouring blocks come stacked (models.stacking), and one reduction serves all of them: a statistic is a
vector over the layers, float32 [S] in the order in which the model applies them. Trees that are not stacked do too.
`split` says that arrays lie in parts on several devices (sums.sums).
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from altgrad_jax.models.stacking import is_stacked, layers_of
from altgrad_jax.numerics import gains
from altgrad_jax.numerics.histograms import rank_health
from altgrad_jax.numerics.layers import HEAD, model_order
from altgrad_jax.numerics.moments import adam_direction
from altgrad_jax.numerics.sums import sums

BY_SIZE = "_by_size"  # ends the name of a mean over layers that is weighted by their sizes


@partial(jax.tree_util.register_dataclass, data_fields=["values"], meta_fields=["names"])
@dataclass(frozen=True)
class Columns:
    """Metrics of one row: float32 [number of names], which are static."""

    names: tuple[str, ...]
    values: jax.Array

    def __getitem__(self, name: str) -> jax.Array:
        return self.values[self.names.index(name)]


def scalars(metrics: Mapping[str, jax.Array | float]) -> Columns:
    """Columns of single numbers."""
    values = [jnp.asarray(value, jnp.float32) for value in metrics.values()]
    return Columns(tuple(metrics), jnp.stack(values) if values else jnp.zeros(0, jnp.float32))


def over(layers: Sequence[str], statistics: Mapping[str, jax.Array], prefix: str = "") -> Columns:
    """Columns `prefix statistic/layer` of vectors [number of layers], statistic by statistic."""
    names = tuple(f"{prefix}{statistic}/{layer}" for statistic in statistics for layer in layers)
    values = [jnp.asarray(vector, jnp.float32).reshape(len(layers)) for vector in statistics.values()]
    return Columns(names, jnp.concatenate(values) if values else jnp.zeros(0, jnp.float32))


def joined(columns: Iterable[Columns]) -> Columns:
    """Several columns as one."""
    columns = list(columns)
    names = tuple(name for part in columns for name in part.names)
    assert len(set(names)) == len(names), "a metric is there twice"
    return Columns(names, jnp.concatenate([part.values for part in columns]))


def by_group(tree) -> dict[str, dict]:
    """{group: {array name: array [n, ...]}} of a tree shaped like the parameters; n is 1 for a layer by itself."""
    groups: dict[str, dict] = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        *group, name = (key.key for key in path)
        groups.setdefault("/".join(group), {})[name] = leaf if is_stacked(path) else leaf[None]
    return groups


def in_model_order(groups: Iterable[str]) -> tuple[tuple[str, ...], np.ndarray]:
    """(layers of these groups in the order in which the model applies them, where each stands in the groups' order)."""
    layers = [layer for group in groups for layer in layers_of(group)]
    order = sorted(range(len(layers)), key=lambda i: model_order(layers[i]))
    return tuple(layers[i] for i in order), np.array(order, int)


def layer_names(tree) -> tuple[str, ...]:
    """The layers of a tree like the parameters, in the model's order."""
    return in_model_order(by_group(tree))[0]


def _vectors(found: dict[str, dict[str, jax.Array]]) -> dict[str, jax.Array]:
    """{statistic: [S] in the model's order} from {group: {statistic: [n]}}."""
    _, order = in_model_order(found)
    statistics = list(next(iter(found.values())))
    matrix = jnp.concatenate([jnp.stack([jnp.float32(of[s]) for s in statistics]) for of in found.values()], axis=1)
    return dict(zip(statistics, matrix[:, order]))


def neuron_layers(params) -> dict[str, int]:
    """Layers that have neurons (a kernel), with the number of them: {layer: outputs}."""
    groups = {name: arrays["kernel"] for name, arrays in by_group(params).items() if "kernel" in arrays}
    width = {layer: kernel.shape[2] for group, kernel in groups.items() for layer in layers_of(group)}
    return {layer: width[layer] for layer in in_model_order(groups)[0]}


class LayerStats(NamedTuple):
    """Reductions of one pass, float32 [S] over `layers`."""

    layers: tuple[str, ...]
    square_sum: jax.Array
    max_abs: jax.Array
    nonfinite: jax.Array
    neuron_square_sum: dict  # {group: float32 [n, outputs]}, groups with a kernel only


def _rest(a) -> tuple[int, ...]:
    """All axes but that of the layers."""
    return tuple(range(1, a.ndim))


def _sums(terms: Iterable[tuple[jax.Array, ...]], split: bool) -> jax.Array:
    """float32 [statistics, n]: over all but the first axis, and over the arrays of a layer, from each array's terms."""
    first, *others = (sums(*of_array, lead=1, apart=split) for of_array in terms)
    return sum(others, start=first)


def _max_abs(arrays: Iterable[jax.Array]) -> jax.Array:
    largest = [jnp.max(jnp.abs(a), axis=_rest(a)) for a in arrays]
    return largest[0] if len(largest) == 1 else jnp.max(jnp.stack(largest), axis=0)


def _layer_sums(terms: Callable[..., dict[str, jax.Array]], *trees, split: bool) -> dict[str, jax.Array]:
    """{name: float32 [S]}: sums over the elements of every layer, and its "size", in one pass over each array.

    Args:
      terms: of an array of each tree, {name: what is summed}. trees: shaped like the parameters, all alike.
    """
    first, *others = map(by_group, trees)
    found = {}
    for group, arrays in first.items():
        of_arrays = [terms(a, *(other[group][name] for other in others)) for name, a in arrays.items()]
        totals = _sums((tuple(named.values()) for named in of_arrays), split)
        size = sum(a[0].size for a in arrays.values())
        found[group] = dict(zip(of_arrays[0], totals)) | {"size": jnp.full(len(layers_of(group)), size, jnp.float32)}
    return _vectors(found)


def gradient_stats(grads, split: bool = False) -> LayerStats:
    """One pass over the unclipped gradients.

    The columns of a kernel, with their biases, are the neurons, whose square sums the count of dead neurons needs.
    """
    found, neurons = {}, {}
    for group, arrays in by_group(grads).items():
        if "kernel" in arrays:
            neurons[group] = _neuron_sums(**arrays)
        square_sum, nonfinite = _sums(((jnp.square(g), ~jnp.isfinite(g)) for g in arrays.values()), split)
        found[group] = {"square_sum": square_sum, "max_abs": _max_abs(arrays.values()), "nonfinite": nonfinite}
    return LayerStats(layer_names(grads), **_vectors(found), neuron_square_sum=neurons)


def _neuron_sums(kernel, bias=None) -> jax.Array:
    """float32 [n, outputs]: square sums of the columns of a kernel with their biases."""
    columns = jnp.square(kernel).sum(1)
    return columns if bias is None else columns + jnp.square(bias)


def gradient_metrics(stats: LayerStats) -> Columns:
    """grad_norm/layer (L2), grad_max/layer (Linf), nonfinite_grads/layer (count), of the unclipped gradient."""
    return over(
        stats.layers,
        {"grad_norm": jnp.sqrt(stats.square_sum), "grad_max": stats.max_abs, "nonfinite_grads": stats.nonfinite},
    )


def gradient_snr(moments: optax.ScaleByAdamState, *, beta1: float, beta2: float, split: bool = False) -> Columns:
    """grad_snr/layer: signal-to-noise ratio of the gradient as Adam sees it.

    mean over the layer's elements of |m_hat| / sqrt(v_hat), with m_hat = mu / (1 - beta1^t), v_hat = nu / (1 - beta2^t)
    the bias-corrected moments after t updates. 1 where every recent gradient had the same value; for noise of mean 0
    about sqrt(2 / pi) * sqrt((1 - beta1) / (1 + beta1)), 0.18 at beta1 = 0.9. Elements that never had a gradient
    (nu = 0) count 0. NaN at t = 1: one gradient has no spread, and the ratio is 1 whatever it is.
    """
    t = jnp.maximum(moments.count, 1).astype(jnp.float32)
    correction = jnp.where(t > 1, jnp.sqrt(1 - beta2**t) / (1 - beta1**t), jnp.nan)
    found = _layer_sums(_snr_terms, moments.mu, moments.nu, split=split)
    return over(layer_names(moments.mu), {"grad_snr": correction * (found["ratio"] / found["size"])})


def _snr_terms(mu, nu):
    return {"ratio": jnp.where(nu > 0, jnp.abs(mu) * jax.lax.rsqrt(nu), 0.0)}


def moment_metrics(
    exact: optax.ScaleByAdamState,
    kept: optax.ScaleByAdamState,
    *,
    beta1: float,
    beta2: float,
    eps: float,
    split: bool = False,
) -> Columns:
    """What keeping Adam's moments in a number format loses, per layer and over all elements (numerics.moments).

    moment2_underflow: share of the second moments that were not 0 and are kept as 0, of those that were not 0.
    moments_cosine: <d, k> / (|d| |k|), with d Adam's direction from the exact moments of this update and k that from
    the kept ones, both without weight decay. NaN where a direction is 0 everywhere. Over all elements it is weighted by
    the energy of the directions.

    Args:
      exact, kept: before and after rounding; of the parameters' structure.
    """
    direction = partial(adam_direction, count=jnp.maximum(exact.count, 1), beta1=beta1, beta2=beta2, eps=eps)
    of_layers = _layer_sums(partial(_moment_terms, direction), exact.mu, exact.nu, kept.mu, kept.nu, split=split)
    total = {name: vector.sum() for name, vector in of_layers.items()}
    return joined([over(layer_names(exact.mu), _moment_losses(of_layers)), scalars(_moment_losses(total))])


def _moment_terms(direction, mu, nu, kept_mu, kept_nu):
    d, k = direction(mu, nu), direction(kept_mu, kept_nu)
    flushed, nonzero = (nu != 0) & (kept_nu == 0), nu != 0
    return {"dot": d * k, "own": d * d, "other": k * k, "flushed": flushed, "nonzero": nonzero}


def _moment_losses(f) -> dict[str, jax.Array]:
    return {"moment2_underflow": f["flushed"] / jnp.maximum(f["nonzero"], 1), "moments_cosine": _cosine(f)}


def _cosine(f) -> jax.Array:
    return f["dot"] / (jnp.sqrt(f["own"]) * jnp.sqrt(f["other"]))


class TreeNorms(NamedTuple):
    """float32 [S] over the layers of a tree like the parameters."""

    layers: tuple[str, ...]
    norm: jax.Array  # L2
    nonfinite: jax.Array  # elements
    zeros: jax.Array  # share of elements that are exactly 0
    size: jax.Array  # elements


def tree_norms(tree, split: bool = False) -> TreeNorms:
    """L2 norm, elements that are not finite, and share of zeros, of every layer."""
    return _tree_norms(tree, _layer_sums(_norm_terms, tree, split=split))


def _norm_terms(a):
    return {"square": jnp.square(a), "nonfinite": ~jnp.isfinite(a), "zeros": a == 0}


def _tree_norms(tree, f) -> TreeNorms:
    return TreeNorms(layer_names(tree), jnp.sqrt(f["square"]), f["nonfinite"], f["zeros"] / f["size"], f["size"])


class ChangeNorms(NamedTuple):
    """What `change_norms` returns."""

    params: TreeNorms
    updates: TreeNorms
    nonfinite_moments: jax.Array  # float32 [S], elements


def change_norms(params, raw, applied, moments: optax.ScaleByAdamState, split: bool = False) -> ChangeNorms:
    """The parameters before an update, the update and the moments after it.

    `updates` has the norm and the zeros of what is applied, and counts what is not finite in what the optimizer made.
    A moment cannot be used where the first or the second is not finite, or the second is negative.

    Args:
      raw, applied: the update, and the same with 0 for elements that cannot be used.
    """
    # Two passes: seven sums in one reduction ask for 58 kB of shared memory on an H100, and a kernel may have 48.
    f = _layer_sums(_update_terms, raw, applied, moments.mu, moments.nu, split=split)
    return ChangeNorms(tree_norms(params, split), _tree_norms(applied, f), f["moments"])


def _update_terms(raw, applied, mu, nu):
    unusable = ~jnp.isfinite(mu) | ~jnp.isfinite(nu) | (nu < 0)
    return _norm_terms(applied) | {"nonfinite": ~jnp.isfinite(raw), "moments": unusable}


def parameter_metrics(params: TreeNorms) -> Columns:
    """param_norm/layer (L2) and nonfinite_params/layer (count), of the parameters the gradient was taken at."""
    return over(params.layers, {"param_norm": params.norm, "nonfinite_params": params.nonfinite})


def gain_metrics(params, recipe: str) -> Columns:
    """gain_top_code/layer and gain_one_value/layer (numerics.gains.statistics) of the norms, and over all gains as
    gain_top_code/all and gain_one_value/all; `recipe` as ModelConfig.norm_gains."""
    of_norms = {group: arrays["scale"] for group, arrays in by_group(params).items() if "scale" in arrays}
    layers, order = in_model_order(of_norms)
    parts = [gains.statistics(scale, recipe) for scale in of_norms.values()]
    found = {name: jnp.concatenate([part[name] for part in parts])[order] for name in parts[0]}
    sizes = np.concatenate([np.full(len(scale), scale[0].size) for scale in of_norms.values()])[order]
    total = {f"{name}/all": jnp.sum(vector * sizes) / sizes.sum() for name, vector in found.items()}
    return joined([over(layers, found), scalars(total)])


def update_metrics(updates: TreeNorms, params: TreeNorms, prefix: str = "") -> Columns:
    """update_norm/layer (L2), update_ratio/layer (its ratio to param_norm) and zero_update/layer (share of elements
    whose update is exactly zero): weight decay, clipping and learning rate included.

    Args:
      updates: what was applied; with the prefix "requested_" what was asked for, where weights are stored on a grid.
    """
    ratio = updates.norm / jnp.maximum(params.norm, 1e-30)
    found = {"update_norm": updates.norm, "update_ratio": ratio, "zero_update": updates.zeros}
    return over(updates.layers, found, prefix)


def activation_metrics(output) -> Columns:
    """act_amax/block_i and act_rms/block_i of the residual stream as it leaves each block."""
    blocks = [f"block_{i}" for i in range(output.act_amax_N.shape[0])]
    return over(blocks, {"act_amax": output.act_amax_N, "act_rms": output.act_rms_N})


def gradient_fidelity(grads, reference, suffix: str = "", split: bool = False) -> Columns:
    """How close a gradient is to a reference of the same parameters and batch, per layer and over all elements.

    grad_cosine: <g, r> / (|g| |r|). grad_sqnr_db: 10 log10(|r|^2 / |g - r|^2). grad_flushed: share of elements that are
    0 in g and not in r. Without a layer they are taken over all elements of all layers together: cosine and SQNR are
    then weighted by energy, the share by size. None of them says enough alone: a gradient that is mostly zeros can have
    a cosine of 1.000.

    grad_cosine_by_size: mean of the layers' cosines, weighted by their sizes; a layer whose g is 0 counts 0, one whose
    r is 0 is left out. grad_sqnr_db_by_size: -10 log10 of the mean of the layers' |g - r|^2 / |r|^2, likewise.

    Args:
      grads, reference: trees like the parameters. suffix: is appended to each name.
    """
    of_layers = _layer_sums(_fidelity_terms, grads, reference, split=split)
    total = {name: vector.sum() for name, vector in of_layers.items()}
    by_size = {
        f"grad_cosine{BY_SIZE}{suffix}": mean_by_size(
            jnp.where(of_layers["own"] == 0, 0.0, _cosine(of_layers)), of_layers["other"], of_layers["size"]
        ),
        f"grad_sqnr_db{BY_SIZE}{suffix}": sqnr_db_by_size(of_layers["other"], of_layers["error"], of_layers["size"]),
    }
    return joined([over(layer_names(grads), _fidelity(of_layers, suffix)), scalars(_fidelity(total, suffix) | by_size)])


def _fidelity_terms(g, r):
    flushed = (g == 0) & (r != 0)
    return {"dot": g * r, "own": g * g, "other": r * r, "error": jnp.square(g - r), "flushed": flushed}


def mean_by_size(values, energies, sizes) -> jax.Array:
    """Mean of `values` over the first axis, weighted by `sizes`, without those whose energy is 0; NaN where all are."""
    weights = jnp.where(energies == 0, 0.0, sizes)
    return jnp.sum(jnp.where(weights > 0, values * weights, 0.0), axis=0) / jnp.sum(weights, axis=0)


def sqnr_db_by_size(signal, noise, sizes) -> jax.Array:
    """-10 log10 of the mean of noise / signal over the first axis, weighted by `sizes`; all where the signal is 0."""
    return -10 * jnp.log10(mean_by_size(noise / signal, signal, sizes))


def _fidelity(f, suffix) -> dict[str, jax.Array]:
    return {
        f"grad_cosine{suffix}": _cosine(f),
        f"grad_sqnr_db{suffix}": 10 * (jnp.log10(f["other"]) - jnp.log10(f["error"])),
        f"grad_flushed{suffix}": f["flushed"] / f["size"],
    }


def rank_metrics(params) -> dict[str, jax.Array]:
    """stable_rank/layer, participation_ratio/layer and spectral_norm/layer, float32 scalars, as in `rank_health`.

    Of every kernel, of the token table `embed`, which is the output head too where that is tied, and of the table of a
    `head` that is not. (The other parameters are vectors, and the table of positions is no operand of a product.) The
    tree is not stacked.
    """
    out = {}
    for layer, arrays in sorted(by_group(params).items(), key=lambda item: model_order(item[0])):
        matrix = arrays.get("kernel", arrays.get("embedding") if layer in ("embed", HEAD) else None)
        if matrix is not None:
            out |= {f"{name}/{layer}": value for name, value in rank_health(matrix[0]).items()}
    return out
