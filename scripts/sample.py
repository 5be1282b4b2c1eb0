"""Prints text that a checkpoint writes after a prompt.

    python scripts/sample.py checkpoints/bf16_baseline --prompt "HAS ADOPTED THIS REGULATION:"

The text goes to standard output, notes and errors to standard error.
"""

import os
import sys

from altgrad_jax.cli import ArgumentParser, run_script, whole_number


def parse_args(argv=None):
    parser = ArgumentParser(__doc__)
    parser.add_argument("checkpoint", help="run folder, or one checkpoint in it")
    parser.add_argument("--step", type=whole_number, help="checkpoint of the run folder (default: the newest)")
    parser.add_argument("--prompt", default="", help="text to continue (default: none, the start of a document)")
    parser.add_argument("--max_new_tokens", type=whole_number, default=200, help="tokens to add (default: %(default)s)")
    parser.add_argument(
        "--temperature",
        type=float,
        default=0.8,
        help="0 = always the most likely token, 1 = the model's own distribution (default: %(default)s)",
    )
    parser.add_argument(
        "--top_k", type=whole_number, help="sample from the k most likely tokens, 0 = from all (default: 200)"
    )
    parser.add_argument(
        "--seed",
        type=whole_number,
        default=0,
        help="of the first sample; the next ones take the next numbers (default: %(default)s)",
    )
    parser.add_argument("--num_samples", type=whole_number, default=1, help="texts to write (default: %(default)s)")
    return parser.parse_args(argv)


def main(args):
    # Here, so that --help does not wait for jax.
    from altgrad_jax.data.tokenizer import get_tokenizer
    from altgrad_jax.errors import UserError
    from altgrad_jax.inference.generate import generate, load_model

    if args.num_samples < 1:
        raise UserError(f"--num_samples {args.num_samples} cannot be used; give 1 or more.")
    params, config, settings, operands = load_model(args.checkpoint, args.step)
    tokenizer = get_tokenizer(settings["tokenizer"])
    prompt_ids = tokenizer.encode(args.prompt) if args.prompt else [tokenizer.eot]
    top_k = min(200, config.vocab_size) if args.top_k is None else args.top_k
    if len(prompt_ids) + args.max_new_tokens > config.block_size + 1:
        print(
            f"note: {len(prompt_ids)} prompt tokens and {args.max_new_tokens} new ones exceed the context of "
            f"{config.block_size}; when it is full, the model goes on from its last "
            f"{max(1, config.block_size // 2)} tokens",
            file=sys.stderr,
        )
    try:
        for i in range(args.num_samples):
            if args.num_samples > 1:
                print(f"--- sample {i + 1} of {args.num_samples}, seed {args.seed + i}", flush=True)
            new_ids = generate(
                params,
                config,
                prompt_ids,
                max_new_tokens=args.max_new_tokens,
                temperature=args.temperature,
                top_k=top_k,
                seed=args.seed + i,
                end_id=tokenizer.eot,
                operands=operands,
            )
            print(args.prompt + tokenizer.decode(new_ids[new_ids != tokenizer.eot]), flush=True)
    except BrokenPipeError:
        # The reader of `sample.py | head` left. Python would write once more at exit, and complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    run_script(lambda: main(parse_args()))
