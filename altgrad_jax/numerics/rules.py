"""Which operand of which product gets which number format: the setting `formats`, read.

A rule is `PATTERN[:OPERANDS]=FORMAT`, or `FORMAT` alone for every linear layer of the blocks. PATTERN is a shell
pattern (*, ?, [...]) over the layers' names, `block_0/attn_qkv` ... `block_5/mlp_down` and `head`; a `*` crosses the
slash. OPERANDS is some of W (weights), A (activations) and G (output gradients), by default all three. FORMAT is a name
of `formats.FORMATS`, or `none` for the compute dtype. Later rules win over earlier ones:

    E5M2                                         every linear layer of the blocks
    block_*/attn_*=BF16  block_*/mlp_*=E3M4      attention and MLP apart
    E4M3  block_*:G=E5M2                         forward E4M3, gradients E5M2
    E4M3  head=E4M3                              the output head too

The output head multiplies with the embedding table, so W of `head` is that table as an operand; looking rows up in it
is no product and rounds nothing. LayerNorm, biases and the attention products have no format.

No jax: the settings are checked with this before it starts.
"""

import fnmatch
import functools
import re
from dataclasses import dataclass

from altgrad_jax.errors import UserError
from altgrad_jax.numerics.formats import get_format
from altgrad_jax.numerics.layers import HEAD, linear_layers

OPERANDS = ("W", "A", "G")
NONE = "none"
# What a run may choose, by name: where an operand's scale comes from, how it is rounded, how weights are kept, what
# updates them, and how the learning rate goes. Settings and the modules that compute share these lists.
SCALINGS = ("delayed", "tensor", "channel", "block32", "block128", "none")
PER_TENSOR = ("delayed", "tensor", "none")  # the scalings with one scale for each operand
ROUNDINGS = ("nearest", "stochastic")
AT_REST = ("float32", "nearest", "stochastic", "error_feedback")
OPTIMIZERS = ("adamw", "ulp_precondition_before_adam", "ulp_adamw", "grid")
SCHEDULES = ("constant", "cosine", "wsd")
MOMENTS = ("float32", "bfloat16", "E4M3:128", "E4M3:256", "dynamic8")  # how Adam's moments are kept
FLOAT8 = {"E4M3": "float8_e4m3fn", "E5M2": "float8_e5m2"}  # what `native` products can compute with
_RULE = re.compile(r"(?:(?P<pattern>[^:=]+)(?::(?P<operands>[^:=]*))?=)?(?P<format>[^:=]*)")


@dataclass(frozen=True)
class LayerFormats:
    """The formats of one layer's operands by name; None is the compute dtype."""

    layer: str
    w: str | None = None
    a: str | None = None
    g: str | None = None

    @property
    def wag(self) -> tuple[str | None, str | None, str | None]:
        return self.w, self.a, self.g


@functools.lru_cache(maxsize=64)
def resolve_rules(rules: tuple[str, ...], n_layer: int, model: str = "gpt2") -> tuple[LayerFormats, ...]:
    """The layers that have a format, in the order of the model.

    Raises UserError, one sentence, for a rule that cannot be read, a format or layer that does not exist, or rules that
    leave nothing quantized.
    """
    layers = linear_layers(n_layer, model)
    chosen: dict[str, dict[str, str | None]] = {layer: dict.fromkeys(OPERANDS) for layer in layers}
    for rule in rules:
        match = _RULE.fullmatch(rule)
        if not match:
            raise UserError(
                f"formats has a rule {rule!r} that cannot be read: write FORMAT, PATTERN=FORMAT or "
                "PATTERN:OPERANDS=FORMAT, for example E4M3 or block_*/mlp_*:G=E5M2"
            )
        pattern, operands = match["pattern"] or "block_*", match["operands"]
        operands = "WAG" if operands is None else operands
        if not operands or set(operands) - set(OPERANDS) or len(set(operands)) < len(operands):
            raise UserError(
                f"formats has a rule {rule!r} for the operands {operands!r}: give some of W (weights), A "
                "(activations) and G (output gradients), each once, such as block_*:WA=E4M3"
            )
        name = match["format"]
        if name.lower() == NONE:
            fmt = None
        else:
            try:
                fmt = get_format(name).name
            except UserError as error:
                raise UserError(f"formats has a rule {rule!r}, but {error}, or {NONE}") from None
        hit = [layer for layer in layers if fnmatch.fnmatchcase(layer, pattern)]
        if not hit:
            raise UserError(
                f"formats has a rule {rule!r} whose pattern {pattern!r} fits no layer: give one that does, "
                f"the layers are {', '.join(layers[:4])}, ... {layers[-2]}, {HEAD}"
            )
        for layer in hit:
            chosen[layer].update(dict.fromkeys(operands, fmt))
    found = tuple(LayerFormats(layer, *formats.values()) for layer, formats in chosen.items() if any(formats.values()))
    if not found:
        raise UserError(f"formats={rules!r} gives no layer a format: set use_fp8=False, or name a format such as E4M3")
    return found


def names_used(layers: tuple[LayerFormats, ...]) -> list[str]:
    """The different formats, in the order in which they first appear."""
    return list(dict.fromkeys(name for layer in layers for name in layer.wag if name))
