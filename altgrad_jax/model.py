"""GPT-2 in Flax linen; the only file that imports flax.linen.

Pre-LayerNorm (eps 1e-5), learned positions, tanh-GELU, biases where GPT-2 has them, output head tied to the embedding
(Radford et al. 2019, "Language Models are Unsupervised Multitask Learners"). Layer names are the ones every metric,
file and option uses: embed, pos_embed, block_i/{ln_1, attn_qkv, attn_out, ln_2, mlp_up, mlp_down}, ln_f.

Dtypes: parameters, LayerNorm, softmax, GELU and the residual stream are float32. Values are rounded to `compute_dtype`
only as operands of a product (quant_dot's rule); q, k and v are such operands too, of the two attention products.

Axes: B batch, L length, D width, H heads, C width of one head, F hidden width (4 D), V vocabulary, T cache length,
N number of blocks.
"""

from dataclasses import dataclass
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from altgrad_jax.quant_dot import quant_dot

LAYER_NORM_EPS = 1e-5
INIT_STD = 0.02


@dataclass(frozen=True)
class GPTConfig:
    """Shape and dtypes of the model. `attention` is the kernel: "xla" or "cudnn" (GPU, bfloat16 only)."""

    n_layer: int
    n_head: int
    n_embd: int
    block_size: int
    vocab_size: int
    dropout: float = 0.0
    compute_dtype: str = "bfloat16"
    attention: str = "xla"


class KVCache(NamedTuple):
    """Keys and values of the tokens seen so far, one array per block: compute_dtype [B, T, H, C]."""

    keys: tuple
    values: tuple


class GPTOutput(NamedTuple):
    logits: jax.Array  # float32 [B, L, V]
    act_amax_N: jax.Array  # float32: largest magnitude of the residual stream as it leaves each block
    act_rms_N: jax.Array  # float32: its root mean square
    cache: KVCache | None


class LayerNorm(nn.Module):
    """(x - mean) / sqrt(var + eps) * scale + bias over the last axis, in float32."""

    @nn.compact
    def __call__(self, x_BLD):
        width = x_BLD.shape[-1]
        scale_D = self.param("scale", nn.initializers.ones, (width,), jnp.float32)
        bias_D = self.param("bias", nn.initializers.zeros, (width,), jnp.float32)
        centred_BLD = x_BLD - x_BLD.mean(-1, keepdims=True)
        var_BL1 = jnp.square(centred_BLD).mean(-1, keepdims=True)
        return centred_BLD * jax.lax.rsqrt(var_BL1 + LAYER_NORM_EPS) * scale_D + bias_D


class Linear(nn.Module):
    """x kernel + bias, through quant_dot; kernel [inputs, outputs]. float32 in and out."""

    features: int
    compute_dtype: str
    init_std: float = INIT_STD

    @nn.compact
    def __call__(self, x):
        shape = (x.shape[-1], self.features)
        kernel = self.param("kernel", nn.initializers.normal(self.init_std), shape, jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, (self.features,), jnp.float32)
        return quant_dot(x, kernel, compute_dtype=self.compute_dtype) + bias


class Embedding(nn.Module):
    """A table [entries, width]; `lookup` reads rows of it in float32, `table` is what the tied head multiplies with."""

    entries: int
    width: int

    def setup(self):
        self.table = self.param("embedding", nn.initializers.normal(INIT_STD), (self.entries, self.width), jnp.float32)

    def lookup(self, ids):
        return self.table[ids]


def causal_attention(q_BLHC, k_BTHC, v_BTHC, *, kernel, mask_LT=None):
    """softmax(q k^T / sqrt(C), causal) v with a float32 softmax; the output has the operands' dtype.

    `mask_LT` (True = may attend) replaces the causal mask where the queries do not start at key 0 (the cache).
    """
    # float32 operands mean float32 products: without this Hopper would take TF32.
    with jax.default_matmul_precision("highest" if q_BLHC.dtype == jnp.float32 else "default"):
        if mask_LT is None:
            return jax.nn.dot_product_attention(q_BLHC, k_BTHC, v_BTHC, is_causal=True, implementation=kernel)
        return jax.nn.dot_product_attention(q_BLHC, k_BTHC, v_BTHC, mask=mask_LT[None, None], implementation="xla")


