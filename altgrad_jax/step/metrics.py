"""Every statistic of the step, as float32 reductions inside the jit.

A metric's name is `statistic` or `statistic/layer`. A layer is a module of the model: its statistics run over all its
arrays together (kernel and bias, scale and bias), so a norm is the norm of the concatenation and a share is a share of
all its elements.

The reductions are grouped by what they read, because at small batch their cost is memory traffic. One pass reads the
gradients before the update. Another reads parameter, moments and update; the compiler can merge it with the update.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from altgrad_jax.numerics.histograms import rank_health
from altgrad_jax.numerics.rules import model_order


def by_layer(tree) -> dict[str, dict]:
    """{layer: {array name: array}} of a tree shaped like the parameters, in the order the model applies them."""
    layers = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        *layer, name = (key.key for key in path)
        layers.setdefault("/".join(layer), {})[name] = leaf
    return dict(sorted(layers.items(), key=lambda item: model_order(item[0])))


def neuron_layers(params) -> dict[str, int]:
    """Layers that have neurons (a kernel), with the number of them: {layer: outputs}."""
    return {name: arrays["kernel"].shape[1] for name, arrays in by_layer(params).items() if "kernel" in arrays}


class LayerStats(NamedTuple):
    """Reductions of one pass, one entry per layer. All but neuron_square_sum hold {layer: float32 scalar}."""

    square_sum: dict
    max_abs: dict
    nonfinite: dict
    neuron_square_sum: dict  # {layer: float32 [outputs]}, layers with a kernel only


def _sum(parts):
    return sum(parts[1:], start=parts[0])


def _nonfinite(x):
    return jnp.sum(~jnp.isfinite(x), dtype=jnp.float32)


def gradient_stats(grads) -> LayerStats:
    """One pass over the unclipped gradients.

    The square sum of a kernel is taken per output column and then added up. The columns are the neurons, so dead
    neurons are counted without a second pass.
    """
    square_sum, max_abs, nonfinite, neurons = {}, {}, {}, {}
    for layer, arrays in by_layer(grads).items():
        squares = {name: jnp.square(g).sum(0) if name == "kernel" else jnp.square(g) for name, g in arrays.items()}
        if "kernel" in arrays:
            neurons[layer] = squares["kernel"] + squares["bias"]
        square_sum[layer] = _sum([s.sum() for s in squares.values()])
        max_abs[layer] = _max_abs(arrays)
        nonfinite[layer] = _sum([_nonfinite(g) for g in arrays.values()])
    return LayerStats(square_sum, max_abs, nonfinite, neurons)


def _max_abs(arrays):
    largest = [jnp.max(jnp.abs(a)) for a in arrays.values()]
    return largest[0] if len(largest) == 1 else jnp.max(jnp.stack(largest))


def _layer_mean(arrays, sums):
    return _sum(sums) / sum(a.size for a in arrays.values())


def gradient_metrics(stats: LayerStats) -> dict[str, jax.Array]:
    """grad_norm/layer (L2), grad_max/layer (Linf), nonfinite_grads/layer (count), of the unclipped gradient."""
    return (
        {f"grad_norm/{layer}": jnp.sqrt(s) for layer, s in stats.square_sum.items()}
        | {f"grad_max/{layer}": m for layer, m in stats.max_abs.items()}
        | {f"nonfinite_grads/{layer}": n for layer, n in stats.nonfinite.items()}
    )


def gradient_snr(moments: optax.ScaleByAdamState, *, beta1: float, beta2: float) -> dict[str, jax.Array]:
    """grad_snr/layer: signal-to-noise ratio of the gradient as Adam sees it.

    mean over the layer's elements of |m_hat| / sqrt(v_hat), with m_hat = mu / (1 - beta1^t), v_hat = nu / (1 - beta2^t)
    the bias-corrected moments after t updates. 1 where every recent gradient had the same value; for noise of mean 0
    about sqrt(2 / pi) * sqrt((1 - beta1) / (1 + beta1)), 0.18 at beta1 = 0.9. Elements that never had a gradient
    (nu = 0) count 0.
    """
    t = jnp.maximum(moments.count, 1).astype(jnp.float32)
    correction = jnp.sqrt(1 - beta2**t) / (1 - beta1**t)
    first, second = by_layer(moments.mu), by_layer(moments.nu)
    out = {}
    for layer, mu in first.items():
        nu = second[layer]
        sums = [jnp.sum(jnp.where(nu[k] > 0, jnp.abs(mu[k]) * jax.lax.rsqrt(nu[k]), 0.0)) for k in mu]
        out[f"grad_snr/{layer}"] = correction * _layer_mean(mu, sums)
    return out


def nonfinite_moments(moments: optax.ScaleByAdamState) -> jax.Array:
    """float32 [layers]: elements whose first or second moment is not finite, or whose second one is negative."""
    first, second = by_layer(moments.mu), by_layer(moments.nu)
    return jnp.stack(
        [
            _sum(
                [
                    jnp.sum(
                        ~jnp.isfinite(mu) | ~jnp.isfinite(second[layer][k]) | (second[layer][k] < 0), dtype=jnp.float32
                    )
                    for k, mu in arrays.items()
                ]
            )
            for layer, arrays in first.items()
        ]
    )


def parameter_metrics(params) -> dict[str, jax.Array]:
    """param_norm/layer (L2) and nonfinite_params/layer (count), of the parameters the gradient was taken at."""
    out = {}
    for layer, arrays in by_layer(params).items():
        out[f"param_norm/{layer}"] = jnp.sqrt(_sum([jnp.square(p).sum() for p in arrays.values()]))
        out[f"nonfinite_params/{layer}"] = _sum([_nonfinite(p) for p in arrays.values()])
    return out


def update_metrics(updates, param_norms: dict) -> dict[str, jax.Array]:
    """update_norm/layer (L2), update_ratio/layer (its ratio to param_norm) and zero_update/layer (share of elements
    whose update is exactly zero), of the update that is applied: weight decay, clipping and learning rate included."""
    out = {}
    for layer, arrays in by_layer(updates).items():
        norm = jnp.sqrt(_sum([jnp.square(u).sum() for u in arrays.values()]))
        out[f"update_norm/{layer}"] = norm
        out[f"update_ratio/{layer}"] = norm / jnp.maximum(param_norms[f"param_norm/{layer}"], 1e-30)
        zeros = [jnp.sum(u == 0, dtype=jnp.float32) for u in arrays.values()]
        out[f"zero_update/{layer}"] = _layer_mean(arrays, zeros)
    return out


def activation_metrics(output) -> dict[str, jax.Array]:
    """act_amax/block_i and act_rms/block_i of the residual stream as it leaves each block."""
    return {
        f"{name}/block_{i}": values[i]
        for name, values in (("act_amax", output.act_amax_N), ("act_rms", output.act_rms_N))
        for i in range(values.shape[0])
    }


def gradient_fidelity(grads, reference, suffix: str = "") -> dict[str, jax.Array]:
    """How close a gradient is to a reference of the same parameters and batch, per layer and over all elements.

    grad_cosine: <g, r> / (|g| |r|). grad_sqnr_db: 10 log10(|r|^2 / |g - r|^2). grad_flushed: share of elements that are
    0 in g and not in r. Without a layer they are taken over all elements of all layers together, so that a layer counts
    by its size. None of them says enough alone: a gradient that is mostly zeros can have a cosine of 1.000.

    Args:
      grads, reference: trees like the parameters. suffix: is appended to the statistic's name.
    """
    out, totals = {}, []
    others = by_layer(reference)
    for layer, arrays in by_layer(grads).items():
        pairs = [(g, others[layer][name]) for name, g in arrays.items()]
        sums = jnp.stack(
            [
                _sum([jnp.sum(g * r) for g, r in pairs]),
                _sum([jnp.sum(g * g) for g, _ in pairs]),
                _sum([jnp.sum(r * r) for _, r in pairs]),
                _sum([jnp.sum(jnp.square(g - r)) for g, r in pairs]),
                _sum([jnp.sum((g == 0) & (r != 0), dtype=jnp.float32) for g, r in pairs]),
                jnp.float32(sum(g.size for g, _ in pairs)),
            ]
        )
        totals.append(sums)
        out |= _fidelity(sums, suffix, f"/{layer}")
    return out | _fidelity(_sum(totals), suffix, "")


def _fidelity(sums, suffix, layer):
    dot, own, other, error, flushed, size = sums
    return {
        f"grad_cosine{suffix}{layer}": dot / (jnp.sqrt(own) * jnp.sqrt(other)),
        f"grad_sqnr_db{suffix}{layer}": 10 * (jnp.log10(other) - jnp.log10(error)),
        f"grad_flushed{suffix}{layer}": flushed / size,
    }


def pack(metrics: dict) -> tuple[tuple[str, ...], jax.Array]:
    """A dict of scalars as (names, float32 [number of metrics]): a single array is transferred faster than many."""
    return tuple(metrics), jnp.stack([jnp.asarray(value, jnp.float32) for value in metrics.values()])


def rank_metrics(params) -> dict[str, jax.Array]:
    """stable_rank/layer, participation_ratio/layer and spectral_norm/layer, float32 scalars, as in `rank_health`.

    Of every kernel and of the token table `embed`, which is the output head too. (The other parameters are vectors, and
    the table of positions is no operand of a product.)
    """
    out = {}
    for layer, arrays in by_layer(params).items():
        matrix = arrays.get("kernel", arrays.get("embedding") if layer == "embed" else None)
        if matrix is not None:
            out |= {f"{name}/{layer}": value for name, value in rank_health(matrix).items()}
    return out
