"""What one step of a compiled program is made of, and a model of its time. No jax.

A `Kernel` is whatever the device is given to do once: a fusion, a library call, a copy. Bytes are those of operands and
results, an upper figure, for nothing is supposed to stay in a cache; of an operand that a kernel only slices or gathers
from, what is taken counts. FLOPs are those of products alone, 2 M N K, and of attention over the full square.
"""

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

from altgrad_jax.bench.cards import Assumptions, Card
from altgrad_jax.bench.hlo import NOWHERE, Executed, Instruction, Module, executed

SMALL_BYTES = 2_000_000
FLOAT8 = "__cublas$lt$matmul$f8"
_TAKES_A_PART = frozenset({"dynamic-slice", "gather", "slice"})
_WRITES_A_PART = frozenset({"dynamic-update-slice", "scatter"})
# A gather whose result is this much smaller than an operand reads no more of it than it returns.
_GATHERED = 64
COLLECTIVES = (
    "all-reduce",
    "all-gather",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)


class Product(NamedTuple):
    """A matrix product: dtypes of operands and result, FLOPs, the precision asked for its operands (DEFAULT, HIGHEST;
    "" where XLA names none), and who computes it."""

    lhs: str
    rhs: str
    out: str
    flops: float
    precision: str
    by: str


class Kernel(NamedTuple):
    """One thing the device does. `times` a step; n_bytes and flops are of once. place: Module.place."""

    name: str
    kind: str
    place: str
    times: int
    n_bytes: int
    flops: float
    dtype: str
    products: tuple[Product, ...]
    opcodes: tuple[str, ...]
    conditional: bool

    def seconds(self, card: Card, launch_s: float, assumed: Assumptions) -> float:
        """Modelled time of once."""
        moved = self.n_bytes / (assumed.of_bandwidth * card.bandwidth)
        return max(launch_s, moved, self.flops / assumed.peak(card, self.dtype))


class Collective(NamedTuple):
    """One collective.

    n_bytes: of the whole array: of the larger of operands and results. n_arrays: sent in one. group: devices that take
    part together. hosts: whether a group reaches beyond a host. beside: kernels that are started while it is under way,
    0 where the next one waits for it.
    """

    kind: str
    n_bytes: int
    n_arrays: int
    group: int
    hosts: bool
    beside: int
    times: int
    place: str

    def seconds(self, card: Card, assumed: Assumptions) -> float:
        """Modelled time of once, if nothing hides it."""
        share = (self.group - 1) / self.group
        sent = self.n_bytes * share * (2 if self.kind == "all-reduce" else 1)
        return assumed.latency_s + sent / (assumed.of_link * (card.port if self.hosts else card.link))


class Step(NamedTuple):
    """What is executed once for each step. unknown_loops: how many loops have no known number of turns; they count
    once."""

    kernels: tuple[Kernel, ...]
    collectives: tuple[Collective, ...]
    unknown_loops: int


def step_of(module: Module, unit: str, per_host: int = 8) -> Step:
    """The kernels and collectives of one execution of the computation `unit`. per_host: devices of a host."""
    kernels, collectives, unknown = [], [], set()
    types: dict[str, Mapping[str, Instruction]] = {}
    for item in executed(module, unit):
        if item.unknown:
            unknown.add(item.unknown)
        named = types.get(item.computation)
        if named is None:
            named = types[item.computation] = {i.name: i for i in module.computations[item.computation]}
        if _is_done(item.instruction):
            continue
        if inner := _collective(module, item.instruction):
            collectives.append(_collective_of(module, item, inner, named, per_host))
        else:
            kernels.append(_kernel_of(module, item, named))
    return Step(tuple(kernels), tuple(collectives), len(unknown))


# ------------------------------------------------------------------------------------------------------------- kernels


