"""Students that are trained through rounded matrices: what is saved, measured, resumed and refused."""

import json
import shutil
from dataclasses import replace

import chex
import jax
import numpy as np
import pytest
from tiny_run import recipe, write_teacher

from rtd_jax.apps.distill.prepare import prepare
from rtd_jax.apps.distill.run import train
from rtd_jax.base.sharding import make_mesh
from rtd_jax.models.from_hf import load_config, load_params
from rtd_jax.models.quantized_folders import quantization_of
from rtd_jax.models.schemes import Scheme, as_params, rounded
from rtd_jax.train.abstract import abstract_step
from rtd_jax.train.checkpoints import numbered
from rtd_jax.train.curriculum import CurriculumSettings
from rtd_jax.train.recipe import LossSettings, OnPolicySettings, StudentSettings
from rtd_jax.train.saved_models import load_model

QUANTIZED = StudentSettings("teacher_layers", layers=2, quantization="int3", group_size=8, compute_dtype="float32")
SCHEME = Scheme("int3", 8)
# Every kind of term: logits, states at steps, every token.
LOSS = LossSettings(chunk_length=32, step_state="mean", distance="squared", layers="evenly:2", intermediate_weight=0.5)
AT_ONCE = CurriculumSettings(enabled=False, validate_every=4, validation_chains=8)


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    teacher = write_teacher(tmp_path_factory.mktemp("quantized") / "teacher")
    return recipe(teacher, student=QUANTIZED, loss=LOSS, curriculum=AT_ONCE)


@pytest.fixture(scope="module")
def finished(settings, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("quantized") / "run"
    train(settings, workdir)
    return workdir


def metrics(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def folder_params(folder):
    return load_params(folder, load_config(folder))


def test_what_is_saved_is_what_the_loss_saw(finished):
    """student/ holds the rounded matrices of student_float/ to the last bit, and a stage checkpoint opens as them."""
    assert quantization_of(finished / "student") == SCHEME
    assert quantization_of(finished / "student_float") is None
    floats = folder_params(finished / "student_float")
    want = jax.jit(lambda params: as_params(rounded(params, SCHEME), load_config(finished / "student")))(floats)
    chex.assert_trees_all_equal(folder_params(finished / "student"), want)
    opened = load_model(str(finished))
    assert opened.model.quantization is None
    chex.assert_trees_all_equal(jax.device_get(opened.params), jax.device_get(want))
    chex.assert_trees_all_equal(load_model(str(finished), "bfloat16").model, opened.model)


def test_what_is_reported_is_the_quantised_student(finished, settings):
    experiment, _ = prepare(settings, lambda _: None)
    opened = load_model(str(finished / "student"))
    want, _ = experiment.evaluator(opened.model, opened.params, experiment.problems)
    report = json.loads((finished / "report.json").read_text())
    assert report["student"]["perplexity"] == pytest.approx(want["perplexity"], rel=1e-6)
    floats = load_model(str(finished / "student_float"))
    other, _ = experiment.evaluator(floats.model, floats.params, experiment.problems)
    assert abs(other["perplexity"] / want["perplexity"] - 1) > 1e-3  # the rounding is not nothing


def test_it_learns_and_a_resumed_run_has_the_same_bits(finished, settings, tmp_path):
    losses = [line["distill/hard_loss"] for line in metrics(finished) if "distill/hard_loss" in line]
    assert np.mean(losses[-2:]) < np.mean(losses[:2])
    workdir = tmp_path / "run"
    shutil.copytree(finished, workdir)
    for name in ("student", "student_float"):
        shutil.rmtree(workdir / name)
    (workdir / "report.json").unlink()
    shutil.rmtree(workdir / "checkpoints" / "stages")
    assert numbered(workdir / "checkpoints" / "rolling")[-1].name == "8"
    train(settings, workdir)
    for name in ("student", "student_float"):
        chex.assert_trees_all_equal(folder_params(workdir / name), folder_params(finished / name))


def test_own_chains_are_written_by_the_quantised_student(settings, tmp_path):
    """The student that writes is the one that is trained: rounded once for a drawing, not at each token."""
    own = OnPolicySettings(fraction=0.5, updates_per_refresh=2, max_new_tokens=8, batch_size=4)
    changes = {"total_updates": 2, "batch_size": 16, "on_policy": own, "loss": LossSettings(chunk_length=32)}
    train(replace(settings, **changes), tmp_path / "run")
    assert quantization_of(tmp_path / "run" / "student") == SCHEME


def test_what_is_rounded_is_not_rounded_again_and_a_foreign_file_is_found_at_the_start(settings, finished, tmp_path):
    again = replace(QUANTIZED, init="pretrained", layers=0, path=str(finished / "student"))
    with pytest.raises(ValueError, match=r"is quantised \(int3-g8\).*of a run student_float/ beside it"):
        prepare(replace(settings, student=again), lambda _: None)
    prepare(replace(settings, student=replace(again, path=str(finished / "student_float"))), lambda _: None)
    (tmp_path / "run" / "student_float").mkdir(parents=True)
    (tmp_path / "run" / "student_float" / "notes.txt").touch()
    with pytest.raises(ValueError, match=r"student_float: holds notes\.txt"):
        train(settings, tmp_path / "run")
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_it_is_planned_and_refused_by_name(settings):
    assert abstract_step(settings, make_mesh(settings.mesh)).student.quantization == SCHEME
    for changes, says in (
        ({"group_size": 128}, r"student\.quantization='int3': group_size 128 does not divide the 32 inputs"),
        ({"quantization": "nf4", "group_size": 8}, r"student\.quantization='nf4': .*group"),
    ):
        with pytest.raises(ValueError, match=says):
            prepare(replace(settings, student=replace(QUANTIZED, **changes)), lambda _: None)
    with pytest.raises(ValueError, match="int3 has no zero points"):
        replace(QUANTIZED, symmetric=False)
