"""A decoder: embedding, blocks, a last norm and the output head. What models differ in are its blocks and norms.

The blocks of a segment are one block in a loop to the compiler (models.stacking).

Axes: B batch, L length, D width, V vocabulary, N number of blocks, n blocks of a segment.
"""

from functools import partial
from typing import Any, ClassVar, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from altgrad_jax.models.attention import KVCache
from altgrad_jax.models.config import Choices, ModelConfig
from altgrad_jax.models.linear import Embedding, Quantized, product
from altgrad_jax.models.stacking import segment_key, stack
from altgrad_jax.numerics import gains
from altgrad_jax.numerics.layers import HEAD


class ModelOutput(NamedTuple):
    hidden: jax.Array  # float32 [B, L, D]: what the head multiplies with its table
    logits: jax.Array | None  # float32 [B, L, V]; None with head=False
    act_amax_N: jax.Array  # float32: largest magnitude of the residual stream as it leaves each block
    act_rms_N: jax.Array  # float32: its root mean square
    cache: KVCache | None
    statistics: dict  # {group: products.Statistics [n, S]} of the quantized layers


class Block(nn.Module):
    """A block of a model. `rules`: (part, Choices) of the quantized layers of this block.

    Called with (x_BLD, cache, i, position, quantized, *, train), it returns (x, cache with the keys and values of this
    block, the i-th; statistics by part).
    """

    config: Any
    rules: tuple[tuple[str, Choices], ...] = ()


def rounded_gains(gain, recipe: str) -> jax.Array:
    """The gains of a norm as it multiplies with them; `recipe` as ModelConfig.norm_gains."""
    return gain if recipe == "float32" else gains.rounded(gain, recipe)


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


def one_block(kind: type[Block], config: ModelConfig, rules, position, carried: _Carried, block: _OfBlock):
    """A block of a segment: (carried on, (act_amax, act_rms, statistics by part))."""
    train = block.dropout_key is not None
    rngs: Any = {"dropout": block.dropout_key} if train else None
    after: Any = kind(config, rules, parent=None).apply(
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


def through_blocks(
    kind: type[Block], config: ModelConfig, params, x_BLD, cache, position, dropout_key, quantized
) -> Any:
    """(x, cache, act_amax [N], act_rms [N], {group: Statistics}) after all blocks, a segment at a time."""
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
            partial(one_block, kind, config, rules, position),
            carried,
            _OfBlock(numbers_n, params[key], keys_n, own),
            unroll=end - first if config.unroll or end - first == 1 else 1,
        )
        seen.append((amax_n, rms_n))
        statistics |= {f"{key}/{part}": of_part for part, of_part in by_part.items()}
    amax_N, rms_N = (jnp.concatenate(values) for values in zip(*seen))
    return *carried, amax_N, rms_N, statistics


def _of_head(quantized: Quantized | None) -> Quantized | None:
    if quantized is None:
        return None
    operands, probes = ({name: tree[name] for name in tree if name == HEAD} for tree in quantized)
    return Quantized(operands, probes)  # pyright: ignore[reportArgumentType] (it takes both for one kind)


class Transformer(nn.Module):
    """The whole model; see ModelOutput for what it returns. A model fills in its kind of block and its ends.

    last_norm: the kind of norm before the head, made with ModelConfig.norm_gains, and its name.
    """

    config: Any
    block: ClassVar[type[Block]]
    last_norm: ClassVar[tuple[type[nn.Module], str]]

    def positions(self, positions_L) -> jax.Array | None:
        """What is added to the embeddings of the tokens at these positions, float32 [L, D]; None adds nothing."""
        return None

    def head_table(self, embed: Embedding) -> jax.Array:
        """The head's table [V, D]: by default that of the embedding."""
        return embed.table

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
        x_BLD = embed.lookup(tokens_BL)
        if (added_LD := self.positions(position + jnp.arange(tokens_BL.shape[1]))) is not None:
            x_BLD = x_BLD + added_LD
        x_BLD = nn.Dropout(config.dropout, deterministic=not train)(x_BLD)
        if self.is_initializing():
            # Every block makes its own parameters; only they are wanted.
            for i in range(config.n_layer):
                x_BLD, _, _ = self.block(config, name=f"block_{i}")(x_BLD, None, i, position, None, train=False)
            amax_N = rms_N = jnp.zeros(config.n_layer)
            statistics = {}
        else:
            key = self.make_rng("dropout") if train and config.dropout > 0 else None
            x_BLD, cache, amax_N, rms_N, statistics = through_blocks(
                self.block, config, self.variables["params"], x_BLD, cache, position, key, quantized
            )
        norm, name = self.last_norm
        x_BLD = norm(config.norm_gains, name=name)(x_BLD)
        table_VD, logits_BLV = self.head_table(embed), None
        if head:
            of_head, found = jax.tree.map(lambda leaf: leaf[0], _of_head(quantized)), {}
            logits_BLV = product(config, config.rules, HEAD, x_BLD, table_VD, of_head, found, w_is_NK=True)
            statistics |= jax.tree.map(lambda leaf: leaf[None], found)
        return ModelOutput(x_BLD, logits_BLV, amax_N, rms_N, cache, statistics)
