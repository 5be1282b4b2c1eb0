"""Writes a checkpoint as a Hugging Face GPT-2 folder (config.json, model.safetensors), or reads one.

    python scripts/export_hf.py checkpoints/bf16_baseline exported/
    python scripts/export_hf.py --import downloaded/gpt2 checkpoints/gpt2

The first folder loads with transformers' GPT2LMHeadModel.from_pretrained. The second becomes a run folder
with one checkpoint, of step 0, that holds parameters and settings but no optimizer state: what
scripts/sample.py and scripts/evaluate.py need.
"""

from altgrad_jax import config as settings_table
from altgrad_jax.cli import ArgumentParser, run_script, whole_number
from altgrad_jax.errors import UserError

TOKENIZER_KEY = "altgrad_tokenizer"  # our own key in config.json; transformers keeps what it does not know


def parse_args(argv=None):
    parser = ArgumentParser(__doc__)
    parser.add_argument("source", help="run folder or checkpoint; with --import, the Hugging Face folder")
    parser.add_argument("out", help="folder to write, which must not exist yet or be empty")
    parser.add_argument("--import", dest="imports", action="store_true", help="from Hugging Face instead of to it")
    parser.add_argument(
        "--step", type=whole_number, help="checkpoint of the run folder to export (default: the newest)"
    )
    parser.add_argument(
        "--tokenizer",
        choices=settings_table.VOCABULARY_OF,
        help="with --import: tokenizer of the model (default: what config.json or vocab_size says)",
    )
    return parser.parse_args(argv)


def main(args):
    if args.imports and args.step is not None:
        raise UserError("--step cannot be used with --import: leave it out, for a Hugging Face folder holds one model.")
    if not args.imports and args.tokenizer is not None:
        raise UserError("--tokenizer is only for --import: leave it out, for a checkpoint records its own.")
    (import_folder if args.imports else export_checkpoint)(args)


def export_checkpoint(args):
    # Here and below, so that --help does not wait for jax.
    from altgrad_jax.inference import hf
    from altgrad_jax.inference.generate import load_model

    hf.refuse_occupied(args.out)
    params, config, settings, operands = load_model(args.source, args.step)
    tensors, config_json = hf.to_hf(params, config)
    hf.write_folder(args.out, tensors, config_json | {TOKENIZER_KEY: settings["tokenizer"]})
    print(f"wrote {args.out}: GPT-2 with {sum(array.size for array in tensors.values()):,} parameters, float32")
    if operands:
        print(
            "note: this run trained in number formats; the files hold its weights, and a program that loads them "
            "rounds no operand, so its loss differs from the run's"
        )


def import_folder(args):
    import jax.numpy as jnp
    from jax import tree

    from altgrad_jax.inference import hf
    from altgrad_jax.run.checkpoint import open_checkpoints

    out = hf.refuse_occupied(args.out)
    tensors, config_json = hf.read_folder(args.source)
    params, sizes = hf.from_hf(tensors, config_json)
    config = settings_table.default_config()
    config.update(sizes)
    config.tokenizer = args.tokenizer or tokenizer_of(config_json)
    # float32: the imported model then computes what transformers computes with these files.
    config.compute_dtype, config.run_name, config.checkpoint_dir = "float32", "imported", str(out)
    settings_table.validate(config)
    checkpoints = open_checkpoints(out, max_checkpoints=1)
    try:
        checkpoints.save(
            0,
            {"params": tree.map(jnp.asarray, params)},
            {"config": settings_table.to_dict(config), "imported_config": config_json},
        )
    finally:
        checkpoints.close()
    for outcome in checkpoints.check():
        if outcome.error:
            raise UserError(outcome.error)
    print(
        f"wrote {out}: step 0, GPT-2 with {sum(leaf.size for leaf in tree.leaves(params)):,} parameters, "
        f"tokenizer {config.tokenizer}"
    )
    if config_json.get("attn_pdrop", 0.1):
        print("note: config.json's attn_pdrop is not carried over; training here does not drop attention probabilities")


def tokenizer_of(config_json):
    """The tokenizer that an imported model was trained with, as its config.json tells; else UserError."""
    recorded = config_json.get(TOKENIZER_KEY)
    if isinstance(recorded, str) and recorded in settings_table.VOCABULARY_OF:
        return recorded
    # GPT-2's vocabulary is often padded to a multiple of 64.
    names = {size: name for name, size in settings_table.VOCABULARY_OF.items()} | {50304: "gpt2"}
    vocab_size = config_json["vocab_size"]
    if vocab_size not in names:
        raise UserError(
            f"config.json has vocab_size = {vocab_size}, which does not tell the tokenizer: give --tokenizer "
            f"{' or '.join(settings_table.VOCABULARY_OF)}"
        )
    return names[vocab_size]


if __name__ == "__main__":
    run_script(lambda: main(parse_args()))
