"""The certificate of a checkpoint: bias and variance of the products of its recipe, with as many draws as asked; and
of several recipes at the same weights, in one program."""

import dataclasses
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from altgrad_jax import config as settings
from altgrad_jax.data.dataset import choose_windows, load_token_data
from altgrad_jax.errors import UserError
from altgrad_jax.inference.evaluate import data_dir_of
from altgrad_jax.numerics import bias
from altgrad_jax.numerics.bias import Bias
from altgrad_jax.numerics.recipes import Phase
from altgrad_jax.run.checkpoint import load_arrays
from altgrad_jax.step import recipe, update
from altgrad_jax.step.certify import biases, certify, metrics_of, require_windows
from altgrad_jax.step.from_config import model_config, step_options
from altgrad_jax.step.mesh import data_mesh
from altgrad_jax.step.update import Step

# What a certificate does otherwise than the run: on one device, whatever the run was diagnosed at.
_OTHERWISE = {"fsdp": 1, "attention": "xla", "diagnostic_interval": 1}
_READ = ("params/", "quant/amax_history_Q6H", "quant/number", "quant/begun")


class Loaded(NamedTuple):
    """A checkpoint of a run with a recipe, and the windows of its evaluations."""

    step: Step
    params: dict
    quant: recipe.RecipeState
    windows: np.ndarray  # uint16 [E, L+1]
    settings: dict


def load(path, *, checkpoint=None, data_dir=None, items: Sequence[str] = (), draws: int = 16) -> Loaded:
    """What is needed to look into a checkpoint.

    Args:
      path: a run folder, or one checkpoint in it. checkpoint: which one of the folder; None is the newest.
      data_dir: folder of token files; None: the one in the run's manifest.
      items: recipes to look at it by, in place of its own; for any run without number formats. The step follows the
        first, and its program can follow all.
      draws: of a certificate.

    Raises:
      UserError: the run has no recipe and none is given, or the recipe does not fit its model.
    """
    arrays, meta = load_arrays(path, checkpoint, _READ)
    values = settings.upgraded(meta["config"])
    if items:
        values |= {"recipe": [items[0]], "recipe_program": list(items[1:]), "amax_history": 16}
    if not values["recipe"]:
        raise UserError(f"the run of {path} has no recipe: give one with --recipe, such as nvfp4")
    config: settings.Config = settings.from_dict(values | _OTHERWISE | {"certify_draws": draws})
    device = jax.devices()[0]
    options = dataclasses.replace(step_options(config, steps_per_dispatch=1), grad_accum_steps=1)
    if options.recipe is not None:
        options = dataclasses.replace(options, recipe=recipe.for_platform(options.recipe, device.platform))
    data = load_token_data(
        data_dir or data_dir_of(Path(path)),
        vocab_size=config.vocab_size,
        block_size=config.block_size,
        tokenizer=config.tokenizer,
    )
    windows, batch = choose_windows(data.val_T, config.block_size, config.eval_windows, config.eval_batch_size)
    step = Step(model_config(config, device), options, data_mesh([device]), 1, batch)
    assert step.recipe is not None, "the config was checked to have one"
    state = recipe.init_state(step.recipe)
    if not items:
        own = arrays["quant"]
        state = recipe.RecipeState(own["amax_history_Q6H"], own["number"], own.get("begun"))
    return Loaded(step, arrays["params"], state, np.asarray(windows), values)


class Found(NamedTuple):
    """What a certificate says."""

    biases: dict[str, Bias]  # by layer, and `all`
    metrics: dict[str, float]  # by the names of the record
    n_draws: int


def certify_checkpoint(path, draws: int, **choices) -> Found:
    """The certificate of a checkpoint by its own recipe with `draws` draws; `choices` as in `load`.

    Raises:
      UserError: as `load`.
    """
    (found,) = _certify(load(path, draws=draws, **choices), draws, [None])
    return found


