"""The parts of a model that hold matrices: products, in the number formats of their layer, and tables of rows."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from altgrad_jax.models.config import Choices, ModelConfig
from altgrad_jax.numerics.certified_products import Draws, certified_dot
from altgrad_jax.numerics.products import Operands, Rule, quant_dot
from altgrad_jax.numerics.slot_quantization import Slot
from altgrad_jax.numerics.slots import slot_dot

INIT_STD = 0.02


class Quantized(NamedTuple):
    """What the quantized layers of one call work with.

    operands: {group: Operands, leaves [n, ...]} for every group in ModelConfig.rules, with a recipe {group: Slot}.
    g_probes: {group: float32 [n, S]} where statistics of the output gradients are taken (see quant_dot; with a recipe
    [n, 3, S], see slot_dot).
    """

    operands: Mapping[str, Operands | Slot]
    g_probes: dict[str, jax.Array]


def product(
    config: ModelConfig, rules, layer, x, w, quantized: Any, statistics: dict, w_is_NK=False, columns_K=None
) -> jax.Array:
    """quant_dot for one layer, in its formats if `rules` has it; their statistics are put into `statistics`.

    Args:
      quantized: Quantized; None where no layer has a format. columns_K: as in quant_dot, for a layer of `rules`.
    """
    rule = dict(rules).get(layer)
    if rule is None:
        return quant_dot(x, w, w_is_NK=w_is_NK, compute_dtype=config.compute_dtype)
    operands, g_probe, dtype = quantized.operands[layer], quantized.g_probes.get(layer), config.compute_dtype
    if isinstance(rule, Draws):
        return certified_dot(x, w, operands._replace(columns_K=columns_K), rule, g_probe, w_is_NK, dtype)
    if isinstance(rule, Rule):
        numbers = dict(rule=rule, operands=operands, g_probe=g_probe, columns_K=columns_K)
        y, statistics[layer] = quant_dot(x, w, w_is_NK=w_is_NK, compute_dtype=dtype, **numbers)
    else:
        y, statistics[layer] = slot_dot(x, w, operands, rule, g_probe, w_is_NK, dtype, columns_K)
    return y


class Linear(nn.Module):
    """x kernel + bias, through quant_dot; kernel [inputs, outputs]. float32 in and out."""

    config: ModelConfig
    rules: tuple[tuple[str, Choices], ...]
    features: int
    init_std: float = INIT_STD
    use_bias: bool = True

    @nn.compact
    def __call__(self, x, quantized: Quantized | None, statistics: dict, columns_K=None):
        shape = (x.shape[-1], self.features)
        kernel = self.param("kernel", nn.initializers.normal(self.init_std), shape, jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, (self.features,), jnp.float32) if self.use_bias else None
        y = product(self.config, self.rules, self.name, x, kernel, quantized, statistics, columns_K=columns_K)
        return y if bias is None else y + bias


class Embedding(nn.Module):
    """A table [entries, width]; `lookup` reads rows of it in float32, `table` is what the head multiplies with."""

    entries: int
    width: int

    def setup(self):
        self.table = self.param("embedding", nn.initializers.normal(INIT_STD), (self.entries, self.width), jnp.float32)

    def lookup(self, ids):
        return self.table[ids]
