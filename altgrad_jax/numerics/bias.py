"""What of a quantized product's error averages out (variance) and what stays (bias), from repeated roundings.

y is the exact result of a product and y_1 ... y_N are N draws of the quantized one, of the same operands:

    E1 = mean |y_n - y|^2 / |y|^2        EN = |mean y_n - y|^2 / |y|^2
    V = N / (N - 1) (E1 - EN)            variance, relative: what averaging removes
    B = EN - V / N                       bias, relative, without bias itself: it may come out below 0
    shrinkage = 1 - <mean y_n, y> / |y|^2

So E[E1] = B + V and E[EN] = B + V / N. Draws are taken in K groups; the interval of B is a jackknife over them. With
two halves of a batch, each with draws of its own, e_1 and e_2 the mean errors of the weight gradient:

    persistent = <e_1, e_2> / mean |y|^2            the part of B that another batch has too, which alone compounds

And of gradients g_i of m windows, g the mean of W of them that the draws are made on:

    signal s^2 = mean <g_i, g_j>, i != j           squared norm of the true gradient, without bias
    noise n^2 = (mean |g_i|^2 - s^2) / W           of g, by the choice of the windows
    noise ratio = V |g|^2 / n^2          below 1 another batch disturbs the gradient more than the format does
    signal to error = s / (sqrt(B + V) |g|)        below sqrt(3) the format is exhausted (arXiv 2505.19115)

The sums (`Sums`, `WholeSums`) are float32 on the device and add up over layers; what follows from them is float64.

Axes: R references, P products, K groups of draws, S layers.
"""

import math
from typing import Any, NamedTuple

import numpy as np
from scipy.special import stdtrit

from altgrad_jax.numerics.recipes import PRODUCTS

# The product of the forward pass's own (quantized) operands and the unquantized gradient, and that of the unquantized
# operands. In fprop both are the latter.
REFERENCES = ("straight_through", "float32")
MOST_GROUPS = 16
EXHAUSTED = math.sqrt(3)
# Bias beyond both is called so: the relative size that rounding to bfloat16 reaches, and standard errors.
FLOOR, SIGMAS = 1e-5, 5.0
CONFIDENCE = 0.95


class Sums(NamedTuple):
    """Of N draws of the products of one layer, or of several layers together; arrays may have leading axes."""

    energy_RP: Any  # |y|^2
    square_RP: Any  # mean over the draws of |y_n - y|^2
    gram_RPKK: Any  # <m_k - y, m_l - y>, m_k the mean of group k
    dot_RPK: Any  # <m_k, y>
    cross_RK: Any  # of wgrad: <m_k - y, m_k' - y'>, ' of the other half of the batch; NaN for a batch that has none


class Bias(NamedTuple):
    """Float64 [..., R, P]: what follows from Sums, relative to |y|^2."""

    bias: np.ndarray
    bias_se: np.ndarray
    variance: np.ndarray
    shrinkage: np.ndarray
    persistent: np.ndarray  # of wgrad, else NaN
    persistent_se: np.ndarray
    n_draws: int
    n_groups: int

    @property
    def half_width(self) -> np.ndarray:
        """Of the interval of `bias` at CONFIDENCE."""
        return stdtrit(self.n_groups - 1, (1 + CONFIDENCE) / 2) * self.bias_se

    @property
    def biased(self) -> np.ndarray:
        """Whether bias is shown: beyond FLOOR, and SIGMAS standard errors beyond 0."""
        return self.bias > np.maximum(FLOOR, SIGMAS * self.bias_se)


def groups_of(n_draws: int) -> int:
    """K, the number of groups that N draws are taken in: the largest divisor of N that is at most MOST_GROUPS."""
    return max(k for k in range(1, MOST_GROUPS + 1) if n_draws % k == 0)


def n_fields(n_draws: int) -> int:
    """Length of `packed` Sums."""
    K, cells = groups_of(n_draws), len(REFERENCES) * len(PRODUCTS)
    return cells * (2 + K * K + K) + len(REFERENCES) * K


def packed(sums: Sums, xp: Any = np) -> Any:
    """One vector [n_fields] of the Sums of one layer."""
    return xp.concatenate([xp.ravel(leaf) for leaf in sums])


