"""The rules of the setting `formats`: which operand of which layer they give which format, and what they refuse."""

import jax
import pytest

from altgrad_jax.errors import UserError
from altgrad_jax.models.gpt2 import GPTConfig
from altgrad_jax.models.model import init_params
from altgrad_jax.models.parameters import weights_of
from altgrad_jax.numerics import formats
from altgrad_jax.numerics.layers import linear_layers, matrix_sizes
from altgrad_jax.numerics.rules import LayerFormats, names_used, resolve_rules

PARTS = ("attn_qkv", "attn_out", "mlp_up", "mlp_down")


def resolved(*rules, n_layer=2):
    """{layer: "W/A/G"}, `-` where there is no format."""
    layers = resolve_rules(rules, n_layer)
    assert all(type(layer) is LayerFormats for layer in layers)
    return {layer.layer: "/".join(name or "-" for name in layer.wag) for layer in layers}


def in_blocks(shown, parts=PARTS, n_layer=2):
    return {f"block_{i}/{part}": shown for i in range(n_layer) for part in parts}


@pytest.mark.parametrize(
    "rules, expected",
    [
        (["E5M2"], in_blocks("E5M2/E5M2/E5M2")),
        (["block_*=E5M2"], in_blocks("E5M2/E5M2/E5M2")),
        (["*=E3M4"], in_blocks("E3M4/E3M4/E3M4") | {"head": "E3M4/E3M4/E3M4"}),
        (["head=E4M3"], {"head": "E4M3/E4M3/E4M3"}),
        (["block_*:W=E4M3"], in_blocks("E4M3/-/-")),
        (["block_*:GA=E4M3"], in_blocks("-/E4M3/E4M3")),
        (["block_*/mlp_*:A=E2M5"], in_blocks("-/E2M5/-", PARTS[2:])),
        (["block_1/attn_out=E6M1"], {"block_1/attn_out": "E6M1/E6M1/E6M1"}),
        (["block_?/attn_qk[vw]=E6M1"], in_blocks("E6M1/E6M1/E6M1", PARTS[:1])),
        (["*_up=E7M0"], in_blocks("E7M0/E7M0/E7M0", ["mlp_up"])),
        # Later rules win, operand by operand.
        (["E4M3", "E5M2"], in_blocks("E5M2/E5M2/E5M2")),
        (["E4M3", "block_*:G=E5M2"], in_blocks("E4M3/E4M3/E5M2")),
        (["block_*:G=E5M2", "E4M3"], in_blocks("E4M3/E4M3/E4M3")),
        (["E4M3", "head:WA=E5M2"], in_blocks("E4M3/E4M3/E4M3") | {"head": "E5M2/E5M2/-"}),
        (["E4M3", "block_0/*=none"], {k: v for k, v in in_blocks("E4M3/E4M3/E4M3").items() if k.startswith("block_1")}),
        (
            ["E4M3", "block_*:W=None", "block_*/mlp_*:G=none"],
            in_blocks("-/E4M3/E4M3") | in_blocks("-/E4M3/-", PARTS[2:]),
        ),
        (
            ["block_*/attn_*=BF16", "block_*/mlp_*=E3M4"],
            in_blocks("BF16/BF16/BF16", PARTS[:2]) | in_blocks("E3M4/E3M4/E3M4", PARTS[2:]),
        ),
        (["E8M7", "block_*:G=E5M10"], in_blocks("BF16/BF16/FP16")),  # by the names that FORMATS has
    ],
)
def test_which_operands_get_which_format(rules, expected):
    assert resolved(*rules) == expected


def test_every_format_can_be_named():
    for name in [*formats.FORMATS, *formats.ALIASES]:
        true_name = formats.ALIASES.get(name, name)
        assert resolved(name, n_layer=1) == in_blocks("/".join([true_name] * 3), n_layer=1)


