"""Writes a checkpoint as a Hugging Face folder (config.json, model.safetensors, tokenizer), or reads one.

    python scripts/export_hf.py checkpoints/bf16_baseline exported/
    python scripts/export_hf.py --import downloaded/gpt2 checkpoints/gpt2

The first folder loads with transformers' AutoModelForCausalLM and AutoTokenizer. The second becomes a run folder
with one checkpoint, of step 0, that holds parameters and settings but no optimizer state: what
scripts/sample.py and scripts/evaluate.py need. To train from a folder, give it as --config.init_from to
scripts/train.py.
"""

import installed  # noqa: F401
from absl import flags

from altgrad_jax import cli
from altgrad_jax import config as settings_table
from altgrad_jax.data.tokenizer import TOKENIZERS
from altgrad_jax.errors import UserError

ARGUMENTS = ("source", "out")
FLAGS = cli.new_flags(device=True)
flags.DEFINE_bool("import", False, "from Hugging Face instead of to it", flag_values=FLAGS)
flags.DEFINE_integer("step", None, "checkpoint of the run folder to export (default: the newest)", flag_values=FLAGS)
flags.DEFINE(
    cli.Parser(str, "gpt2, bytes or the path of a tokenizer.json"),
    "tokenizer",
    None,
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
    from altgrad_jax.data.hf_tokenizer import tokenizer_files
    from altgrad_jax.inference.generate import load_model
    from altgrad_jax.models import hf

    hf.refuse_occupied(out)
    params, config, settings, operands = load_model(source, step)
    tensors, config_json = hf.to_hf(params, config)
    name = settings["tokenizer"]
    hf.write_folder(out, tensors, config_json | {hf.TOKENIZER_KEY: name}, tokenizer_files(name, config.block_size))
    n_parameters = sum(array.size for array in tensors.values())
    print(f"wrote {out}: {hf.TITLES[config.name]} with {n_parameters:,} parameters, float32, and its tokenizer {name}")
    if config.dropout and config.name == "llama":
        print(f"note: dropout={config.dropout} is not carried over, because LlamaForCausalLM has none")
    if operands:
        print(
            "note: this run trained in number formats; the files hold its weights, and a program that loads them "
            "rounds no operand, so its loss differs from the run's"
        )


def import_folder(source, out, tokenizer):
    from pathlib import Path

    import jax.numpy as jnp
    from jax import tree

    from altgrad_jax.data.hf_tokenizer import require_vocabulary
    from altgrad_jax.models import hf
    from altgrad_jax.run.checkpoint import open_checkpoints

    out = hf.refuse_occupied(out)
    tensors, config_json = hf.read_folder(source)
    params, sizes = hf.from_hf(tensors, config_json)
    config = settings_table.default_config()
    config.update(sizes)
    if not (tokenizer or (tokenizer := hf.tokenizer_of(config_json))):
        raise UserError(
            f"config.json has vocab_size = {config_json['vocab_size']}, which does not tell the tokenizer: give "
            f"--tokenizer {', '.join(TOKENIZERS)} or the path of its tokenizer.json"
        )
    config.tokenizer = tokenizer
    # float32: the imported model then computes what transformers computes with these files.
    config.compute_dtype, config.run_name, config.checkpoint_dir = "float32", "imported", str(out)
    settings_table.validate(config)
    if not require_vocabulary(Path(source), config.tokenizer):
        print(f"note: the folder has no tokenizer whose vocabulary could be compared with that of {config.tokenizer}")
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
    n_parameters = sum(leaf.size for leaf in tree.leaves(params))
    title = hf.TITLES[config.model]
    print(f"wrote {out}: step 0, {title} with {n_parameters:,} parameters, tokenizer {config.tokenizer}")
    if config.model == "gpt2" and config_json.get("attn_pdrop", 0.1):
        print("note: config.json's attn_pdrop is not carried over; training here does not drop attention probabilities")


if __name__ == "__main__":
    cli.main(run, FLAGS, usage=__doc__, arguments=ARGUMENTS)
