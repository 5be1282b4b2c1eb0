"""Where a value of a jaxpr comes from: whether it is one parameter, and nothing but its layout was changed.

A product can be computed in a number format where one operand is a *weight*: one leaf of the parameters after
operations of layout only (`LAYOUT`). A value is one of

    none      no parameter and no data has a part in it: constants, loop counters
    weight    one leaf, laid out anew
    derived   parameters after arithmetic
    data      anything that depends on the batch

A loop over layers reads another part of a leaf in each round. `Origin.loops` says in which loops a value differs from
round to round, as the depths of the loops.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import jax.numpy as jnp

NONE, WEIGHT, DERIVED, DATA = "none", "weight", "derived", "data"
# Names of primitives that change the layout, dtype or place of a value and no number beyond a rounding of dtype.
LAYOUT = frozenset(
    "reshape transpose broadcast_in_dim squeeze expand_dims slice dynamic_slice gather split copy copy_p "
    "sharding_constraint reshard layout_constraint rev stop_gradient convert_element_type name pvary pcast all_gather "
    "device_put".split()
)


class Origin(NamedTuple):
    """Where a value comes from."""

    kind: str = NONE
    leaves: frozenset[str] = frozenset()  # names of the parameters that have a part in it
    loops: frozenset[int] = frozenset()  # depths of the loops in which it differs from round to round
    through: str = ""  # the primitive that made it more than one leaf
    scores: bool = False  # whether a product of two activations has a part in it, and no product with a weight after it


def union(sets: Iterable[frozenset]) -> frozenset:
    """The union of any number of sets."""
    return frozenset().union(*sets)


def joined(origins: Sequence[Origin], through: str) -> Origin:
    """The origin of what the primitive `through` computes from values of these origins."""
    leaves, loops = union(o.leaves for o in origins), union(o.loops for o in origins)
    if any(o.kind == DATA for o in origins):
        return Origin(DATA, loops=loops, scores=any(o.scores for o in origins))
    through = next((o.through for o in origins if o.through), through)
    return Origin(DERIVED, leaves, loops, through) if leaves else Origin(loops=loops)


def either(a: Origin, b: Origin) -> Origin:
    """The origin of a value that is one of two, as after a branch."""
    loops, scores = a.loops | b.loops, a.scores or b.scores
    return a._replace(loops=loops, scores=scores) if a[:2] == b[:2] else joined([a, b], "a choice")


def laid_out(eqn, origins: Sequence[Origin]) -> Origin:
    """The origin of the result of an equation whose primitive is in LAYOUT; its first input is laid out anew by the
    others, which are indices."""
    source, *index = origins
    if any(o.kind in (DATA, DERIVED) for o in index):
        return Origin(DATA, source.leaves, source.loops, eqn.primitive.name)  # rows that the data chose
    if source.leaves and not jnp.issubdtype(eqn.outvars[0].aval.dtype, jnp.floating):
        return joined(origins, eqn.primitive.name)
    return source._replace(loops=source.loops | union(o.loops for o in index))


def in_loop(origin: Origin, depth: int) -> Origin:
    """The origin of a value that differs between the rounds of the loop at this depth."""
    return origin._replace(loops=origin.loops | {depth})


def out_of_loop(origin: Origin, depth: int) -> Origin:
    """The origin of a value that left the loop at this depth."""
    return origin._replace(loops=origin.loops - {depth})
