"""What a compiled program does, read from its HLO text: collectives, bytes moved, the compiler's own cycle counts.

XLA's `cost_analysis` counts the body of a loop once; a model whose layers are scanned looks tiny to it. Here each
instruction counts as often as the loops around it run. A loop whose length is not in the text (one that skips blocks of
a causal mask) inside one that runs n times is taken to run (n + 1) / 2 times, as a causal one does.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Iterator, Mapping

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute")

_BITS = {"pred": 8, "s2": 2, "u2": 2, "s4": 4, "u4": 4, "c64": 64, "c128": 128, "token": 0, "opaque": 0}
_HEADER = re.compile(r"^(?:ENTRY )?%?(\S+) \(.*\{$")
_LINE = re.compile(r"^\s+(?:ROOT )?%?(\S+) = (.*)$")
_ARRAY = re.compile(r"([a-z]\w*)\[([\d,]*)\](\{[^{}]*\})?")
# What costs nothing: names for parts of other buffers.
_FREE = frozenset(
    (
        *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call"),
        *("after-all", "partition-id", "replica-id", "opt-barrier", "domain"),
    )
)


@dataclasses.dataclass(frozen=True)
class Collective:
    """All collectives of a kind and group size in one step of one device."""

    kind: str
    group: int
    """Devices that take part in each; 0 if the text does not say."""
    count: float
    """How often a step runs one."""
    payload: float
    """Bytes of the whole arrays: what an all-gather gives, what a reduction takes."""

    @property
    def sent(self) -> float:
        """Bytes that a device sends in ring algorithms."""
        share = 1.0 if self.group < 2 else (self.group - 1) / self.group
        return self.payload * {"all-reduce": 2 * share, "collective-permute": 1.0}.get(self.kind, share)


_UNKNOWN_CYCLES = 2**60


@dataclasses.dataclass(frozen=True)
class Costs:
    """One step of one device."""

    collectives: tuple[Collective, ...]
    bytes_moved: float
    """Between main memory and the chip; what stays in on-chip memory is left out."""
    cycles: float | None
    """Sum of the compiler's estimates over the instructions that have one; `None` where it makes none."""
    guessed_loops: int
    """Loops whose length is not in the text."""


def analyze(text: str) -> Costs:
    """Reads the text of a compiled module (`compiled.as_text()`)."""
    module = _parse(text)
    trips = dict.fromkeys(module.computations, 0.0)
    guessed = _count(module, module.entry, 1.0, 1.0, trips)
    moved, cycles, found = 0.0, 0.0, {}
    for name, times in trips.items():
        if not times:
            continue
        body = module.computations[name]
        channels = set()
        for instruction in body.values():
            moved += times * _moved(module, body, instruction)
            if match := re.search(r'"estimated_cycles":"(\d+)"', instruction.rest):
                # The greatest integer stands for an instruction that the compiler cannot judge.
                cycles += times * int(match[1]) if int(match[1]) < _UNKNOWN_CYCLES else 0.0
            for kind, group, payload, channel in _collectives(module, body, instruction):
                # A collective that the compiler spreads over several fusions keeps its channel.
                if channel is None or channel not in channels:
                    channels.add(channel)
                    count, total = found.get((kind, group), (0.0, 0.0))
                    found[kind, group] = (count + times, total + times * payload)
    collectives = tuple(Collective(kind, group, *sums) for (kind, group), sums in found.items())
    collectives = tuple(sorted(collectives, key=lambda c: -c.sent))
    return Costs(collectives, moved, cycles or None, guessed)


@dataclasses.dataclass(frozen=True)
class _Instruction:
    name: str
    type: str
    opcode: str
    operands: tuple[str, ...]
    rest: str
    is_root: bool

    def called(self, attribute: str) -> str | None:
        match = re.search(rf"\b{attribute}=%?([\w.\-]+)", self.rest)
        return match and match[1]


@dataclasses.dataclass(frozen=True)
class _Module:
    computations: Mapping[str, Mapping[str, _Instruction]]
    entry: str

    @functools.cached_property
    def moved(self) -> dict[str, tuple[Mapping[int, float], float | None]]:
        return {}


