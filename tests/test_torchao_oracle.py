"""MX blocks against torchao's `to_mx` on a CPU: every element format of its, all four scale rules.

Needs torch and torchao (the extra `oracle`), and so carries the mark `oracle`: `make test` leaves it out and .ci/run
runs it. A missing package is a failure, never a skip.
"""

import logging
import warnings

import jax
import numpy as np
import pytest

from altgrad_jax.numerics.formats import get_format
from altgrad_jax.numerics.recipes import SlotSpec
from altgrad_jax.numerics.slot_quantization import Features, dequantized, quantize_slot
from altgrad_jax.numerics.slots import slot_of

pytestmark = pytest.mark.oracle

ROWS, COLUMNS, BLOCK = 1024, 1024, 32
ABLE = Features((BLOCK,), (1,), ("power_of_two",), False, False, False, False, False, 0)
RULES = ("floor", "rceil", "ceil", "even")


@pytest.fixture(scope="module")
def torchao():
    """(torch, its module of MX tensors), which warns of CUDA libraries that a CPU has not."""
    logging.disable(logging.WARNING)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import torch
        from torchao.prototype.mx_formats import mx_tensor
    logging.disable(logging.NOTSET)
    return torch, mx_tensor


@jax.jit
def ours(v, slot):
    return dequantized(quantize_slot(v, slot, 1, ABLE)[0], 1)


def inputs(largest):
    """float32 [ROWS, COLUMNS]: Gaussian, heavy-tailed and on ties, sizes of blocks over 2^60; zeros; amaxes that are
    the largest number times a power of two, and their neighbours."""
    rng = np.random.default_rng(0)
    v = rng.standard_normal((ROWS, COLUMNS))
    v[ROWS // 4 : ROWS // 2] = rng.standard_t(2, (ROWS // 4, COLUMNS))
    v[ROWS // 2 : 3 * ROWS // 4] = np.round(v[ROWS // 2 : 3 * ROWS // 4] * 16) / 16
    v *= 2.0 ** rng.integers(-30, 31, (ROWS, COLUMNS // BLOCK)).repeat(BLOCK, 1)
    v = v.astype(np.float32)
    v[5, : 4 * BLOCK] = 0
    amax = np.float32(largest * 2.0 ** rng.integers(-20, 20, (ROWS // 8, COLUMNS // BLOCK)))
    amax = amax.view(np.int32) + rng.integers(-2, 3, amax.shape, dtype=np.int32)
    blocks = v[-ROWS // 8 :].reshape(ROWS // 8, -1, BLOCK)
    blocks /= np.maximum(np.abs(blocks).max(-1, keepdims=True), np.float32(1e-30))
    blocks *= amax.view(np.float32)[..., None] / 2
    blocks[..., 7] = amax.view(np.float32)
    return v


def inexact_exponents(torch, v, largest):
    """bool per block: torchao rounds log2 of amax / largest, both in float32, and an amax just above largest * 2^k gets
    k, so that it is clipped. By the rule it gets k + 1."""
    amax = np.abs(v.reshape(ROWS, -1, BLOCK)).max(-1)
    of_float32 = torch.ceil(torch.log2(torch.from_numpy(amax) / largest)).numpy()
    mantissa, exponent = np.frexp(amax.astype(np.float64) / largest)
    return (amax > 0) & (of_float32 != exponent - (mantissa == 0.5))


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", ["E4M3", "E5M2", "E2M3", "E3M2", "E2M1"])
def test_every_block_is_torchaos(torchao, name, rule):
    torch, mx = torchao
    element = {
        "E4M3": torch.float8_e4m3fn,
        "E5M2": torch.float8_e5m2,
        "E2M3": mx.DTYPE_FP6_E2M3,
        "E3M2": mx.DTYPE_FP6_E3M2,
        "E2M1": torch.float4_e2m1fn_x2,
    }[name]
    largest = get_format(name).max_finite
    v = inputs(largest)
    scale, data = mx.to_mx(torch.from_numpy(v), element, BLOCK, mx.ScaleCalculationMode(rule))
    want = mx.to_dtype(data, scale, element, BLOCK, torch.float32).numpy()
    got = np.asarray(ours(v, slot_of(SlotSpec(name, "E8M0", "1x32", rule))))
    wrong = (got != want).reshape(ROWS, -1, BLOCK).any(-1)
    known = inexact_exponents(torch, v, largest) if rule == "rceil" else np.zeros_like(wrong)
    assert not (wrong & ~known).any()
    assert known.mean() < 0.05 and wrong.size == 32_768
