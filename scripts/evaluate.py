"""Validation loss and perplexity of a checkpoint.

    python scripts/evaluate.py checkpoints/bf16_baseline
    python scripts/evaluate.py checkpoints/bf16_baseline --step 1900 --tokens other.bin --all

Without --data_dir or --tokens it is the validation data of the run; on a CPU the figure is the one in the run's
record, to the bit.
"""

from altgrad_jax.cli import ArgumentParser, run_script, whole_number


def parse_args(argv=None):
    parser = ArgumentParser(__doc__)
    parser.add_argument("checkpoint", help="run folder, or one checkpoint in it")
    parser.add_argument("--step", type=whole_number, help="checkpoint of the run folder (default: the newest)")
    data = parser.add_mutually_exclusive_group()
    data.add_argument("--data_dir", help="folder of token files; its val.bin is used")
    data.add_argument("--tokens", help="a file of uint16 tokens, of the checkpoint's tokenizer")
    parser.add_argument(
        "--all", action="store_true", help="the whole file, but for a last incomplete batch, not the run's fixed choice"
    )
    return parser.parse_args(argv)


def main(args):
    # Here, so that --help does not wait for jax.
    from altgrad_jax.inference.evaluate import evaluate_checkpoint

    result = evaluate_checkpoint(
        args.checkpoint, step=args.step, data_dir=args.data_dir, token_file=args.tokens, all_windows=args.all
    )
    print(
        f"loss {result.val_loss:.6f} nats/token, perplexity {result.val_perplexity:.3f}, on {result.n_windows:,} "
        f"windows ({result.n_tokens:,} tokens) of {result.file}"
    )


if __name__ == "__main__":
    run_script(lambda: main(parse_args()))
