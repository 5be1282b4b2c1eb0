"""Where `update` and `program` are found by the name of the module that was both."""

from altgrad_jax.program import (
    MemberFunctions,
    Observed,
    StepFunctions,
    make_diagnose,
    make_evaluate,
    make_step_functions,
    over_members,
)
from altgrad_jax.update import SPARSE, Inputs, StepOptions, TrainState, make_loss, state_shardings

__all__ = ["SPARSE", "Inputs", "MemberFunctions", "Observed", "StepFunctions", "StepOptions", "TrainState",
           "make_diagnose", "make_evaluate", "make_loss", "make_step_functions", "over_members", "state_shardings"]
