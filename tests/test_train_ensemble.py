"""Members of an ensemble are the single runs of their seeds: at the start to the bit, and after updates to rounding."""

import json

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file
from tiny_run import one_device_mesh, recipe, trained, write_teacher

from rtd_jax.apps.distill.ensemble import EnsembleRecipe, initial_states, train_ensemble
from rtd_jax.apps.distill.prepare import prepare
from rtd_jax.apps.distill.run import train
from rtd_jax.apps.distill.stages import Run
from rtd_jax.apps.study.finished import read_outcome
from rtd_jax.models.to_hf import save_pretrained
from rtd_jax.train.clock import Clock
from rtd_jax.train.curriculum import CurriculumSettings
from rtd_jax.train.optimizer import OptimizerSettings
from rtd_jax.train.recipe import EvaluationSettings, StudentSettings

SEEDS = (0, 3, 4, 7)
AT_ONCE = CurriculumSettings(enabled=False, validate_every=2, validation_chains=8)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return write_teacher(tmp_path_factory.mktemp("ensemble") / "teacher")


def ensemble_of(teacher, seeds=SEEDS, **changes):
    single = recipe(teacher, **({"curriculum": AT_ONCE, "total_updates": 3, "log_every": 1} | changes))
    values = {name: getattr(single, name) for name in single.__dataclass_fields__}
    return EnsembleRecipe(**values, seeds=seeds)


def lines(folder):
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if not key.startswith("perf/")} for line in found]


@pytest.mark.parametrize("init", ["random", "teacher_layers"])
def test_members_start_as_single_runs_do(teacher, init, monkeypatch):
    student = {} if init == "random" else {"student": StudentSettings(init, layers=1, compute_dtype="float32")}
    members = ensemble_of(teacher, **student)
    experiment, first = prepare(members.member(0), lambda _: None)
    states = jax.device_get(initial_states(experiment, first, SEEDS))
    for i, seed in enumerate(SEEDS):
        single = jax.device_get(prepare(members.member(seed), lambda _: None)[1])
        member = jax.tree.map(lambda x: x[i], states._replace(step=()))  # noqa: B023
        jax.tree.map(np.testing.assert_array_equal, member, single._replace(step=()))


# With Adam's usual eps an entry whose gradient is rounding noise moves by a whole step, either way.
SMOOTH = OptimizerSettings(learning_rate=1e-2, warmup_updates=1, eps=1e-2)
MEASURED = EvaluationSettings(
    problems_per_depth=2, max_new_tokens=8, batch_size=4, every=2, curve_problems=1, drift_problems=4, drift_own=True
)


@pytest.fixture(scope="module")
def finished(teacher, tmp_path_factory):
    """The folder of an ensemble of four members that had three updates, and its recipe."""
    workdir, members = tmp_path_factory.mktemp("members"), ensemble_of(teacher, optimizer=SMOOTH, evaluation=MEASURED)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("rtd_jax.apps.distill.prepare.make_mesh", one_device_mesh)
        reports = train_ensemble(members, workdir)
    assert reports == [workdir / f"seed_{seed}" / "report.json" for seed in SEEDS]
    return workdir, members


def test_members_learn_what_single_runs_of_their_seeds_learn(finished, tmp_path, monkeypatch):
    """Losses of every update, validation, curves and params after three updates of four members."""
    monkeypatch.setattr("rtd_jax.apps.distill.prepare.make_mesh", one_device_mesh)
    workdir, members = finished
    for seed in SEEDS:
        member, single = workdir / f"seed_{seed}", tmp_path / str(seed)
        single.mkdir()
        experiment, state = prepare(members.member(seed), lambda _: None)
        run = Run(state, Clock())
        alike(lines(member), trained(experiment, run, single))
        save_pretrained(single, experiment.student.config, run.state.params["student"])
        ours, theirs = (load_file(folder / "model.safetensors") for folder in (member / "student", single))
        for name in theirs:
            np.testing.assert_allclose(ours[name], theirs[name], rtol=0, atol=2e-6, err_msg=name)


def test_a_member_leaves_what_its_own_run_would_have_left(finished, tmp_path, monkeypatch):
    monkeypatch.setattr("rtd_jax.apps.distill.prepare.make_mesh", one_device_mesh)
    workdir, members = finished
    member, single, seed = workdir / f"seed_{SEEDS[-1]}", tmp_path / "single", SEEDS[-1]
    train(members.member(seed), single)
    ours, theirs = (json.loads((folder / "report.json").read_text()) for folder in (member, single))
    assert ours.pop("ensemble") == {"seeds": list(SEEDS)}
    for times in ("wall_seconds", "train_seconds", "seconds"):
        assert ours.pop(times)
        del theirs[times]
    for row in (*ours["curve"], *theirs["curve"]):
        del row["seconds"]
    ours["settings"]["mesh"] = theirs["settings"]["mesh"]
    alike(ours, theirs)
    found = read_outcome("task", "kd", seed, member, (f"seed={seed}",))
    assert found.correct.tolist() == read_outcome("task", "kd", seed, single).correct.tolist()


def alike(ours, theirs, place=""):
    """The same JSON, but for rounding."""
    if isinstance(theirs, dict):
        assert ours.keys() == theirs.keys(), place
        ours, theirs = ([x[key] for key in theirs] for x in (ours, theirs))
    if isinstance(theirs, list):
        assert len(ours) == len(theirs), place
        for i, (one, other) in enumerate(zip(ours, theirs, strict=True)):
            alike(one, other, f"{place}/{i}")
    elif isinstance(theirs, float):
        assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-5), place
    else:
        assert ours == theirs, place