def _parse(text: str) -> _Module:
    computations, entry, current = {}, "", None
    for line in text.splitlines():
        if current is None or not line.startswith(" "):
            if match := _HEADER.match(line):
                current = computations.setdefault(match[1], {})
                entry = match[1] if line.startswith("ENTRY") else entry
            continue
        if (match := _LINE.match(line)) and (instruction := _instruction(match[1], match[2], "ROOT " in line[:12])):
            current[instruction.name] = instruction
    if not entry:
        raise ValueError("no ENTRY computation: this is not the text of an HLO module")
    return _Module(computations, entry)


def _instruction(name: str, line: str, is_root: bool) -> _Instruction | None:
    end = _closing(line, 0) + 1 if line.startswith("(") else line.find(" ")
    match = re.match(r" ([\w\-]+)\(", line[end:])
    if not match:
        return None
    start = end + match.end() - 1
    close = _closing(line, start)
    operands = tuple(re.findall(r"%([\w.\-]+)", line[start:close]))
    rest = line[start : close + 1] if match[1] in ("constant", "parameter") else line[close + 1 :]
    return _Instruction(name, line[:end], match[1], operands, rest, is_root)


def _closing(line: str, start: int) -> int:
    depth = 0
    for i in range(start, len(line)):
        depth += (line[i] == "(") - (line[i] == ")")
        if depth == 0:
            return i
    return len(line)


def _count(module: _Module, name: str, times: float, around: float, trips: dict[str, float]) -> int:
    """Adds to `trips` how often each computation runs; returns the number of loops that had to be guessed."""
    trips[name] += times
    guessed = 0
    for instruction in module.computations[name].values():
        match instruction.opcode:
            case "while":
                known = _trip_count(module, instruction)
                guessed += known is None
                count = (around + 1) / 2 if known is None else known
                guessed += _count(module, instruction.called("body"), times * count, count, trips)
            case "conditional":
                branches = re.search(r"branch_computations=\{([^}]*)\}", instruction.rest)
                names = re.findall(r"%?([\w.\-]+)", branches[1]) if branches else []
                names += [instruction.called(f"{which}_computation") for which in ("true", "false")]
                for branch in filter(None, names):
                    guessed += _count(module, branch, times, around, trips)
            case "call":
                guessed += _count(module, instruction.called("to_apply"), times, around, trips)
    return guessed


def _trip_count(module: _Module, loop: _Instruction) -> int | None:
    if match := re.search(r'known_trip_count"?:\{"?n"?:"?(\d+)', loop.rest):
        return int(match[1])
    condition = module.computations[loop.called("condition")]
    root = next(i for i in condition.values() if i.is_root)
    if root.opcode == "fusion":
        condition = module.computations[root.called("calls")]
        root = next(i for i in condition.values() if i.is_root)
    if root.opcode != "compare" or "direction=LT" not in root.rest:
        return None
    limit = condition.get(root.operands[1])
    match = limit and limit.opcode == "constant" and re.match(r"\((\d+)\)", limit.rest)
    return int(match[1]) if match else None


def _collectives(module: _Module, body: Mapping[str, _Instruction], instruction: _Instruction) -> Iterator[tuple]:
    """`(kind, group size, payload, channel)` of the collectives that an instruction is or contains."""
    if instruction.opcode in ("fusion", "async-start"):
        inner = module.computations.get(instruction.called("calls"), {})
        scattered = any(i.is_root and "dynamic-slice" in i.opcode for i in inner.values())
        for part in inner.values():
            for kind, group, payload, channel in _collectives(module, inner, part):
                yield "reduce-scatter" if scattered and kind == "all-reduce" else kind, group, payload, channel
        return
    kind = instruction.opcode.removesuffix("-start")
    if kind not in KINDS:
        return
    out = _bytes(instruction.type)
    if instruction.opcode.endswith("-start") and kind in ("all-gather", "collective-permute"):
        arrays = [_bytes(m[0]) for m in _ARRAY.finditer(instruction.type)]  # (inputs, outputs, ...)
        out = max(arrays, default=0.0)
    if kind == "reduce-scatter":
        out = sum(_bytes(body[o].type) for o in instruction.operands if o in body)
    channel = re.search(r"channel_id=(\d+)", instruction.rest)
    yield kind, _group_size(instruction.rest), out, channel and channel[1]


