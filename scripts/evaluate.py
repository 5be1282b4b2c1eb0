"""Validation loss and perplexity of a checkpoint.

    python scripts/evaluate.py checkpoints/bf16_baseline
    python scripts/evaluate.py checkpoints/bf16_baseline --step 1900 --tokens other.bin --all

Without --data_dir or --tokens it is the validation data of the run; on a CPU the figure is the one in the run's
record, to the bit.
"""

import installed  # noqa: F401
from absl import flags

from altgrad_jax import cli
from altgrad_jax.errors import UserError

ARGUMENTS = ("checkpoint",)
FLAGS = cli.new_flags(device=True)
flags.DEFINE_integer("step", None, "checkpoint of the run folder (default: the newest)", flag_values=FLAGS)
flags.DEFINE_string("data_dir", None, "folder of token files; its val.bin is used", flag_values=FLAGS)
flags.DEFINE_string("tokens", None, "a file of tokens, of the checkpoint's tokenizer", flag_values=FLAGS)
flags.DEFINE_bool(
    "all", False, "the whole file, but for a last incomplete batch, not the run's fixed choice", flag_values=FLAGS
)


flags.DEFINE_string(
    "kv_cache", None, "number format of keys and values, such as E4M3 or E2M1:1x16 (docs/recipes.md)", flag_values=FLAGS
)


def run(*, checkpoint, device, step, data_dir, tokens, all, kv_cache):
    if data_dir is not None and tokens is not None:
        raise UserError(f"--data_dir={data_dir} and --tokens={tokens} name two places of data: give one of them")
    # Here, so that --help does not wait for jax.
    from altgrad_jax.inference.evaluate import evaluate_checkpoint
    from altgrad_jax.run.device import use_device

    use_device(device)
    result = evaluate_checkpoint(
        checkpoint, step=step, data_dir=data_dir, token_file=tokens, all_windows=all, kv_cache=kv_cache
    )
    print(
        f"loss {result.val_loss:.6f} nats/token, perplexity {result.val_perplexity:.3f}, on {result.n_windows:,} "
        f"windows ({result.n_tokens:,} tokens) of {result.file}"
        + (f", keys and values in {kv_cache}" if kv_cache else "")
    )


if __name__ == "__main__":
    cli.main(run, FLAGS, usage=__doc__, arguments=ARGUMENTS)