def kind_of(module: Module, item: Instruction) -> str:
    """What an executed instruction is, in a few words."""
    if item.opcode == "fusion":
        return _fusion_kind(module, item)
    if item.opcode == "custom-call":
        if item.target == FLOAT8:
            return "GEMM float8"
        if "matmul" in item.target or "gemm" in item.target:
            return "GEMM"
        return "attention (cuDNN)" if "fmha" in item.target else f"call {item.target}"
    return "copy" if item.opcode in ("copy", "copy-start") else item.opcode


def _fusion_kind(module: Module, item: Instruction) -> str:
    opcodes = {inner.opcode for inner in module.computations[item.called or ""]}
    if "dot" in opcodes:
        return "fusion GEMM (Triton)" if "triton" in item.fusion_kind else "fusion GEMM"
    words = [word for word in ("scatter", "reduce", "gather", "sort") if word in opcodes]
    kind = words[0] if words else "loop"
    if item.attribute(r"kind=(\w+)") == "kCustom":
        return f"fusion {kind} (Triton)" if "triton" in item.fusion_kind else f"fusion {item.fusion_kind or 'custom'}"
    return f"fusion {kind}"


def _kernel_of(module: Module, item: Executed, named: Mapping[str, Instruction]) -> Kernel:
    instruction = item.instruction
    operands = [named[name] for name in instruction.operands if name in named]
    inside = module.computations[instruction.called] if instruction.called else ()
    products, flops, dtype = (), 0.0, "bf16"
    if instruction.opcode == "fusion":
        n_bytes = _fusion_bytes(inside, operands)
        within = {i.name: i for i in inside}
        products = tuple(_product(i, within, "Triton") for i in inside if i.opcode == "dot")
    elif instruction.opcode in ("copy", "copy-start"):
        n_bytes = 2 * instruction.arrays[0].n_bytes
    else:
        results = [array for array in instruction.arrays if array.dtype not in ("s8", "u8")]  # without work space
        n_bytes = sum(o.n_bytes for o in operands) + sum(array.n_bytes for array in results)
        if instruction.opcode == "dot" or kind_of(module, instruction).startswith("GEMM"):
            products = (_product(instruction, named, instruction.target or "XLA"),)
        elif "fmha" in instruction.target:
            flops = _attention_flops(instruction, operands)
    if products:
        flops, dtype = sum(product.flops for product in products), products[0].lhs
    opcodes = tuple(i.opcode for i in inside) or (instruction.opcode,)
    # XLA leaves some fusions without a place: then the last of what is inside that has one.
    places = (module.place(i) for i in (instruction, *reversed(inside)))
    return Kernel(
        instruction.name,
        kind_of(module, instruction),
        next((place for place in places if place != NOWHERE), NOWHERE),
        item.times,
        n_bytes,
        flops,
        dtype,
        products,
        opcodes,
        item.conditional,
    )


def _product(item: Instruction, named: Mapping[str, Instruction], by: str) -> Product:
    """A dot, or a call of a GEMM, whose first two operands are multiplied."""
    lhs, rhs = (named[name].arrays[0] for name in item.operands[:2])
    axes = item.attribute(r'"lhs_contracting_dimensions":\["([\d",]*)"\]') or item.attribute(
        r"lhs_contracting_dims=\{([\d,]*)\}"
    )
    contracted = [int(axis) for axis in re.findall(r"\d+", axes or str(len(lhs.shape) - 1))]
    k = math.prod(lhs.shape[axis] for axis in contracted)
    asked = item.attribute(r'"operand_precision":\[([^\]]*)\]') or item.attribute(r"operand_precision=\{([^}]*)\}")
    precision = "/".join(sorted(set(re.findall(r"\w+", asked or "")))).upper()
    out = item.arrays[0]
    return Product(lhs.dtype, rhs.dtype, out.dtype, 2.0 * out.size * k, precision, by)


