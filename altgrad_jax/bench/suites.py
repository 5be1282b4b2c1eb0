"""What is timed together: sections of rows, each with its own rounds, and the measurement of one section.

A section is some rows, built in order of importance, and the row that ratios refer to. With a time budget each section
gets the share of what is left that its rows are of all rows still to come; half of that may go to building. Rows that
come later are left out by name, rounds are cut, and a section whose share is too small for its first rows is left out.
"""

import contextlib
import dataclasses
import fnmatch
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import jax

from altgrad_jax.bench import peers, programs, roofline, timing
from altgrad_jax.bench.timing import Unavailable
from altgrad_jax.config import FORMAT_GROUPS, METRIC_GROUPS
from altgrad_jax.errors import UserError
from altgrad_jax.models import flops
from altgrad_jax.step.from_config import flops_per_step, has_cudnn_attention

BARE, ALL_METRICS, LOGGED = "bare step", "all metrics", "all metrics + logging"
BARE_FLOAT32 = "bare step, float32"
METRIC_VARIANTS = {
    "monitor only": {"metrics": "none"},
    **{f"+ {group}": {"metrics": group} for group in METRIC_GROUPS if group not in FORMAT_GROUPS},
    ALL_METRICS: {"metrics": "all"},
}
DISPATCH_STEPS = (1, 2, 5, 10, 25)
SHAPE_FIELDS = ("n_layer", "n_head", "n_embd", "block_size", "vocab_size")  # of a peer, which is a GPT-2
PARAMETER_FIELDS = (*SHAPE_FIELDS, "model", "n_kv_head", "tied_head", "qk_norm")
OPTIMIZER_FIELDS = ("learning_rate", "beta1", "beta2", "adam_eps", "weight_decay", "grad_clip")
# Layers, heads, width; parameters with GPT-2's vocabulary.
LADDER = {"10M": (4, 3, 192), "30M": (6, 6, 384), "100M": (12, 11, 704), "300M": (20, 16, 1024), "1B": (24, 28, 1792)}
GPT2_124M = (12, 12, 768)
SCALING = {
    "batch_size": (1, 2, 4, 8, 16),
    "n_embd": (128, 256, 384, 512, 768),
    "n_layer": (2, 4, 6, 8, 12),
    "block_size": (64, 128, 256, 512),
}
SCALING_METRICS = ("none", "activation", "param", "update", "grad", "param,update", "all")
HEAD_WIDTH = 64
ALWAYS = 2  # first rows of a section, which no time budget leaves out
BUDGET = "the time budget does not reach it"
SUITES = ("metrics", "dispatch", "formats", "recipes", "attention", "sizes", "scaling", "rounding")
QUICK_CUTS = (
    "--quick: fewer rounds; left out: single groups of metrics, most K, torch.compile, and the suites sizes, "
    "formats, recipes, attention, rounding, scaling"
)


def format_variants(fmt, native=False):
    """Variants of the step in a number format; each "+" adds to the formatted step alone or to all its statistics."""
    base = {"use_fp8": True, "formats": (fmt,)}
    rows = {
        f"{fmt} alone": base | {"metrics": "none"},
        f"{fmt} + operand statistics": base | {"metrics": "format"},
        f"{fmt} + update ledger": base | {"metrics": "ledger"},
        f"{fmt} + all statistics": base | {"metrics": "all"},
        f"{fmt} + all, scaling from own amax": base | {"scaling": "current"},
        f"{fmt} + all, weights stored, stochastic": base | {"weights_at_rest": "stochastic"},
        f"{fmt} + all + reference gradient with noise floor": base | {"reference_gradient": True},
    }
    if native:
        float8 = base | {"formats": ("E4M3", "block_*:G=E5M2")}
        rows |= {"E4M3/E5M2 + all, emulated": float8, "E4M3/E5M2 + all, native": float8 | {"products": "native"}}
    return rows


@dataclass(frozen=True)
class Row:
    """One row to be built: make() -> timing.Entry, or Unavailable. `config`: whose work it does, for its FLOPs."""

    name: str
    config: object
    make: Callable


@dataclass(frozen=True)
class Section:
    """Rows timed together. `base`: the row that `ratio` refers to. `note`: a line for the reader. `x`, `x_name`: for a
    straight line through the rows (scaling), {row name: x}."""

    name: str
    rows: tuple
    base: str = BARE
    note: str = ""
    x: dict | None = None
    x_name: str = ""