def certify_recipes(path, items: Sequence[str], draws: int, **choices) -> dict[str, Found]:
    """{recipe: its certificate at the weights of a checkpoint}: in one program, on the same windows."""
    loaded = load(path, draws=draws, items=items, **choices)
    return dict(zip(items, _certify(loaded, draws, items), strict=True))


def table_with(options: recipe.RecipeOptions, item: str) -> recipe.RecipeTable:
    """The table of a run that follows one recipe for ever."""
    return recipe.table_of(dataclasses.replace(options, schedule=(Phase(item, 0),)))


def _certify(loaded, draws, items):
    """[Found] by each recipe that the program can follow; None is the step's own schedule."""
    step, options = loaded.step, loaded.step.recipe
    assert options is not None, "`load` asks for one"
    require_windows(step)
    # As an evaluation has so many windows at once, so has a certificate.
    windows = loaded.windows[: step.eval_batch_size]
    program = jax.jit(partial(certify, step, draws))
    given = loaded.params, windows, np.int32(loaded.settings["seed"]), loaded.quant
    found = []
    for item in items:
        table = update.numbers_table(step.options) if item is None else table_with(options, item)
        measured = jax.device_get(program(*given, table))
        found.append(Found(biases(measured, options, draws), metrics_of(measured, step), draws))
    return found


def table_lines(found: Found, reference: int = 0) -> list[str]:
    """Lines of text: a row for each layer and product.

    reference: index into bias.REFERENCES.
    """
    lines = [
        f"bias and variance of each product, relative to its energy, {found.n_draws} draws; reference: "
        f"{bias.REFERENCES[reference]}",
        f"{'layer':<22}{'product':<8}{'bias':>11}{'95% +-':>11}{'variance':>11}{'shrinkage':>11}{'persistent':>12}",
    ]
    for layer, of in found.biases.items():
        for p, product in enumerate(bias.PRODUCTS):
            values = (of.bias, of.half_width, of.variance, of.shrinkage)
            numbers = "".join(f"{array[reference, p]:>11.2e}" for array in values)
            persistent = of.persistent[reference, p]
            numbers += f"{persistent:>12.2e}" if np.isfinite(persistent) else " " * 12
            lines.append(f"{layer:<22}{product:<8}{numbers}{'  BIASED' if of.biased[reference, p] else ''}")
    return lines


def comparison_lines(found: Mapping[str, Found], reference: int = 0) -> list[str]:
    """Lines of text: a row for each recipe, all layers together."""
    whole = "grad_total_bias", "grad_total_variance", "grad_noise_ratio", "grad_signal_to_error"
    columns = [f"{what} {product}" for product in bias.PRODUCTS for what in ("bias", "var.")]
    titles = *columns, "total bias", "total var.", "noise ratio", "signal/error"
    width = max(map(len, [*found, "recipe"])) + 2
    lines = [
        f"bias and variance of all layers' products, relative to their energy, at the same weights; reference: "
        f"{bias.REFERENCES[reference]}",
        f"{'recipe':<{width}}" + "".join(f"{title:>13}" for title in titles),
    ]
    for name, one in found.items():
        of = one.biases["all"]
        values = [array[reference, p] for p in range(len(bias.PRODUCTS)) for array in (of.bias, of.variance)]
        values += [one.metrics.get(key, float("nan")) for key in whole]
        lines.append(f"{name:<{width}}" + "".join(f"{value:>13.2e}" for value in values))
    return lines


def as_json(found: Found) -> dict:
    """The certificate as a JSON value: {layer: {product: {reference: {name: number or None}}}}, and `metrics`."""
    names = "bias", "half_width", "variance", "shrinkage", "persistent", "biased"

    def cell(of, r, p):
        values = {name: getattr(of, name)[r, p] for name in names}
        return {name: value.item() if np.isfinite(value) else None for name, value in values.items()}

    layers = {
        layer: {
            product: {reference: cell(of, r, p) for r, reference in enumerate(bias.REFERENCES)}
            for p, product in enumerate(bias.PRODUCTS)
        }
        for layer, of in found.biases.items()
    }
    return {"draws": found.n_draws, "layers": layers, "metrics": found.metrics}
