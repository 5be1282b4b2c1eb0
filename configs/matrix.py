"""The whole question as one sweep: formats x how weights are kept x learning rates x seeds, one operand at a time, and
what the scales come from.

Command:   python scripts/prepare_data.py --input ACTS --tokenizer bytes --out data/bytes
           python scripts/sweep.py --config configs/matrix.py --out runs/matrix --cpu_devices=2
           python scripts/report.py runs/matrix -o report.html
Members:   bfloat16 and float32; each format with a float32 master, stored to nearest and stored stochastically, at
           three learning rates and five seeds; ulp_adamw beside adamw where weights are stored to nearest; at the
           middle rate W, A or G alone in the format, and weights stored in it with A and G exact; scales in float32
           instead of powers of two at all rates; scales of the current amax, and of a longer history, at the middle
           one. E1M6 is E0M7's grid and joins once, as a check that both give the same run. The data seed varies with
           the seed, and at the end every validation window is evaluated, so that the report can tell what each adds.
Time:      docs/results/matrix.md. The model is small (0.1 million parameters, a token is a byte), for two CPU cores.
Expected:  bfloat16 at its best rate ends near a validation loss of 2.1 nats per byte; the rest is the question. The
           published runs had one data seed, 1337, and 128 validation windows.

The base of the sweep is any config: --config.max_steps=2000 trains every member longer.
"""

from altgrad_jax.config import Config, default_config
from altgrad_jax.numerics.formats import DEFAULT_8BIT
from altgrad_jax.run.sweep import axis, grid, only

RATES = (1e-3, 2e-3, 4e-3)
SEEDS = (1, 2, 3, 4, 5)
SAME_GRID = "E1M6"  # as E0M7
LONG_HISTORY = 256


def get_config() -> Config:
    config = default_config()
    config.tokenizer = "bytes"
    config.n_layer, config.n_head, config.n_embd, config.block_size = 2, 4, 64, 64
    config.batch_size, config.max_steps, config.warmup_steps, config.learning_rate = 16, 400, 40, 2e-3
    config.checkpoint_interval, config.eval_interval, config.eval_windows = 400, 100, 128
    config.evaluate_all = True
    config.dead_neuron_window, config.diagnostic_interval, config.layer_interval = 50, 200, 50
    config.run_name, config.tags, config.wandb_mode = "matrix", ("matrix", "bytes"), "disabled"
    return config


def get_sweep(config) -> list[dict]:
    """The members, those first that the answer needs most."""
    measured = {"use_fp8": True, "metrics": "grad,format,ledger", "reference_gradient": True, "reference_interval": 50}
    plain = {"metrics": "grad,update"}

    def arms(kind="", **settings):
        kind = kind or "-".join(settings.values())
        return [
            {"run_name": f"{name}-{kind}" if kind else name, "formats": (name,), **measured, **settings}
            for name in DEFAULT_8BIT
            if name != SAME_GRID
        ]

    def ablations(operands, **settings):
        kind = "rest" if settings else f"only{operands}"
        return [
            {"run_name": f"{name}-{kind}", "formats": only(operands, name), **measured, **settings}
            for name in DEFAULT_8BIT
            if name != SAME_GRID
        ]

    rates = axis("learning_rate", RATES, lambda rate: f"lr{rate:g}")
    middle = axis("learning_rate", RATES[1:2], lambda rate: f"lr{rate:g}")
    seeds = [{"seed": seed, "data_seed": seed, "run_name": f"s{seed}"} for seed in SEEDS]
    return [
        *grid(
            [{"run_name": "bf16", **plain}, {"run_name": "float32", "compute_dtype": "float32", **plain}], rates, seeds
        ),
        *grid(arms(), rates, seeds),
        *grid(ablations("W") + ablations("A") + ablations("G"), middle, seeds),
        *grid([{"run_name": SAME_GRID, "formats": (SAME_GRID,), **measured}], middle, seeds[:1]),
        *grid(arms(weights_at_rest="nearest"), rates, seeds),
        *grid(ablations("W", weights_at_rest="nearest"), middle, seeds),
        *grid(arms(weights_at_rest="stochastic"), rates, seeds),
        *grid(arms(weights_at_rest="nearest", optimizer="ulp_adamw"), rates, seeds),
        *grid(arms("float32scale", scale_rounding="float32"), rates, seeds),
        *grid(arms(scaling="current"), middle, seeds),
        *grid(arms("history", amax_history=LONG_HISTORY), middle, seeds),
    ]
