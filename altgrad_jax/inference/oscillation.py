"""Oscillation of a run's quantized weights: some more updates from a checkpoint, watched and thrown away."""

from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from altgrad_jax import config as settings
from altgrad_jax.data.dataset import gather_windows, load_token_data, permute_windows
from altgrad_jax.errors import UserError
from altgrad_jax.inference.evaluate import data_dir_of
from altgrad_jax.models import stacking
from altgrad_jax.models.parameters import weights_of
from altgrad_jax.numerics import oscillation
from altgrad_jax.run.checkpoint import read_document, resolve_checkpoint, restore_path
from altgrad_jax.step import recipe, update
from altgrad_jax.step.certify import certified_layers
from altgrad_jax.step.from_config import model_config, step_options
from altgrad_jax.step.mesh import data_mesh
from altgrad_jax.step.program import make_step_functions
from altgrad_jax.step.update import Step


def oscillation_of(path, n_updates: int, *, checkpoint=None, data_dir=None) -> dict[str, dict[str, float]]:
    """{layer: numerics.oscillation.named} over n updates from a checkpoint, whose run is left as it is.

    Args:
      path: a run folder, or one checkpoint in it. checkpoint: which one of the folder; None is the newest.
      data_dir: folder of token files; None: the one in the run's manifest.

    Raises:
      UserError: the run has no recipe.
    """
    folder = resolve_checkpoint(path, checkpoint)
    values = settings.upgraded(read_document(folder)["meta"]["config"])
    if not values["recipe"]:
        raise UserError(f"the run of {path} has no recipe, so that no weight of it is rounded by one: give another")
    config: settings.Config = settings.from_dict(values | {"fsdp": 1, "data_placement": "auto"})
    device = jax.devices()[0]
    data = load_token_data(
        data_dir or data_dir_of(Path(path)),
        vocab_size=config.vocab_size,
        block_size=config.block_size,
        tokenizer=config.tokenizer,
    )
    functions = make_step_functions(
        model_config(config, device),
        step_options(config, steps_per_dispatch=1),
        data_mesh([device]),
        n_train_windows=data.n_train_windows,
        eval_batch_size=config.eval_batch_size,
        seed=config.seed,
    )
    state, _ = restore_path(folder, functions.abstract_state)
    program = jax.jit(partial(observe, functions.step))
    found = jax.device_get(program(state, np.asarray(data.train_T), np.int32(n_updates), functions.inputs))
    return {layer: {name: float(value) for name, value in of.items()} for layer, of in found.items()}


def observe(step: Step, state: update.TrainState, tokens_T, n_updates, inputs: update.Inputs) -> dict:
    """{layer: {name: float32}} over n updates from a state that is not stacked; see StepFunctions.run."""
    assert step.recipe is not None, "made for a step with a recipe"
    own, B, layers = step.recipe, step.options.batch_size, certified_layers(step.recipe)

    def weights(state):
        params = stacking.unstack(state.params)
        return {layer: weights_of(params, layer) for layer in layers}

    def one(_, carry):
        state, watched = carry
        numbers = state.step.astype(jnp.uint32) * B + jnp.arange(B, dtype=jnp.uint32)
        index_B = permute_windows(numbers, step.n_train_windows, inputs.data_seed, xp=jnp)
        windows = gather_windows(tokens_T, index_B, step.plain.block_size, xp=jnp)
        state, _ = update.train_step(step, state, windows, inputs)
        of_layer = _rounded(own, state.quant, inputs.formats)
        new = weights(state)
        watched = {layer: oscillation.watch(watched[layer], new[layer], of_layer[layer]) for layer in layers}
        return state, watched

    state = update.stacked(step, state)
    first, of_layer = weights(state), _rounded(step.recipe, state.quant, inputs.formats)
    start = {layer: oscillation.begin(w, of_layer[layer](w)) for layer, w in first.items()}
    _, watched = jax.lax.fori_loop(0, n_updates, one, (state, start))
    return {layer: oscillation.named(of) for layer, of in watched.items()}


def _rounded(options: recipe.RecipeOptions, state, table) -> dict:
    """{layer: function of its weights that gives them as the forward pass multiplies them}."""
    slots_Q6 = recipe.slots_at(options, state, table)
    return {
        layer: partial(recipe.forward_copy, options, layer, jax.tree.map(lambda leaf, q=q: leaf[q], slots_Q6))
        for q, layer in enumerate(options.names)
        if layer in certified_layers(options)
    }
