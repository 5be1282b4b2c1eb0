"""What is wrong between settings that are right by themselves: one sentence for each contradiction.

`c` holds every setting at a value that its field may have (`config.validate` asks that first). No jax, as in config.
"""

import math
from collections.abc import Iterator
from types import MappingProxyType
from typing import Any

from altgrad_jax.data.tokenizer import vocabulary_size
from altgrad_jax.errors import UserError
from altgrad_jax.numerics import recipes, rules
from altgrad_jax.numerics.formats import get_format, require_overflow_code
from altgrad_jax.numerics.layers import ATTENTION, all_products, attention_sizes, matrix_sizes

INT32_MAX = 2**31 - 1
_AMAX_HISTORY = 16  # the default
VOCABULARY_OF = MappingProxyType({name: vocabulary_size(name) for name in ("gpt2", "bytes")})


def decay_steps(decay_fraction: float, max_steps: int) -> int:
    """Updates over which schedule "wsd" decays: the last `decay_fraction` of `max_steps`, rounded."""
    return round(decay_fraction * max_steps)


def for_operands(value: str) -> tuple[str, str, str]:
    """A setting with one choice or three, as the choices of W, A and G."""
    w, a, g = value.split(",") if "," in value else (value,) * 3
    return w, a, g


def _matrix_sizes(c: Any) -> dict[str, tuple[int, int]]:
    """{part of a block, or `head`: (K, N)}: the axes that blocks of W and A, and of G, run along."""
    return matrix_sizes(
        model=c.model,
        n_embd=c.n_embd,
        n_head=c.n_head,
        n_kv_head=c.n_kv_head,
        vocab_size=c.vocab_size or vocabulary_size(c.tokenizer),
    )


def of_heads(c: Any) -> Iterator[str]:
    """What is wrong between the width of the model and its attention heads."""
    if c.n_embd % c.n_head:
        yield (
            f"n_embd={c.n_embd} cannot be split over n_head={c.n_head} heads: n_embd must be a multiple of "
            f"n_head, for example n_embd={math.ceil(c.n_embd / c.n_head) * c.n_head}"
        )
    elif c.n_kv_head and c.n_head % c.n_kv_head:
        yield (
            f"n_kv_head={c.n_kv_head} cannot be shared by n_head={c.n_head} heads of queries: n_kv_head must divide "
            "n_head, and 0 stands for n_head"
        )
    elif c.model == "llama" and c.n_embd // c.n_head % 2:
        yield (
            f"model='llama' cannot rotate heads of n_embd / n_head = {c.n_embd // c.n_head} numbers, because it turns "
            "them in pairs: change n_embd or n_head"
        )


def of_sizes(c: Any) -> Iterator[str]:
    """What is wrong between the sizes of the model and of its batches."""
    yield from of_heads(c)
    own = vocabulary_size(c.tokenizer)
    if c.vocab_size and c.vocab_size < own:
        yield (
            f"vocab_size={c.vocab_size} is too small for tokenizer={c.tokenizer!r}, whose token ids go up to "
            f"{own - 1}: set vocab_size to {own} or more"
        )
    if c.attention == "cudnn" and c.compute_dtype != "bfloat16":
        yield (
            f"attention='cudnn' cannot work with compute_dtype={c.compute_dtype!r}, because cuDNN's kernel takes "
            "16-bit operands only: set attention='xla' or compute_dtype='bfloat16'"
        )
    if c.attention == "cudnn" and c.n_embd // c.n_head % 8:
        yield (
            f"attention='cudnn' cannot work with heads of n_embd / n_head = {c.n_embd // c.n_head} numbers, "
            "because cuDNN's kernel takes multiples of 8 only: set attention='xla' or change n_embd or n_head"
        )
    if c.batch_size % c.grad_accum_steps:
        yield (
            f"batch_size={c.batch_size} cannot be split into grad_accum_steps={c.grad_accum_steps} equal "
            "micro-batches: grad_accum_steps must divide batch_size"
        )
    if c.eval_windows % c.eval_batch_size:
        yield (
            f"eval_windows={c.eval_windows} cannot be split into batches of "
            f"eval_batch_size={c.eval_batch_size}: eval_batch_size must divide eval_windows"
        )
    if c.max_steps * c.batch_size > INT32_MAX:
        yield (
            f"max_steps={c.max_steps} times batch_size={c.batch_size} is {c.max_steps * c.batch_size} "
            f"training windows, but they are numbered in 32 bits: keep the product at {INT32_MAX} or below"
        )
    for name in ("batch_size", "eval_batch_size"):
        if c[name] * (c.block_size + 1) > INT32_MAX:
            yield (
                f"{name}={c[name]} windows of block_size={c.block_size} tokens are too many to index in 32 "
                f"bits: keep {name} * (block_size + 1) at {INT32_MAX} or below"
            )


