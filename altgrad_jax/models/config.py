"""Shape and dtypes of a model: what all models have in common."""

from dataclasses import dataclass, replace
from typing import ClassVar

from altgrad_jax.models.stacking import Segments
from altgrad_jax.numerics.certified_products import Draws
from altgrad_jax.numerics.products import Rule
from altgrad_jax.numerics.recipes import SlotSpec
from altgrad_jax.numerics.slot_quantization import Features

# The static choices of a quantized layer: those of quant_dot, of a certificate, or of the six slots of a recipe.
Choices = Rule | Draws | tuple[Features, ...]


@dataclass(frozen=True)
class ModelConfig:
    """Shape and dtypes of a model. `attention` is the kernel: "xla" or "cudnn" (GPU, bfloat16 only).

    `rules`: (group, Choices) of the layers whose products are quantized (models.stacking). `split`: how the blocks are
    divided into segments, each computed alike; empty stands for one segment. `loss_tile_bytes`: limit of the float32
    logits that the loss computes at once (cross_entropy). `unroll`: whether the program holds every block apart, as a
    GPU wants it, or one block in a loop, which compiles in a fraction of the time. `kv_cache`: how keys and values are
    kept, in an evaluation or while text is made; None in the compute dtype. `norm_gains`: "float32", or the recipe by
    which gains of norms are rounded (numerics.gains).
    """

    n_layer: int
    n_head: int
    n_embd: int
    block_size: int
    vocab_size: int
    dropout: float = 0.0
    norm_gains: str = "float32"
    compute_dtype: str = "bfloat16"
    attention: str = "xla"
    rules: tuple[tuple[str, Choices], ...] = ()
    loss_tile_bytes: int = 2**27
    unroll: bool = False
    split: Segments = ()
    kv_cache: SlotSpec | None = None

    name: ClassVar[str]  # as the setting `model` has it

    @property
    def exact(self) -> "ModelConfig":
        """The model in float32, without formats."""
        return replace(self, compute_dtype="float32", attention="xla", norm_gains="float32")

    @property
    def segments(self) -> Segments:
        """The segments of the blocks, in order."""
        return self.split or ((0, self.n_layer),)

    @property
    def head_width(self) -> int:
        """Numbers of one attention head."""
        return self.n_embd // self.n_head

    @property
    def kv_heads(self) -> int:
        """Heads of keys and values."""
        return self.n_head