@dataclass(frozen=True)
class Plan:
    """How everything is timed: rounds, training steps of one row in a round, and what rows can be built from."""

    config: Any  # the ConfigDict of a training
    bench: programs.Bench
    rounds: int
    steps: int
    resources: contextlib.ExitStack
    peer: peers.Peer | None = None
    quick: bool = False

    @property
    def buffer_steps(self):
        """Rows of metrics that a dispatch has room for: the same for all, so that rows share programs."""
        return max(*DISPATCH_STEPS, self.steps)

    def ours(self, name, config=None, changes=None, *, bare=False, steps=None, K=None, logged=False):
        """A Row of our own step, `steps` steps in dispatches of K."""
        config = programs.changed(config or self.config, changes or {})
        steps = steps or self.steps

        def make():
            step = self.bench.step(config, buffer_steps=self.buffer_steps, bare=bare)
            if logged:
                return step.logged_entry(name, self.resources, steps=steps, steps_per_dispatch=K or steps)
            return step.entry(name, steps=steps, steps_per_dispatch=K or steps)

        return Row(name, config, make)

    def peers(self, names, config=None):
        """Rows of a peer doing the work of `config`; none without a peer."""
        config = config or self.config

        peer = self.peer
        if peer is None:
            return []

        def make(name):
            return peer.entry(
                name,
                shape={field: config[field] for field in SHAPE_FIELDS},
                batch_size=config.batch_size,
                steps=self.steps,
                optimizer={field: config[field] for field in OPTIMIZER_FIELDS},
                free_bytes=roofline.free_memory(programs.device().memory_stats()),
            )

        known = peer.variants()
        if self.quick:
            known = [name for name in known if "torch.compile" not in name]
        return [Row(name, config, lambda name=name: make(name)) for name in names or known if name in known]


def metrics_section(plan):
    """What metrics and the record add to a step, float32 for comparison, and the peers."""
    rows = [plan.ours(BARE, bare=True), plan.ours(ALL_METRICS), plan.ours(LOGGED, logged=True)]
    if not plan.quick:
        rows += [plan.ours(name, changes=changes) for name, changes in METRIC_VARIANTS.items() if name != ALL_METRICS]
    if plan.config.compute_dtype != "float32":
        rows.append(plan.ours(BARE_FLOAT32, changes={"compute_dtype": "float32"}, bare=True))
    return [
        Section(
            "metrics",
            (*rows, *plan.peers(None)),
            note=f"{LOGGED}: the writer's thread writes metrics.jsonl beside the step, as in training",
        )
    ]


def dispatch_section(plan):
    """The same steps in dispatches of K, the rows fetched after each."""
    config, note = plan.config, "the rows of metrics are fetched after every dispatch of K steps"
    if programs.device().platform == "cpu" and config.batch_size > 1 and not plan.quick:
        config = programs.changed(config, {"batch_size": 1})
        note += "; with batch_size=1, for on a CPU a larger step hides what a dispatch costs"
    Ks = (1, 5) if plan.quick else DISPATCH_STEPS
    steps = max(*Ks, plan.steps)
    rows = [plan.ours(f"K = {K}", config, steps=steps, K=K) for K in Ks]
    return [Section("dispatch", tuple(rows), base="K = 1", note=note)]


def formats_section(plan, fmt):
    native = programs.device().platform == "gpu"
    rows = [plan.ours(BARE, bare=True), plan.ours(ALL_METRICS)]
    rows += [plan.ours(name, changes=changes) for name, changes in format_variants(fmt, native).items()]
    return [Section("formats", tuple(rows), note="" if native else "native float8 products need a GPU: left out")]


def recipes_section(plan, names):
    """Steps by recipes with all statistics: each recipe's own program, and the one program that can follow them all."""
    rows = [plan.ours(ALL_METRICS), *(plan.ours(name, changes={"recipe": (name,)}) for name in names)]
    if len(names) > 1:
        union = {"recipe": names[:1], "recipe_program": names}
        rows.append(plan.ours(f"{names[0]}, the program of {', '.join(names)}", changes=union))
    return [Section("recipes", tuple(rows), base=ALL_METRICS, note="every row with all its statistics")]


def attention_section(plan):
    """XLA's attention against cuDNN's; the XLA row alone, with a note, where there is no cuDNN."""
    config = plan.config
    fits = has_cudnn_attention(
        programs.device(), head_width=config.n_embd // config.n_head, compute_dtype=config.compute_dtype
    )
    kernels = ("xla", "cudnn") if fits else ("xla",)
    rows = [
        plan.ours(f"{what}, attention {kernel}", changes={"attention": kernel}, bare=what == BARE)
        for what in (BARE, ALL_METRICS)
        for kernel in kernels
    ]
    return [
        Section(
            "attention",
            tuple(rows),
            base=f"{BARE}, attention xla",
            note="" if fits else "cuDNN's attention does not run on this device: left out",
        )
    ]


