"""What the benchmarks share: running commands in turn, noticing a disturbed machine, and keeping tables in docs/."""

import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # configs/ is beside the package, not in it
MARK = "RESULT "  # before the JSON that a worker prints
DISTURBED = 0.2  # cores that others may use while a worker runs; more, and its result is thrown away
ATTEMPTS = 4  # per result


@dataclass(frozen=True)
class Result:
    """What a worker printed, and how busy others kept the machine meanwhile."""

    values: dict[str, Any]
    other_load: float  # cores


def report(**values: Any) -> None:
    """Called by a worker at its end."""
    print(MARK + json.dumps(values), flush=True)


def peak_memory() -> float:
    """Most memory this process ever held, in bytes (resident set)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0


def peak_device_memory() -> float:
    """Most bytes that this process ever held on its first JAX device; in main memory where that is the device."""
    import jax  # workers of other systems do without it

    stats = jax.devices()[0].memory_stats()
    return stats["peak_bytes_in_use"] if stats else peak_memory()


def alternate(commands: Mapping[str, Sequence[str]], rounds: int) -> dict[str, list[Result]]:
    """Runs the commands in turn, `rounds` times; a result got on a disturbed machine is taken again."""
    found: dict[str, list[Result]] = {name: [] for name in commands}
    for turn in range(rounds):
        for name, command in commands.items():
            result = _undisturbed(name, command)
            found[name].append(result)
            print(f"round {turn + 1}: {name}: {result.values} (others used {result.other_load:.2f} cores)", flush=True)
    return found


def _undisturbed(name: str, command: Sequence[str]) -> Result:
    for _ in range(ATTEMPTS):
        result = run_worker(name, command)
        if result.other_load <= DISTURBED:
            return result
        print(f"{name}: others used {result.other_load:.2f} cores; thrown away", flush=True)
    raise RuntimeError(f"the machine was busy in {ATTEMPTS} attempts at {name}; stop what else runs and try again")


def run_worker(name: str, command: Sequence[str]) -> Result:
    """What one worker reported.

    Raises:
      RuntimeError: it failed; has the end of what it printed.
    """
    busy, own, started = busy_seconds(), _children_seconds(), time.monotonic()
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    elapsed = time.monotonic() - started
    others = (busy_seconds() - busy) - (_children_seconds() - own)
    lines = [line for line in done.stdout.splitlines() if line.startswith(MARK)]
    if done.returncode or not lines:
        raise RuntimeError(f"{name} failed:\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}")
    return Result(json.loads(lines[-1][len(MARK) :]), max(0.0, others / elapsed))


def busy_seconds() -> float:
    """Seconds that all cores together were not idle since the machine started (user, nice, system, irq, softirq)."""
    fields = Path("/proc/stat").read_text().splitlines()[0].split()[1:]
    user, nice, system, _, _, irq, softirq = map(int, fields[:7])
    return (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK")


def _children_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def median(results: Sequence[Result], key: str) -> float:
    return statistics.median(result.values[key] for result in results)


def spread(results: Sequence[Result], key: str) -> str:
    """Median (smallest to largest)."""
    values = sorted(result.values[key] for result in results)
    return f"{statistics.median(values):,.0f} ({values[0]:,.0f} to {values[-1]:,.0f})"


def machine(gpu: bool = False) -> str:
    """One line about this machine, with its GPU's name where that matters."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())
    if gpu:
        query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
        model += f", {subprocess.run(query, capture_output=True, text=True, check=True).stdout.splitlines()[0]}"
    return f"{os.cpu_count()} cores of {model}, Python {platform.python_version()}, {time.strftime('%Y-%m-%d')}"


def random_batch(
    rows: int, length: int, vocab_size: int, step_tokens: int, boundaries: bool = True, chains_per_row: int = 1
) -> Any:
    """A `Batch` of one chain a row, of steps of `step_tokens`; without boundaries one slot that is not used.

    Room for more chains a row stays empty; attention is then masked all the same.
    """
    from rtd_jax.base.types import Batch  # workers of other systems do without it

    positions_BL = np.broadcast_to(np.arange(length, dtype=np.int32), (rows, length))
    ends = np.arange(step_tokens - 1, length, step_tokens, dtype=np.int32)[: None if boundaries else 1]
    ends_BCK = np.broadcast_to(ends, (rows, 1, len(ends)))
    room = [(0, 0), (0, chains_per_row - 1), (0, 0)]
    return Batch(
        np.random.default_rng(0).integers(0, vocab_size, (rows, length)).astype(np.int32),
        positions_BL,
        np.ones_like(positions_BL),
        (positions_BL > 0).astype(np.float32),
        np.pad(ends_BCK, room),
        np.pad(np.full(ends_BCK.shape, boundaries), room),
    )


def markdown_table(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Left column as text, the others as numbers."""
    head = "| " + " | ".join(columns) + " |"
    rule = "|---" + "|--:" * (len(columns) - 1) + "|"
    return "\n".join([head, rule, *("| " + " | ".join(str(cell) for cell in row) + " |" for row in rows)])


def write_section(document: Path, name: str, text: str) -> None:
    """Puts `text` between the document's marks `<!-- name -->` and `<!-- end name -->`.

    Raises:
      ValueError: the document has no such marks.
    """
    begin, end = f"<!-- {name} -->", f"<!-- end {name} -->"
    content = document.read_text(encoding="utf-8")
    if begin not in content or end not in content:
        raise ValueError(f"{document} has no marks {begin} and {end}; put them where the table belongs")
    before, rest = content.split(begin, 1)
    after = rest.split(end, 1)[1]
    document.write_text(f"{before}{begin}\n{text.strip()}\n{end}{after}", encoding="utf-8")
    print(f"wrote {name} into {document}", file=sys.stderr)
