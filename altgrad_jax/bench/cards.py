"""The cards that a program can be compiled for, as facts, and what is assumed of how much of them a kernel reaches.

No jax. XLA's own description of each card, which decides what it compiles, is the file `targets/NAME.txtpb`.
"""

from pathlib import Path
from typing import NamedTuple

from altgrad_jax.errors import UserError

# What must be set before jax is imported: it computes on the CPU, and neither looks for CUDA's libraries nor complains
# that there are none.
ENVIRONMENT = {"JAX_PLATFORMS": "cpu", "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1", "TF_CPP_MIN_LOG_LEVEL": "1"}
TARGETS = Path(__file__).parent / "targets"


class Card(NamedTuple):
    """Vendor's figures of one card.

    bandwidth: bytes/s of its memory. bf16, f8, f32: dense FLOP/s of products by the dtype of the operands, sums in
    float32; f8 is None where the card has no such units. link: bytes/s in one direction between the cards of a host.
    port: bytes/s in one direction of the card's network port, which is the host's choice and not the card's.
    """

    name: str
    bandwidth: float
    bf16: float
    f8: float | None
    f32: float
    link: float
    port: float = 50e9  # 400 Gb/s

    @property
    def target(self) -> str:
        """The GpuTargetConfigProto, as text."""
        return (TARGETS / f"{self.name}.txtpb").read_text(encoding="utf-8")


# NVIDIA's datasheets: H100 SXM, H200 SXM, HGX B200, A100 SXM 80 GB; without sparsity.
CARDS = {
    card.name: card
    for card in (
        Card("h100", 3.352e12, 989e12, 1979e12, 67e12, 450e9),
        Card("h200", 4.8e12, 989e12, 1979e12, 67e12, 450e9),
        Card("b200", 7.67e12, 2250e12, 4500e12, 75e12, 900e9),
        Card("a100", 2.039e12, 312e12, None, 19.5e12, 300e9),
    )
}


def card(name: str) -> Card:
    """The card of this name; UserError where there is none."""
    if name not in CARDS:
        raise UserError(f"there is no card {name!r} to compile for: give one of {', '.join(CARDS)}")
    return CARDS[name]


class Assumptions(NamedTuple):
    """What the modelled time supposes. None of it was measured.

    A kernel takes the longest of: its launch; its bytes at `of_bandwidth` of the card's bandwidth; its FLOPs at the
    share of the peak of its operands' dtype. Kernels follow one another. A collective of n devices takes `latency_s`
    and the bytes that a ring sends, at `of_link` of the slowest link it crosses.
    """

    launch_s: tuple[float, ...] = (1.3e-6, 2.5e-6)  # a node of a CUDA graph; a launch by itself, pipelined
    of_bandwidth: float = 0.8
    of_bf16: float = 0.55
    of_f8: float = 0.5
    of_f32: float = 0.6
    of_link: float = 0.8
    latency_s: float = 10e-6

    def peak(self, card: Card, dtype: str) -> float:
        """FLOP/s that products of operands of an XLA dtype are supposed to reach. A card without float8 units, and any
        other dtype, computes in bfloat16."""
        if dtype in ("f32", "f64"):
            return self.of_f32 * card.f32
        if dtype.startswith("f8") and card.f8:
            return self.of_f8 * card.f8
        return self.of_bf16 * card.bf16
