"""Where the time of an update goes on a GPU, by part of the model and by kind of kernel; from a trace made there.

python benchmarks/accelerator.py --only='8B -> 1B: chunk_length 128' --trace=trace  # on the GPU
python benchmarks/gpu_profile.py trace '8B -> 1B: chunk_length 128' H200  # anywhere; writes docs/benchmarks.md

The trace has the kernels' durations and instructions, the program's text the scopes of these, and the case's jaxpr the
FLOPs of matrix products under the same scopes.
"""

import argparse
import gzip
import re
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

import jax
from accelerator import CASES, PEAKS, recipe_of
from measure import ROOT, markdown_table, write_section
from profile_step import OTHER, PARTS, matmuls, part_of, parts_of_instructions

from rtd_jax.base.sharding import MeshSettings, make_mesh
from rtd_jax.train.abstract import abstract_step

# What a kernel's name says, first match first.
KINDS = (
    ("products", r"nvjet|gemm|cutlass"),
    ("attention", r"sdpa|fmha|flash|cudnn"),
    ("copies", r"^Mem(cpy|set)"),
    ("others", r""),
)
Kernel = tuple[str, str, float, float]  # name, instruction, start, end; in seconds


def kernels(trace: Path) -> Iterator[Kernel]:
    """What ran on the GPU.

    Raises:
      ValueError: the trace has no GPU in it.
    """
    planes = [plane for plane in jax.profiler.ProfileData.from_file(str(trace)).planes if "GPU" in plane.name]
    if not planes:
        raise ValueError(f"{trace} has nothing of a GPU; trace an update on one with accelerator.py --trace")
    for line in (line for plane in planes for line in plane.lines):
        for event in line.events:
            instruction = str(dict(event.stats).get("hlo_op", ""))
            yield event.name, instruction, event.start_ns / 1e9, (event.start_ns + event.duration_ns) / 1e9


def kind_of(kernel: str) -> str:
    return next(kind for kind, pattern in KINDS if re.search(pattern, kernel))


def seconds_by_kind(found: Iterable[Kernel], instructions: dict[str, tuple[str, str]]) -> Counter[tuple[str, str]]:
    """Seconds by (part, kind of kernel), summed over streams."""
    seconds: Counter[tuple[str, str]] = Counter()
    for name, instruction, start, end in found:
        seconds[instructions.get(instruction, ("", OTHER))[1], kind_of(name)] += end - start
    return seconds


def idle_seconds(found: Iterable[Kernel]) -> tuple[float, float]:
    """(seconds from the first kernel's start to the last one's end, seconds of these in which none ran)."""
    spans = sorted((start, end) for _, _, start, end in found)
    idle, until = 0.0, spans[0][0]
    for start, end in spans:
        idle, until = idle + max(0.0, start - until), max(until, end)
    return until - spans[0][0], idle


def flops_by_part(name: str) -> Counter[str]:
    """FLOPs of the matrix products of a case's update, attention's without what its mask saves."""
    config, overrides = CASES[name]
    with tempfile.TemporaryDirectory() as folder:
        abstract = abstract_step(
            recipe_of(config, overrides, Path(folder)), make_mesh(MeshSettings(), jax.devices()[:1])
        )
    traced = abstract.step.trace(abstract.state, abstract.source, abstract.batch, abstract.objective.coefficients())
    flops: Counter[str] = Counter()
    for scopes, amount in matmuls(traced.jaxpr.jaxpr):
        flops[part_of(scopes)] += amount
    return flops


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trace", type=Path, help="folder of accelerator.py --trace")
    parser.add_argument("case", choices=CASES, help="the case that was traced")
    parser.add_argument("card", choices=PEAKS, help="what it was traced on")
    parser.add_argument("--no-write", action="store_true", help="print the table, leave docs/benchmarks.md as it is")
    arguments = parser.parse_args()
    (path,) = arguments.trace.rglob("*.xplane.pb")
    program = gzip.decompress((arguments.trace / "program.txt.gz").read_bytes()).decode()
    found = list(kernels(path))
    seconds, flops = seconds_by_kind(found, parts_of_instructions(program)), flops_by_part(arguments.case)
    names = [name for name, _ in KINDS]
    rows = []
    for part in (*(name for name, _ in PARTS), OTHER):
        by_kind = [seconds[part, kind] for kind in names]
        # Attention's products are in its own kernels.
        rate = flops[part] / by_kind[0] / 1e12 if flops[part] and by_kind[0] and "attention" not in part else 0.0
        cells = [f"{1e3 * x:.0f}" for x in (sum(by_kind), *by_kind)]
        rows.append((part, *cells, f"{flops[part] / 1e12:.0f}", f"{rate:.0f}" if rate else ""))
    totals = [sum(amount for (_, kind), amount in seconds.items() if kind == name) for name in names]
    rows.append(("all", *(f"{1e3 * x:.0f}" for x in (sum(totals), *totals)), f"{flops.total() / 1e12:.0f}", ""))
    columns = ("part of an update", "ms", *names, "TFLOP of products", "TFLOP/s of the products' kernels")
    whole, idle = idle_seconds(found)
    text = markdown_table(columns, rows)
    text += f"\n\n{arguments.case}, one update of {1e3 * whole:.0f} ms on {arguments.card}, of which "
    text += f"{1e3 * idle:.0f} ms no kernel ran; streams overlap in part."
    print(text)
    if not arguments.no_write:
        write_section(ROOT / "docs" / "benchmarks.md", "profile_gpu", text)


if __name__ == "__main__":
    main()
