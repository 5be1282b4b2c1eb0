"""Text from a model: a key-value cache, one compiled program, and the same tokens for the same seed.

One call of the compiled function reads a context and continues it. The context lies in an array of block_size
tokens with its length as a traced number, and so do the number of new tokens and the temperature: prompts of
any length share one compile (top_k, which is a shape, does not). The context's keys and values are computed
in one pass; then a loop feeds the last token, samples the next one, and so on. The positions behind the
context hold padding, which is never attended to and is overwritten as the loop gets there.

Positions are learned and absolute, and a cached key carries its position, so a full context cannot slide by
one token. When it is full, the model starts over from its last block_size // 2 tokens, at position 0, and
what lies further back is forgotten. Of a longer prompt, the last block_size tokens are read.

The random key of new token i is fold_in(key(seed), i): it depends on nothing else, so a longer text begins
with the shorter one.

Axes: T positions of the context (block_size), V vocabulary, L any number of tokens.
"""

import dataclasses
import math
from functools import partial
from types import SimpleNamespace
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from altgrad_jax.config import upgraded, wrong_values
from altgrad_jax.conflicts import of_heads
from altgrad_jax.errors import UserError
from altgrad_jax.models.attention import empty_cache
from altgrad_jax.models.config import ModelConfig
from altgrad_jax.models.linear import Quantized
from altgrad_jax.models.model import forward, model_config, setting_names
from altgrad_jax.numerics.formats import known_again
from altgrad_jax.run.checkpoint import load_arrays
from altgrad_jax.run.environment import fixed_options
from altgrad_jax.step import quantization, recipe, update

SEED_MAX = 2**31 - 1


class Model(NamedTuple):
    """What a checkpoint computes: nested dict of NumPy float32 arrays, the ModelConfig, the flat dict of the run's
    settings, and {group: products.Operands} of the layers that were trained in number formats (empty without)."""

    params: dict
    config: ModelConfig
    settings: dict
    operands: dict


_READ = ("params/", "quant/amax_history", "quant/level", "quant/number", "quant/rest_scale/", "quant/begun")


def load_model(path, step: int | None = None) -> Model:
    """The model of a checkpoint, in the number formats it was trained in.

    Args:
      path: a run folder or one checkpoint in it.
      step: which checkpoint of the run folder; None is the newest.

    Raises:
      UserError: there is no such checkpoint, or it is damaged, or its settings describe no model.
    """
    arrays, meta = load_arrays(path, step, _READ)
    if "params" not in arrays:
        raise UserError(f"the checkpoint {path} holds no parameters: give one that the training wrote")
    known_again(meta.get("registered"))
    settings = meta.get("config", {})
    # All else is a choice of the machine it trained on; the defaults compute the same everywhere.
    complete = upgraded(settings) | {"use_fp8": settings.get("use_fp8", False)}
    missing = [name for name in (*setting_names("gpt2"), "tokenizer") if name not in complete]
    if missing:
        raise UserError(
            f"the checkpoint in {path} does not record {', '.join(missing)}; give one that was written by "
            "scripts/train.py or scripts/export_hf.py --import."
        )
    if wrong := wrong_values(settings):
        raise UserError(f"the checkpoint in {path} describes no model: {wrong[0]}")
    for problem in of_heads(SimpleNamespace(**complete)):
        raise UserError(f"the checkpoint in {path} describes no model: {problem}")
    config, operands = model_config(complete), {}
    formats, recipes = quantization.options_of(complete), recipe.options_of(complete)
    quant = arrays.get("quant", {})
    if formats is not None:
        state = quantization.QuantState(
            quant["amax_history_Q3H"],
            quant["level"],
            bad_streak=jnp.int32(0),
            rest_scale=quant.get("rest_scale", {}),
            residual={},
            age={},
        )
        config = quantization.quantized_model(quantization.layout(config, formats), formats)
        operands = update.operands_at(config, formats, None, state, quantization.format_table(formats))
    if recipes is not None:
        state = recipe.RecipeState(quant["amax_history_Q6H"], quant["number"], quant.get("begun"))
        config = recipe.quantized_model(config, recipes)
        operands = update.operands_at(config, None, recipes, state, recipe.table_of(recipes))
    operands = jax.device_get(operands)
    return Model(arrays["params"], config, settings, operands)


def sample_token(logits_V, key, temperature, top_k: int | None) -> jax.Array:
    """One token id, int32: drawn from softmax(logits / temperature) over the top_k largest (None: all).

    temperature 0 is the largest logit; of equal ones the lowest id. `temperature` may be traced, `top_k` not.
    """
    if top_k is None:
        candidate_logits, candidates = logits_V, jnp.arange(logits_V.size)
    else:
        candidate_logits, candidates = jax.lax.top_k(logits_V, top_k)
    # The largest logit is moved to 0 before the division, which else overflows at a small temperature.
    scaled = (candidate_logits - candidate_logits.max()) / jnp.where(temperature == 0, 1.0, temperature)
    drawn = jax.random.categorical(key, scaled)
    return candidates[jnp.where(temperature == 0, jnp.argmax(candidate_logits), drawn)].astype(jnp.int32)


