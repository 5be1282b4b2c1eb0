"""The structure that docs/architecture.md promises, read from the imports themselves."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "altgrad_jax"
MODULES = sorted(path for path in PACKAGE.rglob("*.py"))

REPORT = {f"report.{name}" for name in ("__init__", "analysis", "figures", "page", "panels", "runs", "statistics",
                                        "tables")}

BENCHMARK = {f"benchmark.{name}" for name in ("__init__", "peers", "programs", "report", "roofline", "suites", "tables",
                                              "timing", "torch_peer", "trace")}

FAULTS = {f"faults.{name}" for name in ("bad_configs", "bad_files", "case", "corruption", "environment", "inputs",
                                         "kills", "numerics", "runs", "soak")}

# From the bottom up; a module may import only from rows above its own, or from its own row where that is no cycle.
LAYERS = [
    {"errors", "__init__", "data.__init__", "faults.__init__"},
    {"files", "formats", "flops", "goodput", "process", "data.tokenizer"},
    {"format_rules", "whatif", "rank_alerts"},
    {"config"},
    {"quantize", "quant_dot"},
    {"quantization", "ledger", "diagnostics", "cli", "cross_entropy", "model", "optimizer", "metrics", "stability",
     "data.sources"},
    {"data.prepare", "hf", "environment", "distributed", "mesh"},
    {"data.dataset", "checkpoint", "logger", "console"},
    {"step", "verdict"},
    REPORT,
    {"generate"},
    {"evaluation"},
    {"training"},
    {"campaign", "checkpoint_benchmark", "dry_run", "sweep", *BENCHMARK},
    FAULTS,
]
OWNERS = {"flax": {"model"}, "orbax": {"checkpoint", "checkpoint_benchmark"}, "wandb": set(),
          "tiktoken": {"data.tokenizer"}, "torch": {"benchmark.torch_peer"}, "transformers": {"benchmark.torch_peer"}}
MAY_JIT = {"step", "generate", "benchmark.programs", "quantize"}
NO_JAX = {"errors", "files", "config", "formats", "format_rules", "whatif", "rank_alerts", "cli", "logger", "console",
          "verdict",
          "flops", "goodput", "process", "data.tokenizer", "data.sources", "data.prepare", *REPORT,
          *(BENCHMARK - {"benchmark.programs", "benchmark.report", "benchmark.suites"})}


def name_of(path):
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts)


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
    names = {name.removeprefix("altgrad_jax.") for name in imports_of(path) if name.startswith("altgrad_jax.")}
    return names & known


def test_every_module_has_a_layer():
    assert sorted(name_of(path) for path in MODULES) == sorted(set().union(*LAYERS))


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_imports_point_down(path):
    name = name_of(path)
    if name == "__init__":  # the package offers train() on demand
        return
    level = next(i for i, layer in enumerate(LAYERS) if name in layer)
    allowed = set().union(*LAYERS[:level + 1])
    assert internal_imports(path) <= allowed, f"{name} imports from above itself"


def test_modules_of_one_layer_do_not_import_each_other_in_circles():
    graph = {name_of(path): internal_imports(path) for path in MODULES if name_of(path) != "__init__"}
    done = set()
    while len(done) < len(graph):
        free = {name for name, needs in graph.items() if name not in done and needs - {"__init__"} <= done}
        assert free, f"an import cycle among {sorted(set(graph) - done)}"
        done |= free


@pytest.mark.parametrize("package, owners", OWNERS.items())
def test_a_library_is_imported_in_one_place(package, owners):
    users = {name_of(path) for path in MODULES if any(name.split(".")[0] == package for name in imports_of(path))}
    assert users == owners


def test_only_the_listed_modules_compile():
    users = set()
    for path in MODULES:
        calls = {ast.unparse(node) for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Attribute)}
        if "jax.jit" in calls:
            users.add(name_of(path))
    assert users == MAY_JIT


@pytest.mark.parametrize("name", sorted(NO_JAX))
def test_modules_that_must_start_at_once_do_not_import_jax(name):
    path = PACKAGE / (name.replace(".", "/") + ".py")
    assert not any(imported.split(".")[0] == "jax" for imported in imports_of(path))


def test_only_the_top_sees_the_config_dict():
    users = {name_of(path) for path in MODULES if any(name.startswith("ml_collections") for name in imports_of(path))}
    assert users == {"config", "cli"}


def test_scripts_hold_flags_and_one_call():
    for path in (ROOT / "scripts").glob("*.py"):
        assert len(path.read_text().splitlines()) < 140, f"{path.name} holds logic that tests cannot import"
