"""Where arrays lie: the mesh of devices, and the sharding of the training state and of the batch.

A mesh has two axes, `data` and `fsdp`. A batch is split over both. Arrays as large as the parameters (parameters,
optimizer moments, residuals, ages) are split over `fsdp` and copied over `data`; everything else is copied everywhere.
One device is the mesh of 1 x 1, and its program contains no sharding constraint.

Which axis of an array: the largest that `fsdp` divides, the first of equals. (The 50,257 rows of GPT-2's table are
divided by no power of two; its columns are.) Arrays of less than MIN_SPLIT_ELEMENTS stay whole: biases, scales of
LayerNorm and everything that is one number a layer take little memory, and each collective costs microseconds whatever
its size.

Only shardings are stated here; which collectives they take is left to XLA's partitioner.
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from altgrad_jax.errors import UserError
from altgrad_jax.models.stacking import is_stacked

DATA, FSDP = "data", "fsdp"
Device = Any  # jax.Device, which is a variable to a type checker
# 64 KiB of float32.
MIN_SPLIT_ELEMENTS = 2**14


def data_mesh(devices: Sequence | None = None, fsdp: int = 1) -> Mesh:
    """The mesh of the given devices (default: all of all processes), `fsdp` neighbours of which share one copy of the
    parameters. UserError where fsdp does not divide their number."""
    devices = jax.devices() if devices is None else devices
    if len(devices) % fsdp:
        raise UserError(
            f"fsdp={fsdp} does not divide the {len(devices)} devices that are visible: give a divisor of "
            f"{len(devices)}, or change how many are visible"
        )
    return jax.make_mesh((len(devices) // fsdp, fsdp), (DATA, FSDP), axis_types=(AxisType.Auto,) * 2, devices=devices)


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding of an array that every device holds whole."""
    return NamedSharding(mesh, PartitionSpec())


def over_batch(mesh: Mesh) -> NamedSharding:
    """The sharding of an array whose first axis is split over all devices."""
    return NamedSharding(mesh, PartitionSpec((DATA, FSDP)))


def split_axis(shape: Sequence[int], fsdp: int) -> int | None:
    """The axis along which an array of this shape is split in `fsdp` parts; None where it stays whole.

    UserError where it is to be split and `fsdp` divides none of its axes.
    """
    if fsdp == 1 or math.prod(shape) < MIN_SPLIT_ELEMENTS:
        return None
    axes = [axis for axis, size in enumerate(shape) if size % fsdp == 0]
    if not axes:
        raise UserError(
            f"fsdp={fsdp} divides no axis of a parameter of shape {list(shape)}: give a divisor of one, or "
            "change n_embd"
        )
    return max(axes, key=lambda axis: (shape[axis], -axis))


def over_fsdp(mesh: Mesh, shape: Sequence[int], stacked: bool = False) -> NamedSharding:
    """The sharding of an array of the parameters' kind. `stacked`: its first axis is that of several layers, each of
    which is split as it would be alone."""
    axis = split_axis(shape[stacked:], mesh.shape[FSDP])
    return NamedSharding(mesh, PartitionSpec() if axis is None else PartitionSpec(*[None] * (axis + stacked), FSDP))


def split_like_parameters(mesh: Mesh, tree) -> Any:
    """The shardings of a tree whose arrays are of the parameters' kind."""
    return jax.tree_util.tree_map_with_path(lambda path, leaf: over_fsdp(mesh, leaf.shape, is_stacked(path)), tree)


def constrain(tree, shardings, mesh: Mesh) -> Any:
    """The tree, in a compiled program, with its arrays laid out by these shardings. One device needs no request."""
    return tree if mesh.size == 1 else jax.lax.with_sharding_constraint(tree, shardings)


def gather(params, mesh: Mesh) -> Any:
    """Parameters as every device computes with them: whole.

    Without this the partitioner would send activations between devices instead, where a batch is small beside a matrix.
    """
    return constrain(params, replicated(mesh), mesh)


def scatter(grads, mesh: Mesh) -> Any:
    """Gradients of gathered parameters, summed over all devices and split like the parameters.

    With fsdp XLA makes one reduce-scatter of it on a GPU.
    """
    return constrain(grads, split_like_parameters(mesh, grads), mesh)


def place(array, sharding: jax.sharding.Sharding) -> jax.Array:
    """A host array, the same in every process, on the devices of the sharding."""
    if sharding.is_fully_addressable:
        return jax.device_put(array, sharding)
    array = np.asarray(array)
    # device_put would send the whole array between processes to check that it is the same everywhere.
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


def shard_bytes(tree) -> int:
    """Bytes of a tree (of arrays or of their shapes) on each device of its shardings."""
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
