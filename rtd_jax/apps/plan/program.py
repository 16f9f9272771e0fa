"""What a compiled program costs: memory, arithmetic, bytes moved and collectives.

XLA's own cost analysis counts the body of a loop once, and the A100 compiler gives no analysis at all; a scanned Llama
of 80 layers would look like one of a single layer. Here every loop counts as often as it runs: arithmetic is counted in
the jaxpr, where scans have lengths, and bytes and collectives in the optimised HLO, where loops have trip counts.
"""

import math
import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import jax
from jax.extend import core

BYTES = {"pred": 1, "s4": 0.5, "u4": 0.5, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "bf16": 2, "f16": 2, "s32": 4}
BYTES |= {"u32": 4, "f32": 4, "s64": 8, "u64": 8, "f64": 8, "f8e4m3fn": 1, "f8e5m2": 1, "c64": 8}
_BY_REPLICA = ("all-gather", "all-reduce", "reduce-scatter")  # what their groups name depends on an attribute
COLLECTIVES = (*_BY_REPLICA, "all-to-all", "collective-permute")
# Instructions that move no bytes themselves: names, tuples, control flow (whose bodies are counted), and the second
# halves of asynchronous pairs.
_FREE = {"parameter", "constant", "get-tuple-element", "tuple", "bitcast", "while", "conditional", "call", "after-all"}
_FREE |= {"partition-id", "replica-id", "iota", "opt-barrier", "async-done", "async-update", "copy-done"}
_SLICES = ("dynamic-slice", "slice", "gather")  # they read only as much as they write
# These write an update into an operand, in place; which of their operands the update is.
_UPDATES = {"dynamic-update-slice": 1, "scatter": 2}

