"""Shows that a change moves no number: whether two checkouts compile the same programs and make the same records.

  git worktree add ../before HEAD~1
  python scripts/compare_checkouts.py ../before . --tokens data/bytes --report equal.md

Programs: init, run, evaluate, diagnose and the programs of members, for 17 tiny configs on 8 CPU devices, are lowered
in both checkouts (nothing is compiled), and the sha256 of their StableHLO is compared. Equal text is an equal program.
`jax.result_info`, the path of a result in its Python container, is a label and is left out.

Runs, with --tokens (a folder of byte tokens from scripts/prepare_data.py): six short trainings by scripts/train.py of
each checkout; compared are metrics.jsonl and diagnostics.jsonl, to the byte but for the order of the columns in a row,
and every array of the last checkpoint. So are the names of the metrics, in any order.

Exit code: 0 all equal, 1 something differs, 2 a checkout could not be compared.
"""

import argparse
import difflib
import hashlib
import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

# Module names of earlier layouts of this package, so that any two commits can be compared.
FORMER_NAMES = {
    "step.stability": ("stability",),
    "step.program": ("program", "step"),
    "step.update": ("update", "step"),
    "numerics.rules": ("format_rules",),
    "step.mesh": ("mesh",),
    "models.gpt2": ("model",),
    "step.quantization": ("quantization",),
    "run.checkpoint": ("checkpoint",),
}
# Settings and their values that have another name in checkouts of before schema version 6.
FORMER_WORDS = {
    "reference_gradient": "use_shadow",
    "reference_interval": "shadow_interval",
    "1x32": "block32",
    "ulp_adamw_mean": "ulp_adamw",
}
SMOKE = ["--config=configs/smoke.py", "--config.max_steps=20", "--config.warmup_steps=5"]
E4M3 = ["--config.use_fp8=True", "--config.formats=E4M3"]
RUNS = {
    "bf16": [],
    "float32 accumulation dropout": [
        "--config.compute_dtype=float32",
        "--config.grad_accum_steps=2",
        "--config.dropout=0.1",
    ],
    "E4M3": E4M3,
    "E5M2 stochastic ulp_adamw_mean reference": [
        "--config.use_fp8=True",
        "--config.formats=E5M2",
        "--config.weights_at_rest=stochastic",
        "--config.optimizer=ulp_adamw_mean",
        "--config.operand_rounding=stochastic",
        "--config.weights_at_rest=stochastic",
        "--config.reference_gradient=True",
        "--config.reference_interval=5",
        "--config.operand_rounding=nearest,stochastic,stochastic",
    ],
    "E4M3 1x32 wsd": [*E4M3, "--config.scaling=1x32", "--config.schedule=wsd"],
    "E3M4 grid host batches": [
        "--config.use_fp8=True",
        "--config.formats=E3M4,head=BF16",
        "--config.optimizer=grid",
        "--config.data_placement=host",
        "--config.metrics=all",
    ],
}


def configs() -> dict:
    """{name: (changes to the model, to StepOptions, to QuantOptions or None without formats, fsdp)}."""
    stored, shift = dict(weights_at_rest="nearest"), dict(emergency_formats=("E5M2",), emergency_patience=2)
    return {
        "bf16": ({}, {}, None, 1),
        "float32": (dict(compute_dtype="float32"), dict(schedule="wsd", decay_steps=5), None, 1),
        "grad_accum": ({}, dict(grad_accum_steps=2), None, 1),
        "dropout grad_accum": (dict(dropout=0.1), dict(grad_accum_steps=2), None, 1),
        "cosine, host batches": ({}, dict(schedule="cosine", data_on_device=False), None, 1),
        "no metric groups E4M3": ({}, dict(metric_groups=()), {}, 1),
        "reference/3": ({}, dict(reference_gradient=True, reference_interval=3), None, 1),
        "fsdp=2": (dict(n_embd=128), {}, None, 2),
        "fsdp=2 E4M3 nearest grad_accum": (
            dict(n_embd=128),
            dict(grad_accum_steps=2, reference_gradient=True),
            stored,
            2,
        ),
        "E4M3 adamw float32 master": ({}, {}, {}, 1),
        "E4M3 nearest ulp_adamw_mean": ({}, dict(optimizer="ulp_adamw_mean"), stored, 1),
        "stochastic grid reference/3": (
            {},
            dict(optimizer="grid", reference_gradient=True, reference_interval=3),
            dict(weights_at_rest="stochastic", stochastic=(True,) * 3),
            1,
        ),
        "error_feedback reference": ({}, dict(reference_gradient=True), dict(weights_at_rest="error_feedback"), 1),
        "1x32": ({}, dict(optimizer="ulp_precondition_before_adam"), dict(scaling=("1x32",) * 3), 1),
        "native": ({}, {}, dict(native=True), 1),
        "emergency": ({}, {}, dict(**stored, **shift, saturate=False), 1),
        "range_clip dropout": (
            dict(dropout=0.1),
            dict(grad_accum_steps=2),
            dict(range_clip=1.0, stochastic=(False, False, True)),
            1,
        ),
    }


