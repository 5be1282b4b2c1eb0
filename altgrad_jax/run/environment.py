"""What a process takes from its surroundings and no setting names: jax's options and the environment's variables.

Every option of jax (jax.config) is of one of three kinds. FIXED ones decide numbers, or end a run where they are not as
jax delivers them: while this package computes they have that value. HARMLESS ones decide no number. The rest, an option
of a newer jax among them, and the variables of VARIABLES and XLA_FLAGS, are recorded at every start, and a run is not
continued under others.
"""

import contextlib
import os
import re
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import jax

from altgrad_jax.errors import UserError

FIXED: dict[str, Any] = {
    # Random numbers: what a seed means.
    "jax_default_prng_impl": "threefry2x32",
    "jax_threefry_partitionable": True,
    "jax_enable_custom_prng": False,
    "jax_legacy_prng_key": "allow",
    "jax_random_seed_offset": 0,
    "jax_high_dynamic_range_gumbel": False,
    # Types, and the precision of products.
    "jax_enable_x64": False,
    "jax_explicit_x64_dtypes": "warn",
    "jax_numpy_dtype_promotion": "standard",
    "jax_numpy_rank_promotion": "allow",
    "jax_default_matmul_precision": None,
    "jax_allow_f16_reductions": True,
    # Which program is traced, and how far it is optimized.
    "jax_disable_jit": False,
    "jax_use_direct_linearize": True,
    "jax_softmax_custom_jvp": False,
    "eager_constant_folding": False,
    "jax_disable_most_optimizations": False,
    "jax_optimization_level": "UNKNOWN",
    "jax_exec_time_optimization_effort": 0.0,
    "jax_memory_fitting_effort": 0.0,
    "jax_memory_fitting_level": "O2",
    "jax_compiler_enable_remat_pass": True,
    # Searches for mistakes, which take a run's own NaN for one, or its transfers. The run looks for NaN itself.
    "jax_debug_nans": False,
    "jax_debug_infs": False,
    "jax_debug_key_reuse": False,
    "jax_check_tracer_leaks": False,
    "jax_enable_checks": False,
    "jax_error_checking_behavior_nan": "ignore",
    "jax_error_checking_behavior_divide": "ignore",
    "jax_error_checking_behavior_oob": "ignore",
    "jax_transfer_guard": None,
    "jax_transfer_guard_host_to_device": None,
    "jax_transfer_guard_device_to_device": None,
    "jax_transfer_guard_device_to_host": None,
    "jax_no_tracing": False,
    "jax_no_execution": False,
    "jax_thread_guard": False,
}
# Patterns of whole names.
HARMLESS = re.compile(
    "|".join(
        (
            # What is said, and where programs are kept.
            "jax_(log|logging|debug_log|traceback|tracer_error|pprint|explain|distributed_debug|dump|include)_?.*",
            "jax_(hlo_source_file|source_url|captured_constants|compiler_detailed_logging|send_traceback)_.*",
            "jax_(en|dis)able_(compilation_cache|bwd_checks|recoverability|preemption_service)",
            "jax_(compilation_cache|persistent_cache|raise_persistent|remove_custom_partitioning|share_binary)_.*",
            "jax_(array_garbage_collection_guard|debug_leaked_clients.*|export_.*|serialization_version|jax2tf_.*)",
            "jax2tf_.*",
            # Which devices and processes; the manifest has them (`device`, `mesh`, `processes`).
            "jax_(platforms|platform_name|xla_backend|backend_target|default_device|num_cpu_devices)",
            "jax_(cuda|rocm|oneapi)_visible_devices|jax_pjrt_client_create_options|jax_mock_gpu_topology",
            "jax_(cpu_get_.*_timeout_minutes|cpu_enable_async_dispatch|cpu_collectives_implementation|sort_devices_by_process_index)",
            "jax_(cross_host|force_dcn_cross_host)_.*|jax_check_proxy_envs|mock_num_gpu_processes",
            "jax_(coordinator|coordination|heartbeat|initialization|mtls|distributed)_.*|jax_(num_processes|process_id)",
            "jax_(local_device_ids|slice_index|partition_index|force_tpu_init)",
            # Parts of jax that this package does not use: Pallas, MAGMA, cuSPARSE, ragged products, GPU profiles.
            "jax_(pallas|mosaic|bcoo|ragged_dot)_.*|jax_use_(magma|emit_pipeline_primitive)|jax_pgle_.*",
        )
    )
)
# Variables of libraries that jax calls, which decide numbers.
VARIABLES = ("NVIDIA_TF32_OVERRIDE", "CUBLAS_WORKSPACE_CONFIG", "LIBTPU_INIT_ARGS", "TF_CUDNN_DETERMINISTIC")
# Flags of XLA that decide no number, or that a run sets itself (device.py), or did in earlier versions (autotune).
_HARMLESS_FLAGS = re.compile(
    "--xla_(dump_.*|force_host_platform_device_count|gpu_cuda_data_dir|gpu_deterministic_ops"
    "|gpu_(dump|load)_autotune_results_.*|gpu_per_fusion_autotune_cache_dir|hlo_profile|.*_parallelism)(=.*)?"
)

