"""Learning-rate schedules, AdamW and gradient clipping.

The optimizers here are optax transformations that end *before* the learning rate: the step multiplies by -lr itself, so
that the rate is a value it can log (and, later, an axis of a sweep) instead of a constant buried in optimizer state.
"""

import jax
import jax.numpy as jnp
import optax

SCHEDULES = ("constant", "cosine", "wsd")


def learning_rate(step, *, peak, warmup_steps, max_steps, schedule, min_lr_ratio, decay_steps):
    """Learning rate of the update made from state `step` (counted from 0), float32.

    Warm-up is linear, peak * (step + 1) / warmup_steps, reaching the peak at update warmup_steps - 1. After it:
      constant: the peak.
      cosine: half a cosine from the peak down to min_lr_ratio * peak at the last update.
      wsd (warm-up, stable, decay): the peak, then linear to min_lr_ratio * peak over the last decay_steps updates
        (Hu et al. 2024, "MiniCPM").
    """
    step = jnp.asarray(step, jnp.float32)
    warm = jnp.minimum(1.0, (step + 1.0) / max(1, warmup_steps))
    if schedule == "constant":
        shape = 1.0
    else:
        start = warmup_steps if schedule == "cosine" else max_steps - decay_steps
        done = jnp.clip((step - start) / max(1, max_steps - 1 - start), 0.0, 1.0)
        fall = 0.5 * (1.0 + jnp.cos(jnp.pi * done)) if schedule == "cosine" else 1.0 - done
        shape = min_lr_ratio + (1.0 - min_lr_ratio) * fall
    return jnp.float32(peak) * warm * shape


def is_decayed(params):
    """Tree of booleans: weight decay applies to every array with two or more axes, the embeddings included."""
    return jax.tree.map(lambda leaf: leaf.ndim >= 2, params)


def adamw(*, beta1, beta2, eps, weight_decay):
    """AdamW (Loshchilov & Hutter 2019) up to the learning rate: the update is -lr times what this returns."""
    return optax.chain(optax.scale_by_adam(b1=beta1, b2=beta2, eps=eps),
                       optax.add_decayed_weights(weight_decay, mask=is_decayed))


def adam_moments(opt_state) -> optax.ScaleByAdamState:
    """The (count, mu, nu) inside an optimizer state made by `adamw`."""
    return opt_state[0]


def clip_factor(norm, max_norm):
    """What a gradient of global L2 norm `norm` is multiplied with so that it is at most `max_norm`; 0 turns it off."""
    return jnp.minimum(1.0, max_norm / jnp.maximum(norm, 1e-30)) if max_norm > 0 else jnp.ones_like(norm)