def _group_size(rest: str) -> int:
    if match := re.search(r"replica_groups=mesh\[([^\]]*)\]\s*\{([^}]*)\}", rest):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", match[1]))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'(\w+)'", match[2]) if axis in sizes)
    if match := re.search(r"replica_groups=\[(\d+),(\d+)\]<=", rest):
        return int(match[2])
    if match := re.search(r"replica_groups=\{\{([\d,]*)\}", rest):
        return len(match[1].split(","))
    return 2 if "source_target_pairs=" in rest else 0


def _moved(module: _Module, body: Mapping[str, _Instruction], instruction: _Instruction) -> float:
    """Bytes between main memory and the chip of one instruction: operands read, results written."""
    if instruction.opcode in _FREE or instruction.opcode.endswith(("-done", "-update")):
        return 0.0
    operands = [_bytes(body[o].type, main_only=True) if o in body else 0.0 for o in instruction.operands]
    result = _bytes(instruction.type, main_only=True)
    match instruction.opcode:
        case "dynamic-slice" | "slice" | "gather":
            return 2 * result
        case "dynamic-update-slice":
            return 2 * operands[1]
        case "copy-start" | "slice-start":  # (destination, source, flag)
            return sum(_bytes(m[0], main_only=True) for m in list(_ARRAY.finditer(instruction.type))[:2])
        case "fusion" | "async-start":
            reads, written = _slices(module, instruction.called("calls"))
            operands = [min(size, reads.get(i, size)) for i, size in enumerate(operands)]
            result = result if written is None else min(result, written)
    return sum(operands) + result


def _slices(module: _Module, name: str | None) -> tuple[Mapping[int, float], float | None]:
    """Of a fused computation: the bytes read of parameters that are only sliced; those written, if by updates alone."""
    if name not in module.computations:
        return {}, None
    if name in module.moved:
        return module.moved[name]
    inner = module.computations[name]
    users: dict[str, list[_Instruction]] = {}
    for instruction in inner.values():
        for operand in instruction.operands:
            users.setdefault(operand, []).append(instruction)
    reads = {}
    for instruction in inner.values():
        if instruction.opcode != "parameter":
            continue
        sizes = [_slice_read(module, instruction, user, users) for user in users.get(instruction.name, [])]
        if sizes and None not in sizes:
            reads[int(instruction.rest.strip("()"))] = sum(sizes)
    root = next((i for i in inner.values() if i.is_root), None)
    outputs = [inner[o] for o in root.operands] if root and root.opcode == "tuple" else [root] if root else []
    written = None
    if any(_update(inner, output) for output in outputs):
        parts = [inner[u.operands[1]] if (u := _update(inner, output)) else output for output in outputs]
        written = sum(_bytes(part.type, main_only=True) for part in parts)
    module.moved[name] = (reads, written)
    return reads, written


def _slice_read(module: _Module, source: _Instruction, user: _Instruction, users) -> float | None:
    """Bytes that `user` reads of `source` if that is a slice of it, else `None`."""
    match user.opcode:
        case "dynamic-slice" | "slice":
            return _bytes(user.type)
        case "dynamic-update-slice" if user.operands[0] == source.name:
            return 0.0
        case "bitcast":
            sizes = [_slice_read(module, user, next_user, users) for next_user in users.get(user.name, [])]
            return None if not sizes or None in sizes else sum(sizes)
        case "fusion":
            reads, _ = _slices(module, user.called("calls"))
            sizes = [reads.get(i) for i, operand in enumerate(user.operands) if operand == source.name]
            return None if None in sizes else sum(sizes)
    return None


def _update(inner, output: _Instruction) -> _Instruction | None:
    while output.opcode == "bitcast" and output.operands[0] in inner:
        output = inner[output.operands[0]]
    return output if output.opcode == "dynamic-update-slice" and output.operands[1] in inner else None


def _bytes(type_text: str, main_only: bool = False) -> float:
    """Bytes of all arrays of a type; with `main_only` those in main memory (space 0)."""
    total = 0.0
    for dtype, dims, layout in _ARRAY.findall(type_text):
        if main_only and "S(" in layout:
            continue
        bits = _BITS.get(dtype)
        if bits is None:
            digits = re.search(r"\d+", dtype)
            bits = int(digits[0]) if digits else 0
        total += bits / 8 * math.prod(int(d) for d in dims.split(",") if d)
    return total
