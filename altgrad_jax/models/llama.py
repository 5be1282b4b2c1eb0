"""Llama.

Pre-RMSNorm (gain only, eps 1e-6), rotary positions (theta 10,000), SwiGLU, no biases (Touvron et al. 2023, arXiv
2302.13971). Options: grouped queries (`n_kv_head`; Ainslie et al. 2023, arXiv 2305.13245), a head with a table of its
own (`tied_head=False`), RMSNorm of q and k over each head before the rotation (`qk_norm`; Dehghani et al. 2023, arXiv
2302.05442, with RMSNorm as in Qwen3), Smooth-SwiGLU (`smooth_swiglu`; Fishman et al. 2024, arXiv 2409.12517: column i
of mlp_down's input is s_i^-1 Q(s_i h_i), with 1 / s_i its largest magnitude, here down to a power of two). Layer names:
embed, block_i/{norm_1, attn_qkv, q_norm, k_norm, attn_out, norm_2, mlp_gate, mlp_up, mlp_down}, norm_f, head.

q, k and v are one product, as in GPT-2, so they share the scales of its operands. The initialization is GPT-2's:
N(0, 0.02), the projections into the residual stream N(0, 0.02 / sqrt(2 n_layer)), gains 1. `dropout` acts where it does
in GPT-2.

Dtypes: parameters, RMSNorm, the rotation, softmax, SwiGLU and the residual stream are float32. Values are rounded to
`compute_dtype` only as operands of a product; q and k are rounded after their rotation.

Axes: B batch, L length, D width, H heads of queries, G heads of keys and values, C width of one head, F hidden width
(layers.hidden_width).
"""

from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from altgrad_jax.models.attention import KVCache, attend
from altgrad_jax.models.config import ModelConfig
from altgrad_jax.models.linear import INIT_STD, Embedding, Linear, Quantized
from altgrad_jax.models.transformer import Block, Transformer, rounded_gains
from altgrad_jax.numerics.layers import HEAD, hidden_width
from altgrad_jax.numerics.products import column_scales

RMS_NORM_EPS = 1e-6
ROPE_THETA = 10_000.0


@dataclass(frozen=True)
class LlamaConfig(ModelConfig):
    """Shape and dtypes of a Llama.

    `n_kv_head`: heads of keys and values, which divides n_head; 0 is n_head. `tied_head`: whether the head multiplies
    with the table of the embedding. `qk_norm`: whether q and k are normalized. `smooth_swiglu`: whether the input of
    mlp_down, where it is quantized, is scaled by columns for it.
    """

    n_kv_head: int = 0
    tied_head: bool = True
    qk_norm: bool = False
    smooth_swiglu: bool = False

    name: ClassVar[str] = "llama"

    @property
    def kv_heads(self) -> int:
        return self.n_kv_head or self.n_head


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * scale over the last axis, in float32 (Zhang and Sennrich 2019, arXiv 1910.07467);
    `gains` as ModelConfig.norm_gains."""

    gains: str

    @nn.compact
    def __call__(self, x):
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],), jnp.float32)
        return (
            x * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + RMS_NORM_EPS) * rounded_gains(scale, self.gains)
        )


def rotated(x_BLHC, position) -> jax.Array:
    """Rotary positions (Su et al. 2021, arXiv 2104.09864): the pair (c, c + C/2) of the token at position p is turned
    by the angle p theta^(-2 c / C). This pairing is that of Hugging Face's Llama.

    Args:
      x_BLHC: float32, C even. position: of the first token.
    """
    _, L, _, C = x_BLHC.shape
    frequency_C2 = np.float32(ROPE_THETA ** (-np.arange(0, C, 2) / C))
    angle_LC2 = (position + jnp.arange(L)).astype(jnp.float32)[:, None] * frequency_C2
    cos_L1C2, sin_L1C2 = jnp.cos(angle_LC2)[:, None], jnp.sin(angle_LC2)[:, None]
    first, second = jnp.split(x_BLHC, 2, axis=-1)
    return jnp.concatenate([first * cos_L1C2 - second * sin_L1C2, second * cos_L1C2 + first * sin_L1C2], axis=-1)


class LlamaBlock(Block):
    """x + attention(norm(x)), then x + SwiGLU(norm(x))."""

    @nn.compact
    def __call__(self, x_BLD, cache: KVCache | None, i, position, quantized: Quantized | None, *, train):
        config: LlamaConfig = self.config
        statistics: dict = {}

        def linear(x, part, features, init_std=INIT_STD, columns_K=None):
            layer = Linear(config, self.rules, features, init_std, False, name=part)
            return layer(x, quantized, statistics, columns_K)

        residual_std = INIT_STD / (2 * config.n_layer) ** 0.5
        drop = nn.Dropout(config.dropout, deterministic=not train)
        B, L, D = x_BLD.shape
        H, G, C = config.n_head, config.kv_heads, config.head_width

        norm = partial(RMSNorm, config.norm_gains)
        h_BLD = norm(name="norm_1")(x_BLD)
        qkv = linear(h_BLD, "attn_qkv", (H + 2 * G) * C).reshape(B, L, H + 2 * G, C)
        q_BLHC, k_BLGC, v_BLGC = jnp.split(qkv, [H, H + G], axis=2)
        if config.qk_norm:
            q_BLHC, k_BLGC = norm(name="q_norm")(q_BLHC), norm(name="k_norm")(k_BLGC)
        turned = rotated(q_BLHC, position), rotated(k_BLGC, position), v_BLGC
        q_BLHC, k_BLGC, v_BLGC = (x.astype(config.compute_dtype) for x in turned)
        a_BLHC, cache = attend(config, self.rules, q_BLHC, k_BLGC, v_BLGC, cache, i, position, quantized, statistics)
        x_BLD = x_BLD + drop(linear(a_BLHC.reshape(B, L, D).astype(jnp.float32), "attn_out", D, residual_std))
        h_BLD = norm(name="norm_2")(x_BLD)
        F = hidden_width(D, config.name)
        h_BLF = jax.nn.silu(linear(h_BLD, "mlp_gate", F)) * linear(h_BLD, "mlp_up", F)
        columns_F = column_scales(h_BLF) if config.smooth_swiglu and "mlp_down" in dict(self.rules) else None
        x_BLD = x_BLD + drop(linear(h_BLF, "mlp_down", D, residual_std, columns_F))
        return x_BLD, cache, statistics


class Llama(Transformer):
    """The whole model; its blocks turn q and k by their positions."""

    block = LlamaBlock
    last_norm = RMSNorm, "norm_f"

    def head_table(self, embed):
        config = self.config
        return embed.table if config.tied_head else Embedding(config.vocab_size, config.n_embd, name=HEAD).table
