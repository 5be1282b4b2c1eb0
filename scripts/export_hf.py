"""Writes a checkpoint as a Hugging Face GPT-2 folder (config.json, model.safetensors), or reads one.

    python scripts/export_hf.py checkpoints/bf16_baseline exported/
    python scripts/export_hf.py --import downloaded/gpt2 checkpoints/gpt2

The first folder loads with transformers' GPT2LMHeadModel.from_pretrained. The second becomes a run folder
with one checkpoint, of step 0, that holds parameters and settings but no optimizer state: what
scripts/sample.py and scripts/evaluate.py need.
"""

from absl import flags

from altgrad_jax import cli
from altgrad_jax import config as settings_table
from altgrad_jax.errors import UserError

TOKENIZER_KEY = "altgrad_tokenizer"  # our own key in config.json; transformers keeps what it does not know


ARGUMENTS = ("source", "out")
FLAGS = cli.new_flags(device=True)
flags.DEFINE_bool("import", False, "from Hugging Face instead of to it", flag_values=FLAGS)
flags.DEFINE_integer("step", None, "checkpoint of the run folder to export (default: the newest)", flag_values=FLAGS)
flags.DEFINE_enum(
    "tokenizer",
    None,
    list(settings_table.VOCABULARY_OF),
    "with --import: tokenizer of the model (default: what config.json or vocab_size says)",
    flag_values=FLAGS,
)


def run(*, source, out, device, step, tokenizer, **others):
    imports = others["import"]
    if imports and step is not None:
        raise UserError(
            "--step cannot be used with --import: leave it out, because a Hugging Face folder has one model"
        )
    if not imports and tokenizer is not None:
        raise UserError("--tokenizer is only for --import: leave it out, because a checkpoint records its own")
    from altgrad_jax.run.device import use_device

    use_device(device)
    import_folder(source, out, tokenizer) if imports else export_checkpoint(source, out, step)


def export_checkpoint(source, out, step):
    # Here and below, so that --help does not wait for jax.
    from altgrad_jax.models import hf
    from altgrad_jax.inference.generate import load_model

    hf.refuse_occupied(out)
    params, config, settings, operands = load_model(source, step)
    tensors, config_json = hf.to_hf(params, config)
    hf.write_folder(out, tensors, config_json | {TOKENIZER_KEY: settings["tokenizer"]})
    print(f"wrote {out}: GPT-2 with {sum(array.size for array in tensors.values()):,} parameters, float32")
    if operands:
        print(
            "note: this run trained in number formats; the files hold its weights, and a program that loads them "
            "rounds no operand, so its loss differs from the run's"
        )


def import_folder(source, out, tokenizer):
    import jax.numpy as jnp
    from jax import tree

    from altgrad_jax.models import hf
    from altgrad_jax.run.checkpoint import open_checkpoints

    out = hf.refuse_occupied(out)
    tensors, config_json = hf.read_folder(source)
    params, sizes = hf.from_hf(tensors, config_json)
    config = settings_table.default_config()
    config.update(sizes)
    config.tokenizer = tokenizer or tokenizer_of(config_json)
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
    cli.main(run, FLAGS, usage=__doc__, arguments=ARGUMENTS)
