"""GPT-2 in Flax linen; the only file that imports flax.linen.

Pre-LayerNorm (eps 1e-5), learned positions, tanh-GELU, biases where GPT-2 has them, output head tied to the embedding
(Radford et al. 2019, "Language Models are Unsupervised Multitask Learners"). Layer names are the ones every metric,
file and option uses: embed, pos_embed, block_i/{ln_1, attn_qkv, attn_out, ln_2, mlp_up, mlp_down}, ln_f.

Dtypes: parameters, LayerNorm, softmax, GELU and the residual stream are float32. Values are rounded to `compute_dtype`
only as operands of a product (quant_dot's rule); q, k and v are such operands too, of the two attention products.

A layer whose products are quantized is named in `GPTConfig.rules`, and every call then brings its operands' formats.
The head's product is the layer `head`, its weights the table of `embed`.

Axes: B batch, L length, D width, H heads, C width of one head, F hidden width (4 D), V vocabulary, T cache length,
N number of blocks.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from altgrad_jax.models.stacking import Segments, segment_key, stack
from altgrad_jax.numerics.products import Operands, Rule, quant_dot
from altgrad_jax.numerics.slot_quantization import Features, Slot
from altgrad_jax.numerics.slots import slot_dot

# The static choices of a quantized layer: those of quant_dot, or of the six slots of a recipe.
Choices = Rule | tuple[Features, ...]
LAYER_NORM_EPS = 1e-5
INIT_STD = 0.02


@dataclass(frozen=True)
class GPTConfig:
    """Shape and dtypes of the model. `attention` is the kernel: "xla" or "cudnn" (GPU, bfloat16 only).

    `rules`: (group, Choices) of the layers whose products are quantized (models.stacking). `split`: how the blocks are
    divided into segments, each computed alike; empty stands for one segment. `loss_tile_bytes`: limit of the float32
    logits that the loss computes at once (cross_entropy). `unroll`: whether the program holds every block apart, as a
    GPU wants it, or one block in a loop, which compiles in a fraction of the time.
    """

    n_layer: int
    n_head: int
    n_embd: int
    block_size: int
    vocab_size: int
    dropout: float = 0.0
    compute_dtype: str = "bfloat16"
    attention: str = "xla"
    rules: tuple[tuple[str, Choices], ...] = ()
    loss_tile_bytes: int = 2**27
    unroll: bool = False
    split: Segments = ()

    @property
    def segments(self) -> Segments:
        """The segments of the blocks, in order."""
        return self.split or ((0, self.n_layer),)


class KVCache(NamedTuple):
    """Keys and values of the tokens seen so far, of all blocks: compute_dtype [N, B, T, H, C]."""

    keys: jax.Array
    values: jax.Array

    def after(self, i, k_BLHC, v_BLHC, position) -> "KVCache":
        """The cache with these keys and values of block i written at `position`."""
        return KVCache(
            *(
                jax.lax.dynamic_update_slice(all_NBTHC, new[None], (i, 0, position, 0, 0))
                for all_NBTHC, new in zip(self, (k_BLHC, v_BLHC))
            )
        )


class GPTOutput(NamedTuple):
    hidden: jax.Array  # float32 [B, L, D]: what the head multiplies with the embedding table
    logits: jax.Array | None  # float32 [B, L, V]; None with head=False
    act_amax_N: jax.Array  # float32: largest magnitude of the residual stream as it leaves each block
    act_rms_N: jax.Array  # float32: its root mean square
    cache: KVCache | None
    statistics: dict  # {group: products.Statistics [n, S]} of the quantized layers


class Quantized(NamedTuple):
    """What the quantized layers of one call work with.

    operands: {group: Operands, leaves [n, ...]} for every group in GPTConfig.rules, with a recipe {group: Slot}.
    g_probes: {group: float32 [n, S]} where statistics of the output gradients are taken (see quant_dot; with a recipe
    [n, 3, S], see slot_dot).
    """

    operands: Mapping[str, Operands | Slot]
    g_probes: dict[str, jax.Array]


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


def _product(config, rules, layer, x, w, quantized, statistics, w_is_NK=False):
    """quant_dot for one layer, in its formats if `rules` has it; their statistics are put into `statistics`."""
    rule = dict(rules).get(layer)
    if rule is None:
        return quant_dot(x, w, w_is_NK=w_is_NK, compute_dtype=config.compute_dtype)
    operands, g_probe, dtype = quantized.operands[layer], quantized.g_probes.get(layer), config.compute_dtype
    if isinstance(rule, Rule):
        y, statistics[layer] = quant_dot(
            x, w, w_is_NK=w_is_NK, compute_dtype=dtype, rule=rule, operands=operands, g_probe=g_probe
        )
    else:
        y, statistics[layer] = slot_dot(x, w, operands, rule, g_probe, w_is_NK, dtype)
    return y


class Linear(nn.Module):
    """x kernel + bias, through quant_dot; kernel [inputs, outputs]. float32 in and out."""

    config: GPTConfig
    rules: tuple[tuple[str, Choices], ...]
    features: int
    init_std: float = INIT_STD

    @nn.compact
    def __call__(self, x, quantized, statistics):
        shape = (x.shape[-1], self.features)
        kernel = self.param("kernel", nn.initializers.normal(self.init_std), shape, jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, (self.features,), jnp.float32)
        return _product(self.config, self.rules, self.name, x, kernel, quantized, statistics) + bias


class Embedding(nn.Module):
    """A table [entries, width]; `lookup` reads rows of it in float32, `table` is what the tied head multiplies with."""

    entries: int
    width: int

    def setup(self):
        self.table = self.param("embedding", nn.initializers.normal(INIT_STD), (self.entries, self.width), jnp.float32)

    def lookup(self, ids):
        return self.table[ids]


def causal_attention(q_BLHC, k_BTHC, v_BTHC, *, kernel: Any, mask_LT=None) -> jax.Array:
    """softmax(q k^T / sqrt(C), causal) v with a float32 softmax; the output has the operands' dtype.

    `mask_LT` (True = may attend) replaces the causal mask where the queries do not start at key 0 (the cache).
    """
    # float32 operands mean float32 products: without this Hopper would take TF32.
    with jax.default_matmul_precision("highest" if q_BLHC.dtype == jnp.float32 else "default"):
        if mask_LT is None:
            return jax.nn.dot_product_attention(q_BLHC, k_BTHC, v_BTHC, is_causal=True, implementation=kernel)
        return jax.nn.dot_product_attention(q_BLHC, k_BTHC, v_BTHC, mask=mask_LT[None, None], implementation="xla")


class Block(nn.Module):
    """x + attention(LN(x)), then x + MLP(LN(x)). `rules`: (part, Rule) of the quantized layers of this block."""

    config: GPTConfig
    rules: tuple[tuple[str, Choices], ...] = ()

    @nn.compact
    def __call__(self, x_BLD, cache: KVCache | None, i, position, quantized: Quantized | None, *, train):
        """(x, cache with the keys and values of this block, the i-th; statistics by part)."""
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

        h_BLD = LayerNorm(name="ln_1")(x_BLD)
        qkv_BL3D = linear(h_BLD, "attn_qkv", 3 * D).astype(dtype)
        q_BLHC, k_BLHC, v_BLHC = (part.reshape(B, L, H, D // H) for part in jnp.split(qkv_BL3D, 3, axis=-1))
        if cache is None:
            a_BLHC = causal_attention(q_BLHC, k_BLHC, v_BLHC, kernel=config.attention)
        else:
            cache = cache.after(i, k_BLHC, v_BLHC, position)
            k_BTHC, v_BTHC = cache.keys[i], cache.values[i]
            may_attend_LT = jnp.arange(k_BTHC.shape[1])[None, :] <= position + jnp.arange(L)[:, None]
            a_BLHC = causal_attention(q_BLHC, k_BTHC, v_BTHC, kernel="xla", mask_LT=may_attend_LT)
        x_BLD = x_BLD + drop(linear(a_BLHC.reshape(B, L, D).astype(jnp.float32), "attn_out", D, residual_std))
        h_BLD = LayerNorm(name="ln_2")(x_BLD)
        h_BLF = jax.nn.gelu(linear(h_BLD, "mlp_up", 4 * D), approximate=True)
        x_BLD = x_BLD + drop(linear(h_BLF, "mlp_down", D, residual_std))
        return x_BLD, cache, statistics


class _OfBlock(NamedTuple):
    """What one block is given; with a leading axis, what the blocks of a segment are given."""

    i: Any  # int32: its number
    params: Any
    dropout_key: jax.Array | None
    quantized: Quantized | None  # keyed by part


class _Carried(NamedTuple):
    """What goes from block to block."""

    x_BLD: jax.Array
    cache: KVCache | None


def _one_block(config: GPTConfig, rules, position, carried: _Carried, block: _OfBlock):
    """A block of a segment: (carried on, (act_amax, act_rms, statistics by part))."""
    train = block.dropout_key is not None
    rngs: Any = {"dropout": block.dropout_key} if train else None
    after: Any = Block(config, rules, parent=None).apply(
        {"params": block.params},
        carried.x_BLD,
        carried.cache,
        block.i,
        position,
        block.quantized,
        train=train,
        rngs=rngs,
    )
    x_BLD, cache, statistics = after
    seen = jax.lax.stop_gradient(x_BLD)
    measured = jnp.max(jnp.abs(seen)), jnp.sqrt(jnp.mean(jnp.square(seen))), statistics
    return _Carried(x_BLD, cache), measured


def _below(prefix: str, tree) -> Any:
    return {name.removeprefix(prefix): value for name, value in tree.items() if name.startswith(prefix)}


def _through_blocks(config: GPTConfig, params, x_BLD, cache, position, dropout_key, quantized: Quantized | None) -> Any:
    """(x, cache, act_amax [N], act_rms [N], {group: Statistics}) after all blocks, a segment at a time.

    To the compiler a segment is one block in a loop.
    """
    if segment_key(*config.segments[0]) not in params:
        params = stack({name: block for name, block in params.items() if name.startswith("block_")}, config.segments)
    carried, seen, statistics = _Carried(x_BLD, cache), [], {}
    for first, end in config.segments:
        key = segment_key(first, end)
        numbers_n = jnp.arange(first, end)
        keys_n = None if dropout_key is None else jax.vmap(partial(jax.random.fold_in, dropout_key))(numbers_n)
        own = None if quantized is None else Quantized(*(_below(f"{key}/", tree) for tree in quantized))
        rules = tuple(_below(f"{key}/", dict(config.rules)).items())
        carried, (amax_n, rms_n, by_part) = jax.lax.scan(
            partial(_one_block, config, rules, position),
            carried,
            _OfBlock(numbers_n, params[key], keys_n, own),
            unroll=end - first if config.unroll or end - first == 1 else 1,
        )
        seen.append((amax_n, rms_n))
        statistics |= {f"{key}/{part}": of_part for part, of_part in by_part.items()}
    return *carried, *(jnp.concatenate(values) for values in zip(*seen)), statistics


def _of_head(quantized: Quantized | None) -> Quantized | None:
    if quantized is None:
        return None
    operands, probes = ({name: tree[name] for name in tree if name == "head"} for tree in quantized)
    return Quantized(operands, probes)  # pyright: ignore[reportArgumentType] (it takes both for one kind)


class GPT(nn.Module):
    """The whole model; see GPTOutput for what it returns."""

    config: GPTConfig

    @nn.compact
    def __call__(
        self,
        tokens_BL,
        *,
        train=False,
        cache: KVCache | None = None,
        position=0,
        quantized: Quantized | None = None,
        head=True,
    ):
        """Logits of the next token at every position.

        Args:
          tokens_BL: integer token ids below vocab_size; L <= block_size.
          train: whether dropout is on (then a "dropout" rng is needed if dropout > 0).
          cache: keys and values of the tokens before; the new ones are written at `position` and the updated cache
            is returned. None: the tokens are the whole context.
          position: index of tokens_BL[:, 0] in the context (traced or static); position + L <= block_size.
          quantized: the operands of the layers in config.rules; needed where there are any.
          head: whether the logits are computed.
        """
        config = self.config
        embed = Embedding(config.vocab_size, config.n_embd, name="embed")
        pos_embed = Embedding(config.block_size, config.n_embd, name="pos_embed")
        x_BLD = embed.lookup(tokens_BL) + pos_embed.lookup(position + jnp.arange(tokens_BL.shape[1]))
        x_BLD = nn.Dropout(config.dropout, deterministic=not train)(x_BLD)
        if self.is_initializing():
            # Every block makes its own parameters; only they are wanted.
            for i in range(config.n_layer):
                x_BLD, _, _ = Block(config, name=f"block_{i}")(x_BLD, None, i, position, None, train=False)
            amax_N = rms_N = jnp.zeros(config.n_layer)
            statistics = {}
        else:
            key = self.make_rng("dropout") if train and config.dropout > 0 else None
            x_BLD, cache, amax_N, rms_N, statistics = _through_blocks(
                config, self.variables["params"], x_BLD, cache, position, key, quantized
            )
        x_BLD = LayerNorm(name="ln_f")(x_BLD)
        logits_BLV = None
        if head:
            of_head, found = jax.tree.map(lambda leaf: leaf[0], _of_head(quantized)), {}
            logits_BLV = _product(config, config.rules, "head", x_BLD, embed.table, of_head, found, w_is_NK=True)
            statistics |= jax.tree.map(lambda leaf: leaf[None], found)
        return GPTOutput(x_BLD, logits_BLV, amax_N, rms_N, cache, statistics)


def init_params(config: GPTConfig, seed) -> Any:
    """Fresh float32 parameters as a nested dict; a pure function of (config, seed), whatever the formats."""
    tokens_BL = jnp.zeros((1, 1), jnp.int32)
    return GPT(dataclasses.replace(config, rules=())).init(jax.random.key(seed), tokens_BL)["params"]


def forward(
    config: GPTConfig,
    params,
    tokens_BL,
    *,
    dropout_key=None,
    cache: KVCache | None = None,
    position=0,
    quantized: Quantized | None = None,
    head=True,
) -> GPTOutput:
    """The model applied to tokens, as a pure function; arguments as in `GPT.__call__`.

    Args:
      params: as `init_params` makes them. dropout_key: of this pass; None turns dropout off.
    """
    output = GPT(config).apply(
        {"params": params},
        tokens_BL,
        train=dropout_key is not None,
        cache=cache,
        position=position,
        quantized=quantized,
        head=head,
        rngs=None if dropout_key is None else {"dropout": dropout_key},
    )
    return output  # pyright: ignore[reportReturnType] (linen's stub adds the tuple of a call with `mutable`)


def empty_cache(config: GPTConfig, batch: int, length: int | None = None) -> KVCache:
    """A cache for `batch` sequences of up to `length` (default block_size) tokens."""
    head_width = config.n_embd // config.n_head
    shape = (config.n_layer, batch, length or config.block_size, config.n_head, head_width)
    return KVCache(jnp.zeros(shape, config.compute_dtype), jnp.zeros(shape, config.compute_dtype))


def count_params(params) -> int:
    """Number of scalars in a parameter tree."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))


def layer_of(path: Sequence[str]) -> str:
    """Metric name of the layer a parameter path belongs to: ("block_0", "ln_1", "scale") -> "block_0/ln_1"."""
    return "/".join(path[:-1])


def weights_of(params, layer: str) -> Any:
    """The weight matrix of a linear layer: its kernel [K, N], or for `head` the embedding table [V, D]. Of a group in
    stacked parameters: [n, K, N]."""
    if layer == "head":
        return params["embed"]["embedding"]
    block, part = layer.split("/")
    return params[block][part]["kernel"]


def with_weights(params, weights: dict) -> dict:
    """The parameters with the matrices of some layers or groups replaced: {layer: matrix}, as in `weights_of`."""
    params = {name: dict(group) for name, group in params.items()}
    for layer, matrix in weights.items():
        if layer == "head":
            params["embed"] = params["embed"] | {"embedding": matrix}
        else:
            block, part = layer.split("/")
            params[block][part] = params[block][part] | {"kernel": matrix}
    return params
