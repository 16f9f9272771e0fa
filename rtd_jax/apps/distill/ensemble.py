"""`ensemble`: runs that differ in their seed alone, trained as one program.

Each member trains as `train` would train it with its seed: the same params at the start, the same order of the data,
the same update. What it leaves lies where its own run would have left it, in <workdir>/seed_<seed>. Checkpoints hold
all members, in <workdir>/ensemble_<first seed>/checkpoints.
"""

import contextlib
import dataclasses
import functools
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import jax
import jax.numpy as jnp

from rtd_jax.apps.distill.ensemble_recipe import EnsembleRecipe, NoEnsemble, check_ensemble
from rtd_jax.apps.distill.members import Ensemble
from rtd_jax.apps.distill.prepare import Experiment, prepare
from rtd_jax.base import signals
from rtd_jax.base.console import Display
from rtd_jax.base.files import write_json
from rtd_jax.base.lock import locked
from rtd_jax.base.sharding import MeshSettings
from rtd_jax.train.checkpoints import Checkpoints, check_same_settings
from rtd_jax.train.clock import Clock
from rtd_jax.train.ensemble import NO_ENSEMBLE, put_state
from rtd_jax.train.metrics import MetricsLog
from rtd_jax.train.outputs import check_outputs, check_saves
from rtd_jax.train.state import TrainState, create_state
from rtd_jax.train.student import student_folders


def train_ensemble(recipe: EnsembleRecipe, workdir: Path) -> list[Path]:
    """Runs or resumes an ensemble. Returns the paths of the members' report.json.

    Leaves in <workdir>/seed_<seed> what `train` leaves, but for checkpoints and report.html. Times are a member's equal
    share of the ensemble's.

    Raises:
      ValueError: bad settings, data, checkpoints or disk; or a member's loss became non-finite, after all others ended.
      SystemExit: with status NO_ENSEMBLE, where the runs cannot be one program; the reason was printed.
    """
    try:
        check_ensemble(recipe)
        own = workdir / f"ensemble_{recipe.seeds[0]}"
        with contextlib.ExitStack() as stack:
            for folder in (own, *(workdir / f"seed_{seed}" for seed in recipe.seeds)):
                stack.enter_context(locked(folder))
            return _train_ensemble(recipe, workdir, own)
    except NoEnsemble as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        raise SystemExit(NO_ENSEMBLE) from error


def _train_ensemble(recipe: EnsembleRecipe, workdir: Path, own: Path) -> list[Path]:
    started = time.monotonic()
    recipe = dataclasses.replace(recipe, mesh=MeshSettings(data=-1, fsdp=1, tensor=1))
    folders = [workdir / f"seed_{seed}" for seed in recipe.seeds]
    checkpoints = Checkpoints(own, recipe.keep_checkpoints, digest=recipe.checkpoint_digest)
    latest = checkpoints.latest()
    if latest is not None:  # before anything heavy is loaded
        check_same_settings(latest, recipe)
    for folder in folders:
        check_outputs(folder, *student_folders(recipe.student))
        if latest is not None and (folder / "report.json").exists():
            continue
        for name in ("checkpoints", "report.json"):
            if (folder / name).exists():
                raise ValueError(
                    f"{folder} has the {name} of a run that was no part of this ensemble; choose another --workdir, or "
                    "leave its seed out"
                )
    clock = Clock()
    with clock.span("loading and tokenising"):
        experiment, first = prepare(recipe.member(recipe.seeds[0]), functools.partial(print, flush=True))
        check_saves(experiment.tokenizer)
        state = put_state(initial_states(experiment, first, recipe.seeds), experiment.mesh)
        del first
        ensemble = Ensemble(recipe, experiment, state, clock, folders, checkpoints)
        before = ensemble.drift_before()
        if latest is not None:
            ensemble.restore(latest)
    for member in ensemble.members:
        write_json(member.folder / "settings.json", asdict(member.recipe))
    with (
        contextlib.ExitStack() as stack,
        Display(recipe.total_updates, int(ensemble.state.step), silent=False) as display,
    ):
        done = int(ensemble.state.step)
        logs = [stack.enter_context(contextlib.closing(MetricsLog(folder, done))) for folder in folders]
        display.note(
            f"{f'resuming at update {done}' if done else 'starting'} in {own}: {len(folders)} members over "
            f"{experiment.mesh.size} devices, {len(experiment.train.encoded)} training chains"
        )
        with signals.finishing():
            ensemble.train(logs, display)
        display.note("writing the students as Hugging Face folders, then evaluating by greedy decoding")
        with clock.span("evaluation"):
            ensemble.report(display, before, started)
    failed = {member.folder: member.failure for member in ensemble.members if member.failure}
    if failed:
        folder, failure = next(iter(failed.items()))
        raise ValueError(f"{len(failed)} of {len(folders)} members failed, first {folder}: {failure}")
    return [folder / "report.json" for folder in folders]


def initial_states(experiment: Experiment, state: TrainState, seeds: Sequence[int]) -> TrainState:
    """The states from which single runs of these seeds start, [R, ...] but for `step`.

    Args:
      state: from which a run of any seed starts.
    """
    student, objective = experiment.student, experiment.objective
    widths = student.config.width, experiment.teacher_config.width
    is_random = experiment.recipe.student.init == "random"  # else all seeds start with the same student

    def start(key: jax.Array) -> TrainState:
        student_key, maps_key, run_key = jax.random.split(key, 3)
        params = student.init(student_key) if is_random else state.params["student"]
        learned = objective.init_params(maps_key, *widths, experiment.kept_S)
        return create_state({"student": params, **learned}, experiment.optimizer, run_key)

    keys_R = jnp.stack([jax.random.PRNGKey(seed) for seed in seeds])
    return jax.jit(jax.vmap(start))(keys_R)._replace(step=state.step)
