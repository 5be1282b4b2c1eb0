"""Prints text that a checkpoint writes after a prompt.

    python scripts/sample.py checkpoints/bf16_baseline --prompt "HAS ADOPTED THIS REGULATION:"

The text goes to standard output, notes and errors to standard error.
"""

import dataclasses
import sys

import installed  # noqa: F401
from absl import flags

from altgrad_jax import cli

ARGUMENTS = ("checkpoint",)
FLAGS = cli.new_flags(device=True)
flags.DEFINE_integer("step", None, "checkpoint of the run folder (default: the newest)", flag_values=FLAGS)
flags.DEFINE_string(
    "prompt", "", "text to continue; empty = the start of a document; <|endoftext|> ends one", flag_values=FLAGS
)
flags.DEFINE_integer("max_new_tokens", 200, "tokens to add", flag_values=FLAGS)
flags.DEFINE_float(
    "temperature", 0.8, "0 = always the most likely token, 1 = the model's own distribution", flag_values=FLAGS
)
flags.DEFINE_integer(
    "top_k", None, "sample from the k most likely tokens, 0 = from all (default: 200)", flag_values=FLAGS
)
flags.DEFINE_integer("seed", 0, "of the first sample; the next ones take the next numbers", flag_values=FLAGS)
flags.DEFINE_integer("num_samples", 1, "texts to write", 1, flag_values=FLAGS)
flags.DEFINE_string(
    "kv_cache", None, "number format of keys and values, such as E4M3 or E2M1:1x16 (docs/recipes.md)", flag_values=FLAGS
)


def run(*, checkpoint, device, step, prompt, max_new_tokens, temperature, top_k, seed, num_samples, kv_cache):
    # Here, so that --help does not wait for jax.
    from altgrad_jax.data.tokenizer import get_tokenizer
    from altgrad_jax.inference.generate import generate, load_model
    from altgrad_jax.numerics.kv_cache import cache_spec
    from altgrad_jax.run.device import use_device

    use_device(device)
    params, config, settings, operands = load_model(checkpoint, step)
    if kv_cache is not None:
        config = dataclasses.replace(config, kv_cache=cache_spec(kv_cache, config.head_width))
    tokenizer = get_tokenizer(settings["tokenizer"])
    prompt_ids = tokenizer.encode_prompt(prompt)
    if len(prompt_ids) + max_new_tokens > config.block_size + 1:
        print(
            f"note: {len(prompt_ids)} prompt tokens and {max_new_tokens} new ones exceed the context of "
            f"{config.block_size}; when it is full, the model goes on from its last "
            f"{max(1, config.block_size // 2)} tokens",
            file=sys.stderr,
        )
    for i in range(num_samples):
        if num_samples > 1:
            print(f"--- sample {i + 1} of {num_samples}, seed {seed + i}", flush=True)
        new_ids = generate(
            params,
            config,
            prompt_ids,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_k=min(200, tokenizer.vocab_size) if top_k is None else top_k,
            seed=seed + i,
            end_id=tokenizer.eot,
            n_ids=tokenizer.vocab_size,
            operands=operands,
        )
        print(prompt + tokenizer.decode(new_ids[new_ids != tokenizer.eot]), flush=True)


if __name__ == "__main__":
    cli.main(run, FLAGS, usage=__doc__, arguments=ARGUMENTS)