def unpacked(vector, n_draws: int) -> Sums:
    """The Sums, float64, of vectors [..., n_fields]."""
    vector = np.asarray(vector, np.float64)
    R, P, K = len(REFERENCES), len(PRODUCTS), groups_of(n_draws)
    shapes = (R, P), (R, P), (R, P, K, K), (R, P, K), (R, K)
    ends = np.cumsum([math.prod(shape) for shape in shapes])
    parts = np.split(vector, ends[:-1], axis=-1)
    return Sums(*(part.reshape(*vector.shape[:-1], *shape) for part, shape in zip(parts, shapes, strict=True)))


def bias_of(sums: Sums, n_draws: int) -> Bias:
    """Bias, variance and shrinkage with their standard errors.

    Args:
      sums: as `unpacked` gives them, or their sum over layers. n_draws: N, at least 2.

    Where |y|^2 is 0, as of a product that is not there, all are NaN.
    """
    N, K, persistent = n_draws, groups_of(n_draws), np.full((2,) + np.shape(sums.energy_RP), np.nan)
    with np.errstate(divide="ignore", invalid="ignore"):
        first = sums.square_RP / sums.energy_RP
        last = sums.gram_RPKK.mean((-2, -1)) / sums.energy_RP
        variance = N / (N - 1) * (first - last)
        cross = 2 * sums.cross_RK / sums.energy_RP[..., -1, None]
        persistent[0, ..., -1] = cross.mean(-1)
        persistent[1, ..., -1] = cross.std(-1, ddof=1) / math.sqrt(K) if K > 1 else np.nan
        return Bias(
            bias=last - variance / N,
            bias_se=_jackknife(sums.gram_RPKK) / sums.energy_RP,
            variance=variance,
            shrinkage=1 - sums.dot_RPK.mean(-1) / sums.energy_RP,
            persistent=persistent[0],
            persistent_se=persistent[1],
            n_draws=N,
            n_groups=K,
        )


def _jackknife(gram):
    """Standard error of the mean of a Gram matrix's [..., K, K] entries beside the diagonal, leaving out one group at a
    time. Where there is no bias it is too large, by up to sqrt(2) (Efron and Stein 1981)."""
    K = gram.shape[-1]
    if K < 3:
        return np.full(gram.shape[:-2], np.nan)
    rows = gram.sum(-1) - np.diagonal(gram, axis1=-2, axis2=-1)
    without = (rows.sum(-1, keepdims=True) - 2 * rows) / ((K - 1) * (K - 2))
    return np.sqrt((K - 1) / K * np.square(without - without.mean(-1, keepdims=True)).sum(-1))


class WholeSums(NamedTuple):
    """Of the gradient of each layer after a whole backward pass; [S], or their sum."""

    signal: Any  # s^2
    noise: Any  # n^2
    energy: Any  # |g|^2
    square: Any  # mean over the draws of |g_n - g|^2
    pairs: Any  # mean over pairs of different draws of <g_n - g, g_m - g>


def whole_of(sums: WholeSums, share: float = 1.0) -> dict[str, np.ndarray]:
    """What quantization does to the gradient that the optimizer sees, by name; float64.

    Args:
      share: windows measured over windows of an update. Both noises fall as 1 / windows. Bias is taken as it is on the
        windows measured: what of it is not persistent falls in a larger batch too, so `grad_signal_to_error` is low
        rather than high.

    Returns:
      `grad_noise_ratio`; `grad_signal_to_error`, 0 where the estimate of s^2 is not above 0; `grad_total_bias` and
      `grad_total_variance`, relative to |g|^2, as measured.
    """
    signal, noise, energy, square, pairs = (np.asarray(leaf, np.float64) for leaf in sums)
    variance = square - pairs
    with np.errstate(divide="ignore", invalid="ignore"):
        error = np.sqrt(np.maximum(pairs, 0) + share * np.maximum(variance, 0))
        return {
            "grad_noise_ratio": variance / noise,
            "grad_signal_to_error": np.sqrt(np.maximum(signal, 0)) / error,
            "grad_total_bias": pairs / energy,
            "grad_total_variance": variance / energy,
        }
