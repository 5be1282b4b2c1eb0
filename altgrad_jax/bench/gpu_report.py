"""What `scripts/inspect_program.py` says of a compiled program: a dict for --json, and lines. No jax."""

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

from altgrad_jax.bench.cards import Assumptions, Card
from altgrad_jax.bench.hlo import loop_body, parse
from altgrad_jax.bench.kernels import (
    FLOAT8,
    SMALL_BYTES,
    Collective,
    Kernel,
    Product,
    Step,
    modelled_seconds,
    products_of,
    rounding_instructions,
    step_of,
)

UNITS = {"run": "training step", "evaluate": "batch of an evaluation", "diagnose": "diagnosis"}


class Compiled(NamedTuple):
    """A compiled program.

    program: a name of UNITS. text: XLA's optimized program. memory: bytes on a device, by name. graphs: for each CUDA
    graph the operations in it, in the order of the program. options: those it was compiled with. seconds: of the
    compiler. native_layers: how many layers are quantized with native products.
    """

    program: str
    text: str
    memory: dict[str, int] = {}
    graphs: tuple[int, ...] = ()
    options: dict[str, Any] = {}
    seconds: float = 0.0
    native_layers: int = 0


class Report(NamedTuple):
    """A program and what one of its units (UNITS) is made of.

    looped: whether the unit is the body of a loop; else it is the whole program.
    """

    compiled: Compiled
    card: Card
    n_devices: int
    step: Step
    looped: bool
    assumed: Assumptions = Assumptions()

    @property
    def unit(self) -> str:
        """What is executed once, in words."""
        program = self.compiled.program
        return UNITS[program] if self.looped or program == "diagnose" else "whole program"

    @property
    def float8_products(self) -> int:
        """Calls of a float8 product in the text of the whole program."""
        return self.compiled.text.count(f'"{FLOAT8}"')


def report_of(compiled: Compiled, card: Card, *, n_devices: int = 1, per_host: int = 8) -> Report:
    """Reads a compiled program's text. A diagnosis is taken whole; of the others one turn of the loop is the unit."""
    module = parse(compiled.text)
    body = None if compiled.program == "diagnose" else loop_body(module)
    return Report(compiled, card, n_devices, step_of(module, body or module.entry, per_host), body is not None)


def n_kernels(step: Step, kind: str = "") -> int:
    """Kernels of a unit whose kind begins with `kind`; all by default."""
    return sum(kernel.times for kernel in step.kernels if kernel.kind.startswith(kind))


# ------------------------------------------------------------------------------------------------------------ as data


def as_dict(report: Report) -> dict[str, Any]:
    """The report for JSON. Times in seconds, sizes in bytes."""
    step, kernels = report.step, report.step.kernels
    return {
        "program": report.compiled.program,
        "unit": report.unit,
        "target": report.card.name,
        "devices": report.n_devices,
        "kernels": n_kernels(step),
        "conditional_kernels": sum(k.times for k in kernels if k.conditional),
        "small_kernels": sum(k.times for k in kernels if k.n_bytes < SMALL_BYTES),
        "copies": n_kernels(step, "copy"),
        "bytes": sum(k.times * k.n_bytes for k in kernels),
        "flops": sum(k.times * k.flops for k in kernels),
        "unknown_loops": step.unknown_loops,
        "by_kind": _by(report, lambda kernel: kernel.kind),
        "by_line": _by(report, lambda kernel: kernel.place),
        "products": [
            {**product._replace(flops=0.0)._asdict(), "flops": flops, "count": count}
            for product, count, flops in _distinct(products_of(step))
        ],
        "float8_products": report.float8_products,
        "float8_products_wanted": 3 * report.compiled.native_layers,
        "attention_kernels": n_kernels(step, "attention"),
        "rounding_instructions": rounding_instructions(step),
        "collectives": [collective._asdict() for collective in step.collectives],
        "graphs": list(report.compiled.graphs),
        "memory": report.compiled.memory,
        "options": report.compiled.options,
        "compile_s": report.compiled.seconds,
        "modelled": _modelled(report),
        "assumed": report.assumed._asdict() | {"card": report.card._asdict()},
    }


def as_json(report: Report) -> bytes:
    """`as_dict` as the text of a JSON file."""
    return (json.dumps(as_dict(report), indent=1, default=str) + "\n").encode()


def _by(report: Report, key: Callable[[Kernel], str]) -> dict[str, dict[str, float]]:
    """{key: kernels, bytes, FLOPs and modelled seconds together}, the longest first."""
    groups: dict[str, list[Kernel]] = {}
    for kernel in report.step.kernels:
        groups.setdefault(key(kernel), []).append(kernel)
    launch = report.assumed.launch_s[0]
    found = {
        name: {
            "kernels": sum(k.times for k in group),
            "bytes": sum(k.times * k.n_bytes for k in group),
            "flops": sum(k.times * k.flops for k in group),
            "seconds": modelled_seconds(group, report.card, launch, report.assumed),
        }
        for name, group in groups.items()
    }
    return dict(sorted(found.items(), key=lambda item: -item[1]["seconds"]))


def _distinct(products: Iterable[Product]) -> list[tuple[Product, int, float]]:
    """(product without FLOPs, how many, their FLOPs together), the most first."""
    counts: Counter[Product] = Counter()
    flops: Counter[Product] = Counter()
    for product in products:
        key = product._replace(flops=0.0)
        counts[key] += 1
        flops[key] += product.flops  # pyright: ignore[reportArgumentType]  # a Counter of floats adds as well
    return [(key, n, float(flops[key])) for key, n in counts.most_common()]


