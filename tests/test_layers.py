"""The structure that docs/architecture.md promises, computed from folder names and imports."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "altgrad_jax"
MODULES = sorted(PACKAGE.rglob("*.py"))
# From the ground up. A module imports from lower floors and from its own room.
FLOORS = [
    {"errors"},
    {"files"},
    {"numerics", "data"},
    {"conflicts"},
    {"config"},
    {"models", "step", "cli"},
    {"instrumentation"},
    {"run"},
    {"inference", "report", "bench", "commands"},
]
# `step` traces the models, and the models know nothing of it.
WITHIN_A_FLOOR = {("step", "models")}
OWNERS = {
    "flax": {"models.linear", "models.transformer", "models.gpt2", "models.llama"},
    "orbax": {"run.checkpoint"},
    "wandb": {"run.wandb"},
    "tensorboardX": {"run.tensorboard"},
    "submitit": {"run.launch"},
    "altair": {"report.figures"},
    "jinja2": {"report.page"},
    "vl_convert": {"report.page"},
    "tiktoken": {"data.tokenizer"},
    "tokenizers": {"data.tokenizer"},
    "requests": {"data.sources", "run.wandb"},
    "torch": {"bench.torch_peer"},
    "transformers": {"bench.torch_peer"},
}
# `numerics.rounding` compiles the canary, and `numerics.recipe_certificate` slots: as the device at hand computes them.
# `step.update`, `numerics.slot_quantization` and `instrumentation.numbers` use jax.jit so that what is met again is not
# traced again; `instrumentation.rewrite` makes the calls of a user's program anew. `run.recorder` puts a row together
# behind a step that is not ours.
MAY_COMPILE = {
    "step.program",
    "step.update",
    "numerics.slot_quantization",
    "instrumentation.rewrite",
    "instrumentation.numbers",
    "inference.certify",
    "inference.generate",
    "inference.oscillation",
    "inference.precision_map",
    "run.recorder",
    "bench.programs",
    "numerics.rounding",
    "numerics.recipe_certificate",
}
# What a script needs before it has understood its command line must start at once.
WITHOUT_JAX = {
    "errors",
    "files",
    "conflicts",
    "config",
    "cli",
    "commands",
    "numerics.formats",
    "numerics.layers",
    "numerics.recipe_reference",
    "numerics.recipes",
    "numerics.rules",
    "numerics.scales",
    "numerics.whatif",
}
ROOMS_WITHOUT_JAX = {"report"}


def name_of(path):
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")


def room_of(name):
    return name.partition(".")[0]


def imports_of(path):
    """Names of the modules that a file imports anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def internal_imports(path):
    known = {name_of(module) for module in MODULES}
    return {name.removeprefix("altgrad_jax.") for name in imports_of(path) if name.startswith("altgrad_jax.")} & known


def importers_of(package):
    return {name_of(path) for path in MODULES if any(name.split(".")[0] == package for name in imports_of(path))}


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_imports_point_down(path):
    room = room_of(name_of(path))
    if name_of(path) in ("__init__", "train"):  # the front door: offers what the rooms hold, on demand
        return
    floor = next(i for i, rooms in enumerate(FLOORS) if room in rooms)
    below = set().union(*FLOORS[:floor])
    for other in map(room_of, internal_imports(path)):
        assert other == room or other in below or (room, other) in WITHIN_A_FLOOR, f"{room} imports from {other}"


def test_no_module_imports_itself_by_way_of_others():
    # Importing a module of a package runs the package's own file first, which is no cycle of ours.
    packages = {name_of(path) for path in MODULES if path.name == "__init__.py"}
    graph = {name_of(path): internal_imports(path) - packages for path in MODULES}
    done = set()
    while len(done) < len(graph):
        free = {name for name, needs in graph.items() if name not in done and needs <= done}
        assert free, f"an import cycle among {sorted(set(graph) - done)}"
        done |= free


@pytest.mark.parametrize("package, owners", OWNERS.items())
def test_a_library_is_imported_in_one_place(package, owners):
    assert importers_of(package) == owners


def test_only_the_listed_modules_compile():
    users = set()
    for path in MODULES:
        calls = {ast.unparse(node) for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Attribute)}
        if "jax.jit" in calls:
            users.add(name_of(path))
    assert users == MAY_COMPILE


def test_what_must_start_at_once_does_not_import_jax():
    users = importers_of("jax")
    assert not users & WITHOUT_JAX
    assert not {name for name in users if room_of(name) in ROOMS_WITHOUT_JAX}


def test_numerics_know_no_config_and_only_the_top_sees_the_config_dict():
    assert importers_of("ml_collections") == {"config", "cli"}


def test_scripts_hold_flags_and_one_call():
    # compare_checkouts imports the package of two other checkouts, so it cannot keep its logic in this one.
    for path in set((ROOT / "scripts").glob("*.py")) - {ROOT / "scripts" / "compare_checkouts.py"}:
        assert len(path.read_text().splitlines()) < 140, f"{path.name} holds logic that tests cannot import"