_REFUSED = "numbers could differ from those of one uninterrupted run"


@contextlib.contextmanager
def fixed_options() -> Iterator[None]:
    """A context, or a function's decorator, in which jax's options of FIXED have their values. Says what it overrides.

    Raises:
      UserError: an option is set otherwise by a context around this call.
    """
    before = {name: value for name, value in _options().items() if name in FIXED and _differs(name, value)}
    for name in before:
        jax.config.update(name, FIXED[name])
    try:
        stubborn = next((name for name in before if _differs(name, _options()[name])), None)
        if stubborn:
            raise UserError(
                f"{stubborn}={before[stubborn]} is set by a context around this call, and a run computes with "
                f"{FIXED[stubborn]}: call it outside that context"
            )
        if before:
            asked = ", ".join(f"{name}={_plain(value)}" for name, value in before.items())
            print(
                f"note: {asked} is not followed, so that equal settings give equal numbers: jax's own default is used",
                file=sys.stderr,
            )
        yield
    finally:
        for name, value in before.items():
            jax.config.update(name, value)


def recorded() -> dict[str, str]:
    """{name: value} of the options and variables that may decide numbers: what `starts` holds of them.

    FIXED options are among them where they do not have their value, as in a loop that is not of this package.
    """
    options = {name: value for name, value in _options().items() if not HARMLESS.fullmatch(name)}
    rest = {name: _plain(value) for name, value in options.items() if name not in FIXED or _differs(name, value)}
    return dict(sorted(rest.items())) | {name: os.environ[name] for name in VARIABLES if name in os.environ}


def difference(start: Mapping[str, Any]) -> list[str]:
    """A line for each thing that was otherwise at `start` (of a manifest's `starts`), so that numbers may differ.

    A record of before there was `environment` says nothing of it. Options of another version of jax are not compared,
    because defaults change with versions.
    """
    lines = []
    old, new = _xla_flags(start.get("xla_flags")), _xla_flags(os.environ.get("XLA_FLAGS"))
    if "xla_flags" in start and old != new:
        lines.append(f"XLA_FLAGS: {' '.join(old) or 'none'} in the run, {' '.join(new) or 'none'} now")
    before = start.get("environment")
    if not isinstance(before, Mapping):
        return lines
    now, same_jax = recorded(), start.get("versions", {}).get("jax") == jax.__version__
    for name in sorted({*before, *now}):
        if (same_jax or name in VARIABLES) and before.get(name) != now.get(name):
            lines.append(f"{name}: {before.get(name, 'not set')} in the run, {now.get(name, 'not set')} now")
    return lines


def refuse_other(run_dir: Any, manifest: Mapping[str, Any]) -> None:
    """UserError where the run of this manifest began in another environment, as far as numbers depend on it."""
    if lines := difference(next(iter(manifest["starts"]), {})):
        raise UserError(
            f"{run_dir} was begun in another environment, so its {_REFUSED}: {'; '.join(lines)}. Set that back, or "
            "give another folder (--workdir) to start a new run"
        )


def _options() -> dict[str, Any]:
    return jax.config.values  # pyright: ignore[reportAttributeAccessIssue]  # made at run time


def _differs(name: str, value: Any) -> bool:
    return _plain(value) != _plain(FIXED[name])


def _plain(value: Any) -> str:
    """An option's value as text; of an enumeration, its value's or name's."""
    return str(getattr(value, "name", value)).lower()


def _xla_flags(text: str | None) -> list[str]:
    """The flags that may decide numbers, sorted."""
    return sorted(flag for flag in (text or "").split() if not _HARMLESS_FLAGS.fullmatch(flag))
