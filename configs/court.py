"""The court of recipes: every recipe beside bfloat16, on the same batches, from one compiled program.

Command:   python scripts/prepare_data.py --input ACTS --tokenizer bytes --val_fraction=0.005 --out data/court
           python scripts/sweep.py --config configs/court.py --out runs/court --data_dir=data/court --cpu_devices=2
           python scripts/report.py runs/court -o court.html
Argument:  court.py:llama is the same court on the Llama block. Quartet II is not in it: its transforms of 128 do not
           divide the width of that block's MLP.
Members:   the pilot (PILOT arms at RATES, with the first seeds), then every arm at its rate, seed by seed, so that a
           court that is stopped has whole seeds. Arms whose names have a part or a suffix are controls: they differ
           from the arm before in one thing. `~head` keeps the head alone in bfloat16, so that arms compare.
Time:      docs/results/court.md.
Expected:  bfloat16 ends near 2.2 nats per byte, below the 2.4 of pairs of bytes; the rest is the question.

Other sizes: --config.n_layer, --config.n_embd (multiples of 128 for Quartet II), --config.max_steps, and on a GPU the
baseline's: --config.n_layer=6 --config.n_head=6 --config.n_embd=384 --config.block_size=256 --config.tokenizer=gpt2.
"""

from altgrad_jax.config import Config, default_config
from altgrad_jax.errors import UserError
from altgrad_jax.run.sweep import axis, grid

SEEDS = tuple(range(1, 9))
RATES = (1e-3, 2e-3, 4e-3, 8e-3)
PILOT_SEEDS = 2
OWN_RATE = 2e-3
PILOT = ("bf16", "nvfp4~head", "mxfp4")
EIGHT_BITS = ("mxfp8", "mxfp8_floor", "rowwise", "mxfp6")
FOUR_BITS = ("mxfp4", "mxfp4_tseng", "nvfp4", "fp4_all_the_way", "tetrajet_v2", "quartet_2", "ufp4")
CONTROLS = (
    *("nvfp4~head", "nvfp4:fprop~head", "nvfp4:backward~head", "nvfp4_headroom~head", "nvfp4_redrawn~head"),
    *("nvfp4_w1x16~head", "quartet_2_sr", "ufp4_no_rht", "ufp4_e2m1", "ufp4_e2m1_no_rht"),
)
ARMS = ("bf16", *EIGHT_BITS, *FOUR_BITS, *CONTROLS)
MODELS = ("gpt2", "llama")


def get_config(argument: str = "gpt2") -> Config:
    if argument not in MODELS:
        raise UserError(f"court.py:{argument} names no model: give {' or '.join(MODELS)}")
    config = default_config()
    config.model, config.tokenizer = argument, "bytes"
    config.n_layer, config.n_head, config.n_embd, config.block_size = 2, 4, 128, 64
    config.batch_size, config.max_steps, config.warmup_steps, config.learning_rate = 4, 1000, 100, OWN_RATE
    config.checkpoint_interval, config.eval_interval, config.eval_windows = 1000, 500, 512
    config.max_checkpoints = 1
    config.metrics, config.diagnostic_interval, config.layer_interval = "none", 0, 50
    config.run_name, config.tags, config.wandb_mode = "court", ("court", "bytes"), "disabled"
    return config


def pairs(seeds):
    return [{"seed": seed, "data_seed": seed, "run_name": f"s{seed}"} for seed in seeds]


def at(rates):
    return axis("learning_rate", rates, lambda rate: f"lr{rate:g}")


def by(recipes):
    return axis("recipe", [(name,) for name in recipes], lambda value: value[0].replace(":", "-"))


def get_sweep(config: Config):
    arms = [name for name in ARMS if config.model == "gpt2" or not name.startswith("quartet")]
    pilot = grid(by(PILOT), at(RATES), pairs(SEEDS[:PILOT_SEEDS]))
    exact = grid(axis("compute_dtype", ["float32"], lambda value: value), at([OWN_RATE]), pairs(SEEDS))
    main = [point for pair in pairs(SEEDS) for point in grid(by(arms), at([OWN_RATE]), [pair])]
    return list({point["run_name"]: point for point in (*pilot, *main, *exact)}.values())