def of_one_token(c: Any) -> Iterator[str]:
    """A pass over a single token: XLA's CPU compiler refuses a bfloat16 product with one row."""
    if c.compute_dtype != "bfloat16" or c.block_size > 1:
        return
    rows = {"batch_size / grad_accum_steps": c.batch_size // c.grad_accum_steps, "eval_batch_size": c.eval_batch_size}
    if c.evaluate_all:
        rows["with evaluate_all the batch of a window"] = 1
    for name, n in rows.items():
        if n == 1:
            yield (
                f"block_size=1 and {name} of 1 make passes over a single token, which compute_dtype='bfloat16' cannot "
                "compute: give more tokens, or compute_dtype='float32'"
            )


def of_schedule(c: Any) -> Iterator[str]:
    """What is wrong between the length of a run and its learning rates."""
    decay = decay_steps(c.decay_fraction, c.max_steps)
    if c.warmup_steps > c.max_steps:
        yield (
            f"warmup_steps={c.warmup_steps} is more than max_steps={c.max_steps}, so the learning rate would "
            f"never reach its peak: set warmup_steps to {c.max_steps} or less"
        )
        return
    if c.schedule == "cosine" and c.warmup_steps == c.max_steps:
        yield (
            f"schedule='cosine' has no update left to decay over, because warmup_steps={c.warmup_steps} is all "
            f"of max_steps={c.max_steps}: set warmup_steps below max_steps"
        )
        return
    if c.schedule == "wsd" and not 1 <= decay <= c.max_steps - c.warmup_steps:
        yield (
            f"decay_fraction={c.decay_fraction} of max_steps={c.max_steps} is a decay over {decay} updates, "
            f"but schedule='wsd' needs at least 1 and has {c.max_steps - c.warmup_steps} after "
            f"warmup_steps={c.warmup_steps}: change decay_fraction or warmup_steps"
        )


def of_moments(c: Any) -> Iterator[str]:
    """What is wrong between the form of the moments and the optimizer."""
    if c.moments != "float32" and c.optimizer == "grid":
        yield (
            f"moments={c.moments!r} is about Adam's two moments, and optimizer='grid' has no second one for weights in "
            "a number format: set moments='float32', or give another optimizer"
        )


def of_gains(c: Any) -> Iterator[str]:
    """What is wrong between the form of the norms' gains and the widths of the norms."""
    if c.norm_gains == "float32":
        return
    widths = {"n_embd": c.n_embd} | ({"n_embd / n_head": c.n_embd // c.n_head} if c.qk_norm else {})
    for name, width in widths.items():
        if width % 32:
            yield (
                f"norm_gains={c.norm_gains!r} takes gains in blocks of 32, which do not divide the norms of {name} = "
                f"{width} numbers: give a multiple of 32, or norm_gains='float32'"
            )


def of_smooth_swiglu(c: Any) -> Iterator[str]:
    """What is wrong between Smooth-SwiGLU and what quantizes the input of mlp_down."""
    if not c.smooth_swiglu or c.model != "llama":
        return
    off = "set smooth_swiglu=False"
    if not c.use_fp8 and not c.recipe:
        yield f"smooth_swiglu=True has no effect without formats or a recipe: give one, or {off}"
    if c.use_fp8 and c.products == "native":
        yield (
            "smooth_swiglu=True scales the columns of an operand, and products='native' takes one scale for each "
            f"operand: set products='emulated', or {off}"
        )
    try:
        layers = rules.resolve_rules(c.formats, c.n_layer, c.model) if c.use_fp8 and c.formats else ()
        phases = recipes.parse_schedule(c.recipe, c.max_steps)
        known = [recipes.get_recipe(name) for name in (*(phase.recipe for phase in phases), *c.recipe_program)]
    except UserError:  # of_formats and of_recipe say so
        return
    if layers and not any(layer.a for layer in layers if layer.layer.endswith("/mlp_down")):
        yield (
            f"smooth_swiglu=True has no effect with formats={c.formats!r}, which give A of mlp_down none: give it a "
            f"format, or {off}"
        )
    if known and all(recipe.fprop_x.high and recipe.wgrad_x.high for recipe in known):
        yield (
            f"smooth_swiglu=True has no effect with recipe={c.recipe!r}, which quantizes no input of a layer: give "
            f"another recipe, or {off}"
        )
    if mixed := [recipe.name for recipe in known if recipe.fprop_x.rotation]:
        yield (
            f"smooth_swiglu=True scales the columns of mlp_down's input, which recipe={mixed[0]!r} mixes by a Hadamard "
            f"transform: {off}, or give another recipe"
        )


def of_recipe(c: Any) -> Iterator[str]:
    """What is wrong between a recipe and the rest."""
    if not c.recipe:
        if not c.use_fp8 and c.amax_history != _AMAX_HISTORY:
            yield f"amax_history={c.amax_history} has no effect without formats or a recipe: leave it out"
        return
    if c.use_fp8:
        yield (
            f"recipe={c.recipe!r} and use_fp8=True both say how operands are rounded: give a recipe, or formats with "
            "use_fp8=True"
        )
    try:
        schedule = recipes.parse_schedule(c.recipe, c.max_steps)
        known = [recipes.get_recipe(name) for name in (*(phase.recipe for phase in schedule), *c.recipe_program)]
        tokens = c.batch_size // c.grad_accum_steps * c.block_size
        for recipe in known:
            kept, sizes = recipes.kept_high(recipe, c.n_layer, c.model), _matrix_sizes(c)
            for layer in all_products(c.n_layer, c.model):
                part = layer.rpartition("/")[2]
                if layer not in kept and part in ATTENTION:
                    recipes.check_dimensions(recipe, layer, *attention_sizes(part, c.n_embd // c.n_head, c.block_size))
                elif layer not in kept:
                    recipes.check_dimensions(recipe, layer, tokens, *sizes[part])
        if c.attention == "cudnn" and (own := [recipe.name for recipe in known if recipe.attention]):
            yield (
                f"attention='cudnn' computes the products of attention in bfloat16, which recipe={own[0]!r} quantizes: "
                "set attention='auto'"
            )
        if c.certify_draws:
            windows = 2 * recipes.half_batch(known, c.batch_size, c.block_size)
            if windows > c.eval_batch_size:
                yield (
                    f"certify_draws={c.certify_draws} looks at {windows} windows of {c.block_size} tokens at once, so "
                    f"that the blocks of {known[0].name[:80]} divide them, and eval_batch_size={c.eval_batch_size} is "
                    f"less: set eval_batch_size={windows} or more, or certify_draws=0"
                )
        elif any(phase.exhausted for phase in schedule):
            yield (f"recipe={c.recipe!r} waits for certificates, and certify_draws=0 makes none: set certify_draws=16")
        first = c.oscillation_start + -(-c.oscillation_reset // 4)
        if c.oscillation_reset and first > c.max_steps:
            yield (
                f"oscillation_reset={c.oscillation_reset} with oscillation_start={c.oscillation_start} first resets "
                f"after update {first}, and max_steps={c.max_steps} ends before: give smaller ones, or "
                "oscillation_reset=0"
            )
        if c.oscillation_reset and c.fsdp != 1:
            yield (
                f"oscillation_reset={c.oscillation_reset} watches whole weights, and fsdp={c.fsdp} splits them: set "
                "fsdp=1 or oscillation_reset=0"
            )
        delayed = any(spec.amax == "delayed" for recipe in known for spec in recipe.slots)
        if not delayed and c.amax_history != _AMAX_HISTORY:
            yield (
                f"amax_history={c.amax_history} has no effect with recipe={c.recipe!r}, which takes no amax from "
                "earlier updates: leave it out"
            )
    except UserError as error:
        yield str(error)


def of_xla_options(c: Any) -> Iterator[str]:
    """What is wrong between the options for the compiler, and between them and other settings."""
    names = [option.partition("=")[0] for option in c.xla_options]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        yield f"xla_options={c.xla_options!r} gives {twice[0]} more than one value: give one"
    if c.products == "native" and "xla_gpu_enable_triton_gemm" in names:
        yield (
            f"xla_options={c.xla_options!r} cannot choose xla_gpu_enable_triton_gemm with products='native', which "
            "turns it off, so that all float8 products are the library's: leave it out, or set products='emulated'"
        )


def of_formats(c: Any) -> Iterator[str]:
    """What is wrong between the settings of number formats."""
    if not c.use_fp8:
        return
    if not c.formats:
        yield "use_fp8=True needs to know the formats: set formats, for example --config.formats=E4M3"
        return
    try:
        layers = rules.resolve_rules(c.formats, c.n_layer, c.model)
    except UserError as error:
        yield str(error)
        return
    scaling, names = for_operands(c.scaling), rules.names_used(layers)
    one_scale = all(way in rules.PER_TENSOR for way in scaling)
    yield from _of_blocks(c, layers, scaling)
    yield from _of_operands(c, layers, scaling)
    if c.scale_rounding == "float32" and not one_scale:
        yield (
            f"scale_rounding='float32' needs one scale for each operand, and scaling={c.scaling!r} has many: "
            f"give {', '.join(rules.PER_TENSOR)}, or scale_rounding='power_of_two'"
        )
    if not c.saturate:
        for name in [*names, *c.emergency_formats]:
            try:
                require_overflow_code(get_format(name))
            except UserError as error:
                yield (str(error))
    if c.products == "native":
        yield from _of_native(c, layers, one_scale)
    yield from _of_stored(c, layers, scaling)
    if c.range_clip and (scaling[2] != "delayed" or not any(layer.g for layer in layers)):
        yield (
            f"range_clip={c.range_clip} acts on the delayed scale of output gradients, and there is none: "
            "give G a format and scaling delayed, or set range_clip=0"
        )
    yield from _of_emergency(c, names)


def _of_blocks(c: Any, layers: tuple[rules.LayerFormats, ...], scaling: tuple[str, ...]) -> Iterator[str]:
    sizes_of = _matrix_sizes(c)
    for layer in layers:
        sizes = sizes_of[layer.layer.rpartition("/")[2]]
        for operand, name, way, size in zip("WAG", layer.wag, scaling, (sizes[0], *sizes)):
            block = rules.BLOCK_SIZES.get(way, 1)
            if name and size % block:
                yield (
                    f"scaling={c.scaling!r} cannot split operand {operand} of {layer.layer}, which has {size} "
                    f"numbers along its contracted axis, into blocks of {block}: give a model whose "
                    "dimensions are multiples of it, or another scaling"
                )
                return


def _of_operands(c: Any, layers: tuple[rules.LayerFormats, ...], scaling: tuple[str, ...]) -> Iterator[str]:
    """Choices for operands that no layer rounds, which nothing would read."""
    has_format = [any(layer.wag[i] for layer in layers) for i in range(3)]
    for name, default in (("scaling", "delayed"), ("operand_rounding", "nearest")):
        for operand, choice, exists in zip("WAG", for_operands(c[name]), has_format):
            if "," in c[name] and choice != default and not exists:
                yield (
                    f"{name}={c[name]!r} asks for {choice} of {operand}, and formats={c.formats!r} gives it "
                    f"no format: give {operand} a format, or {default} in this place"
                )
    # Stored weights have a scale of their own, and are not rounded again.
    stored = c.weights_at_rest != "float32"
    if stored and c.operand_rounding.startswith("stochastic,"):
        yield (
            f"operand_rounding={c.operand_rounding!r} has no effect on W with weights_at_rest="
            f"{c.weights_at_rest!r}, whose weights are on their grid already: give nearest for W"
        )
    delayed = [way == "delayed" and exists for way, exists in zip(scaling, has_format)]
    if not any(delayed[1 if stored else 0 :]) and c.amax_history != _AMAX_HISTORY:
        yield (
            f"amax_history={c.amax_history} has no effect with scaling={c.scaling!r}, which takes no scale of "
            "any operand from earlier amaxes: set scaling=delayed, or leave it out"
        )
    if "ledger" in c.metrics.split(",") and not has_format[0]:
        yield (
            f"metrics={c.metrics!r} names ledger, which is about weights in a number format, and "
            f"formats={c.formats!r} gives none to W: give W a format too, or leave ledger out"
        )


def _of_native(c: Any, layers: tuple[rules.LayerFormats, ...], one_scale: bool) -> Iterator[str]:
    if c.emergency_formats:
        yield (
            "products='native' computes in fixed formats, so emergency_formats cannot change them: set "
            "products='emulated', or leave emergency_formats out"
        )
        return
    if not one_scale:
        yield (
            f"products='native' takes one scale for each operand, and scaling={c.scaling!r} has many: give "
            f"{', '.join(rules.PER_TENSOR)}, or products='emulated'"
        )
        return
    for layer in layers:
        wrong = [name for name in layer.wag if name not in rules.FLOAT8]
        if wrong:
            yield (
                f"products='native' can compute with {' and '.join(rules.FLOAT8)} for each of W, A and G, "
                f"not with {wrong[0] or 'an operand that has no format'} in {layer.layer}: change formats, or set "
                "products='emulated'"
            )
            return
        if layer.wag.count("E5M2") > 1:
            yield (
                f"products='native' cannot multiply two E5M2 operands, which {layer.layer} has: give W and A E4M3 "
                "and G E5M2 (--config.formats=E4M3,block_*:G=E5M2), or set products='emulated'"
            )
            return


def _of_stored(c: Any, layers: tuple[rules.LayerFormats, ...], scaling: tuple[str, ...]) -> Iterator[str]:
    """What is wrong between optimizers and weights that know formats, and the rest."""
    aware = [name for name, default in (("weights_at_rest", "float32"), ("optimizer", "adamw")) if c[name] != default]
    if aware and not any(layer.w for layer in layers):
        yield (
            f"{aware[0]}={c[aware[0]]!r} is about weights in a number format, and formats={c.formats!r} gives none to "
            "W: give W a format too"
        )
    if c.weights_at_rest != "float32" and scaling[0] != "delayed":
        yield (
            f"weights_at_rest={c.weights_at_rest!r} stores weights on a grid with a scale of its own, so "
            f"scaling={scaling[0]!r} of W would have no effect: give W scaling delayed"
        )
    if c.weights_at_rest != "float32" and c.scale_rounding != "power_of_two":
        yield (
            f"weights_at_rest={c.weights_at_rest!r} needs scales that are powers of two, or stored "
            "weights would be rounded again as operands: set scale_rounding='power_of_two'"
        )
    if c.optimizer == "grid" and c.weights_at_rest not in ("float32", "nearest"):
        yield (
            f"optimizer='grid' moves weights by whole codes, rounding its steps stochastically itself, so "
            f"weights_at_rest={c.weights_at_rest!r} would have nothing to round: give nearest or float32"
        )


def _of_emergency(c: Any, names: list[str]) -> Iterator[str]:
    if not c.emergency_formats:
        return
    try:
        after = [get_format(name).mantissa_bits for name in c.emergency_formats]
    except UserError as error:
        yield f"emergency_formats: {error}"
        return
    bits = [max(get_format(name).mantissa_bits for name in names), *after]
    if any(later <= before for before, later in zip(bits, after)):
        yield (
            f"emergency_formats={c.emergency_formats!r} must have more mantissa bits from one to the next than "
            f"{', '.join(names)}: they have {', '.join(map(str, after))} after {bits[0]}"
        )
        return
