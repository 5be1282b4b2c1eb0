"""Blocks of a model taken together: the arrays of neighbouring blocks as one array with a leading axis.

A model of 48 blocks has the same 12 arrays 48 times. A program that holds them apart has 48 times the operations to
compile and to launch, so a step works on stacked arrays. Checkpoints, records and everything outside a compiled
dispatch name every block.

segment   neighbouring blocks that are computed alike, (first, end) as in a slice. Its key is `block_0:6` where a single
          block's is `block_0`. A model without formats is one segment.
group     the layers of one name in a segment, `block_0:6/attn_qkv` for six layers; a layer outside the blocks is a
          group of its own, `embed`. Arrays of a group have a leading axis n, one entry a layer.

Only dictionaries that have keys of blocks change: parameters and trees like them (`block_0` and what is below), and
dictionaries of layers (`block_0/attn_qkv`, or with a dot). No jax transformation is involved: stack and unstack are
concatenations and slices.
"""

import re
from typing import Any

import jax
import jax.numpy as jnp

Segments = tuple[tuple[int, int], ...]
_BLOCK = re.compile(r"block_(\d+)(.*)", re.DOTALL)
_SEGMENT = re.compile(r"block_(\d+):(\d+)(.*)", re.DOTALL)


def segment_key(first: int, end: int) -> str:
    """The key under which blocks first to end - 1 are stacked."""
    return f"block_{first}:{end}"


def layers_of(group: str) -> tuple[str, ...]:
    """The layers of a group, in the order of its axis."""
    match = _SEGMENT.fullmatch(group)
    if not match:
        return (group,)
    first, end, rest = match.groups()
    return tuple(f"block_{i}{rest}" for i in range(int(first), int(end)))


def group_of(layer: str, segments: Segments) -> str:
    """The group that a layer belongs to."""
    match = _BLOCK.fullmatch(layer)
    if not match:
        return layer
    for first, end in segments:
        if first <= int(match[1]) < end:
            return segment_key(first, end) + match[2]
    raise ValueError(f"{layer} lies in none of the segments {segments}")


def is_stacked(path) -> bool:
    """Whether an array at this path of a tree (jax.tree_util's keys) has a leading axis of layers."""
    return any(isinstance(key, jax.tree_util.DictKey) and _SEGMENT.match(str(key.key)) for key in path)


def stacked_arrays(tree: Any) -> Any:
    """Tree of booleans: `is_stacked` of every array."""
    return jax.tree_util.tree_map_with_path(lambda path, _: is_stacked(path), tree)


def stack(tree: Any, segments: Segments) -> Any:
    """The tree with the arrays of each segment's blocks stacked, [n, ...]."""
    return jax.tree.map(
        lambda node: _stacked(node, segments) if _names(node, _BLOCK) else node,
        tree,
        is_leaf=lambda node: _names(node, _BLOCK),
    )


def unstack(tree: Any) -> Any:
    """The inverse of `stack`: every block by its own name."""
    return jax.tree.map(
        lambda node: _apart(node) if _names(node, _SEGMENT) else node, tree, is_leaf=lambda node: _names(node, _SEGMENT)
    )


def _names(node, pattern) -> bool:
    return isinstance(node, dict) and any(isinstance(key, str) and pattern.match(key) for key in node)


def _stacked(node: dict, segments: Segments) -> dict:
    groups: dict[str, list] = {}
    for key in sorted(node, key=_by_number):
        groups.setdefault(group_of(key, segments), []).append(node[key])
    return {
        group: jax.tree.map(lambda *leaves: jnp.stack(leaves), *members) if group not in node else members[0]
        for group, members in groups.items()
    }


def _by_number(key: str):
    match = _BLOCK.fullmatch(key)
    return int(match[1]) if match else -1


def _apart(node: dict) -> dict:
    out = {}
    for group, members in node.items():
        layers = layers_of(group)
        if not _SEGMENT.match(group):
            out[group] = members
            continue
        for k, layer in enumerate(layers):
            out[layer] = jax.tree.map(lambda leaf: leaf[k], members)
    return out
