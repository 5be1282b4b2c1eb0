"""The table of a model's products: what was found, what is computed in which numbers, and what is not and why."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from altgrad_jax.instrumentation.plan import Note, Plan, Product


class Found(NamedTuple):
    """A product with a weight. count: layers of that name (stacked layers, experts)."""

    name: str
    count: int
    M: int
    K: int
    N: int
    dtypes: tuple[str, str, str]  # of weight, input and result
    share: float  # of the FLOPs of all products of a forward pass
    where: str
    numbers: str  # the recipe or formats, or why it has none


class NotCovered(NamedTuple):
    """A product that is computed as the model has it. count: how many are alike."""

    name: str  # the parameters that have a part in it; empty for activations
    reason: str
    count: int
    share: float
    where: str


@dataclass(frozen=True)
class Layers:
    """Every matrix product of a loss function. Prints as a table."""

    found: tuple[Found, ...]
    not_covered: tuple[NotCovered, ...]

    @property
    def names(self) -> tuple[str, ...]:
        """Of the products with a weight."""
        return tuple(row.name for row in self.found)

    @property
    def covered(self) -> float:
        """Share of the FLOPs that is computed in other numbers than the model's own."""
        return sum(row.share for row in self.found if row.numbers and not row.numbers.startswith("kept"))

    def __str__(self):
        head = ("layer", "layers", "M x K x N", "dtypes w, x", "FLOPs", "numbers", "where")
        rows = [
            (row.name, str(row.count), f"{row.M} x {row.K} x {row.N}", ", ".join(row.dtypes[:2]), f"{row.share:.1%}",
             row.numbers or "the model's own", row.where)
            for row in self.found
        ]  # fmt: skip
        lines = aligned([head, *rows])
        if self.not_covered:
            head = ("not covered", "count", "reason", "FLOPs", "where")
            rest = [
                (row.name or "(activations)", str(row.count), row.reason, f"{row.share:.1%}", row.where)
                for row in self.not_covered
            ]
            lines += ["", *aligned([head, *rest])]
        return "\n".join(lines)

    __repr__ = __str__


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of text in columns."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]


_REASONS = {"activations": "product of two activations", "constant": "one operand is a constant"}


def table_of(plan: Plan, numbers: dict[str, str]) -> Layers:
    """The table of a plan. numbers: {product: what it is computed in}."""
    products = plan.products()
    total = sum(item.flops for item in (*products, *plan.notes)) or 1
    found = tuple(_found(product, total, numbers.get(product.name, "")) for product in products)
    alike: dict[tuple, list[Note]] = {}
    for note in plan.notes:
        reason = note.why or _REASONS[note.kind]
        if note.kind == "activations" and note.why:
            reason = f"{_REASONS[note.kind]}, {note.why}"
        alike.setdefault((note.name, reason, note.where), []).append(note)
    rest = tuple(
        NotCovered(name, reason, len(notes), sum(note.flops for note in notes) / total, where)
        for (name, reason, where), notes in alike.items()
    )
    return Layers(found, rest)


def _found(product: Product, total: int, numbers: str) -> Found:
    count = math.prod(product.layers)
    sizes = product.M, product.K, product.N
    return Found(product.name, count, *sizes, product.dtypes, product.flops / total, product.where, numbers)