def _attention_flops(item: Instruction, operands: list[Instruction]) -> float:
    """Two products of the full square forward, five backward (two of them again)."""
    found = item.attribute(r'"intermediate_tensor_shape":\s*\{.*?"dimensions":\s*\[([^\]]*)\]')
    square = [int(size) for size in re.findall(r"\d+", found or "")]
    if len(square) != 4 or not operands:
        return 0.0
    width = operands[0].arrays[0].size / math.prod(square[:3])
    return (5 if "Backward" in item.target else 2) * 2.0 * math.prod(square) * width


def _fusion_bytes(inside: tuple[Instruction, ...], operands: list[Instruction]) -> int:
    """Bytes that a fusion reads and writes."""
    users: dict[str, list[tuple[Instruction, int]]] = {}
    for item in inside:
        for place, name in enumerate(item.operands):
            users.setdefault(name, []).append((item, place))
    parameters = {int(item.inside): item.name for item in inside if item.opcode == "parameter"}
    opcodes = {item.opcode for item in inside}
    gathers = "gather" in opcodes and "reduce" not in opcodes
    result = inside[-1].n_bytes
    read = 0
    for number, operand in enumerate(operands):
        uses = list(_uses(parameters.get(number, ""), users))
        if gathers and operand.n_bytes > _GATHERED * result:
            read += result
        elif uses and all(item.opcode in _TAKES_A_PART and place == 0 for item, place in uses):
            read += sum(item.n_bytes for item, _ in uses)
        elif not uses or not all(item.opcode in _WRITES_A_PART and place == 0 for item, place in uses):
            read += operand.n_bytes
    return read + _written_bytes(inside)


def _uses(name: str, users: Mapping[str, list[tuple[Instruction, int]]]) -> Iterator[tuple[Instruction, int]]:
    """(instruction, number of the operand) of all that read a value, seen through bitcasts."""
    for item, place in users.get(name, []):
        if item.opcode == "bitcast":
            yield from _uses(item.name, users)
        else:
            yield item, place


def _written_bytes(inside: tuple[Instruction, ...]) -> int:
    named = {item.name: item for item in inside}
    root = inside[-1]
    total = 0
    for item in [named[name] for name in root.operands] if root.opcode == "tuple" else [root]:
        while item.opcode == "bitcast" and item.operands[0] in named:
            item = named[item.operands[0]]
        if item.opcode == "dynamic-update-slice":
            total += named[item.operands[1]].n_bytes
        elif item.opcode == "scatter":
            total += 2 * named[item.operands[-1]].n_bytes  # what is there is read and written
        else:
            total += item.n_bytes
    return total


# --------------------------------------------------------------------------------------------------------- collectives


def _collective(module: Module, item: Instruction) -> Instruction | None:
    """The collective that an instruction starts or is, where it is one."""
    if item.opcode.removesuffix("-start") in COLLECTIVES:
        return item
    if item.opcode == "async-start" and item.called:
        return next((i for i in module.computations[item.called] if i.opcode in COLLECTIVES), None)
    return None


def _is_done(item: Instruction) -> bool:
    return item.opcode.endswith(("-done", "-update"))


