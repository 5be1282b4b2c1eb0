"""The layers of the built-in models by name: which a model has, in which order it applies them, how large they are.

A layer is a module of the model, such as `embed` or `block_0/attn_qkv`. `head` is the product that gives the logits;
its weights are the table of `embed`, or a table of its own where the head is not tied.

No jax: the settings are checked with this before it starts.
"""

import re

HEAD = "head"
# The matrix products of a block, by model.
_PRODUCTS = {
    "gpt2": ("attn_qkv", "attn_out", "mlp_up", "mlp_down"),
    "llama": ("attn_qkv", "attn_out", "mlp_gate", "mlp_up", "mlp_down"),
}
MODELS = tuple(_PRODUCTS)
# The products of two activations: Q K^T, and softmax(...) V. A recipe may quantize them.
ATTENTION = ("attn_qk", "attn_pv")
# The layers of all models, in the order in which a model applies those that it has.
STAGES = ("embed", "pos_embed", "block", "ln_f", "norm_f", HEAD)
BLOCK_LAYERS = (
    *("ln_1", "norm_1", "attn_qkv", "q_norm", "k_norm", *ATTENTION, "attn_out"),
    *("ln_2", "norm_2", "mlp_gate", "mlp_up", "mlp_down"),
)


def linear_layers(n_layer: int, model: str = "gpt2") -> list[str]:
    """Every layer that is a matrix product with weights, in the order of the model."""
    return [f"block_{i}/{part}" for i in range(n_layer) for part in _PRODUCTS[model]] + [HEAD]


def all_products(n_layer: int, model: str = "gpt2") -> list[str]:
    """Every matrix product, those of attention too, in the order of the model."""
    in_block = [part for part in BLOCK_LAYERS if part in _PRODUCTS[model] or part in ATTENTION]
    return [f"block_{i}/{part}" for i in range(n_layer) for part in in_block] + [HEAD]


def is_attention(layer: str) -> bool:
    """Whether this is a product of attention, which has no weights."""
    return layer.rpartition("/")[2] in ATTENTION


def attention_sizes(part: str, head_width: int, block_size: int) -> tuple[int, int, int]:
    """(M, K, N) of a product of attention, of one head and sequence."""
    width = head_width, block_size
    k, n = width if part == ATTENTION[0] else reversed(width)
    return block_size, k, n


def model_order(layer: str) -> tuple[int, int, int]:
    """Sorts layers by name (`embed`, `block_0/ln_1`, ...) in the order in which the model applies them; names of other
    models come last, and stay in their order."""
    match = re.fullmatch(r"([a-z_]+?)(?:_(\d+)/(\w+))?", layer)
    stage, index, part = match.groups() if match else (None, None, None)
    if stage not in STAGES or part not in (None, *BLOCK_LAYERS):
        return len(STAGES), 0, 0
    return STAGES.index(stage), int(index or 0), BLOCK_LAYERS.index(part) if part else 0


def hidden_width(n_embd: int, model: str = "gpt2") -> int:
    """Width of the MLP: 4 n_embd, or for SwiGLU, which has three matrices, 8/3 n_embd rounded up to a multiple of 32
    (Shazeer 2020, arXiv 2002.05202; Touvron et al. 2023, arXiv 2302.13971)."""
    return 4 * n_embd if model == "gpt2" else -(-8 * n_embd // 96) * 32


def matrix_sizes(
    *, n_embd: int, vocab_size: int, model: str = "gpt2", n_head: int = 1, n_kv_head: int = 0
) -> dict[str, tuple[int, int]]:
    """{part of a block, or `head`: (K, N)} of every matrix product: inputs and outputs.

    Args:
      n_kv_head: heads of keys and values; 0 is n_head.
    """
    D, F = n_embd, hidden_width(n_embd, model)
    kv = D // n_head * (n_kv_head or n_head)
    sizes = {"attn_qkv": (D, D + 2 * kv), "attn_out": (D, D), "mlp_gate": (D, F), "mlp_up": (D, F), "mlp_down": (F, D)}
    return {part: sizes[part] for part in _PRODUCTS[model]} | {HEAD: (D, vocab_size)}