class Block(nn.Module):
    """x + attention(LN(x)), then x + MLP(LN(x))."""

    config: GPTConfig

    @nn.compact
    def __call__(self, x_BLD, cache, position, *, train):
        config = self.config
        dtype = jnp.dtype(config.compute_dtype)
        # GPT-2 scales the two projections that write to the residual stream by 1/sqrt(number of such projections).
        residual_std = INIT_STD / (2 * config.n_layer) ** 0.5
        drop = nn.Dropout(config.dropout, deterministic=not train)
        B, L, D = x_BLD.shape
        H = config.n_head

        h_BLD = LayerNorm(name="ln_1")(x_BLD)
        qkv_BL3D = Linear(3 * D, config.compute_dtype, name="attn_qkv")(h_BLD).astype(dtype)
        q_BLHC, k_BLHC, v_BLHC = (part.reshape(B, L, H, D // H) for part in jnp.split(qkv_BL3D, 3, axis=-1))
        if cache is None:
            a_BLHC = causal_attention(q_BLHC, k_BLHC, v_BLHC, kernel=config.attention)
        else:
            k_BTHC, v_BTHC = (jax.lax.dynamic_update_slice_in_dim(old, new, position, axis=1)
                              for old, new in zip(cache, (k_BLHC, v_BLHC)))
            may_attend_LT = jnp.arange(k_BTHC.shape[1])[None, :] <= position + jnp.arange(L)[:, None]
            a_BLHC = causal_attention(q_BLHC, k_BTHC, v_BTHC, kernel="xla", mask_LT=may_attend_LT)
            cache = (k_BTHC, v_BTHC)
        x_BLD = x_BLD + drop(Linear(D, config.compute_dtype, residual_std, name="attn_out")(a_BLHC.reshape(B, L, D)
                                                                                         .astype(jnp.float32)))
        h_BLD = LayerNorm(name="ln_2")(x_BLD)
        h_BLF = jax.nn.gelu(Linear(4 * D, config.compute_dtype, name="mlp_up")(h_BLD), approximate=True)
        x_BLD = x_BLD + drop(Linear(D, config.compute_dtype, residual_std, name="mlp_down")(h_BLF))
        return x_BLD, cache


class GPT(nn.Module):
    """The whole model; see GPTOutput for what it returns."""

    config: GPTConfig

    @nn.compact
    def __call__(self, tokens_BL, *, train=False, cache: KVCache | None = None, position=0):
        """Logits of the next token at every position.

        Args:
          tokens_BL: integer token ids below vocab_size; L <= block_size.
          train: whether dropout is on (then a "dropout" rng is needed if dropout > 0).
          cache: keys and values of the tokens before; the new ones are written at `position` and the updated cache
            is returned. None: the tokens are the whole context.
          position: index of tokens_BL[:, 0] in the context (traced or static); position + L <= block_size.
        """
        config = self.config
        embed = Embedding(config.vocab_size, config.n_embd, name="embed")
        pos_embed = Embedding(config.block_size, config.n_embd, name="pos_embed")
        x_BLD = embed.lookup(tokens_BL) + pos_embed.lookup(position + jnp.arange(tokens_BL.shape[1]))
        x_BLD = nn.Dropout(config.dropout, deterministic=not train)(x_BLD)
        amax_N, rms_N, keys, values = [], [], [], []
        for i in range(config.n_layer):
            block_cache = None if cache is None else (cache.keys[i], cache.values[i])
            x_BLD, block_cache = Block(config, name=f"block_{i}")(x_BLD, block_cache, position, train=train)
            seen = jax.lax.stop_gradient(x_BLD)
            amax_N.append(jnp.max(jnp.abs(seen)))
            rms_N.append(jnp.sqrt(jnp.mean(jnp.square(seen))))
            if block_cache is not None:
                keys.append(block_cache[0])
                values.append(block_cache[1])
        x_BLD = LayerNorm(name="ln_f")(x_BLD)
        logits_BLV = quant_dot(x_BLD, embed.table, w_is_NK=True, compute_dtype=config.compute_dtype)
        cache = None if cache is None else KVCache(tuple(keys), tuple(values))
        return GPTOutput(logits_BLV, jnp.stack(amax_N), jnp.stack(rms_N), cache)


def init_params(config: GPTConfig, seed):
    """Fresh float32 parameters as a nested dict; a pure function of (config, seed)."""
    tokens_BL = jnp.zeros((1, 1), jnp.int32)
    return GPT(config).init(jax.random.key(seed), tokens_BL)["params"]


def empty_cache(config: GPTConfig, batch, length=None) -> KVCache:
    """A cache for `batch` sequences of up to `length` (default block_size) tokens."""
    shape = (batch, length or config.block_size, config.n_head, config.n_embd // config.n_head)
    zeros = tuple(jnp.zeros(shape, config.compute_dtype) for _ in range(config.n_layer))
    return KVCache(zeros, zeros)


def count_params(params):
    """Number of scalars in a parameter tree."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))


def layer_of(path):
    """Metric name of the layer a parameter path belongs to: ("block_0", "ln_1", "scale") -> "block_0/ln_1"."""
    return "/".join(path[:-1])
