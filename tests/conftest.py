"""Tests run on the CPU backend, without network, whatever the machine offers."""

import gc
import os
import signal
from pathlib import Path

import pytest

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["WANDB_MODE"] = "disabled"  # a test that wants W&B asks for a mode itself
for name in ("WANDB_API_KEY", "WANDB_PROJECT", "WANDB_ENTITY", "WANDB_TAGS", "WANDB_DISABLED"):
    os.environ.pop(name, None)

# Many tests compile the same small programs: with a cache, only the distinct ones take time.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(__file__).parent.parent / ".cache" / "xla"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")

# Tracing makes many objects that stay: looking through them again and again took 6% of the time of the step's tests.
gc.set_threshold(200_000, 50, 100)

# A shell starts background jobs with SIGINT ignored, and children inherit that: tests that interrupt one would hang.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def cpu_devices(n: int) -> str:
    """XLA_FLAGS of a process in which the CPU is n devices."""
    return f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={n}"


# Files that take long, longest first: two processes that take whole files then end at about the same time.
LONG_FILES = (
    "test_recipe_step",
    "test_sweep",
    "test_training",
    "test_moments_step",
    "test_attention_step",
    "test_llama_run",
    "test_initial",
    "test_step_formats",
    "test_training_formats",
    "test_step",
    "test_faults",
    "test_mesh",
    "test_products_formats",
    "test_benchmark",
    "test_checkpoint_processes",
    "test_generate",
    "test_gpt2",
    "test_faults_numerics",
    "test_wandb",
    "test_optimizers",
    "test_faults_inputs",
    "test_report",
    "test_dry_run",
)


@pytest.fixture(autouse=True, scope="session")
def programs_compiled_once():
    """Runs of one program, which differ in their data or are continued, take it compiled from the first of them."""
    from altgrad_jax.step.program import Program

    compile_, known = Program.compile, {}

    def once(self, n_threads=3):
        sizes = self._n_train_tokens, self._n_val_windows, self._diagnoses, self.width, self.member_loop
        key = self.functions.step, self.shared, self._xla_options, *sizes
        if key not in known:
            compile_(self, n_threads)
            known[key] = self.compiled
        self.compiled = known[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Program, "compile", once)
        yield


@pytest.fixture(autouse=True)
def signal_handlers():
    """cli.run_script, which ends a process, leaves other handlers behind."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


# Files about exact arithmetic, which `make test` compiles as a user's program is.
EXACT_FILES = (
    "test_bias",
    "test_cross_entropy",
    "test_formats",
    "test_gpt2",
    "test_hadamard",
    "test_histograms",
    "test_instrument",
    "test_layers",
    "test_ledger",
    "test_moments",
    "test_optimizers",
    "test_products",
    "test_products_formats",
    "test_recipe_certificate",
    "test_recipes",
    "test_rounding",
    "test_scales",
    "test_slot_products",
    "test_slots",
)


@pytest.hookimpl(tryfirst=True)  # before -m selects
def pytest_collection_modifyitems(items):
    for item in items:
        if item.path.stem in EXACT_FILES:
            item.add_marker("exact")
    order = {name: i for i, name in enumerate(LONG_FILES)}
    items.sort(key=lambda item: order.get(item.path.stem, len(order)))  # stable: within a file nothing moves
