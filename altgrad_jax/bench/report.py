"""One run of the benchmark: plans it, measures section after section, prints the tables and writes the JSON."""

import functools
import json
import os
import platform
import time

import jax

from altgrad_jax.bench import peers, programs, roofline, suites, tables
from altgrad_jax.bench.timing import Unavailable
from altgrad_jax.errors import UserError
from altgrad_jax.numerics.formats import get_format
from altgrad_jax.numerics.recipes import get_recipe

ROUNDING_ELEMENTS = (2**18, 2**22, 2**24)


def say(text):
    print(text, flush=True)


def run(config, flags, resources):
    """Measures what the flags of scripts/bench.py ask for, by name as there; returns the exit code."""
    started = time.perf_counter()
    programs.require_plain(config)
    file = _open_json(flags["json"], resources)
    fmt, recipes = get_format(flags["format"]).name, tuple(flags["recipes"].split(","))
    for name in recipes:
        get_recipe(name)
    config, chosen, rounds, steps, cuts = _extent(config, flags)
    facts = suites.machine_facts() | {
        "python": platform.python_version(),
        "deterministic": flags["deterministic"],
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
        "cuts": cuts,
        "config": dict(config.items()),
        "rounds": rounds,
        "steps_per_round": steps,
    }
    say(
        f"{facts['device']}, {facts['cpus']} CPUs, jax {facts['jax']}, {config.batch_size} x {config.block_size} "
        f"tokens a step, {rounds} rounds of {steps} steps"
        + (", deterministic operations" if flags["deterministic"] else "")
    )
    for cut in cuts:
        say(cut)
    peer = _open_peer(flags, resources, facts)
    # Compiling several programs at once only helps where there are cores to spare.
    workers = max(1, min(4, roofline.cpu_count() // 4))
    plan = suites.Plan(config, programs.Bench(), rounds, steps, resources, peer, flags["quick"])
    sections = suites.sections_of(plan, chosen, fmt, recipes)
    if flags["rows"]:
        sections = suites.only_rows(sections, flags["rows"].split(","))
        say(f"--rows: only the rows {flags['rows']}, and those that ratios refer to")
    measured, rounding = [], []
    write = functools.partial(_write_json, file, facts, measured, rounding)
    for number, section in enumerate(sections):
        left = None
        if flags["budget_s"]:
            left = suites.share_of(flags["budget_s"] - (time.perf_counter() - started), sections[number:], measured)
        if flags["budget_s"] and left is None:
            measured.append(suites.left_out(section))
        else:
            measured.append(suites.measure(plan, section, seconds_left=left, workers=workers, say=say))
        say("\n" + tables.section_text(measured[-1]))
        write()  # after every section, so that an end by force leaves what was measured
    if "rounding" in chosen:
        if flags["budget_s"] and time.perf_counter() - started > flags["budget_s"]:
            say("\nrounding: left out, the time budget does not reach it")
        else:
            for elements in ROUNDING_ELEMENTS:
                rounding += programs.bench_rounding(elements, rounds=40)
            say("\n## rounding\n\n" + tables.rounding_table(rounding))
    if flags["profile"]:
        profile(plan, flags["profile"])
        say(f"\nthe trace of `all metrics` is in {flags['profile']}: Perfetto (ui.perfetto.dev) and xprof read it")
    if peer is not None:
        facts["peer"] |= peer.idleness()
    facts["seconds"] = time.perf_counter() - started
    say(
        f"\n{facts['seconds']:.0f} s in all"
        + (", deterministic operations in every row of ours" if flags["deterministic"] else "")
    )
    if file:
        write()
        say(f"written to {flags['json']}")
    return 0


def _extent(config, flags):
    """(config, suites, rounds, steps of a round, what --quick left out): how much is measured."""
    quick, gpu = flags["quick"], programs.device().platform != "cpu"
    chosen, cuts = flags["suite"], []
    if quick:
        chosen = chosen & {"metrics", "dispatch"} or {"metrics"}
        cuts.append(suites.QUICK_CUTS)
        if not gpu and config.batch_size > 2:
            config = programs.changed(config, {"batch_size": 2})
            cuts.append("batch_size=2")
    rounds = flags["rounds"] or ((5 if gpu else 3) if quick else (9 if gpu else 5))
    steps = flags["steps_per_round"] or ((10 if quick else 25) if gpu else 1)
    return config, chosen, rounds, steps, cuts


def _write_json(file, facts, measured, rounding):
    if not file:
        return
    rows = [row for section in measured for row in section["rows"]]
    others = [{name: value for name, value in section.items() if name != "rows"} for section in measured]
    file.seek(0)
    file.truncate()
    json.dump(facts | {"rows": rows, "sections": others, "rounding": rounding}, file, indent=1)
    file.flush()


def _open_json(path, resources):
    if not path:
        return None
    try:
        return resources.enter_context(open(path, "w"))
    except OSError as error:
        raise UserError(f"--json={path} cannot be written ({error.strerror}): give another file") from None


def _open_peer(flags, resources, facts):
    """The peers' process, or None with a line that says why."""
    if flags["peers"] == "none":
        if flags["nanogpt"]:
            raise UserError(f"--nanogpt={flags['nanogpt']} needs torch: leave --peers=none out")
        return None
    if facts["config"]["model"] != "gpt2":
        say(f"model={facts['config']['model']!r}: the peers are implementations of GPT-2, so there are none")
        return None
    if not peers.torch_importable():
        say(f"torch and transformers are not installed, so there are no peers to compare with: {peers.INSTALL}")
        return None
    try:
        peer = peers.Peer(nanogpt=flags["nanogpt"])
    except Unavailable as reason:
        say(f"no peers: {reason}")
        return None
    resources.callback(peer.close)
    facts["peer"] = dict(peer.facts)
    say("peers: " + ", ".join(f"{name} {value}" for name, value in peer.facts.items() if value != ""))
    return peer


def profile(plan, folder: str, steps: int = 3) -> None:
    """Writes a trace of a few steps with all metrics into the folder."""
    step = plan.bench.step(plan.config, buffer_steps=plan.buffer_steps)
    for _ in range(2):  # the second finds everything warm
        step.dispatch(1)
    try:
        with jax.profiler.trace(folder):
            for _ in range(steps):
                step.dispatch(1)
    except OSError as error:
        raise UserError(f"--profile={folder} cannot be written ({error.strerror}): give another folder") from None
    plan.bench.free()