def _collective_of(
    module: Module, item: Executed, inner: Instruction, named: Mapping[str, Instruction], per_host: int
) -> Collective:
    instruction = item.instruction
    lines = module.computations[item.computation]
    start = lines.index(instruction)
    done = next((i for i in range(start + 1, len(lines)) if _ends(lines[i], instruction.name)), start)
    between = (i for i in lines[start + 1 : done] if not _is_done(i) and not _collective(module, i))
    # Of a start the type lists operands and results; its end has the results alone.
    results = (lines[done] if done > start else instruction).n_bytes
    operands = [named[name] for name in instruction.operands if name in named]
    devices = _groups(inner.attributes)
    return Collective(
        inner.opcode.removesuffix("-start"),
        max(results, sum(operand.n_bytes for operand in operands)),
        sum(len(operand.arrays) for operand in operands),
        len(devices[0]) if devices else 1,
        any(len({device // per_host for device in group}) > 1 for group in devices),
        sum(1 for i in between if i.opcode in ("fusion", "custom-call", "copy", "while", "call", "conditional")),
        item.times,
        module.place(instruction),
    )


def _ends(item: Instruction, start: str) -> bool:
    return item.opcode.endswith("-done") and start in item.operands


def _groups(attributes: str) -> list[list[int]]:
    """The groups of devices of a collective; none where the text names none.

    Written out, {{0,1},{2,3}}; as rows of a transposed array, [2,4]<=[4,2]T(1,0); or by axes of a mesh,
    mesh['data'=8,'fsdp'=8] {'fsdp'}, or parts of them, {'data':(2)4}, of devices in an order of their own,
    device_ids=([8,8]T(1,0)).
    """
    listed = re.search(r"replica_groups=\{(\{[\d,]*\}(?:,\{[\d,]*\})*)\}", attributes)
    if listed:
        return [[int(n) for n in group.split(",")] for group in re.findall(r"\{([\d,]+)\}", listed[1])]
    iota = re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", attributes)
    if iota:
        shape, dims = ([int(n) for n in iota[i].split(",")] for i in (1, 2))
        order = [int(n) for n in iota[3].split(",")] if iota[3] else list(range(len(dims)))
        return _rows(dims, order, shape[-1])
    mesh = re.search(r"replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}", attributes)
    if mesh is None:
        return []
    # A part of an axis, 'data':(2)4, has 2 before it and size 4: every axis is taken as three, the middle one counts.
    parts = {name: (1, int(size), 1) for name, size in re.findall(r"'?(\w+)'?=(\d+)", mesh[1])}
    within = []
    for name, before, size in re.findall(r"'?(\w+)'?(?::\((\d+)\)(\d+))?", mesh[2]):
        if size:
            parts[name] = (int(before), int(size), parts[name][1] // (int(before) * int(size)))
        within.append(3 * list(parts).index(name) + 1)
    dims = [size for part in parts.values() for size in part]
    order = [axis for axis in range(len(dims)) if axis not in within] + within
    groups = _rows(dims, order, math.prod(dims[axis] for axis in within))
    # The mesh need not hold the devices in their order.
    ids = re.search(r"device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\)", attributes)
    if ids is None:
        return groups
    shape = [int(n) for n in ids[1].split(",")]
    numbers = _rows(shape, [int(n) for n in ids[2].split(",")] if ids[2] else list(range(len(shape))), 1)
    return [[numbers[position][0] for position in group] for group in groups]


def _rows(dims: list[int], order: list[int], width: int) -> list[list[int]]:
    """arange(prod(dims)).reshape(dims).transpose(order).reshape(-1, width)."""
    numbers = [_at(position, dims, order) for position in range(math.prod(dims))]
    return [numbers[i : i + width] for i in range(0, len(numbers), width)]


def _at(position: int, dims: list[int], order: list[int]) -> int:
    """The element at a flat position of arange(prod(dims)).reshape(dims).transpose(order)."""
    strides = [math.prod(dims[axis + 1 :]) for axis in range(len(dims))]
    total = 0
    for axis in reversed(order):
        position, index = divmod(position, dims[axis])
        total += index * strides[axis]
    return total


# ----------------------------------------------------------------------------------------------------------- the sums


def modelled_seconds(kernels: Iterable[Kernel], card: Card, launch_s: float, assumed: Assumptions) -> float:
    """Seconds of these kernels one after the other."""
    return sum(kernel.times * kernel.seconds(card, launch_s, assumed) for kernel in kernels)


def rounding_instructions(step: Step) -> int:
    """Roundings to a whole number that the kernels of a step hold: the last act of rounding a subnormal number onto a
    format, once for each rounded operand and kernel that computes it."""
    return sum(kernel.times * kernel.opcodes.count("round-nearest-even") for kernel in step.kernels)


def products_of(step: Step) -> list[Product]:
    """Every product of a step, as often as it is made."""
    return [product for kernel in step.kernels for product in kernel.products for _ in range(kernel.times)]