def size_sections(plan):
    """The step at other sizes, each beside the peers in bfloat16."""
    gpu, config, sections = programs.device().platform != "cpu", plan.config, []
    gpt2 = dict(zip(("n_layer", "n_head", "n_embd"), GPT2_124M), block_size=1024, batch_size=8 if gpu else 1)
    sizes = {"baseline, batch 64": {"batch_size": 64}}
    if config.model == "gpt2":
        sizes["GPT-2 124M"] = gpt2
    for name, shape in LADDER.items():
        sizes[f"ladder {name}"] = dict(
            zip(("n_layer", "n_head", "n_embd"), shape), batch_size=8 if gpu else 4, block_size=1024 if gpu else 256
        )
    names = [name for name in plan.peer.variants() if "bfloat16" in name] if plan.peer else []
    for name, changes in sizes.items():
        sized = programs.changed(config, changes)
        n = roofline.parameters_of(**{field: sized[field] for field in PARAMETER_FIELDS})
        rows = [plan.ours(BARE, sized, bare=True), plan.ours(ALL_METRICS, sized)]
        sections.append(
            Section(
                name,
                (*rows, *(plan.peers(names, sized) if names else ())),
                note=(
                    f"{n:,} parameters: {sized.n_layer} layers, {sized.n_head} heads, {sized.n_embd} wide; "
                    f"{sized.batch_size} x {sized.block_size} tokens a step"
                ),
            )
        )
    return sections


def scaling_sections(plan):
    """Step time against one size at a time, and against the number of metrics; the others as in the config."""
    config, sections = plan.config, []
    note = ""
    if programs.device().platform == "cpu" and config.batch_size > 4:
        config = programs.changed(config, {"batch_size": 4})
        note = "batch_size=4 where it is not the axis"
    for axis, values in SCALING.items():
        rows, x = [], {}
        for value in values:
            changes = {axis: value}
            if axis == "n_embd":
                changes["n_head"] = value // HEAD_WIDTH
            name = f"{axis} = {value}"
            rows.append(plan.ours(name, config, changes))
            x[name] = value
        sections.append(Section(f"scaling, {axis}", tuple(rows), base=rows[0].name, note=note, x=x, x_name=axis))
    rows = [plan.ours(f"metrics = {groups}", config, {"metrics": groups}) for groups in SCALING_METRICS]
    sections.append(
        Section("scaling, metrics", tuple(rows), base=rows[0].name, note=note, x={}, x_name="number of packed columns")
    )
    return sections


def sections_of(plan, suites, fmt, recipes):
    """The sections of the suites named; `rounding` has none, it is another kind of measurement."""
    makers = {
        "metrics": metrics_section,
        "dispatch": dispatch_section,
        "formats": lambda plan: formats_section(plan, fmt),
        "recipes": lambda plan: recipes_section(plan, recipes),
        "attention": attention_section,
        "sizes": size_sections,
        "scaling": scaling_sections,
    }
    return [section for suite in SUITES if suite in suites and suite in makers for section in makers[suite](plan)]


def only_rows(sections, patterns):
    """The sections with the rows whose names fit one of the shell patterns, and the row that ratios refer to.

    Raises:
      UserError: a pattern that fits no row.
    """
    names = [row.name for section in sections for row in section.rows]
    for pattern in patterns:
        if not fnmatch.filter(names, pattern):
            raise UserError(f"--rows has {pattern!r}, which fits no row: give patterns of {', '.join(names)}")
    kept = [
        tuple(
            row
            for row in section.rows
            if row.name == section.base or any(fnmatch.fnmatchcase(row.name, pattern) for pattern in patterns)
        )
        for section in sections
    ]
    return [dataclasses.replace(section, rows=rows) for section, rows in zip(sections, kept)]


def _build(rows, seconds_left, workers, say):
    """(entries, [(name, why)]) of the rows, those of after `seconds_left` left out."""
    started, entries, skipped = time.perf_counter(), [], []

    def make(number, row):
        if seconds_left is not None and time.perf_counter() - started > seconds_left and number >= ALWAYS:
            raise Unavailable(BUDGET)
        return row.make()

    with ThreadPoolExecutor(workers) as pool:
        for row, future in [(row, pool.submit(make, number, row)) for number, row in enumerate(rows)]:
            try:
                entry = future.result()
                entries.append(entry)
                say(f"{row.name}: compiled in {entry.facts['compile_s']:.1f} s")
            except Unavailable as reason:
                skipped.append((row.name, str(reason)))
                say(f"{row.name}: left out, {reason}")
    return entries, skipped


def share_of(budget, sections, built):
    """What the first of the sections still to come may take.

    Args:
      budget: seconds left for all of them. built: the sections measured so far.

    Returns:
      Seconds, or None where they would not do for the first rows, by the time that building a row took so far.
    """
    share = budget * len(sections[0].rows) / sum(len(section.rows) for section in sections)
    rows = sum(len(section["rows"]) for section in built)
    a_row = sum(section["build_s"] for section in built) / rows if rows else 0.0
    return share if share > 0 and share / 2 >= ALWAYS * a_row else None


