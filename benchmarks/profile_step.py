"""Where the time of an RTD update goes on this machine, and its FLOPs, by part of the model; from a profiler trace.

python benchmarks/profile_step.py                # a minute on two cores; writes docs/benchmarks.md
python benchmarks/profile_step.py --keep=trace   # leaves the trace too, for xprof

The instructions of the compiled program carry the scopes that they were traced under ("teacher", "student", "kd", ..);
the trace has their durations. FLOPs are those of matrix products in the jaxpr, under the same scopes, loops as often as
they run.
"""

import argparse
import math
import re
import tempfile
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import optax
from jax.extend import core
from measure import ROOT, machine, markdown_table, random_batch, write_section
from rtd_overhead import LENGTH, ROWS, SIZES, VOCAB, models

from rtd_jax.methods import LossSettings
from rtd_jax.methods.term import Setup
from rtd_jax.train.state import create_state
from rtd_jax.train.update import make_train_step

UPDATES = 20
CONTROL = {"while", "conditional", "call"}  # their bodies are in the trace on their own
# What the scopes in an instruction's name say, first match first.
PARTS = (
    ("optimizer", r"\boptimizer\b"),
    ("alignment and coherence", r"\b(alignment|coherence)\b"),
    ("KD loss, LM heads included", r"\bkd\b"),
    ("teacher, attention", r"\bteacher\b.*\battention\b"),
    ("teacher, MLP", r"\bteacher\b.*\bmlp\b"),
    ("teacher, rest", r"\bteacher\b"),
    ("student backward, attention", r"transpose.*\bstudent\b.*\battention\b"),
    ("student backward, MLP", r"transpose.*\bstudent\b.*\bmlp\b"),
    ("student backward, rest", r"transpose.*\bstudent\b"),
    ("student forward, attention", r"\bstudent\b.*\battention\b"),
    ("student forward, MLP", r"\bstudent\b.*\bmlp\b"),
    ("student forward, rest", r"\bstudent\b"),
    ("attention masks", r"\battention\b"),
)
OTHER = "no scope: buffers of loops cleared or copied"


def part_of(scopes: str) -> str:
    """Which part of the update an instruction with these scopes belongs to."""
    return next((name for name, pattern in PARTS if re.search(pattern, scopes)), OTHER)


def parts_of_instructions(hlo: str) -> dict[str, tuple[str, str]]:
    """Instruction name -> (opcode, part), of every instruction of an HLO text.

    A fusion without scopes of its own has those of what was fused, and what has none at all goes with the loop that it
    runs in: the compiler drops the scopes of products that it rewrites.
    """
    bodies: dict[str, list[tuple[str, str, str]]] = defaultdict(list)  # computation -> (name, opcode, scopes)
    computation = entry = ""
    for line in hlo.splitlines():
        if header := re.match(r"^(ENTRY )?%?([\w.\-]+) \(.*\{\s*$", line):
            computation = header[2]
            entry = computation if header[1] else entry
        elif match := re.match(r"^\s+(?:ROOT )?%?([\w.\-]+) = .*?\s([a-z][\w\-]*)\(", line):
            scopes = re.search(r'op_name="([^"]*)"', line)
            called = re.search(r"calls=%?([\w.\-]+)", line)
            inside = " ".join(scopes for _, _, scopes in bodies[called[1]]) if called else ""
            bodies[computation].append((match[1], match[2], scopes[1] if scopes else inside))
    found = {}
    for computation, body in bodies.items():
        parts = Counter(part_of(scopes) for _, _, scopes in body if part_of(scopes) != OTHER)
        of_loop = parts.most_common(1)[0][0] if parts and computation != entry else OTHER
        for name, opcode, scopes in body:
            part = part_of(scopes)
            found[name] = (opcode, of_loop if part == OTHER else part)
    return found


