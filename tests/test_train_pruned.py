"""Students that are pruned from their teacher: how they start, train, resume, are planned and are refused."""

import shutil
from dataclasses import asdict, replace

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file
from tiny_run import one_device_mesh, recipe, write_teacher

from rtd_jax.apps.distill.ensemble import initial_states
from rtd_jax.apps.distill.prepare import Experiment, prepare
from rtd_jax.apps.distill.run import train
from rtd_jax.base.settings import build, unread_settings
from rtd_jax.base.sharding import make_mesh
from rtd_jax.models.from_hf import load_config, load_params
from rtd_jax.models.model import DecoderModel
from rtd_jax.models.pruning import prune_model
from rtd_jax.models.weights import parameter_count
from rtd_jax.train.abstract import abstract_step
from rtd_jax.train.checkpoints import numbered
from rtd_jax.train.curriculum import CurriculumSettings
from rtd_jax.train.recipe import LossSettings, Recipe, StudentSettings, TeacherSettings
from rtd_jax.train.saved_models import load_model
from rtd_jax.train.state import TrainState
from rtd_jax.train.student import evenly_spaced, student_config

PRUNED = StudentSettings("pruned", share=0.6, kv_heads=1, calibration_chains=10, compute_dtype="float32")
# Two pairs of layers, and every term that has maps.
LOSS = LossSettings(
    chunk_length=32, layers="1:1,2:2", intermediate_weight=0.5, token_alignment_weight=0.5, look_ahead_weight=0.5
)
AT_ONCE = CurriculumSettings(enabled=False, validate_every=2, validation_chains=8)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return write_teacher(tmp_path_factory.mktemp("pruned") / "teacher")


@pytest.fixture(scope="module")
def settings(teacher) -> Recipe:
    return recipe(teacher, student=PRUNED, loss=LOSS)


@pytest.fixture(scope="module")
def prepared(settings) -> tuple[Experiment, TrainState]:
    return prepare(settings, lambda _: None)


def test_a_student_starts_with_what_pruning_keeps_on_any_mesh(teacher, settings, prepared, monkeypatch):
    experiment, state = prepared
    config = load_config(teacher)
    assert parameter_count(experiment.student.config) / parameter_count(config) == pytest.approx(0.6, rel=0.1)
    chains = evenly_spaced(experiment.train.encoded, 10)
    assert len(chains) == 10
    wanted = prune_model(DecoderModel(config), load_params(teacher, config), chains, experiment.student.config)
    np.testing.assert_array_equal(experiment.kept_S, wanted.kept.units_S)
    monkeypatch.setattr("rtd_jax.apps.distill.prepare.make_mesh", one_device_mesh)
    alone, on_one = prepare(settings, lambda _: None)
    np.testing.assert_array_equal(alone.kept_S, experiment.kept_S)
    jax.tree.map(np.testing.assert_array_equal, *(jax.device_get(one.params) for one in (state, on_one)))
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(on_one.params["student"]), wanted.params)


def test_maps_put_what_is_kept_on_its_place_in_the_teacher(prepared):
    experiment, state = prepared
    maps = {name: np.asarray(array) for name, array in state.params.items() if name != "student"}
    assert set(maps) == {"f", "g", "ahead", "regressors"}
    teacher_D = np.random.default_rng(0).normal(size=32)
    placed_D = np.where(np.isin(np.arange(32), experiment.kept_S), teacher_D, 0.0)
    for array in maps.values():
        for one in array:  # of each pair of layers
            assert one.shape == (experiment.student.config.width, 32)
            np.testing.assert_allclose(teacher_D[experiment.kept_S] @ one, placed_D, rtol=1e-6)


def test_members_of_an_ensemble_start_as_single_runs_do(settings, prepared):
    members = jax.device_get(initial_states(*prepared, (0, 3)))
    single = jax.device_get(prepare(replace(settings, seed=3), lambda _: None)[1])
    jax.tree.map(lambda all, one: np.testing.assert_array_equal(all[1], one), members.params, single.params)


