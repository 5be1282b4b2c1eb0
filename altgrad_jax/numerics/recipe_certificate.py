"""Proves, on the device at hand, that the slots of a recipe quantize as `recipe_reference` says.

A compiler may drop a rounding that it takes for redundant, or fuse the arithmetic of scales otherwise. A run would show
neither: it would only train better or worse. So before anything is trained every slot quantizes one fixed matrix under
jit, and each value is compared with NumPy's.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from altgrad_jax.errors import UserError
from altgrad_jax.numerics import formats, recipe_reference, slots
from altgrad_jax.numerics.recipes import Recipe, SlotSpec
from altgrad_jax.numerics.rounding import stochastic_seed
from altgrad_jax.numerics.slot_quantization import Features, Slot, dequantized, quantize_slot, rotate

SIZE = 256  # more than one of the largest blocks, 128x128
# Where division is not exact, or sums decide: the share of elements that may differ, and their squared distance.
MOST_WRONG, LARGEST_DISTANCE = 0.01, 1e-4
_AXIS = 1  # that which is contracted


class _Case(NamedTuple):
    """One quantization that is compared."""

    spec: SlotSpec
    slot: Slot
    given: float  # the amax of earlier steps; 0: its own


def image_inputs() -> np.ndarray:
    """float32 [SIZE, SIZE]: heavy tails, rows and columns of very different sizes, and blocks of zeros."""
    rng = np.random.default_rng(0)
    spread = np.exp2(rng.uniform(-8, 8, (SIZE, 1)) + rng.uniform(-4, 4, (1, SIZE)))
    x = (rng.standard_t(2, (SIZE, SIZE)) * spread).astype(np.float32)
    x[:32, 32:64] = 0
    x[64:80, :16] = 0
    x[100] = 0
    return x


def certify(recipe: Recipe, quantize: Callable = quantize_slot) -> dict | None:
    """Compares what every quantized slot makes of `image_inputs` on the default device, under jit, with NumPy.

    On a CPU every element must be equal. Elsewhere division may be inexact, and the corrections four_six and ms_eden
    decide by float32 sums whose order is the compiler's: there 1% of the elements may differ, by a relative squared
    distance of 1e-4.

    Args:
      quantize: in the place of slot_quantization.quantize_slot; a caller hands in its own to prove that one.

    Returns:
      None for a recipe that quantizes nothing; else {device, tolerance, n_slots: distinct slots, n_elements: compared,
      n_wrong: that differ, image_sha256: of the device's values}.

    Raises:
      UserError: one sentence, naming the first slot whose values are not those of the recipe.
    """
    cases = _cases(recipe)
    if not cases:
        return None
    device = jax.devices()[0]
    features = _union([case.slot for case in cases], lazy=device.platform == "cpu")
    compiled = jax.jit(partial(_values, quantize, features))
    x, images, n_wrong, exact = image_inputs(), [], 0, True
    for spec, slot, given in cases:
        turned, got = (np.asarray(out) for out in compiled(x, slot))
        _require_rotation(recipe, spec, slot, x, turned, device.device_kind)
        # What is quantized are the device's own rotated values: sums of another order would be other inputs.
        want = recipe_reference.quantize(turned, spec, _AXIS, slot.seed, given).astype(np.float32)
        must_equal = device.platform == "cpu" and spec.correction == "none"
        n_wrong += _require_equal(recipe, spec, turned, got, want, must_equal, device.device_kind)
        exact = exact and must_equal
        images.append(got)
    return {
        "device": device.device_kind,
        "tolerance": "equal" if exact else f"{MOST_WRONG:.0%} of the elements, squared distance {LARGEST_DISTANCE:g}",
        "n_slots": len({case.spec for case in cases}),
        "n_elements": x.size * len(cases),
        "n_wrong": n_wrong,
        "image_sha256": formats.image_hash(np.concatenate(images)),
    }


def _cases(recipe: Recipe) -> list[_Case]:
    """The distinct quantized slots; one with a delayed amax also under an amax that clips."""
    # A copy is made by the spec of its first copy, and where its values come from does not matter here.
    specs = dict.fromkeys(replace(spec, source="original") for spec in recipe.slots if not spec.high)
    cases = []
    for i, spec in enumerate(specs):
        slot = slots.slot_of(spec, np.asarray(stochastic_seed(0, 0, i)))
        if slot.redrawn:
            signs = np.random.default_rng(i).choice([-1.0, 1.0], max(spec.rotation, 1))
            slot = slot._replace(signs=np.resize(signs, slot.signs.shape).astype(np.float32))
        cases.append(_Case(spec, slot, 0.0))
        if spec.amax == "delayed":
            given = np.float32(np.abs(image_inputs()).max() / 3)
            cases.append(_Case(spec, slot._replace(given=given), float(given)))
    return cases


def _union(cases: list[Slot], *, lazy: bool) -> Features:
    """What one program needs to quantize by each of these slots."""
    six = [jax.tree.map(lambda leaf: np.stack([leaf] * 6), slot) for slot in cases]
    return slots.features_of(six, lazy=lazy)[0]


def _values(quantize: Callable, features: Features, x, slot: Slot) -> tuple[Any, Any]:
    """(the matrix as it is rotated, its quantized values), float32."""
    turned = rotate(x, slot, _AXIS, features.rotation) if features.rotation else x
    # A rotation of size 0 has a matrix too, which nothing uses.
    turned = jnp.where(slot.rotation > 0, turned, x)
    return turned, dequantized(quantize(x, slot, _AXIS, features)[0], _AXIS)


def _require_rotation(recipe: Recipe, spec: SlotSpec, slot: Slot, x, turned, device: str) -> None:
    """UserError unless the blocks were multiplied by diag(signs) H / sqrt(h)."""
    if not spec.rotation:
        return
    hadamard = np.ones((1, 1))
    while len(hadamard) < spec.rotation:
        hadamard = np.kron([[1, 1], [1, -1]], hadamard)
    signed = x.astype(np.float64) * np.resize(slot.signs[: spec.rotation], SIZE)
    want = (signed.reshape(-1, spec.rotation) @ hadamard / np.sqrt(spec.rotation)).reshape(x.shape)
    distance = np.sum(np.square(turned - want)) / np.sum(np.square(want))
    if not distance < 1e-10:
        raise UserError(
            f"recipe {recipe.name} rotates wrongly on {device}: with {spec.transform} the result is a relative squared "
            f"distance of {distance:.2g} from NumPy's, so no result by this recipe would mean anything: run with "
            "another version of jax or without XLA_FLAGS"
        )


def _require_equal(recipe: Recipe, spec: SlotSpec, x, got, want, exact: bool, device: str) -> int:
    """How many elements differ; UserError if more do than may."""
    n_wrong = int(np.sum(~(got == want)))
    distance = np.sum(np.square(got.astype(np.float64) - want)) / np.sum(np.square(want, dtype=np.float64))
    if n_wrong == 0 or not exact and n_wrong <= MOST_WRONG * want.size and distance < LARGEST_DISTANCE:
        return n_wrong
    changed, must_change = (int(np.sum(values != x)) for values in (got, want))
    raise UserError(
        f"recipe {recipe.name} is quantized wrongly on {device}: to {spec.element} in blocks of {spec.block} with "
        f"scales in {spec.scale} ({spec.rule}, {spec.rounding}) {changed} of {x.size} numbers changed and "
        f"{must_change} must, {n_wrong} results are wrong, at a relative squared distance of {distance:.2g}, so the "
        "compiler altered the arithmetic and no result by this recipe would mean anything: run with another version of "
        "jax or without XLA_FLAGS"
    )