_SHAPE = re.compile(r"\b([a-z]+\d*[a-z0-9]*)\[([\d,]*)\]")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.*?)\s([a-z][\w\-]*)\((.*)$")
_HEADER = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\{\s*$")


@dataclass(frozen=True)
class Memory:
    """Bytes on one device."""

    arguments: int
    temporaries: int
    output: int
    peak: int  # by the compiler, where it says; else arguments + temporaries + output that reuses no argument


@dataclass(frozen=True)
class Collective:
    """One collective instruction, on one device."""

    kind: str
    shape: str  # of its result
    bytes: float  # of its result
    times: int  # how often it runs in one call of the program
    group: int | None = None  # devices that exchange with one another; 1: nothing leaves a device; None: all devices

    def wire_bytes(self, devices: int) -> float:
        """Bytes that one of `devices` sends each time that it runs, by the usual ring algorithms."""
        group = devices if self.group is None else self.group
        if group == 1:
            return 0.0
        others = group - 1
        shares = {"all-reduce": (2 * others, group), "reduce-scatter": (others, 1), "collective-permute": (1, 1)}
        sent, whole = shares.get(self.kind, (others, group))
        return self.bytes * sent / whole


def memory(compiled: Any) -> Memory:
    """Memory of a `jax.stages.Compiled`."""
    stats = compiled.memory_analysis()
    total = stats.argument_size_in_bytes + stats.temp_size_in_bytes
    total += stats.output_size_in_bytes - stats.alias_size_in_bytes
    peak = getattr(stats, "peak_memory_in_bytes", 0) or total
    return Memory(stats.argument_size_in_bytes, stats.temp_size_in_bytes, stats.output_size_in_bytes, peak)


def matmul_flops(jaxpr: core.Jaxpr) -> float:
    """FLOPs of all matrix products, over all devices; a multiply-add counts as two, a scan as often as it runs.

    The body of a `while` of unknown length counts once, so decoding is planned per token.
    """
    total = 0.0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            lhs: Any = equation.invars[0].aval
            result: Any = equation.outvars[0].aval
            total += 2.0 * math.prod(result.shape) * math.prod(lhs.shape[axis] for axis in contracted)
        repeat = equation.params["length"] if equation.primitive.name == "scan" else 1
        values = [x.jaxpr if isinstance(x, core.ClosedJaxpr) else x for x in jax.tree.leaves(equation.params)]
        inner = [matmul_flops(x) for x in values if isinstance(x, core.Jaxpr)]
        # One branch of a conditional runs; the most expensive one is counted.
        total += repeat * (max(inner, default=0.0) if equation.primitive.name == "cond" else sum(inner))
    return total


@dataclass(frozen=True)
class _Instruction:
    name: str
    shape: str
    opcode: str
    rest: str  # operands and attributes

    @property
    def operands(self) -> list[str]:
        return re.findall(r"%([\w.\-]+)", self.rest.split("), ")[0])

    def called(self, *attributes: str) -> list[str]:
        return re.findall(rf"(?:{'|'.join(attributes)})=%?([\w.\-]+)", self.rest)


class Hlo:
    """Optimised HLO, parsed from its text."""

    def __init__(self, text: str):
        partitions = re.search(r"^HloModule .*\bnum_partitions=(\d+)", text)
        self._partitions = int(partitions[1]) if partitions else 1
        self._computations: dict[str, list[_Instruction]] = {}
        current: list[_Instruction] = []
        for line in text.splitlines():
            header = _HEADER.match(line)
            if header:
                current = self._computations.setdefault(header[1], [])
                if line.startswith("ENTRY"):
                    self._entry = header[1]
            elif (match := _INSTRUCTION.match(line)) is not None:
                current.append(_Instruction(*match.groups()))
        self._shapes = {i.name: i.shape for body in self._computations.values() for i in body}
        self._times: dict[str, int] = defaultdict(int)
        self._count(self._entry, 1)

    def _count(self, computation: str, times: int) -> None:
        """Counts how often each computation runs, except those inside of fusions."""
        self._times[computation] += times
        for instruction in self._computations.get(computation, []):
            if instruction.opcode == "while":
                trips = re.search(r'known_trip_count"?:\{"?n"?:"?(\d+)', instruction.rest)
                repeat = int(trips[1]) if trips else 1
                for name in instruction.called("body"):
                    self._count(name, times * repeat)
            elif instruction.opcode in ("call", "conditional", "async-start"):
                for name in instruction.called("to_apply", "calls", "true_computation", "false_computation"):
                    self._count(name, times)

    def _executed(self) -> Iterator[tuple[_Instruction, int]]:
        """Every instruction that is not inside a fusion, with how often it runs."""
        for computation, times in self._times.items():
            for instruction in self._computations.get(computation, []):
                yield instruction, times

    def collectives(self) -> list[Collective]:
        """Every collective instruction, with how often it runs."""
        found = []
        for instruction, times in self._executed():
            kind = instruction.opcode.removesuffix("-start")
            if kind in COLLECTIVES:
                shape = _result(instruction)
                group = _moving_group(instruction) if kind == "collective-permute" else self._group(kind, instruction)
                found.append(Collective(kind, shape, shape_bytes(shape), times, group))
        return found

    def _group(self, kind: str, instruction: _Instruction) -> int | None:
        """Devices in the largest group of a collective; None where its group is all of them."""
        size = group_size(instruction.rest)
        if size is None or kind not in _BY_REPLICA or "use_global_device_ids=true" in instruction.rest:
            return size
        # Without global ids these name replicas; on a channel all partitions of a replica take part, too.
        return size * self._partitions if "channel_id=" in instruction.rest else size

    def bytes_moved(self) -> float:
        """Bytes read and written on one device: operands and results of every instruction that is not inside a fusion.

        Where a fusion or slice reads only a part of an operand, that part is counted.
        """
        total = 0.0
        for instruction, times in self._executed():
            if instruction.opcode not in _FREE and not instruction.opcode.endswith("-done"):
                total += times * self._moved(instruction)
        return total

    def _moved(self, instruction: _Instruction) -> float:
        written = shape_bytes(instruction.shape)
        if instruction.opcode in _SLICES:
            return 2 * written
        if instruction.opcode in _UPDATES:
            return 2 * self._size(instruction.operands[_UPDATES[instruction.opcode]])
        if instruction.opcode == "fusion":
            (body,) = instruction.called("calls")
            return self._moved_by_fusion(written, self._computations.get(body, []))
        return written + sum(map(self._size, instruction.operands))

    def _moved_by_fusion(self, written: float, body: list[_Instruction]) -> float:
        updated = [i for i in body if i.opcode in _UPDATES]
        # An update is in place: the rest of the result is not written.
        total = sum(2 * self._size(i.operands[_UPDATES[i.opcode]]) for i in updated) if updated else written
        in_place = {i.operands[0] for i in updated}
        for parameter in body:
            if parameter.opcode != "parameter" or parameter.name in in_place:
                continue
            readers = [i for i in body if parameter.name in i.operands]
            is_sliced = readers and all(i.opcode in _SLICES for i in readers)
            total += sum(shape_bytes(i.shape) for i in (readers if is_sliced else [parameter]))
        return total

    def _size(self, name: str) -> float:
        """Bytes of an instruction's result; 0 where there is no such instruction."""
        return shape_bytes(self._shapes.get(name, ""))


def shape_bytes(shape: str) -> float:
    """Bytes of an HLO shape, tuples included."""
    return sum(
        BYTES[dtype] * math.prod(int(size) for size in sizes.split(",") if size)
        for dtype, sizes in _SHAPE.findall(shape)
        if dtype in BYTES
    )


def group_size(attributes: str) -> int | None:
    """Devices in the largest group of a collective's `replica_groups`; None where they are empty: all devices.

    The groups are listed, {{0,1},{2,3}}; or the rows of a reshaped and transposed iota, [4,2]<=[2,4]T(1,0); or axes of
    a mesh, mesh['x'=2,'y'=4] {'y'}, where 'y':(2)2 is a part of an axis, of size 2.
    """
    if listed := re.search(r"replica_groups=\{((?:\s*\{[\d,\s]*\},?)*)\s*\}", attributes):
        return max((len(group.split(",")) for group in re.findall(r"\{([^}]+)\}", listed[1])), default=None)
    if rows := re.search(r"replica_groups=\[\d+,(\d+)\]<=", attributes):
        return int(rows[1])
    if mesh := re.search(r"replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}", attributes):
        sizes = dict(re.findall(r"([\w.\-]+)'?=(\d+)", mesh[1]))
        axes = re.findall(r"([A-Za-z_][\w.\-]*)'?(?::\(\d+\)(\d+))?", mesh[2])
        return math.prod(int(part or sizes[name]) for name, part in axes)
    return None


def _moving_group(permutation: _Instruction) -> int | None:
    """1 where a collective-permute leaves all data where they are, 2 where it sends any to another device."""
    pairs = re.search(r"source_target_pairs=\{((?:\s*\{\d+,\d+\},?)*)\s*\}", permutation.rest)
    if pairs is None:
        return None
    return 2 if any(source != target for source, target in re.findall(r"(\d+),(\d+)", pairs[1])) else 1


def _result(instruction: _Instruction) -> str:
    """Shape of a collective's result. The tuple of a `-start` instruction has the operands as well."""
    shapes = [f"{dtype}[{sizes}]" for dtype, sizes in _SHAPE.findall(instruction.shape)]
    if instruction.opcode.endswith("-start") and instruction.opcode != "all-reduce-start":
        shapes = shapes[len(shapes) // 2 :]
    return shapes[0] if len(shapes) == 1 else f"({', '.join(shapes)})"