def module(name: str):
    """The module of this name in the checkout that is imported, under the name that it has there."""
    for candidate in (name, *FORMER_NAMES.get(name, ())):
        try:
            return importlib.import_module(f"altgrad_jax.{candidate}")
        except ModuleNotFoundError:
            continue
    raise ModuleNotFoundError(f"this checkout has no module {name}")


def in_words_of(checkout: Path, text: str) -> str:
    """A flag as the checkout spells it."""
    known = (checkout / "altgrad_jax" / "config.py").read_text()
    for word, former in FORMER_WORDS.items():
        text = text if "RENAMED_IN_6" in known else text.replace(word, former)
    return text


def lower_all(folder: Path, only: str) -> None:
    """Writes the programs of the checkout that is imported, each to folder/CONFIG.FUNCTION."""
    for name, choices in configs().items():
        if only not in name:
            continue
        lowered, metric_names = lower(*choices)
        for function, program in lowered.items():
            text = re.sub(r',? ?jax\.result_info = "[^"]*",? ?', "", program.as_text()).replace(" {}", "")
            (folder / f"{name}.{function}".replace("/", "_")).write_text(text)
        (folder / f"{name}.metric_names".replace("/", "_")).write_text("\n".join(metric_names))


def lower(model: dict, options: dict, quant: dict | None, fsdp: int) -> tuple[dict, tuple[str, ...]]:
    """({function: lowered program}, names of the metrics) of one config."""
    import jax
    import numpy as np

    program, update = module("step.program"), module("step.update")
    former = {} if hasattr(module("config"), "RENAMED_IN_6") else FORMER_WORDS
    options = {former.get(name, name): former.get(value, value) for name, value in options.items()}
    if quant is not None and "scaling" in quant:
        quant = quant | {"scaling": tuple(former.get(way, way) for way in quant["scaling"])}
    config = module("models.gpt2").GPTConfig(
        **dict(n_layer=2, n_head=2, n_embd=32, block_size=16, vocab_size=64) | model
    )
    if quant is not None:
        rules = module("numerics.rules").resolve_rules(("E4M3", "head=E4M3"), 2)
        options = options | {"quant": module("step.quantization").QuantOptions(rules, **quant)}
    thresholds = module("step.stability").Thresholds(10, 0.5, 1e-8, 20, 100, 8.0, 100)
    sizes = dict(
        batch_size=16, steps_per_dispatch=4, learning_rate=1e-3, max_steps=20, warmup_steps=2, thresholds=thresholds
    )
    chosen = update.StepOptions(**sizes | options)
    mesh = module("step.mesh").data_mesh(jax.devices()[: 8 if fsdp > 1 else 1], fsdp)
    functions = program.make_step_functions(config, chosen, mesh, n_train_windows=50, eval_batch_size=8, seed=1)
    state, inputs = functions.abstract_state, functions.inputs
    windows = jax.ShapeDtypeStruct((16, 17), np.uint16)
    shape = (1000,) if chosen.data_on_device else (4, 16, 17)
    data, n_steps = jax.ShapeDtypeStruct(shape, np.uint16), jax.ShapeDtypeStruct((), np.int32)
    formats = state.quant, inputs.formats
    lowered = {
        "run": functions.run.lower(state, data, n_steps, inputs),
        "init": functions.init.lower(1, inputs.formats),
        "evaluate": functions.evaluate.lower(state.params, windows, *formats),
        "diagnose": functions.diagnose.lower(state.params, windows, *formats),
    }
    for loop, width in (("map", 1), ("vmap", 2)) if fsdp == 1 else ():
        members = program.over_members(functions, jax.devices()[:width], loop)
        state_R, n_R, inputs_R, formats_R = (members.abstract(tree, 4) for tree in (state, n_steps, inputs, formats))
        lowered[f"{loop} run"] = members.run.lower(state_R, data, n_R, inputs_R)
        lowered[f"{loop} evaluate"] = members.evaluate.lower(state_R.params, windows, *formats_R)
    return lowered, functions.metric_names


def write_arrays(run_dir: Path) -> None:
    """Writes arrays.txt beside a run: the sha256 of every array of its newest checkpoint, as its own checkout reads."""
    import jax
    import numpy as np

    arrays, _ = module("run.checkpoint").load_arrays(run_dir, None, ("",))
    leaves = jax.tree_util.tree_flatten_with_path(arrays)[0]
    lines = sorted(
        f"{jax.tree_util.keystr(path, simple=True, separator='/')} {leaf.dtype}{list(leaf.shape)} "
        + hashlib.sha256(np.ascontiguousarray(leaf).tobytes()).hexdigest()
        for path, leaf in leaves
    )
    (run_dir.parent / f"{run_dir.name}.arrays").write_text("\n".join(lines))


def in_checkout(checkout: Path, code: str, devices: int = 1) -> subprocess.Popen:
    """Starts Python code that imports altgrad_jax from this checkout, on CPU devices."""
    environment = os.environ | {
        "PYTHONPATH": f"{checkout.resolve()}:{Path(__file__).resolve().parent}",
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
    }
    return subprocess.Popen([sys.executable, "-c", code], env=environment, cwd=checkout)