def matmuls(jaxpr: core.Jaxpr, outer: str = "", times: int = 1) -> Iterator[tuple[str, float]]:
    """(scopes, FLOPs) of every matrix product."""
    for equation in jaxpr.eqns:
        scopes = f"{outer}/{equation.source_info.name_stack}"
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            lhs: Any = equation.invars[0].aval
            result: Any = equation.outvars[0].aval
            yield scopes, times * 2.0 * math.prod(result.shape) * math.prod(lhs.shape[axis] for axis in contracted)
        repeat = times * (equation.params["length"] if equation.primitive.name == "scan" else 1)
        for inner in equation.params.values():
            for sub in inner if isinstance(inner, tuple | list) else (inner,):
                if isinstance(sub, core.ClosedJaxpr | core.Jaxpr):
                    yield from matmuls(sub.jaxpr if isinstance(sub, core.ClosedJaxpr) else sub, scopes, repeat)


def seconds_by_part(trace: Path, instructions: dict[str, tuple[str, str]]) -> Counter[str]:
    """Durations of a trace's instructions, summed over threads, control flow left out."""
    (path,) = trace.rglob("*.xplane.pb")
    found: Counter[str] = Counter()
    for plane in jax.profiler.ProfileData.from_file(str(path)).planes:
        for line in plane.lines:
            for event in line.events:
                opcode, part = instructions.get(event.name, ("", ""))
                if opcode and opcode not in CONTROL:
                    found[part] += event.duration_ns / 1e9
    return found


def profile(keep: Path | None) -> tuple[Counter[str], Counter[str]]:
    """(seconds, FLOPs) of one update by part."""
    teacher, student = models()
    key = jax.random.PRNGKey(0)
    optimizer = optax.adamw(1e-4)
    objective = LossSettings().objective(Setup(student.config, teacher.config, VOCAB))
    step: Any = make_train_step(student, teacher, optimizer, objective)
    params = {
        "student": student.init(key),
        **objective.init_params(key, student.config.width, teacher.config.width),
    }
    state, teacher_params, batch = create_state(params, optimizer, key), teacher.init(key), random_batch(*SIZES)
    traced = step.trace(state, teacher_params, batch, objective.coefficients())
    flops: Counter[str] = Counter()
    for scopes, amount in matmuls(traced.jaxpr.jaxpr):
        flops[part_of(scopes)] += amount
    compiled = traced.lower().compile()
    for _ in range(3):
        state, _ = compiled(state, teacher_params, batch, objective.coefficients())
    jax.block_until_ready(state)
    with tempfile.TemporaryDirectory() as folder:
        where = keep or Path(folder)
        with jax.profiler.trace(str(where)):
            for _ in range(UPDATES):
                state, _ = compiled(state, teacher_params, batch, objective.coefficients())
            jax.block_until_ready(state)
        seconds = seconds_by_part(where, parts_of_instructions(compiled.as_text()))
    return Counter({name: total / UPDATES for name, total in seconds.items()}), flops


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--keep", type=Path, help="folder for the trace; it must not hold one already")
    parser.add_argument("--no-write", action="store_true", help="print the table, leave docs/benchmarks.md as it is")
    arguments = parser.parse_args()
    seconds, flops = profile(arguments.keep)
    all_seconds, all_flops = seconds.total(), flops.total()
    rows = [
        (
            name,
            f"{1000 * seconds[name]:.0f}",
            f"{100 * seconds[name] / all_seconds:.1f}",
            f"{flops[name] / 1e9:.1f}",
            f"{100 * flops[name] / all_flops:.1f}",
            f"{flops[name] / seconds[name] / 1e9:.0f}" if flops[name] and seconds[name] else "",
        )
        for name in (*(name for name, _ in PARTS), OTHER)
    ]
    rows.append(("all", f"{1000 * all_seconds:.0f}", "100", f"{all_flops / 1e9:.1f}", "100", ""))
    columns = ("part of an update", "ms", "%", "GFLOP of matrix products", "%", "GFLOP/s")
    text = markdown_table(columns, rows)
    text += f"\n\n{UPDATES} updates of {ROWS} x {LENGTH} tokens, traced, on {machine()}."
    print(text)
    if not arguments.no_write:
        write_section(ROOT / "docs" / "benchmarks.md", "profile", text)


if __name__ == "__main__":
    main()