def test_a_run_resumes_to_the_same_bits_and_its_stages_are_read(settings, tmp_path):
    """A run that is cut back to its checkpoint after four updates ends with the student of the whole one."""
    short = replace(settings, total_updates=6, curriculum=AT_ONCE, loss=LossSettings(chunk_length=32))
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    train(short, whole)
    shutil.copytree(whole, cut)
    (cut / "report.json").unlink()
    for folder in ("student", "checkpoints/stages"):
        shutil.rmtree(cut / folder)
    assert [path.name for path in numbered(cut / "checkpoints" / "rolling")] == ["4"]
    train(short, cut)
    ours, theirs = (load_file(folder / "student" / "model.safetensors") for folder in (cut, whole))
    assert ours.keys() == theirs.keys()
    for name in theirs:
        np.testing.assert_array_equal(ours[name], theirs[name], err_msg=name)
    loaded = load_model(str(whole))
    assert loaded.model.config == load_config(whole / "student")
    np.testing.assert_array_equal(loaded.params["embedding"], theirs["model.embed_tokens.weight"])
    assert loaded.f.shape == loaded.g.shape == (loaded.model.config.width, 32)


def test_a_plan_needs_sizes_only(settings, teacher, tmp_path):
    (tmp_path / "config.json").write_text((teacher / "config.json").read_text())
    found = abstract_step(replace(settings, teacher=TeacherSettings(str(tmp_path))), make_mesh(settings.mesh))
    assert found.student.config == student_config(PRUNED, load_config(teacher))
    assert found.state.params["f"].shape == (2, found.student.config.width, 32)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"width": 64}, r"student\.width is 64, but the model to be pruned has 32"),
        ({"width": 16, "mlp_width": 24}, r"student\.share is 0\.6, but width and mlp_width, .* are given"),
        ({"layers": 1, "share": 0.9}, r"student\.share is 0\.9, .* with layers 1, kv_heads 1 have"),
    ],
)
def test_sizes_that_the_teacher_cannot_be_pruned_to_are_refused_by_name(settings, changes, message):
    with pytest.raises(ValueError, match=message):
        prepare(replace(settings, student=replace(PRUNED, **changes)), lambda _: None)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"share": 1.0}, r"config\.student\.share is 1\.0; expected at least 0 and below 1"),
        ({"share": -0.1}, r"config\.student\.share is -0\.1"),
        ({"share": 0.0, "kv_heads": 0}, r"init='pruned' needs share \(it is 0\.0\), or one of layers"),
        ({"heads": 2}, r"init='pruned' does not read heads"),
        ({"path": "x"}, r"init='pruned' does not read path"),
        ({"init": "teacher_layers", "layers": 1, "kv_heads": 0}, r"init='teacher_layers' does not read share"),
        ({"calibration_chains": 0}, r"config\.student\.calibration_chains is 0; expected 1 to"),
    ],
)
def test_settings_of_students_that_cannot_be_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        build(StudentSettings, asdict(PRUNED) | changes, "config.student")


def test_a_teacher_without_weights_cannot_be_pruned(settings, teacher, tmp_path):
    """It is refused before the data are read, though its cache would be enough for everything else."""
    folder = shutil.copytree(teacher, tmp_path / "weightless")
    (folder / "model.safetensors").unlink()
    served = TeacherSettings(str(folder), cache=str(tmp_path / "cache"), served_model="team/teacher")
    logits_only = LossSettings(chunk_length=32, alignment_weight=0.0, coherence_weight=0.0, temperature=1.0)
    without = replace(settings, teacher=served, loss=logits_only, curriculum=replace(AT_ONCE, threshold_factor=0.0))
    with pytest.raises(
        ValueError, match=r"student\.init is 'pruned', .* teacher's weights .*weightless.*teacher\.path"
    ):
        prepare(without, lambda _: None)


def test_calibration_chains_are_unread_by_other_students():
    other = StudentSettings("teacher_layers", layers=1, calibration_chains=9)
    assert "calibration_chains" in unread_settings(other)
    unread = {name for name in unread_settings(PRUNED) if not name.startswith("adapter.")}  # of which it has none
    assert unread == {"group_size", "symmetric", "quantize_head"}  # it is not quantised