def _modelled(report: Report) -> dict[str, Any]:
    card, assumed, kernels = report.card, report.assumed, report.step.kernels
    collectives = report.step.collectives
    return {
        "kernels_s": [modelled_seconds(kernels, card, launch, assumed) for launch in assumed.launch_s],
        "launches_s": [launch * n_kernels(report.step) for launch in assumed.launch_s],
        "bytes_s": sum(k.times * k.n_bytes for k in kernels) / (assumed.of_bandwidth * card.bandwidth),
        "flops_s": sum(k.times * k.flops / assumed.peak(card, k.dtype) for k in kernels),
        "collectives_s": sum(c.times * c.seconds(card, assumed) for c in collectives),
        "collectives_alone_s": sum(c.times * c.seconds(card, assumed) for c in collectives if not c.beside),
    }


# ----------------------------------------------------------------------------------------------------------- as lines


def lines(report: Report, n_lines: int = 25) -> Iterator[str]:
    """The report as text. n_lines: source lines listed."""
    d = as_dict(report)
    of = f", on each of {report.n_devices} devices" if report.n_devices > 1 else ""
    yield f"one {d['unit']} on {report.card.name}{of}; compiled, not run"
    yield (
        f"  kernels {d['kernels']} ({d['small_kernels']} move less than {SMALL_BYTES / 1e6:g} MB, "
        f"{d['copies']} are copies, {d['conditional_kernels']} lie in branches)"
    )
    graphs = ", ".join(map(str, report.compiled.graphs)) or "none"
    yield f"  CUDA graphs of the whole program: {len(report.compiled.graphs)}; operations in each: {graphs}"
    yield f"  moved {d['bytes'] / 1e9:.2f} GB, products {d['flops'] / 1e9:.1f} GFLOP"
    if report.compiled.native_layers:
        yield f"  float8 products {d['float8_products']} of {d['float8_products_wanted']} in the whole program"
    yield f"  attention kernels {d['attention_kernels']}, rounding instructions {d['rounding_instructions']}"
    if d["unknown_loops"]:
        yield f"  {d['unknown_loops']} loops have no known number of turns and are counted once"
    yield from _memory_lines(report)
    yield from _table("by kind", d["by_kind"])
    yield from _product_lines(report)
    yield from _collective_lines(report)
    yield from _table(f"by source line, the first {n_lines}", dict(list(d["by_line"].items())[:n_lines]))
    yield from _model_lines(report)


def _memory_lines(report: Report) -> Iterator[str]:
    if report.compiled.memory:
        sizes = ", ".join(f"{name} {size / 2**20:,.1f}" for name, size in report.compiled.memory.items())
        yield f"  memory of the whole program, MiB on a device: {sizes}"


def _table(title: str, groups: dict[str, dict[str, float]]) -> Iterator[str]:
    yield f"{title}:"
    for name, g in groups.items():
        yield (
            f"  {g['kernels']:>5.0f} kernels {1e3 * g['seconds']:>8.3f} ms {g['bytes'] / 1e6:>10.1f} MB "
            f"{g['flops'] / 1e9:>8.1f} GFLOP  {name}"
        )


def _product_lines(report: Report) -> Iterator[str]:
    yield "products:"
    for product, count, flops in _distinct(products_of(report.step)):
        yield (
            f"  {count:>5} {product.lhs} x {product.rhs} -> {product.out}, precision {product.precision or 'none'}, "
            f"{product.by}, {flops / 1e9:.1f} GFLOP"
        )


def _collective_lines(report: Report) -> Iterator[str]:
    if not report.step.collectives:
        return
    yield "collectives:"
    for c in sorted(report.step.collectives, key=_by_size):
        hidden = f"{c.beside} kernels beside it" if c.beside else "nothing beside it"
        yield (
            f"  {c.times} x {c.kind:<18} {c.n_bytes / 1e6:>10.3f} MB in {c.n_arrays} arrays, {c.group} devices"
            f"{' of several hosts' if c.hosts else ''}, {1e6 * c.seconds(report.card, report.assumed):.0f} us, "
            f"{hidden}, {c.place}"
        )


def _by_size(collective: Collective) -> int:
    return -collective.n_bytes


def _model_lines(report: Report) -> Iterator[str]:
    m, a, card = _modelled(report), report.assumed, report.card
    times = " / ".join(f"{1e3 * s:.2f}" for s in m["kernels_s"])
    launches = " / ".join(f"{1e6 * s:g}" for s in a.launch_s)
    yield f"modelled: {times} ms with a launch of {launches} us, kernels one after the other"
    yield (
        f"  bytes alone {1e3 * m['bytes_s']:.2f} ms, products alone {1e3 * m['flops_s']:.2f} ms, launches alone "
        f"{' / '.join(f'{1e3 * s:.2f}' for s in m['launches_s'])} ms"
    )
    if report.step.collectives:
        yield (
            f"  collectives {1e3 * m['collectives_s']:.2f} ms more if nothing hides them, of which "
            f"{1e3 * m['collectives_alone_s']:.2f} ms have no kernel beside them"
        )
    f8 = f", float8 {a.of_f8:.0%} of {card.f8 / 1e12:g}" if card.f8 else ""
    yield (
        f"  assumed, not measured: {a.of_bandwidth:.0%} of {card.bandwidth / 1e12:g} TB/s; bfloat16 {a.of_bf16:.0%} of "
        f"{card.bf16 / 1e12:g} TFLOP/s{f8}, float32 {a.of_f32:.0%} of {card.f32 / 1e12:g}; no cache; a collective "
        f"{1e6 * a.latency_s:g} us and {a.of_link:.0%} of {card.link / 1e9:g} GB/s in a host, {card.port / 1e9:g} GB/s "
        "between hosts"
    )
