"""Fine-tune a GPT-2 from a Hugging Face folder, in bfloat16 and by a recipe, and see what the recipe costs.

    python examples/finetune_gpt2.py downloaded/gpt2 --data_dir=data/gpt2 --out=runs/finetune --steps=200

The folder holds config.json, model.safetensors and, to be compared, its tokenizer. Both runs start from the same
weights and see the same batches, so they differ in the numbers of their products alone. Each leaves a run folder with
its record; the last lines are a table of the losses.
"""

import argparse
from pathlib import Path

import altgrad_jax
from altgrad_jax.run.initial import read_initial


def finetune(folder, data_dir, out, recipe, *, steps, block_size, batch_size, learning_rate):
    """The Result of one run by `recipe`, () for bfloat16."""
    config = altgrad_jax.default_config()
    config.update(read_initial(folder).settings)  # the sizes of the model, and its tokenizer where the folder tells it
    config.update(
        init_from=str(folder),
        block_size=min(block_size, config.block_size),  # fewer positions than the model has: its first ones
        recipe=recipe,
        compute_dtype="bfloat16",
        batch_size=batch_size,
        max_steps=steps,
        warmup_steps=max(1, steps // 10),
        learning_rate=learning_rate,
        weight_decay=0.0,
        schedule="cosine",
        eval_interval=steps,
        checkpoint_interval=steps,
        diagnostic_interval=steps,
        metrics="none",
        wandb_mode="disabled",
        run_name=recipe[0] if recipe else "bfloat16",
    )
    return altgrad_jax.train(config, data_dir=data_dir, workdir=Path(out) / config.run_name)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", help="a Hugging Face GPT-2 or Llama folder")
    parser.add_argument("--data_dir", required=True, help="token files, as scripts/prepare_data.py makes them")
    parser.add_argument("--out", default="runs/finetune")
    parser.add_argument("--recipe", default="mxfp8")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--block_size", type=int, default=256)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--learning_rate", type=float, default=5e-5)
    choices = vars(parser.parse_args())
    folder, data_dir, out, name = (choices.pop(key) for key in ("folder", "data_dir", "out", "recipe"))
    results = {
        label: finetune(folder, data_dir, out, recipe, **choices)
        for label, recipe in {"bfloat16": (), name: (name,)}.items()
    }
    print(f"\n{'numbers':<12}{'loss before':>14}{'after':>10}{'than bfloat16':>16}")
    reference = None
    for label, result in results.items():
        losses = result.history["val_loss"]
        before, after = losses[0], losses[-1]
        reference = after if reference is None else reference
        print(f"{label:<12}{before:>14.4f}{after:>10.4f}{after - reference:>+16.4f}")


if __name__ == "__main__":
    main()