def left_out(section):
    """What `measure` returns, of a section that was not measured."""
    return {
        "name": section.name,
        "note": section.note,
        "base": section.base,
        "rounds": 0,
        "build_s": 0.0,
        "rows": [],
        "skipped": [{"name": row.name, "why": BUDGET} for row in section.rows],
        "probes": {},
        "fit": None,
    }


def measure(plan, section, *, seconds_left=None, workers=1, say=lambda text: None):
    """Times one section.

    Args:
      seconds_left: what this section may take, or None. workers: rows built at once.

    Returns:
      {"name", "note", "base", "rounds", "build_s", "rows", "skipped", "probes", "fit"}: build_s for all rows together;
      rows: see docs/benchmark.md; skipped [{"name", "why"}]; probes {name: FLOP/s or bytes/s, median}; fit:
      timing.straight_line's result with x, or None.
    """
    say(f"\n{section.name}" + (f": {section.note}" if section.note else ""))
    started = time.perf_counter()
    config_of = {row.name: row.config for row in section.rows}
    entries, skipped = _build(section.rows, seconds_left and seconds_left / 2, workers, say)
    build_s = time.perf_counter() - started
    sizes = programs.probe_sizes(plan.quick)
    probes = programs.probes(sizes)
    if plan.peer is not None:
        probes += [plan.peer.product(dtype, sizes[0], sizes[1]) for dtype in ("bfloat16", "float32")]
    ready, unable = timing.warm_up(probes + entries, say=say)
    left = seconds_left and max(0.0, seconds_left - (time.perf_counter() - started))
    ready, rounds, dropped = timing.fit_to_budget(ready, plan.rounds, left, keep=len(probes) + ALWAYS)
    skipped += unable + [(name, BUDGET) for name in dropped]
    if dropped:
        say("the time budget does not reach: " + ", ".join(dropped))
    if rounds < plan.rounds:
        say(f"the time budget allows {rounds} rounds of {plan.rounds}")
    ready, unable = timing.time_rounds(ready, rounds, say=say)
    skipped += unable
    probes = [entry for entry in ready if entry in probes]
    entries = [entry for entry in ready if entry not in probes]
    peaks, bandwidths = roofline.peaks_of(probes)
    seconds_of = {entry.name: entry.seconds for entry in entries}
    rows = [_row(entry, section, config_of[entry.name], seconds_of, peaks, bandwidths) for entry in entries]
    plan.bench.free()
    if plan.peer is not None:
        with contextlib.suppress(Unavailable):  # it has ended, and the rows say so
            plan.peer.request(do="free")
    return {
        "name": section.name,
        "note": section.note,
        "base": section.base,
        "rounds": rounds,
        "build_s": build_s,
        "rows": rows,
        "skipped": [{"name": name, "why": why} for name, why in skipped],
        "probes": {e.name: (e.facts.get("flops") or e.facts["bytes"]) / timing.quartiles(e.seconds)[1] for e in probes},
        "fit": _fit(section, rows),
    }


def _row(entry, section, config, seconds_of, peaks, bandwidths):
    tokens = config.batch_size * config.block_size
    dtype = entry.facts.get("dtype", config.compute_dtype)
    n_flops = flops_per_step(config)
    shape = {field: config[field] for field in PARAMETER_FIELDS}
    bytes_least = roofline.BYTES_LEAST_PER_PARAMETER * roofline.parameters_of(**shape)
    row = {
        "section": section.name,
        "name": entry.name,
        **entry.facts,
        "dtype": dtype,
        "steps": entry.steps,
        "batch_size": config.batch_size,
        **{field: config[field] for field in ("model", *SHAPE_FIELDS)},
    }
    row |= timing.time_facts(entry.seconds, seconds_of.get(section.base), seconds_of.get(ALL_METRICS))
    row |= {"tokens_per_s": 1e3 * tokens / row["ms_per_step"], "flops": n_flops, "bytes_least": bytes_least}
    return row | roofline.roofline_facts(
        entry.seconds,
        flops=n_flops,
        bytes_least=bytes_least,
        peaks=peaks[dtype],
        bandwidths=bandwidths,
        stated=flops.peak_flops(programs.device().device_kind, 1, dtype),
    )


def _fit(section, rows):
    if section.x is None or len(rows) < 3:
        return None
    x = [section.x.get(row["name"], row["n_metrics"]) for row in rows]
    return timing.straight_line(x, [row["ms_per_step"] for row in rows]) | {"x": x, "x_name": section.x_name}


def machine_facts():
    """What the figures are of: device, versions, cores."""
    own = programs.device()
    return {"device": own.device_kind, "platform": own.platform, "cpus": roofline.cpu_count(), "jax": jax.__version__}
