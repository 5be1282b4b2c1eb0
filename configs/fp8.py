"""The baseline in an 8-bit number format, and nothing else changed: same model, same batches, same optimizer.

Command:   python scripts/train.py --config configs/fp8.py:E5M2
           python scripts/train.py --config configs/fp8.py:E4M3,ulp_adamw,stochastic
Argument:  FORMAT[,optimizer][,weights]: the format of weights, activations and output gradients in every linear
           layer of the blocks; an optimizer (adamw, ulp_precondition_before_adam, ulp_adamw, ulp_adamw_mean,
           grid); how the weights are kept (float32, nearest, stochastic, error_feedback).
Formats:   E0M7 E1M6 E2M5 E3M4 E4M3 E5M2 E6M1 E7M0, and every other name in altgrad_jax/numerics/formats.py.
Time:      longer than the baseline's, for operands are rounded and measured; not measured for this model.
Expected:  a gap to the baseline that depends on the format: docs/results/formats-small.md.
"""

from altgrad_jax.config import FIELDS, Config, default_config, numbers_in
from altgrad_jax.errors import UserError
from altgrad_jax.numerics.formats import get_format
from altgrad_jax.numerics.rules import AT_REST, OPTIMIZERS


def get_config(argument: str) -> Config:
    name, *choices = argument.split(",")
    config = default_config()
    config.use_fp8, config.formats = True, (get_format(name).name,)
    given = set()
    for choice in choices:
        field = "optimizer" if choice in OPTIMIZERS else "weights_at_rest" if choice in AT_REST else None
        if field is None:
            raise UserError(
                f"configs/fp8.py:{argument} asks for {choice!r}: after the format give an optimizer "
                f"({', '.join(OPTIMIZERS)}) or how weights are kept ({', '.join(AT_REST)})"
            )
        if field in given:
            raise UserError(f"configs/fp8.py:{argument} gives {field} twice: give it once")
        given.add(field)
        config[field] = choice
    derive(config)
    return config


def derive(config: Config) -> None:
    """Names the run by its settings; called again when flags have changed them."""
    numbers = numbers_in(config)
    unlike = [config[name] for name in ("optimizer", "weights_at_rest") if config[name] != FIELDS[name].default]
    config.run_name = "-".join([numbers, *unlike])
    config.checkpoint_dir = f"checkpoints/{config.run_name}"
    config.tags = (numbers, "eurlex", *unlike)
