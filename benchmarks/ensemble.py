"""What an update costs in an ensemble and by itself: KD on few problems, CPU seconds for each update of a run, in turn.

    python benchmarks/ensemble.py --members=4  # 2 minutes on two cores; prints a table

CPU seconds are those of all threads, so that other processes disturb them less than the time on the clock.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from measure import markdown_table

from configs import rtd_tiny
from rtd_jax.apps.distill.ensemble import initial_states
from rtd_jax.apps.distill.ensemble_recipe import EnsembleRecipe
from rtd_jax.apps.distill.members import Ensemble
from rtd_jax.apps.distill.prepare import Experiment, prepare
from rtd_jax.base.settings import build, defaults
from rtd_jax.data.loader import MembersLoader
from rtd_jax.train.checkpoints import Checkpoints
from rtd_jax.train.clock import Clock
from rtd_jax.train.ensemble import put_state

UPDATES = 3  # of every member in a round


def recipe_of(members: int, side_by_side: int) -> EnsembleRecipe:
    """configs/rtd_tiny.py with logit matching alone, as configs/study_tiny.py has it."""
    c = defaults(EnsembleRecipe, rtd_tiny.get_config())
    c.data.train.limit = 250
    c.loss.alignment_weight = c.loss.coherence_weight = 0.0
    c.curriculum.enabled = c.evaluation.teacher = False
    c.seeds, c.side_by_side = tuple(range(members)), side_by_side
    return build(EnsembleRecipe, c.to_dict())


def cpu_seconds(update: Callable[[Any], Any], state: Any) -> float:
    """CPU seconds of an update, the first two, which compile, left out."""
    state = update(update(state))
    jax.block_until_ready(state)
    started = time.process_time()
    for _ in range(UPDATES):
        state = update(state)
        jax.block_until_ready(state)
    return (time.process_time() - started) / UPDATES


def single(experiment: Experiment, ensemble: Ensemble) -> Callable[[Any], Any]:
    """The update of a run by itself."""
    loader = ensemble.loader(0)

    def update(state: Any) -> Any:
        source, batch = experiment.on_devices(next(loader))
        return experiment.step(state, source, batch, experiment.objective.coefficients())[0]

    return update


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--members", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    members = arguments.members
    experiment, state = prepare(recipe_of(members, 1).member(0))
    on_host = jax.device_get(state)
    found: dict[str, list[float]] = {}
    updates = {}
    for name, side_by_side in (("a loop over members", 1), ("members side by side", members)):
        with tempfile.TemporaryDirectory() as folder:
            recipe = recipe_of(members, side_by_side)
            checkpoints = Checkpoints(Path(folder), 1)
            ensemble = Ensemble(recipe, experiment, state, Clock(), [Path(folder)] * members, checkpoints)
        step, loader = ensemble.make_step(), MembersLoader([ensemble.loader(seed) for seed in recipe.seeds])
        updates[name] = lambda state, step=step, loader=loader: step(state, next(loader))[0]
    alone = single(experiment, ensemble)
    for _ in range(arguments.rounds):
        found.setdefault("a run by itself", []).append(cpu_seconds(alone, jax.device_put(on_host)))
        for name, update in updates.items():
            states = put_state(initial_states(experiment, on_host, range(members)), experiment.mesh)
            found.setdefault(name, []).append(cpu_seconds(update, states) / members)
    medians = {name: statistics.median(values) for name, values in found.items()}
    base = medians["a run by itself"]
    rows = [
        (name, f"{medians[name]:.3f}", f"{medians[name] / base:.2f}", f"{min(values):.3f} to {max(values):.3f}")
        for name, values in found.items()
    ]
    print(markdown_table(["CPU seconds an update", "median", "of a run by itself", "rounds"], rows))


if __name__ == "__main__":
    main()
