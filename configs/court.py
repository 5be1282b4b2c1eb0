"""The court of recipes: every recipe beside bfloat16, on the same batches, from one compiled program.

Command:   python scripts/prepare_data.py --input ACTS --tokenizer bytes --val_fraction=0.005 --out data/court
           python scripts/sweep.py --config configs/court.py --out runs/court --data_dir=data/court --cpu_devices=2
           python scripts/report.py runs/court -o court.html
           python scripts/sweep.py --config configs/court.py:small --out runs/small    # three recipes, three pairs
Argument:  gpt2 (the default); again, the same with six fresh pairs of seeds, to see which conclusions hold; llama, four
           pairs on the Llama block, without the recipes whose transforms of 64 or 128 do not divide its MLP, 352 wide;
           sizes, four arms with the fresh seeds, for one --config.n_embd after another; deep, three blocks and 1,500
           updates, twelve recipes whose gaps the courts before let expect to be seen, eight pairs of its own; pilot,
           three arms at four rates, by which RATE was chosen; small, a first look in minutes.
Members:   every arm at RATE, seed by seed, so that a stopped court has whole seeds. Arms with a part or a suffix
           in their names are controls: they differ from another arm in one thing. `~head` keeps the head alone in
           bfloat16, so that arms compare.
Time:      docs/results/court.md.
Expected:  bfloat16 ends near 1.94 nats per byte, far below the 2.4 of pairs of bytes; the rest is the question.

Other sizes: --config.n_layer, --config.n_embd (multiples of 128 for Quartet II), --config.max_steps; the baseline's is
--config.n_layer=6 --config.n_head=6 --config.n_embd=384 --config.block_size=256 --config.tokenizer=gpt2.
"""

from altgrad_jax.config import Config, default_config
from altgrad_jax.errors import UserError
from altgrad_jax.run.sweep import axis, grid

SEEDS, FRESH_SEEDS, DEEP_SEEDS = tuple(range(1, 9)), tuple(range(9, 15)), tuple(range(15, 23))
LLAMA_SEEDS = SEEDS[:4]  # half an hour on two cores
RATE = 2e-3
PILOT_RATES = (1e-3, 2e-3, 4e-3, 8e-3)
PILOT = ("bf16", "nvfp4~head", "mxfp4")
PUBLISHED = ("mxfp8", "mxfp8_floor", "mxfp4", "nvfp4", "fp4_all_the_way", "tetrajet_v2", "ufp4")
CONTROLS = (
    *("nvfp4~head", "nvfp4:fprop~head", "nvfp4:backward~head", "nvfp4_headroom~head", "nvfp4_redrawn~head"),
    *("nvfp4_w1x16~head", "ufp4_no_rht", "ufp4_e2m1", "ufp4_e2m1_no_rht"),
)
# A program that can follow these too takes a quarter longer for every arm, so they have one of their own.
WIDE = ("mxfp4_tseng", "quartet_2", "quartet_2_sr")
DEEP = (
    *("bf16", "mxfp8", "mxfp8_floor", "mxfp4", "nvfp4", "nvfp4~head", "nvfp4:fprop~head", "nvfp4:backward~head"),
    *("nvfp4_redrawn~head", "fp4_all_the_way", "tetrajet_v2", "ufp4", "ufp4_no_rht"),
)
SIZED = ("bf16", "mxfp8", "nvfp4~head", "mxfp4")
SMALL = ("bf16", "mxfp8", "nvfp4~head")
ARGUMENTS = ("gpt2", "again", "llama", "sizes", "deep", "pilot", "small")


def get_config(argument: str = "gpt2") -> Config:
    if argument not in ARGUMENTS:
        raise UserError(f"configs/court.py:{argument} is no court: give one of {', '.join(ARGUMENTS)}")
    config = default_config()
    config.model, config.tokenizer = "llama" if argument == "llama" else "gpt2", "bytes"
    config.n_layer, config.n_head, config.n_embd, config.block_size = 2, 4, 128, 64
    config.batch_size, config.learning_rate = 4, RATE
    config.max_steps, config.warmup_steps = (400, 40) if argument == "small" else (1000, 100)
    if argument == "deep":
        config.n_layer, config.max_steps, config.warmup_steps = 3, 1500, 150
    if argument != "pilot":  # the pilot ran at a constant rate; with a decay the loss ends 0.1 lower
        config.schedule, config.decay_fraction, config.min_lr_ratio = "wsd", 0.3, 0.0
    config.checkpoint_interval, config.eval_interval, config.eval_windows = 1000, 500, 512
    config.max_checkpoints = 1
    config.metrics, config.diagnostic_interval, config.layer_interval = "none", 0, 50
    config.run_name, config.tags, config.wandb_mode = "court", ("court", argument), "disabled"
    return config


def pairs(seeds):
    """Points of a seed and a data seed."""
    return [{"seed": seed, "data_seed": seed, "run_name": f"s{seed}"} for seed in seeds]


def at(rates):
    """Points of a learning rate."""
    return axis("learning_rate", rates, lambda rate: f"lr{rate:g}")


def by(recipes):
    """Points of a recipe."""
    return axis("recipe", [(name,) for name in recipes], lambda value: value[0].replace(":", "-"))


def seed_by_seed(recipes, seeds):
    """Points of recipes over all pairs of seeds, whole seeds one after the other."""
    return [point for pair in pairs(seeds) for point in grid(by(recipes), [pair])]


def get_sweep(config: Config):
    argument = next((tag for tag in config.tags if tag in ARGUMENTS), None)
    if argument is None:
        known = ", ".join(ARGUMENTS)
        raise UserError(f"config.tags is {config.tags}; a court takes its members from a tag: keep one of {known}")
    if argument == "small":
        return grid(by(SMALL), pairs(SEEDS[:3]))
    if argument == "sizes":
        return seed_by_seed(SIZED, FRESH_SEEDS)
    if argument == "deep":
        return seed_by_seed(DEEP, DEEP_SEEDS)
    if argument == "pilot":
        return grid(by(PILOT), at(PILOT_RATES), pairs(SEEDS[:2]))
    seeds = {"again": FRESH_SEEDS, "llama": LLAMA_SEEDS}.get(argument, SEEDS)
    main = seed_by_seed(("bf16", *PUBLISHED, *CONTROLS), seeds)
    wide = [point | {"recipe_program": WIDE} for point in seed_by_seed(WIDE, seeds)] if config.model == "gpt2" else []
    return main + wide + grid(axis("compute_dtype", ["float32"], lambda value: value), pairs(seeds))