@partial(jax.jit, static_argnames=("config", "top_k", "n_ids"))
def _continue(params, operands, context_T, n_context, n_new, first, key, temperature, end_id, *, config, top_k, n_ids):
    """Continues the first `n_context` tokens of `context_T` by up to `n_new` tokens; `end_id` ends it early.

    The new tokens are number `first`, first + 1, ... of the whole text (for their random keys).

    Returns (new tokens int32 [T], how many of them are valid, whether all logits were finite).
    """
    quantized = Quantized(operands, {})

    def more(carry):
        n_done, token, _, _, finite = carry
        return (n_done < n_new) & finite & ((n_done == 0) | (token != end_id))

    def next_token(carry):
        n_done, token, cache, new_T, _ = carry
        out = forward(
            config, params, token[None, None], cache=cache, position=n_context - 1 + n_done, quantized=quantized
        )
        assert out.logits is not None
        logits_V = out.logits[0, 0, :n_ids]
        token = sample_token(logits_V, jax.random.fold_in(key, first + n_done), temperature, top_k)
        finite = jnp.all(jnp.isfinite(logits_V))
        return n_done + 1, token, out.cache, new_T.at[n_done].set(token), finite

    # Only the cache of this pass is used, so XLA drops its logits, the largest product of all.
    cache = forward(config, params, context_T[None], cache=empty_cache(config, batch=1), quantized=quantized).cache
    start = (jnp.int32(0), context_T[n_context - 1], cache, jnp.zeros_like(context_T), jnp.bool_(True))
    n_done, _, _, new_T, finite = jax.lax.while_loop(more, next_token, start)
    return new_T, n_done, finite


@fixed_options()
def generate(
    params,
    config: ModelConfig,
    prompt_ids_L,
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    seed: int = 0,
    end_id: int | None = None,
    operands: dict | None = None,
    n_ids: int | None = None,
) -> np.ndarray:
    """Continues a prompt; a pure function of its arguments on one machine.

    Args:
      params: nested dict of float32 arrays.
      config: their ModelConfig.
      prompt_ids_L: at least one token id; the last block_size of them are read.
      max_new_tokens: how many tokens to add; above block_size - L the context starts over (see above).
      temperature: 0 takes the most likely token each time; 1 samples from the model's own distribution.
      top_k: sample from the top_k most likely tokens only; None or 0 is from all.
      seed: 0 to 2^31 - 1.
      end_id: a token after which to stop, which is then the last one; None never stops early.
      operands: of the layers in config.rules, as `load_model` gives them. Scales from an operand's own amax see the
        tokens of one pass, a single one beside the cache.
      n_ids: ids of the tokenizer; the rest of a padded vocabulary is never drawn. None: the whole vocabulary.

    Returns:
      int32 [up to max_new_tokens]: the new tokens, without the prompt.

    Raises:
      UserError: an argument is out of its range, or the model's logits are not finite.
    """
    prompt_ids_L = np.asarray(prompt_ids_L)
    n_ids = config.vocab_size if n_ids is None else min(n_ids, config.vocab_size)
    _check(prompt_ids_L, n_ids, max_new_tokens, temperature, top_k, seed)
    # The cached attention has one kernel; saying so keeps one compile for every config that differs in it
    # alone.
    # In a loop over blocks their weights would be cut out of a stack again for every token.
    config = dataclasses.replace(config, attention="xla", unroll=True)
    params = jax.device_put(params)
    key = jax.random.key(seed)
    T = config.block_size
    new_ids = np.zeros(0, np.int32)
    context = prompt_ids_L[-T:].astype(np.int32)
    while len(new_ids) < max_new_tokens:
        # The token behind a full context is still predicted from all of it.
        n_new = min(max_new_tokens - len(new_ids), T - len(context) + 1)
        padded_T = np.zeros(T, np.int32)
        padded_T[: len(context)] = context
        new_T, n_done, finite = _continue(
            params,
            operands or {},
            padded_T,
            len(context),
            n_new,
            len(new_ids),
            key,
            float(temperature),
            -1 if end_id is None else end_id,
            config=config,
            top_k=top_k or None,
            n_ids=n_ids,
        )
        if not finite:
            raise UserError("the model's logits are not finite, so no token can be chosen; use an earlier checkpoint.")
        new_ids = np.concatenate([new_ids, np.asarray(new_T)[: int(n_done)]])
        if n_done < n_new or new_ids[-1] == end_id:
            break
        context = np.concatenate([prompt_ids_L.astype(np.int32), new_ids])[-max(1, T // 2) :]
    return new_ids


def _check(prompt_ids_L, n_ids, max_new_tokens, temperature, top_k, seed):
    if prompt_ids_L.ndim != 1 or prompt_ids_L.size == 0:
        raise UserError("the prompt has no token; give at least one, such as the end-of-text token.")
    outside = prompt_ids_L[(prompt_ids_L < 0) | (prompt_ids_L >= n_ids)]
    if outside.size:
        raise UserError(
            f"the prompt holds the token {outside[0]}, but the model knows 0 to {n_ids - 1}; use "
            "the tokenizer that it was trained with."
        )
    if max_new_tokens < 1:
        raise UserError(f"max_new_tokens = {max_new_tokens} cannot be used; give 1 or more.")
    if not 0 <= temperature < math.inf:
        raise UserError(f"temperature = {temperature} cannot be used; give 0 (the most likely token) or more.")
    if top_k is not None and not 0 <= top_k <= n_ids:
        raise UserError(f"top_k = {top_k} cannot be used; give 0 (off) to {n_ids}, the model's vocabulary.")
    if not 0 <= seed <= SEED_MAX:
        raise UserError(f"seed = {seed} cannot be used; give a whole number from 0 to {SEED_MAX}.")
