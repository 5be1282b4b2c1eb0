"""GPT-2.

Pre-LayerNorm (eps 1e-5), learned positions, tanh-GELU, biases where GPT-2 has them, output head tied to the embedding
(Radford et al. 2019, "Language Models are Unsupervised Multitask Learners"). Layer names are the ones every metric,
file and option uses: embed, pos_embed, block_i/{ln_1, attn_qkv, attn_out, ln_2, mlp_up, mlp_down}, ln_f.

Dtypes: parameters, LayerNorm, softmax, GELU and the residual stream are float32. Values are rounded to `compute_dtype`
only as operands of a product (quant_dot's rule); q, k and v are such operands too, of the two attention products.

A layer whose products are quantized is named in `GPTConfig.rules`, and every call then brings its operands' formats.
The head's product is the layer `head`, its weights the table of `embed`.

Axes: B batch, L length, D width, H heads, C width of one head, F hidden width (4 D).
"""

from dataclasses import dataclass
from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from altgrad_jax.models.attention import KVCache, attend
from altgrad_jax.models.config import ModelConfig
from altgrad_jax.models.linear import INIT_STD, Embedding, Linear, Quantized
from altgrad_jax.models.transformer import Block, Transformer, rounded_gains

LAYER_NORM_EPS = 1e-5


@dataclass(frozen=True)
class GPTConfig(ModelConfig):
    """Shape and dtypes of a GPT-2."""

    name: ClassVar[str] = "gpt2"


class LayerNorm(nn.Module):
    """(x - mean) / sqrt(var + eps) * scale + bias over the last axis, in float32; `gains` as ModelConfig.norm_gains."""

    gains: str

    @nn.compact
    def __call__(self, x_BLD):
        width = x_BLD.shape[-1]
        scale_D = self.param("scale", nn.initializers.ones, (width,), jnp.float32)
        bias_D = self.param("bias", nn.initializers.zeros, (width,), jnp.float32)
        centred_BLD = x_BLD - x_BLD.mean(-1, keepdims=True)
        var_BL1 = jnp.square(centred_BLD).mean(-1, keepdims=True)
        return centred_BLD * jax.lax.rsqrt(var_BL1 + LAYER_NORM_EPS) * rounded_gains(scale_D, self.gains) + bias_D


class GPTBlock(Block):
    """x + attention(LN(x)), then x + MLP(LN(x))."""

    @nn.compact
    def __call__(self, x_BLD, cache: KVCache | None, i, position, quantized: Quantized | None, *, train):
        config = self.config
        statistics: dict = {}

        def linear(x, part, features, init_std=INIT_STD):
            return Linear(config, self.rules, features, init_std, name=part)(x, quantized, statistics)

        dtype = jnp.dtype(config.compute_dtype)
        # GPT-2 scales the two projections that write to the residual stream by 1/sqrt(number of such projections).
        residual_std = INIT_STD / (2 * config.n_layer) ** 0.5
        drop = nn.Dropout(config.dropout, deterministic=not train)
        B, L, D = x_BLD.shape
        H = config.n_head

        h_BLD = LayerNorm(config.norm_gains, name="ln_1")(x_BLD)
        qkv_BL3D = linear(h_BLD, "attn_qkv", 3 * D).astype(dtype)
        q_BLHC, k_BLHC, v_BLHC = (part.reshape(B, L, H, D // H) for part in jnp.split(qkv_BL3D, 3, axis=-1))
        a_BLHC, cache = attend(config, self.rules, q_BLHC, k_BLHC, v_BLHC, cache, i, position, quantized, statistics)
        x_BLD = x_BLD + drop(linear(a_BLHC.reshape(B, L, D).astype(jnp.float32), "attn_out", D, residual_std))
        h_BLD = LayerNorm(config.norm_gains, name="ln_2")(x_BLD)
        h_BLF = jax.nn.gelu(linear(h_BLD, "mlp_up", 4 * D), approximate=True)
        x_BLD = x_BLD + drop(linear(h_BLF, "mlp_down", D, residual_std))
        return x_BLD, cache, statistics


class GPT(Transformer):
    """The whole model, with learned positions."""

    block = GPTBlock
    last_norm = LayerNorm, "ln_f"

    def positions(self, positions_L):
        return Embedding(self.config.block_size, self.config.n_embd, name="pos_embed").lookup(positions_L)
