"""Which 8-bit grid trains, and what decides it, as one sweep: formats x what scales are rounded to x how weights are
kept x learning rates, over pairs of a seed and a data seed.

Command:   python scripts/prepare_data.py --input ACTS --tokenizer bytes --val_fraction=0.005 --out data/bytes
           python scripts/sweep.py --config configs/matrix.py --out runs/matrix --cpu_devices=2
           python scripts/report.py runs/matrix -o report.html
Members:   bfloat16 at four learning rates, float32 at two; each format with a float32 master and scales that are powers
           of two at the two rates that matter. At the format's own best rate (OWN_RATE, from earlier runs with other
           seeds): scales that are float32 numbers; weights stored to nearest, stochastically, and by ulp_adamw; for
           formats that lost something W, A or G alone; scales of the current amax. E1M6 is E0M7's grid and joins once,
           as a check that both give the same run. The data seed varies with the seed, and at the end every validation
           window is evaluated, so that the report can tell what each adds. Statistics of every layer take a third of
           the time, so the first pair alone has them, in the arms with a master and those stored to nearest.
Time:      docs/results/matrix.md. The model is small (0.1 million parameters, a token is a byte), for two CPU cores.
Expected:  bfloat16 at its best rate ends near a validation loss of 2.1 nats per byte; the rest is the question.

The base of the sweep is any config: --config.max_steps=2000 trains every member longer.
"""

from altgrad_jax.config import Config, default_config
from altgrad_jax.numerics.formats import DEFAULT_8BIT
from altgrad_jax.run.sweep import axis, grid, only

SEEDS = tuple(range(1, 9))
RATES = (2e-3, 4e-3)
OWN_RATE = {name: 4e-3 for name in DEFAULT_8BIT} | {"E0M7": 2e-3}
ABLATED = ("E0M7", "E7M0")  # whose gap with a float32 master was separated from 0
SAME_GRID = "E1M6"  # as E0M7
FORMATS = tuple(name for name in DEFAULT_8BIT if name != SAME_GRID)


def get_config() -> Config:
    config = default_config()
    config.tokenizer = "bytes"
    config.n_layer, config.n_head, config.n_embd, config.block_size = 2, 4, 64, 64
    config.batch_size, config.max_steps, config.warmup_steps, config.learning_rate = 16, 400, 40, 2e-3
    config.checkpoint_interval, config.eval_interval, config.eval_windows = 400, 100, 128
    config.evaluate_all = True
    config.metrics, config.diagnostic_interval, config.layer_interval = "none", 0, 50
    config.run_name, config.tags, config.wandb_mode = "matrix", ("matrix", "bytes"), "disabled"
    return config


MEASURED = {
    "metrics": "grad,format,ledger", "reference_gradient": True, "reference_interval": 50, "diagnostic_interval": 200
}  # fmt: skip


def pairs(seeds=SEEDS):
    return [{"seed": seed, "data_seed": seed, "run_name": f"s{seed}"} for seed in seeds]


def at(rates):
    return axis("learning_rate", rates, lambda rate: f"lr{rate:g}")


def arm(name, kind="", formats=None, **settings):
    run_name = f"{name}-{kind}" if kind else name
    return {"run_name": run_name, "use_fp8": True, "formats": formats or (name,), **settings}


def at_own_rate(kind="", names=None, operands=None, seeds=SEEDS, **settings):
    """Each format at the rate that is best for it, over pairs of seeds."""
    for name in names or FORMATS:
        formats = operands and only(operands, name)
        yield from grid([arm(name, kind, formats, **settings)], at([OWN_RATE[name]]), pairs(seeds))


def measured_first(kind="", **settings):
    """at_own_rate, the first pair with statistics of every layer."""
    yield from at_own_rate(kind, seeds=SEEDS[:1], **settings, **MEASURED)
    yield from at_own_rate(kind, seeds=SEEDS[1:], **settings)


def get_sweep(config) -> list[dict]:
    """The members, those first that the answer needs most."""
    wide = [{"run_name": "float32", "compute_dtype": "float32"}]
    other_rate = [point for name in FORMATS for point in grid([arm(name)], at(set(RATES) - {OWN_RATE[name]}), pairs())]
    return [
        *grid([{"run_name": "bf16"}], at((*RATES, 1e-3, 8e-3)), pairs()),
        *measured_first(),
        *other_rate,
        *measured_first("nearest", weights_at_rest="nearest"),
        *at_own_rate("stochastic", weights_at_rest="stochastic"),
        *at_own_rate("float32scale", scale_rounding="float32"),
        *grid(wide, at(RATES), pairs()),
        *grid([arm(SAME_GRID)], at([OWN_RATE["E0M7"]]), pairs(SEEDS[1:2])),
        *grid([arm(name) for name in FORMATS], at((8e-3,)), pairs(SEEDS[:2])),
        *at_own_rate("nearest-ulp_adamw", weights_at_rest="nearest", optimizer="ulp_adamw"),
        *at_own_rate("onlyW", ABLATED, "W"),
        *at_own_rate("onlyA", ABLATED, "A"),
        *at_own_rate("onlyG", ABLATED, "G"),
        *at_own_rate("current", scaling="current"),
    ]
