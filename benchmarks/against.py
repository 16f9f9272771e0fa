"""The update of this checkout against that of another one: seconds and memory, in turn, in one run.

    git worktree add ../before 526ce8a
    python benchmarks/against.py ../before --rounds 4

For changes that are to leave the update as it is. Each worker is a process of its own, with a checkout's package and
that checkout's benchmarks/accelerator.py: it compiles the update of `rtd_tiny` for random weights, and times it.
"""

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

KD = {"loss.alignment_weight": 0.0, "loss.coherence_weight": 0.0}
CASES: dict[str, dict[str, Any]] = {"RTD": {}, "plain KD": KD, "RTD, 2 micro-batches": {"micro_batches": 2}}
WARM_UP, UPDATES = 2, 12


def work(root: Path, name: str) -> None:
    """Worker: compiles and times updates of a case with the package in `root`."""
    sys.path[0:1] = [str(root), str(root / "benchmarks")]
    import accelerator
    import jax
    from measure import report

    with tempfile.TemporaryDirectory() as folder:
        recipe = accelerator.recipe_of("rtd_tiny", CASES[name], Path(folder))
        abstract = accelerator.abstract_step(recipe, accelerator.make_mesh(recipe.mesh, jax.devices()[:1]))
    state, *given = accelerator.arguments_of(recipe, abstract)
    step = abstract.step.lower(state, *given).compile()
    seconds, losses = [], []
    for _ in range(WARM_UP + UPDATES):
        started = time.perf_counter()
        state, metrics = step(state, *given)
        jax.block_until_ready((state, metrics))
        seconds.append(time.perf_counter() - started)
        losses.append(float(metrics["loss"].value()))
    report(seconds=statistics.median(seconds[WARM_UP:]), peak=accelerator.memory(step).peak, loss=losses[-1])


def main() -> None:
    from measure import ROOT, alternate, machine, markdown_table

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("other", type=Path, help="the other checkout")
    parser.add_argument("--rounds", type=int, default=4)
    arguments = parser.parse_args()
    roots = {"before": arguments.other.absolute(), "now": ROOT}
    rows = []
    for name in CASES:
        commands = {side: [sys.executable, __file__, "--work", str(root), name] for side, root in roots.items()}
        before, now = (found for found in alternate(commands, arguments.rounds).values())
        ratios = [b.values["seconds"] / a.values["seconds"] for a, b in zip(before, now, strict=True)]
        rows.append(
            (
                name,
                *(f"{1000 * statistics.median(x.values['seconds'] for x in side):.1f} ms" for side in (before, now)),
                f"{statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})",
                *(f"{side[-1].values['peak'] / 2**20:.2f} MiB" for side in (before, now)),
                f"{abs(now[-1].values['loss'] - before[-1].values['loss']):.1e}",
            )
        )
    print(machine())
    print(markdown_table(("case", "before", "now", "ratio", "memory before", "now", "difference of losses"), rows))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--work"]:
        work(Path(sys.argv[2]), sys.argv[3])
    else:
        main()
