"""The matrix product of every linear layer, forward and backward, in one place.

A linear layer is three products: y = x w, dx = g w^T and dw = x^T g. This module decides in which precision each one
runs. With no number format set, which is all the baseline needs:

* a value is rounded to the compute dtype exactly when it becomes an *operand* of a product, and nowhere else;
* every product accumulates in float32 and returns float32, the weight gradient included. (A plain bfloat16 Dense layer
  rounds the weight gradient to bfloat16 on its way out: 8 bits of the quantity this project exists to measure.)
* forward and backward use the same rounded operands: the backward products read the operands the forward pass saved.

Number formats for the operands join here, without the callers changing.

Axes: M rows (batch and time flattened), K inputs, N outputs.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax


def _product(a, b, contract_a, contract_b):
    """a . b over one axis of each, accumulated in float32. float32 operands stay float32 (never TF32)."""
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else lax.Precision.DEFAULT
    return lax.dot_general(a, b, (((contract_a,), (contract_b,)), ((), ())), precision=precision,
                           preferred_element_type=jnp.float32)


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _dot_MK(x_MK, w, w_is_NK, compute_dtype):
    return _forward(x_MK, w, w_is_NK, compute_dtype)[0]


def _forward(x_MK, w, w_is_NK, compute_dtype):
    x_MK, w = x_MK.astype(compute_dtype), w.astype(compute_dtype)
    return _product(x_MK, w, 1, 1 if w_is_NK else 0), (x_MK, w)


def _backward(w_is_NK, compute_dtype, operands, g_MN):
    x_MK, w = operands
    g_MN = g_MN.astype(compute_dtype)
    dx_MK = _product(g_MN, w, 1, 0 if w_is_NK else 1)
    dw = _product(g_MN, x_MK, 0, 0) if w_is_NK else _product(x_MK, g_MN, 0, 0)
    return dx_MK, dw


_dot_MK.defvjp(_forward, _backward)


def quant_dot(x, w, *, w_is_NK=False, compute_dtype=jnp.bfloat16):
    """Product of activations and a weight matrix, with float32 result and float32 gradients.

    Args:
      x: float32 [..., K]; leading axes are flattened for the product.
      w: float32 [K, N], or [N, K] with `w_is_NK` (the tied output head uses the embedding table as it lies).
      w_is_NK: whether `w` carries its output axis first.
      compute_dtype: dtype the operands x, w and the output gradient are rounded to (nearest even).

    Returns:
      float32 [..., N]. Gradients of both arguments are float32 and are the exact derivatives of the product of the
      *rounded* operands, passed straight through the rounding.
    """
    y_MN = _dot_MK(x.reshape(-1, x.shape[-1]), w, w_is_NK, jnp.dtype(compute_dtype))
    return y_MN.reshape(*x.shape[:-1], y_MN.shape[-1])