def lower_both(checkouts: list[Path], folders: list[Path], only: str) -> None:
    started = [
        in_checkout(
            checkout,
            f"from pathlib import Path; import compare_checkouts as c; c.lower_all(Path({str(folder)!r}), {only!r})",
            devices=8,
        )
        for checkout, folder in zip(checkouts, folders, strict=True)
    ]
    if any([process.wait() for process in started]):
        sys.exit("error: a checkout could not be lowered")


def run_both(checkouts: list[Path], folders: list[Path], tokens: Path, only: str) -> None:
    """Trains every config of RUNS in both checkouts, and writes down the arrays of its last checkpoint."""
    for name, flags in RUNS.items():
        if only not in name:
            continue
        started = []
        for checkout, folder in zip(checkouts, folders, strict=True):
            run_dir = (folder / name.replace(" ", "-")).absolute()
            flags_of_all = [*SMOKE, "--config.wandb_mode=disabled", f"--data_dir={tokens}", f"--workdir={run_dir}"]
            flags_there = [in_words_of(checkout, flag) for flag in flags]
            code = (
                f"import runpy, sys; sys.argv = ['scripts/train.py', *{flags_of_all + flags_there!r}]\n"
                "try: runpy.run_path('scripts/train.py', run_name='__main__')\n"
                "except SystemExit as end:\n"
                "    if end.code: raise\n"
                "from pathlib import Path; import compare_checkouts as c\n"
                f"c.write_arrays(Path({str(run_dir)!r}))"
            )
            started.append(in_checkout(checkout, code))
        if any([process.wait() for process in started]):
            sys.exit(f"error: the run {name} failed in a checkout")


def compared(folders: list[Path]) -> list[tuple[str, int, list[str]]]:
    """(name, bytes, [sha256 in A, in B] or "absent") of every program, record and list of arrays."""
    kept = [
        path.relative_to(folder)
        for folder in folders
        for path in folder.rglob("*")
        if path.is_file()
        and (len(path.relative_to(folder).parts) == 1 or path.name in ("metrics.jsonl", "diagnostics.jsonl"))
    ]
    rows = []
    for name in sorted(set(kept)):
        contents = [in_order(folder / name) if (folder / name).exists() else None for folder in folders]
        sums = ["absent" if content is None else hashlib.sha256(content).hexdigest() for content in contents]
        rows.append((str(name), max(len(content or b"") for content in contents), sums))
    return rows


def in_order(path: Path) -> bytes:
    """The bytes of a file, with the columns of a record's rows, or the names of metrics, sorted."""
    if path.suffix == ".jsonl":
        # Numbers stay the text that they are.
        rows = [json.loads(line, parse_float=str, parse_int=str) for line in path.read_text().splitlines()]
        return "\n".join(json.dumps(row, sort_keys=True) for row in rows).encode()
    if path.suffix == ".metric_names":
        return "\n".join(sorted(path.read_text().splitlines())).encode()
    return path.read_bytes()


def print_difference(folders: list[Path], name: str) -> None:
    a, b = [in_order(folder / name).decode().splitlines() if (folder / name).exists() else [] for folder in folders]
    lines = difflib.unified_diff(a, b, n=0, lineterm="")
    print("".join(f"    {line[:160]}\n" for line, _ in zip(lines, range(12))), end="")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkouts", type=Path, nargs=2, help="folders of the two checkouts")
    parser.add_argument("--tokens", type=Path, help="folder of byte tokens; without it only programs are compared")
    parser.add_argument("--keep", type=Path, help="folder for programs and runs; default: a temporary one")
    parser.add_argument("--only", default="", help="configs whose name contains this")
    parser.add_argument("--report", type=Path, help="Markdown file for the table")
    args = parser.parse_args()
    keep = args.keep or Path(tempfile.mkdtemp())
    folders = [keep / "A", keep / "B"]
    for folder in folders:
        folder.mkdir(parents=True, exist_ok=True)
    lower_both(args.checkouts, folders, args.only)
    if args.tokens:
        run_both(args.checkouts, folders, args.tokens.absolute(), args.only)
    table = ["| program, record or arrays | bytes | A | B | |", "|---|---|---|---|---|"]
    different = 0
    for name, size, sums in (rows := compared(folders)):
        equal = sums[0] == sums[1]
        different += not equal
        print(f"{name:60} {size:9} {sums[0][:12]} {sums[1][:12]} {'equal' if equal else 'DIFFERENT'}")
        table.append(f"| {name} | {size} | {sums[0][:12]} | {sums[1][:12]} | {'equal' if equal else '**different**'} |")
        if not equal:
            print_difference(folders, name)
    print(f"{len(rows) - different} of {len(rows)} equal")
    if args.report:
        args.report.write_text("\n".join([*table, "", f"{len(rows) - different} of {len(rows)} equal.", ""]))
    return int(different > 0)


if __name__ == "__main__":
    sys.exit(main())
