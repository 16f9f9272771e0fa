"""Members of an ensemble are the single runs of their seeds: at the start to the bit, and after updates to rounding."""

import json
import shutil
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file
from tiny_run import one_device_mesh, recipe, trained, write_teacher

from rtd_jax.apps.distill.ensemble import initial_states, train_ensemble
from rtd_jax.apps.distill.ensemble_recipe import EnsembleRecipe
from rtd_jax.apps.distill.prepare import prepare
from rtd_jax.apps.distill.run import train
from rtd_jax.apps.distill.stages import Run
from rtd_jax.apps.study.finished import read_outcome
from rtd_jax.base.means import Mean
from rtd_jax.base.sharding import MeshSettings, make_mesh
from rtd_jax.methods.own_chains import OnPolicySettings
from rtd_jax.models.to_hf import save_pretrained
from rtd_jax.train.clock import Clock
from rtd_jax.train.curriculum import CurriculumSettings
from rtd_jax.train.ensemble import NO_ENSEMBLE, make_ensemble_step, put_members, put_state
from rtd_jax.train.optimizer import OptimizerSettings
from rtd_jax.train.recipe import EvaluationSettings, LossSettings, StudentSettings
from rtd_jax.train.state import TrainState

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
    loss = LossSettings(chunk_length=32, intermediate_weight=0.5)  # reads all that a teacher gives
    workdir = tmp_path_factory.mktemp("members")
    members = ensemble_of(teacher, optimizer=SMOOTH, evaluation=MEASURED, loss=loss)
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
        save_pretrained(single / "student", experiment.student.config, run.state.params["student"])
        ours, theirs = (load_file(folder / "student" / "model.safetensors") for folder in (member, single))
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


def test_a_killed_ensemble_goes_on_with_the_same_bits(finished, tmp_path, monkeypatch):
    """From a rolling checkpoint, and, where it was killed while it wrote reports, for the members that have none."""
    monkeypatch.setattr("rtd_jax.apps.distill.prepare.make_mesh", one_device_mesh)
    workdir, members = finished

    def killed(*_):
        raise KeyboardInterrupt

    again = replace(members, checkpoint_every=2)
    with monkeypatch.context() as patch:
        patch.setattr("rtd_jax.apps.distill.ensemble.Ensemble.report", killed)
        with pytest.raises(KeyboardInterrupt):
            train_ensemble(again, tmp_path)
    shutil.rmtree(tmp_path / "ensemble_0" / "checkpoints" / "stages")
    for seed in SEEDS:  # as lines stand when the process ends between two updates
        (tmp_path / f"seed_{seed}" / "metrics.jsonl").open("a").write('{"update": 3, "lo')
    train_ensemble(again, tmp_path)
    for seed in SEEDS:
        ours, theirs = (folder / f"seed_{seed}" for folder in (tmp_path, workdir))
        assert lines(ours) == lines(theirs)
        a, b = (load_file(folder / "student" / "model.safetensors") for folder in (ours, theirs))
        for name in b:
            np.testing.assert_array_equal(a[name], b[name])
    first, other = (tmp_path / f"seed_{seed}" / "report.json" for seed in (0, 3))
    kept, text = first.stat().st_mtime_ns, other.read_text()
    other.unlink()
    train_ensemble(again, tmp_path)
    assert first.stat().st_mtime_ns == kept
    assert json.loads(other.read_text())["student"] == json.loads(text)["student"]


def test_a_member_that_diverges_is_left_out_and_the_others_go_on(teacher, tmp_path, monkeypatch):
    monkeypatch.setattr("rtd_jax.apps.distill.prepare.make_mesh", one_device_mesh)
    members = ensemble_of(teacher, seeds=(0, 1))

    def spoilt(*args):
        states = initial_states(*args)
        return states._replace(params=jax.tree.map(lambda x: x.at[0].set(np.nan), states.params))

    monkeypatch.setattr("rtd_jax.apps.distill.ensemble.initial_states", spoilt)
    for _ in range(2):  # the second time from the checkpoint
        with pytest.raises(
            ValueError, match=r"1 of 2 members failed, first .*/seed_0: .* non-finite at update 1 \(stage 1"
        ):
            train_ensemble(members, tmp_path)
        assert (tmp_path / "seed_1" / "report.json").exists()
        assert not (tmp_path / "seed_0" / "report.json").exists()
    assert len(lines(tmp_path / "seed_1")) > len(lines(tmp_path / "seed_0")) == 0


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"curriculum": CurriculumSettings(depths=(1, 2))}, "a stage of the curriculum ends when its own run is ready"),
        ({"on_policy": OnPolicySettings(0.5, updates_per_refresh=2)}, "on_policy.fraction is not 0"),
        ({"micro_batches": 2}, "micro_batches is 2"),
    ],
)
def test_runs_that_cannot_be_one_program_are_refused_by_name_before_anything_is_loaded(
    teacher, tmp_path, capfd, changes, said
):
    with pytest.raises(SystemExit) as refused:
        train_ensemble(ensemble_of(teacher, **changes), tmp_path)
    assert refused.value.code == NO_ENSEMBLE
    (line,) = capfd.readouterr().err.splitlines()
    assert said in line
    assert "one by one with the train command" in line
    assert not list(tmp_path.iterdir())


def test_a_table_of_the_teacher_that_is_too_large_is_no_ensemble(teacher, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr("rtd_jax.apps.distill.prepare.make_mesh", one_device_mesh)
    monkeypatch.setattr("rtd_jax.train.teacher_table.MOST_BYTES", 1000)
    with pytest.raises(SystemExit) as refused:
        train_ensemble(ensemble_of(teacher), tmp_path)
    assert refused.value.code == NO_ENSEMBLE
    assert "outputs on the first 1 training chains" in capfd.readouterr().err


def test_folders_of_other_runs_are_refused(teacher, tmp_path):
    (tmp_path / "seed_3" / "checkpoints").mkdir(parents=True)
    with pytest.raises(ValueError, match="seed_3 has the checkpoints of a run that was no part of this ensemble"):
        train_ensemble(ensemble_of(teacher), tmp_path)
    with pytest.raises(ValueError, match="seeds is empty"):
        train_ensemble(ensemble_of(teacher, seeds=()), tmp_path)


def test_members_spread_over_devices_are_updated_as_on_one():
    """Two members a device, in a loop or side by side: the same numbers, each where its device has it."""

    def update(state, source, batch, coefficients):
        params = state.params - coefficients * (state.params - batch) + source
        return TrainState(state.step + 1, params, state.opt_state, state.rng), {"loss": Mean(jnp.sum(params), 1.0)}

    state = TrainState(jnp.zeros((), jnp.int32), jnp.arange(16.0).reshape(8, 2), {}, jnp.zeros((8, 2), jnp.uint32))
    expected = jax.vmap(lambda params, batch: params - 0.5 * (params - batch))(state.params, jnp.arange(8.0))
    for devices, together in ((4, None), (4, 2), (1, 8), (3, 5)):  # three do not divide eight members
        mesh = make_mesh(MeshSettings(data=-1, fsdp=1), jax.devices()[:devices])
        step = make_ensemble_step(update, mesh, together)
        own = put_members((jnp.arange(8.0), jnp.zeros(8)), mesh)
        after, metrics = step(put_state(jax.tree.map(jnp.copy, state), mesh), None, *own, 0.5)
        np.testing.assert_allclose(after.params, expected)
        np.testing.assert_allclose(metrics["loss"].sum, expected.sum(axis=1))
        assert int(after.step) == 1
        assert after.params.addressable_shards[0].data.shape[0] == (2 if devices == 4 else 8)


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
