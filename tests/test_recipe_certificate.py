"""The certificate of a recipe: what it says, that it holds for every recipe, and that altered arithmetic is refused."""

import hashlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from altgrad_jax.errors import UserError
from altgrad_jax.numerics import recipe_certificate, recipe_reference
from altgrad_jax.numerics.recipe_certificate import certify, image_inputs
from altgrad_jax.numerics.recipes import Phase, get_recipe
from altgrad_jax.numerics.slot_quantization import Quantized, quantize_slot
from altgrad_jax.run import setup
from altgrad_jax.step.recipe import RecipeOptions


def test_the_inputs_have_heavy_tails_a_wide_range_and_blocks_of_zeros():
    x = image_inputs()
    assert x.dtype == np.float32 and x.shape == (256, 256)
    size = np.abs(x[x != 0])
    assert np.log2(size.max() / size.min()) > 30 and np.mean((x / x.std()) ** 4) > 100
    blocks = x.reshape(16, 16, 16, 16).transpose(0, 2, 1, 3)
    assert 0 < np.sum(~blocks.any((2, 3))) < 32 and not x[100].any()


# One of each kind of arithmetic; a schedule's tests and docs/results cover the others.
@pytest.mark.parametrize("name", ["te_delayed", "deepseek_pow2", "mxfp8_floor", "nvfp4_redrawn", "quartet_2"])
def test_every_element_is_the_reference_s(name):
    found = certify(get_recipe(name))
    assert found is not None and found["n_wrong"] == 0 and found["device"] == jax.devices()[0].device_kind
    n_slots = {"nvfp4_redrawn": 5, "mxfp8_floor": 1}.get(name, 2)
    # A delayed amax is tried twice: the matrix's own, and one that clips.
    assert found["n_slots"] == n_slots and found["n_elements"] == 256**2 * {"te_delayed": 4}.get(name, n_slots)
    assert (found["tolerance"] == "equal") == (name != "quartet_2")


def test_the_hash_is_of_the_values():
    spec = get_recipe("mxfp8").fprop_x
    values = recipe_reference.quantize(image_inputs(), spec, 1).astype("<f4")
    found = certify(get_recipe("mxfp8"))
    assert found is not None and found["image_sha256"] == hashlib.sha256(values.tobytes()).hexdigest()


def test_a_recipe_that_quantizes_nothing_has_none():
    assert certify(get_recipe("bf16")) is None


def identity(v, slot, axis, features):
    return Quantized(v, jnp.ones((1, v.shape[1 - axis]))), None


def zeros(v, slot, axis, features):
    return identity(jnp.zeros_like(v), slot, axis, features)


def to_nearest(v, slot, axis, features):
    return quantize_slot(v, slot._replace(stochastic=False), axis, features)


def one_element_off(v, slot, axis, features):
    q, statistics = quantize_slot(v, slot, axis, features)
    return q._replace(q=q.q.at[3, 5].multiply(2)), statistics


def of_other_noise(v, slot, axis, features):
    return quantize_slot(v, slot._replace(seed=slot.seed + 1), axis, features)


@pytest.mark.parametrize("altered", [identity, zeros, to_nearest, one_element_off, of_other_noise])
def test_altered_arithmetic_is_refused_in_one_sentence(altered):
    with pytest.raises(UserError) as caught:
        certify(get_recipe("mxfp4_tseng"), altered)
    message = str(caught.value)
    assert message.startswith("recipe mxfp4_tseng is quantized wrongly on ") and "\n" not in message
    assert "to E2M1 in blocks of 1x32 with scales in E8M0 (floor, stochastic)" in message
    (n_wrong,) = map(int, re.findall(r"(\d+) results are wrong", message))
    assert n_wrong == 1 if altered is one_element_off else n_wrong > 1000


def test_it_says_where_nothing_was_rounded():
    with pytest.raises(UserError, match=r"\(rceil, nearest\) 0 of 65536 numbers changed and \d+ must"):
        certify(get_recipe("mxfp8"), identity)


def test_a_rotation_that_is_none_is_refused(monkeypatch):
    monkeypatch.setattr(recipe_certificate, "rotate", lambda v, *_: v)
    with pytest.raises(UserError, match="recipe mxfp4_tseng rotates wrongly on .*rht64_redrawn"):
        certify(get_recipe("mxfp4_tseng"))


def test_where_division_is_inexact_few_elements_may_differ_by_little(monkeypatch):
    x = image_inputs()
    want = recipe_reference.quantize(x, get_recipe("mxfp8").fprop_x, 1).astype(np.float32)
    judge = recipe_certificate._require_equal
    about = get_recipe("mxfp8"), get_recipe("mxfp8").fprop_x, x
    got = want.copy()
    got[0, :50] *= np.float32(1 + 2.0**-4)
    assert judge(*about, got, want, False, "a device") == np.sum(got != want) > 20
    for many in (want * np.float32(1 + 2.0**-4), np.where(want == want.max(), 0, want), np.full_like(want, np.nan)):
        with pytest.raises(UserError, match="on a device"):
            judge(*about, many, want, False, "a device")
    with pytest.raises(UserError, match="on a device"):
        judge(*about, got, want, True, "a device")


def test_a_run_is_certified_once_for_every_recipe_that_it_follows(monkeypatch):
    asked = []
    monkeypatch.setattr(recipe_certificate, "certify", lambda recipe: asked.append(recipe.name))
    setup._recipe_certificate.cache_clear()
    schedule = Phase("mxfp8", 0), Phase("nvfp4:fprop", 5), Phase("mxfp8", 9)
    options = RecipeOptions(names=(), n_layer=1, features=(), schedule=schedule)
    for _ in range(2):
        assert setup.certify_recipes(options) == {"mxfp8": None, "nvfp4:fprop": None}
    assert asked == ["mxfp8", "nvfp4:fprop"] and setup.certify_recipes(None) == {}
    setup._recipe_certificate.cache_clear()
