"""The text of a compiled program as data: computations, instructions, sizes, places in the source. No jax.

XLA's optimized program for a GPU is a list of computations in the order in which they are executed. An instruction of
one that runs on the device (the entry, the body of a loop) is a kernel, a library call, a copy, a collective, or
nothing at all (`FREE`). The computations that fusions call say what is inside one kernel.

Only what XLA prints is read; the reader knows the form of jaxlib 0.10's text.
"""

import math
import re
from collections.abc import Iterator, Mapping
from functools import cached_property
from typing import NamedTuple

# Instructions that name or rearrange buffers and launch nothing.
FREE = frozenset(
    "parameter constant tuple get-tuple-element bitcast after-all partition-id replica-id opt-barrier".split()
)
_HEAD = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\((.*)$")
_ARRAY = re.compile(r"\b(pred|[a-z]+\d+[a-z0-9]*)\[([\d,]*)\]")
_NAME = re.compile(r"%([\w.\-]+)")
_PACKAGE = "/altgrad_jax/"
NOWHERE = "(none)"


class Array(NamedTuple):
    """An array's type: XLA's name of the dtype, and the sizes of its axes."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def n_bytes(self) -> int:
        return self.size * dtype_bits(self.dtype) // 8


def dtype_bits(dtype: str) -> int:
    """Bits of an element; `dtype` as XLA writes it: pred, bf16, s32, f8e4m3fn."""
    found = re.match(r"[a-z]+(\d+)", dtype)
    return 8 if found is None else int(found[1])


def arrays_of(text: str) -> tuple[Array, ...]:
    """The arrays of a type as written, of a tuple all of them; layouts are left out."""
    return tuple(
        Array(dtype, tuple(int(size) for size in sizes.split(",") if size)) for dtype, sizes in _ARRAY.findall(text)
    )


class Instruction(NamedTuple):
    """One line of a computation.

    type: as written. inside: what stands in the brackets of the opcode. attributes: what follows them.
    """

    name: str
    type: str
    opcode: str
    inside: str
    attributes: str

    @property
    def arrays(self) -> tuple[Array, ...]:
        return arrays_of(self.type)

    @property
    def n_bytes(self) -> int:
        """Bytes of the results."""
        return sum(array.n_bytes for array in self.arrays)

    @property
    def operands(self) -> list[str]:
        return _NAME.findall(self.inside)

    def attribute(self, pattern: str) -> str | None:
        """The first group of a pattern found among the attributes, or None."""
        found = re.search(pattern, self.attributes)
        return found[1] if found else None

    @property
    def called(self) -> str | None:
        """The computation of a fusion, a call or an asynchronous start."""
        return self.attribute(r"\b(?:calls|to_apply)=%?([\w.\-]+)")

    @property
    def target(self) -> str:
        """What a custom call calls; empty for others."""
        return self.attribute(r'custom_call_target="([^"]+)"') or ""

    @property
    def fusion_kind(self) -> str:
        """How a custom fusion is made, such as __triton_gemm; empty for others."""
        return self.attribute(r'"fusion_backend_config":\{.*?"kind":"([^"]+)"') or ""


class Module(NamedTuple):
    """A program: {name: its instructions in order}, the name of the entry, and {number: frames in the source}."""

    computations: Mapping[str, tuple[Instruction, ...]]
    entry: str
    places: "Places"

    def place(self, instruction: Instruction) -> str:
        """Where the project asks for an instruction, as room/module.py:LINE function; "(library)" where no line of the
        project is among its frames, "(none)" where XLA names none."""
        number = instruction.attribute(r"stack_frame_id=(\d+)")
        return NOWHERE if number is None else self.places.of(int(number))


class Places:
    """The tables of source lines at the head of a program's text."""

    def __init__(self, lines: list[str]):
        self._lines = lines
        self._known: dict[int, str] = {}

    def of(self, frame: int) -> str:
        """The innermost line of the project among a frame and those around it."""
        if frame not in self._known:
            self._known[frame] = next(self._of_project(frame), "(library)")
        return self._known[frame]

    def _of_project(self, frame: int) -> Iterator[str]:
        seen = set()
        while frame in self._frames and frame not in seen:
            seen.add(frame)
            location, parent = self._frames[frame]
            file, function, line = self._locations[location]
            if _PACKAGE in self._files[file]:
                path = self._files[file].rsplit(_PACKAGE, 1)[1]
                yield f"{path}:{line} {self._functions[function].split('.')[-1]}"
            frame = parent

    def _section(self, title: str) -> dict[int, str]:
        found: dict[int, str] = {}
        start = self._lines.index(title) + 1 if title in self._lines else len(self._lines)
        for line in self._lines[start:]:
            numbered = re.match(r"^(\d+) (.*)$", line)
            if numbered is None:
                break
            found[int(numbered[1])] = numbered[2].strip('"')
        return found

    @cached_property
    def _files(self) -> dict[int, str]:
        return self._section("FileNames")

    @cached_property
    def _functions(self) -> dict[int, str]:
        return self._section("FunctionNames")

    @cached_property
    def _locations(self) -> dict[int, tuple[int, int, int]]:
        fields = {number: _fields(text) for number, text in self._section("FileLocations").items()}
        return {n: (f["file_name_id"], f["function_name_id"], f["line"]) for n, f in fields.items()}

    @cached_property
    def _frames(self) -> dict[int, tuple[int, int]]:
        fields = {number: _fields(text) for number, text in self._section("StackFrames").items()}
        return {n: (f["file_location_id"], f.get("parent_frame_id", 0)) for n, f in fields.items()}


def _fields(text: str) -> dict[str, int]:
    return {name: int(value) for name, value in re.findall(r"(\w+)=(\d+)", text)}


def parse(text: str) -> Module:
    """The program that XLA printed. ValueError where it has no entry."""
    computations: dict[str, list[Instruction]] = {}
    current, entry, header = None, None, []
    for line in text.splitlines():
        if current is None:
            head = _HEAD.match(line)
            if head is None:
                header.append(line)
                continue
            current = computations[head[2]] = []
            entry = head[2] if head[1] else entry
        elif line.startswith("}"):
            current = None
        elif found := _INSTRUCTION.match(line):
            inside, attributes = _split(found[5])
            current.append(Instruction(found[2], found[3], found[4], inside, attributes))
    if entry is None:
        raise ValueError("the text has no entry computation")
    return Module({name: tuple(items) for name, items in computations.items()}, entry, Places(header))


def _split(rest: str) -> tuple[str, str]:
    """What follows an opening bracket, as (what it encloses, what comes after)."""
    depth = 1
    for position, character in enumerate(rest):
        depth += (character == "(") - (character == ")")
        if depth == 0:
            return rest[:position], rest[position + 1 :]
    return rest, ""


def loop_body(module: Module) -> str | None:
    """The body of the entry's longest loop, counted in instructions; None where it has no loop.

    Of a training program this is the loop over steps, so its body is one step.
    """
    bodies = [
        body
        for name in _reached_by_calls(module, module.entry)
        for item in module.computations[name]
        if item.opcode == "while" and (body := item.attribute(r"body=%?([\w.\-]+)"))
    ]
    return max(bodies, key=lambda name: len(module.computations[name]), default=None)


def _reached_by_calls(module: Module, name: str) -> Iterator[str]:
    yield name
    for item in module.computations[name]:
        if item.opcode == "call" and item.called:
            yield from _reached_by_calls(module, item.called)


class Executed(NamedTuple):
    """An instruction that runs on the device.

    times: how often in one execution of the unit: the numbers of turns of the loops around it, multiplied; one that is
    not known counts once. unknown: the nearest loop around it of which it is not known; empty where there is none.
    conditional: whether it lies in a branch, which may not be taken.
    """

    instruction: Instruction
    computation: str
    times: int
    unknown: str
    conditional: bool


def executed(module: Module, unit: str, times=1, unknown="", conditional=False) -> Iterator[Executed]:
    """What runs when the computation `unit` is executed once, in order, inner loops and branches opened."""
    for item in module.computations[unit]:
        if item.opcode in FREE:
            continue
        inner: list[str] = []
        if item.opcode == "while":
            trips = item.attribute(r'"known_trip_count":\{"n":"(\d+)"\}')
            pattern = r"\b(?:condition|body)=%?([\w.\-]+)"
            for name in re.findall(pattern, item.attributes):
                yield from executed(module, name, times * int(trips or 1), unknown if trips else item.name, conditional)
            continue
        if item.opcode == "conditional":
            listed = item.attribute(r"branch_computations=\{([^}]*)\}") or ""
            inner = [name.strip().lstrip("%") for name in listed.split(",") if name.strip()]
            inner += re.findall(r"\b(?:true|false)_computation=%?([\w.\-]+)", item.attributes)
        elif item.opcode == "call":
            inner = [item.called] if item.called else []
        for name in inner:
            yield from executed(module, name, times, unknown, conditional or item.opcode == "conditional")
        if not inner:
            yield Executed(item, unit, times, unknown, conditional)