def test_layers_come_in_the_order_of_the_model():
    layers = [f"block_{i}/{part}" for i in range(11) for part in PARTS] + ["head"]
    assert linear_layers(11) == layers
    assert [layer.layer for layer in resolve_rules(("head=E4M3", "block_10/*=E5M2", "E3M4"), 11)] == layers


def test_names_used_come_once_in_the_order_of_the_model():
    layers = resolve_rules(("E4M3", "block_*:G=E5M2", "block_1/*:A=E3M4", "head:W=E4M3"), 2)
    assert names_used(layers) == ["E4M3", "E5M2", "E3M4"]


def test_the_contracted_axes_are_those_of_the_weights():
    config = GPTConfig(n_layer=1, n_head=2, n_embd=16, block_size=4, vocab_size=10)
    params = jax.eval_shape(lambda: init_params(config, 0))
    for layer in linear_layers(1):
        shape = weights_of(params, layer).shape  # [K, N]; of the head's table [N, K]
        assert matrix_sizes(n_embd=16, vocab_size=10)[layer.rpartition("/")[2]] == (
            shape[::-1] if layer == "head" else shape
        )


LAYERS = ["layers are block_0/attn_qkv, block_0/attn_out, block_0/mlp_up, block_0/mlp_down", "block_1/mlp_down, head"]
RULE = ["cannot be read: write FORMAT, PATTERN=FORMAT or PATTERN:OPERANDS=FORMAT", "E4M3"]
OPERANDS = ["give some of W (weights), A (activations) and G (output gradients), each once"]


@pytest.mark.parametrize(
    "rules, words",
    [
        (["E4M9"], ["a rule 'E4M9'", "no number format 'E4M9': give one of E4M3", "or none"]),
        (["head=e4m_3"], ["a rule 'head=e4m_3'", "'e4m_3': give one of E4M3"]),
        (["head=E8M0"], ["a rule 'head=E8M0'", "a format of block scales, not of elements"]),
        (["E4M3", "block_*:G="], ["a rule 'block_*:G='", "no number format '': give one of"]),
        ([""], ["a rule ''", "no number format ''"]),
        (["a=b=E4M3"], ["a rule 'a=b=E4M3'", *RULE]),
        (["block_*:W:A=E4M3"], ["a rule 'block_*:W:A=E4M3'", *RULE]),
        (["block_*:W"], ["a rule 'block_*:W'", *RULE]),
        (["=E4M3"], ["a rule '=E4M3'", *RULE]),
        ([":W=E4M3"], ["a rule ':W=E4M3'", *RULE]),
        (["block_*:=E4M3"], ["for the operands ''", *OPERANDS]),
        (["block_*:X=E4M3"], ["for the operands 'X'", *OPERANDS]),
        (["block_*:wa=E4M3"], ["for the operands 'wa'", *OPERANDS]),
        (["block_*:WW=E4M3"], ["for the operands 'WW'", *OPERANDS]),
        (["block_2/*=E4M3"], ["a rule 'block_2/*=E4M3'", "pattern 'block_2/*' fits no layer", *LAYERS]),
        (["block_0=E4M3"], ["pattern 'block_0' fits no layer", *LAYERS]),
        (["Head=E4M3"], ["pattern 'Head' fits no layer", *LAYERS]),
        (["block_*/ln_1=E4M3"], ["pattern 'block_*/ln_1' fits no layer", *LAYERS]),
        (["none"], ["formats=('none',) gives no layer a format: set use_fp8=False, or name a format such as E4M3"]),
        (["head=E4M3", "*=none"], ["gives no layer a format"]),
        ([], ["formats=() gives no layer a format"]),
    ],
)
def test_refused_in_one_sentence(rules, words):
    with pytest.raises(UserError) as caught:
        resolve_rules(tuple(rules), 2)
    message = str(caught.value)
    assert message.startswith("formats") and "\n" not in message
    for word in words:
        assert word in message
