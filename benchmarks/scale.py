"""The published recipes on hardware that is not here, planned by the real compilers; writes docs/scale.md.

python3 -m venv .venv-plan && .venv-plan/bin/pip install -e '.[plan-gpu,plan-tpu]'
.venv-plan/bin/python benchmarks/scale.py  # 20 minutes on two cores; one after another, no weight is allocated
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from measure import ROOT, machine, markdown_table, write_section

GIB = 2**30
LONG = ("--config.data.row_length=4096", "--config.micro_batches=4", "--config.evaluation.batch_size=32")
INT8 = ("--config.teacher.param_dtype=int8",)
# The folder need not be there: what a plan reads of a cache are the recipe's own settings.
CACHED = ("--config.teacher.cache=cache", "--config.micro_batches=4")
# config, target, overrides
PLANS: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    ("rtd_8b", "a100-80gb:8", ()),
    ("rtd_8b", "a100-80gb:8", LONG),
    ("rtd_8b", "a100-80gb:4", INT8),
    ("rtd_8b", "a100-80gb:2", CACHED),
    ("rtd_8b", "a100-80gb:8", ("--config.teacher.sharding=tensor",)),
    ("rtd_8b", "tpu-v5p:2x2x2", ()),
    ("rtd_8b", "tpu-v6e:4x4", ()),
    ("rtd_1b", "a100-80gb:8", ()),
    ("rtd_1b", "a100-80gb:4", INT8),
    ("rtd_1b", "tpu-v5p:2x2x2", ()),
)


def planned(config: str, target: str, overrides: tuple[str, ...]) -> tuple[dict[str, Any], str]:
    """The numbers of launch/plan.py, and what it printed."""
    with tempfile.TemporaryDirectory() as folder:
        numbers = Path(folder) / "plan.json"
        command = [sys.executable, "launch/plan.py", f"--config=configs/{config}.py", f"--target={target}"]
        command += [*overrides, f"--json={numbers}"]
        print("+", *command[1:-1], flush=True)
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr[-3000:]}")
        return json.loads(numbers.read_text()), done.stdout


def row(config: str, target: str, overrides: tuple[str, ...], numbers: dict[str, Any]) -> tuple[Any, ...]:
    """One plan as a line of the table."""
    programs = numbers["programs"]
    update, capacity = programs["update"], numbers["chip"]["memory"] / GIB
    peaks = {name: (p["memory"]["peak"] + p["resident"]) / GIB for name, p in programs.items()}
    changes = ", ".join(change.removeprefix("--config.") for change in overrides) or "as published"
    binding = max(update["seconds"], key=lambda name: update["seconds"][name])
    return (
        f"`{config}` on {target}: {changes}",
        *(f"{update['memory'][key] / GIB:.1f}" for key in ("arguments", "temporaries")),
        f"{peaks['update']:.1f}",
        f"{max(peaks.values()):.1f}",
        f"{capacity:.1f}",
        "fits" if max(peaks.values()) <= capacity else "does not fit",
        f"{numbers['flops_without_remat'] / numbers['ideal_flops']:.3f}",
        f"{update['seconds'][binding]:.2f} ({binding})",
        f"{sum(p['compile_seconds'] for p in programs.values()):.0f}",
    )


COLUMNS = (
    "recipe, target, changes",
    "arguments",
    "temporaries",
    "peak of the update",
    "peak of any program",
    "capacity",
    "",
    "FLOPs / ideal, without recomputation",
    "s an update at the data sheet's rate (what binds)",
    "s to compile",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="plans whose config and target hold this text; writes nothing")
    arguments = parser.parse_args()
    rows, printed = [], {}
    for config, target, overrides in PLANS:
        if arguments.only not in f"{config} {target}":
            continue
        numbers, text = planned(config, target, overrides)
        rows.append(row(config, target, overrides, numbers))
        printed[config, target, overrides] = text
        print(*rows[-1], sep=" | ", flush=True)
    text = markdown_table(COLUMNS, rows) + f"\n\nMemory in GiB per device. Compiled on {machine()}."
    if not arguments.only:
        document = ROOT / "docs" / "scale.md"
        write_section(document, "plans", text)
        write_section(document, "published", f"```\n{printed[PLANS[0]].strip()}\n```")


if __name__ == "__main__":
    main()
