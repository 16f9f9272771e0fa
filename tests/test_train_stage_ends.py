"""Whole stages under each rule that can end them: what is measured, what a checkpoint brings back, what a run says."""

import dataclasses
import json
import shutil
import zlib
from pathlib import Path

import jax
import numpy as np
import pytest
from tiny_run import one_device_mesh, recipe, trained, write_teacher

from configs.rtd_tiny import BUNDLED_TEACHER
from rtd_jax.apps.distill.prepare import Experiment, prepare
from rtd_jax.apps.distill.run import train
from rtd_jax.apps.distill.stages import Run
from rtd_jax.base.sharding import to_host
from rtd_jax.data.sources import SourceSettings
from rtd_jax.eval.evaluate import ChainEvaluator
from rtd_jax.methods import LossSettings
from rtd_jax.train.checkpoints import read_meta, restore_state
from rtd_jax.train.clock import Clock
from rtd_jax.train.curriculum import CurriculumSettings
from rtd_jax.train.recipe import EvaluationSettings, OptimizerSettings, Recipe, StudentSettings, TeacherSettings


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> Path:
    return write_teacher(tmp_path_factory.mktemp("teacher"))


def staged(teacher: Path, **changes) -> Recipe:
    """Two stages, with changes of the curriculum."""
    settings = {
        "depths": (1, 2),
        "mixture": "equal",
        "validate_every": 3,
        "validation_chains": 8,
        "plateau_patience": 0,
    }
    return recipe(teacher, curriculum=CurriculumSettings(**(settings | changes)))


def prepared(settings: Recipe) -> tuple[Experiment, Run]:
    """What a run needs, and one that begins, on one device."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("rtd_jax.apps.distill.prepare.make_mesh", one_device_mesh)
        experiment, state = prepare(settings, lambda _: None)
    return experiment, Run(state, Clock())


def solving_at_hazard(asked: list[str]):
    """Solutions of which the teacher's are right and the student's as its params have it, to the bit."""

    def solutions(self, model, params, problems, texts=None, *, progress=None):
        is_teacher = model.config.width == 32
        asked.append("teacher" if is_teacher else "student")
        right = zlib.crc32(np.asarray(params["embedding"]).tobytes()) % (len(problems) + 1)
        return [{"correct": is_teacher or i < right} for i in range(len(problems))]

    return solutions


@pytest.mark.parametrize("ends_by", ["coherence", "solved", "share"])
def test_killed_inside_a_stage_a_run_goes_on_with_the_same_bits(teacher, tmp_path, monkeypatch, ends_by):
    """The state, the log and the records, with what the teacher reached: it is not asked again."""
    asked: list[str] = []
    monkeypatch.setattr(ChainEvaluator, "solutions", solving_at_hazard(asked))
    experiment, whole = prepared(staged(teacher, ends_by=ends_by, solved_share=1.0, threshold_factor=0.0))
    lines = trained(experiment, whole, tmp_path)
    assert asked.count("teacher") == (2 if ends_by == "solved" else 0)
    shutil.rmtree(tmp_path / "checkpoints" / "stages")
    path = tmp_path / "checkpoints" / "rolling" / "4"
    resumed = Run.from_meta(restore_state(path, whole.state), Clock(), read_meta(path))
    assert resumed.records[-1].ended_by is None
    assert resumed.records[-1].updates == 4
    asked.clear()
    assert trained(experiment, resumed, tmp_path) == lines
    assert asked.count("teacher") == (1 if ends_by == "solved" else 0)  # of the second stage
    jax.tree.map(np.testing.assert_array_equal, to_host(resumed.state), to_host(whole.state))
    assert resumed.records == whole.records
    measured = {key for line in lines for key in line if key.startswith("validation/")}
    assert (
        measured
        == {
            "coherence": {"validation/coherence", "validation/threshold"},
            "solved": {"validation/solved", "validation/threshold"},
            "share": set(),
        }[ends_by]
    )
    if ends_by == "share":
        assert [(record.updates, record.ended_by) for record in whole.records] == [(6, "budget")] * 2


def test_a_student_that_solves_what_its_teacher_solves_ends_its_stages_early(tmp_path, monkeypatch, capsys):
    """With chains that are written and judged: a copy of the bundled teacher. The report says what ended each stage."""
    monkeypatch.setattr("rtd_jax.apps.distill.prepare.make_mesh", one_device_mesh)
    settings = dataclasses.replace(
        staged(BUNDLED_TEACHER, ends_by="solved", solved_share=1.0, spend_budget=False),
        student=StudentSettings("teacher_layers", layers=4, compute_dtype="float32"),
        teacher=TeacherSettings(str(BUNDLED_TEACHER), "float32", "float32"),
        optimizer=OptimizerSettings(learning_rate=1e-9),
        evaluation=EvaluationSettings(problems_per_depth=1, max_new_tokens=64, batch_size=8, teacher=False),
        loss=LossSettings(chunk_length=32, alignment_weight=0.0, coherence_weight=0.0),
    )
    report = json.loads(train(settings, tmp_path).read_text())
    for stage in report["stages"]:
        assert (stage["updates"], stage["ended_by"], stage["ends_by"]) == (3, "threshold", "solved")
        assert stage["solved"] == stage["teacher_solved"] == stage["threshold"] > 0.8
        assert stage["coherence"] is None
    printed = capsys.readouterr().out
    assert "curriculum stage 1 has 40 training problems" in printed
    assert "of the validation problems solved (the teacher 1.0000)" in printed
    assert "chains solved" in printed
    assert "chains solved" in (tmp_path / "report.html").read_text(encoding="utf-8")
    assert (tmp_path / "training_solved.png").exists()
    assert not (tmp_path / "training_coherence.png").exists()


def test_the_teacher_is_loaded_where_only_the_curriculum_asks_it(teacher):
    labels = LossSettings(alpha=0.0, alignment_weight=0.0, coherence_weight=0.0)
    alone = {"loss": labels, "evaluation": EvaluationSettings(1, max_new_tokens=8, batch_size=4, teacher=False)}
    for ends_by, is_loaded in (("solved", True), ("share", False)):
        experiment, _ = prepared(dataclasses.replace(staged(teacher, ends_by=ends_by), **alone))
        assert (experiment.teacher is not None) == is_loaded


def test_a_cached_teacher_solves_nothing_so_its_share_has_to_be_stated(teacher):
    good = staged(teacher, ends_by="solved")
    cached = dataclasses.replace(good.teacher, cache="somewhere")
    with pytest.raises(ValueError, match=r"teacher.cache, which cannot; set curriculum.teacher_solves"):
        dataclasses.replace(good, teacher=cached)
    stated = dataclasses.replace(good.curriculum, teacher_solves=0.9)
    dataclasses.replace(good, teacher=cached, curriculum=stated)


def test_validation_problems_without_an_answer_are_refused_at_the_start(teacher, tmp_path):
    rows = [{"prompt": "Ben has 2 apples .", "completions": ["2 + 3 = 5"] * steps} for steps in (1, 2)]
    (tmp_path / "validation.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    good = staged(teacher, ends_by="solved")
    source = SourceSettings(schema="stepwise", location=str(tmp_path), split="validation")
    with pytest.raises(ValueError, match=r"validation.jsonl:1 has no answer, but curriculum.ends_by is 'solved'"):
        prepared(dataclasses.replace(good, data=dataclasses.replace(good.data, validation=source)))
