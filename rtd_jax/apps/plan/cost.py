"""One program, compiled for hardware that is not here, and what a call of it costs."""

import math
import time
from dataclasses import dataclass
from typing import Any

import jax

from rtd_jax.apps.plan.program import Hlo, Memory, matmul_flops, memory
from rtd_jax.apps.plan.targets import Target


@dataclass(frozen=True)
class Plan:
    """One program, compiled for one device of the target, with what a call of it costs."""

    program: str
    compile_seconds: float
    memory: Memory
    resident: float  # bytes per device that the run keeps in memory besides the program's arguments
    flops: float  # matrix products, per device
    bytes_moved: float  # per device
    collective_bytes: dict[str, float]  # size of the collectives' results on one device, by kind of collective
    wire_bytes: float  # bytes that a device sends or receives for these collectives

    def seconds(self, target: Target) -> dict[str, float]:
        """Seconds of a call if each resource were the only limit, at its data-sheet rate."""
        chip = target.chip
        return {
            "arithmetic": self.flops / chip.flops,
            "memory": self.bytes_moved / chip.bandwidth,
            "links": self.wire_bytes / chip.link,
        }

    @property
    def peak(self) -> float:
        """Largest number of bytes in use on a device while the program runs."""
        return self.memory.peak + self.resident

    def fits(self, target: Target) -> bool:
        return self.peak <= target.chip.memory


def traced(function: Any, *arguments: Any, **options: Any) -> tuple[jax.stages.Traced, tuple]:
    """A traced program, and its arguments."""
    return function.trace(*arguments, **options), arguments


def compile_plan(name: str, program: jax.stages.Traced, resident: float, devices: int) -> Plan:
    """Compiles a program for the devices of its arguments' shardings and reads off what a call costs."""
    started = time.monotonic()
    compiled = program.lower().compile()
    seconds = time.monotonic() - started
    hlo = Hlo(compiled.as_text())
    by_kind: dict[str, float] = {}
    wire = 0.0
    for collective in hlo.collectives():
        by_kind[collective.kind] = by_kind.get(collective.kind, 0.0) + collective.bytes * collective.times
        wire += collective.wire_bytes(devices) * collective.times
    flops = matmul_flops(program.jaxpr.jaxpr) / devices
    return Plan(name, seconds, memory(compiled), resident, flops, hlo.bytes_moved(), by_kind, wire)


def bytes_on_device(leaf: jax.ShapeDtypeStruct) -> float:
    """Bytes of a device's part of an array, given as a shape with its sharding."""
    assert leaf.sharding is not None
    return math.prod(leaf.sharding.shard_shape(leaf.shape)) * jax.dtypes.itemsize_bits(leaf.dtype) / 8
