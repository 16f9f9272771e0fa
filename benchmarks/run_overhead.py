"""What a whole RTD run costs on top of plain KD with the same updates, by what the time goes to; runs in turn.

python benchmarks/run_overhead.py  # 10 minutes on two cores; writes docs/benchmarks.md
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from measure import ROOT, machine, markdown_table, write_section

PLAIN = (
    "--config.loss.alignment_weight=0.0",
    "--config.loss.coherence_weight=0.0",
    "--config.curriculum.enabled=False",
)
SYSTEMS = {"plain KD": PLAIN, "RTD": ()}
UPDATES = 600
NOT_TRAINING = "evaluation"  # the same for every method, and as long as one likes


def seconds_of_run(flags: tuple[str, ...], workdir: Path) -> dict[str, float]:
    """Where a run of configs/rtd_tiny.py spent its time, by its own report."""
    command = [sys.executable, "launch/train.py", "--config=configs/rtd_tiny.py", f"--workdir={workdir}", *flags]
    command += [f"--config.total_updates={UPDATES}", "--config.evaluation.problems_per_depth=20"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr[-3000:]}")
    report = json.loads((workdir / "report.json").read_text())
    if report["updates"] != UPDATES:
        raise RuntimeError(f"{workdir} made {report['updates']} updates, not {UPDATES}: the runs cannot be compared")
    return report["seconds"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--no-write", action="store_true", help="print the table, leave docs/benchmarks.md as it is")
    arguments = parser.parse_args()
    found: dict[str, list[dict[str, float]]] = {name: [] for name in SYSTEMS}
    with tempfile.TemporaryDirectory() as folder:
        for turn in range(arguments.rounds):
            for name, flags in SYSTEMS.items():
                found[name].append(seconds_of_run(flags, Path(folder) / f"{name} {turn}".replace(" ", "_")))
                print(f"round {turn + 1}: {name}: {found[name][-1]}", flush=True)
    parts = [part for part in found["RTD"][0] if part != NOT_TRAINING]

    def median(name: str, part: str) -> float:
        return statistics.median(seconds.get(part, 0.0) for seconds in found[name])

    totals = {name: sum(median(name, part) for part in parts) for name in SYSTEMS}
    rows = []
    for part in parts:
        kd, rtd = (median(name, part) for name in SYSTEMS)
        rows.append((part, f"{kd:.1f}", f"{rtd:.1f}", f"{100 * (rtd - kd) / totals['plain KD']:+.1f}"))
    kd, rtd = totals.values()
    rows.append(("all but the final evaluation", f"{kd:.1f}", f"{rtd:.1f}", f"{100 * (rtd - kd) / kd:+.1f}"))
    columns = (f"s of {UPDATES} updates of `rtd_tiny`", "plain KD", "RTD", "% of plain KD")
    text = markdown_table(columns, rows) + f"\n\nMedians of {arguments.rounds} runs of each in turn on {machine()}."
    print(text)
    if not arguments.no_write:
        write_section(ROOT / "docs" / "benchmarks.md", "run", text)


if __name__ == "__main__":
    main()
