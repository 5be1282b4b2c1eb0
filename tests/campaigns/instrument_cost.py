"""What `instrument` costs: time to trace, lower and compile, and time of a step.

It is compared with the plain model, and with the same model whose products are placed by hand. The variants take turns.

Command: PYTHONPATH=.:tests python tests/campaigns/instrument_cost.py --model=scanned --layers=48 --recipe=E4M3
"""

import argparse
import statistics as of_numbers
import time

import jax
import jax.numpy as jnp
import numpy as np
from instrumented import ByHand, cross_entropy, normal, plain
from jax import lax

from altgrad_jax import instrument

M = 128


def block(dot, h, w, i):
    return h + dot("down", jax.nn.gelu(dot("up", h, w["up"], i)), w["down"], i)


def scanned(dot, params, batch):
    h, _ = lax.scan(
        lambda h, item: (block(dot, h, item[1], item[0]), None), batch["x"], (jnp.arange(len(params["up"])), params)
    )
    return cross_entropy(h, batch["y"])


def unrolled(dot, params, batch):
    h = batch["x"]
    for i, w in enumerate(params):
        h = block(dot, h, w, i)
    return cross_entropy(h, batch["y"])


def variants(given):
    """{name: a function of nothing that gives (jitted function, its arguments)}."""
    one = {"up": normal(0, given.width, 4 * given.width), "down": normal(1, 4 * given.width, given.width)}
    params = [one] * given.layers
    if given.model == "scanned":
        params = jax.tree.map(lambda *leaves: np.stack(leaves), *params)
    loss = {"scanned": scanned, "unrolled": unrolled}[given.model]
    batch = {"x": normal(2, M, given.width), "y": np.arange(M) % given.width}
    hand = ByHand(given.recipe, {"up": 0, "down": 1}, jax.random.key_data(jax.random.key(0)), 2)

    def plainly(params, batch):
        return loss(plain, params, batch)

    def by_hand(params, batch):
        return loss(hand, params, batch)

    def instrumented(measured):
        inst = instrument(plainly, params, batch, recipe=given.recipe, keep=(), statistics=measured)
        return jax.jit(inst.value_and_grad), (params, batch, inst.init(params)), {"key": jax.random.key(0)}

    return {
        "plain": lambda: (jax.jit(jax.value_and_grad(plainly)), (params, batch), {}),
        "by hand": lambda: (jax.jit(jax.value_and_grad(by_hand)), (params, batch), {}),
        "instrumented": lambda: instrumented(False),
        "with statistics": lambda: instrumented(True),
    }


def compiled(make):
    """(compiled function and its arguments, seconds to trace and lower, seconds to compile)."""
    jax.clear_caches()
    start = time.perf_counter()
    function, args, options = make()
    lowered = function.lower(*args, **options)
    middle = time.perf_counter()
    program = lowered.compile()
    return (program, args, options), middle - start, time.perf_counter() - middle


def step_time(program, args, options):
    start = time.perf_counter()
    jax.block_until_ready(program(*args, **options))
    return time.perf_counter() - start


if __name__ == "__main__":
    flags = argparse.ArgumentParser(description=__doc__)
    flags.add_argument("--model", choices=("scanned", "unrolled"), default="scanned")
    flags.add_argument("--layers", type=int, default=48)
    flags.add_argument("--width", type=int, default=64)
    flags.add_argument("--recipe", default="E4M3")
    flags.add_argument("--rounds", type=int, default=2)
    given = flags.parse_args()
    jax.config.update("jax_enable_compilation_cache", False)
    made = variants(given)
    traced, built, steps = ({name: [] for name in made} for _ in range(3))
    for _ in range(given.rounds):
        programs = {}
        for name, make in made.items():
            programs[name], seconds, more = compiled(make)
            traced[name].append(seconds)
            built[name].append(more)
        for _ in range(20):
            for name, program in programs.items():
                steps[name].append(step_time(*program))
    print(f"{given}\n{'':16} trace and lower  compile    both  to plain   step ms  to by hand")
    total = {name: min(a + b for a, b in zip(traced[name], built[name])) for name in made}
    median = {name: of_numbers.median(steps[name]) for name in made}
    for name in made:
        print(
            f"{name:16} {min(traced[name]):13.2f} s {min(built[name]):6.2f} s {total[name]:5.2f} s "
            f"{total[name] / total['plain']:9.2f} {1000 * median[name]:9.2f} {median[name] / median['by hand']:11.3f}"
        )
