"""launch/compress.py: what it writes and measures for every kind of scheme, and what it refuses before it writes."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import chex
import jax
import numpy as np
import pytest
from tiny_run import recipe, write_teacher

from rtd_jax.apps.compress import measured
from rtd_jax.apps.compress.compress import CompressSettings, compress
from rtd_jax.apps.compress.measured import Measured
from rtd_jax.apps.compress.methods import parse_method
from rtd_jax.apps.distill.run import train
from rtd_jax.apps.study.finished import read_outcome
from rtd_jax.models.from_hf import load_config, load_params
from rtd_jax.models.quantized_folders import quantization_of
from rtd_jax.models.schemes import Scheme, as_params, rounded
from rtd_jax.models.weights import parameter_count
from rtd_jax.train.curriculum import CurriculumSettings
from rtd_jax.train.recipe import StudentSettings


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    """A run's folder: one stage of four updates on a random teacher."""
    folder = tmp_path_factory.mktemp("compress")
    settings = recipe(
        write_teacher(folder / "teacher"),
        student=StudentSettings("teacher_layers", layers=2, compute_dtype="float32"),
        curriculum=CurriculumSettings(enabled=False, validate_every=4, validation_chains=8),
        total_updates=4,
    )
    train(settings, folder / "run")
    return folder / "run"


def settings_of(student, out, scheme, **changes) -> CompressSettings:
    small = {"group_size": 8, "calibration_chains": 6, "problems_per_depth": 2, "max_new_tokens": 8, "row_length": 96}
    return CompressSettings(student=str(student), scheme=scheme, out=str(out), **(small | changes))


def folder_params(folder):
    return load_params(folder, load_config(folder))


@pytest.mark.parametrize("scheme", ["int3", "w3a16_gptq", "prune:0.75"])
def test_what_is_written_is_what_is_measured(student, tmp_path, scheme):
    """The report is of the folder, in a form that a study reads beside those of runs."""
    notes: list[str] = []
    changes = {} if scheme != "prune:0.75" else {"group_size": -1}
    path = compress(settings_of(student, tmp_path / "small", scheme, **changes), notes.append)
    report = json.loads(path.read_text())
    assert path.parent == tmp_path / "small_report"
    before, after = folder_params(student / "student"), folder_params(tmp_path / "small")
    if scheme == "int3":
        config = load_config(student / "student")
        want = jax.jit(lambda params: as_params(rounded(params, Scheme("int3", 8)), config))(before)
        chex.assert_trees_all_equal(after, want)
    if scheme.startswith("prune"):
        counts = [parameter_count(load_config(folder)) for folder in (tmp_path / "small", student / "student")]
        assert counts[0] / counts[1] == pytest.approx(0.75, rel=0.1)
        assert quantization_of(tmp_path / "small") is None
        assert "parts" not in report
    else:
        assert quantization_of(tmp_path / "small") == Scheme("int3", 8)
        assert set(report["parts"]) == {"layer 1", "layer 2", "every attention", "every mlp", "everything"}
        assert report["size"]["after"] < report["size"]["before"]
    assert report["calibration_chains"] == (0 if scheme == "int3" else 6)
    cosines = [step["boundary_cosine"]["value"] for step in report["drift_from_before"]["steps"]]
    assert all(0 < cosine < 1 for cosine in cosines)
    assert (path.parent / "report.html").is_file()
    outcome = read_outcome("task", scheme, 0, path.parent)
    assert len(outcome.depths) == 4
    assert outcome.perplexity == pytest.approx(report["student"]["perplexity"])
    assert "most at depth" in report["where"]


def test_a_finished_run_without_checkpoints_and_a_folder_with_data_are_students_too(student, tmp_path):
    gone = tmp_path / "run"
    gone.mkdir()
    for name in ("student", "settings.json"):
        (gone / name).symlink_to(student / name)
    compress(settings_of(gone, tmp_path / "a", "int4", problems_per_depth=0), lambda _: None)
    # A run's student knows the run's data, and how it was evaluated.
    filled = {"problems_per_depth": -1, "max_new_tokens": 0}
    report = compress(settings_of(student / "student", tmp_path / "b", "int4", **filled), lambda _: None)
    settings = json.loads(report.read_text())["settings"]
    assert (settings["problems_per_depth"], settings["max_new_tokens"]) == (2, 8)
    chex.assert_trees_all_equal(folder_params(tmp_path / "a"), folder_params(tmp_path / "b"))
    alone = tmp_path / "alone"
    shutil.copytree(student / "student", alone)
    with pytest.raises(ValueError, match=r"is not a run.*give --data"):
        compress(settings_of(alone, tmp_path / "c", "int4"), lambda _: None)
    path = compress(settings_of(alone, tmp_path / "c", "int4", data="synthetic"), lambda _: None)
    assert set(json.loads(path.read_text())["student"]["chain_accuracy"]) == {"1", "2", "3", "4", "5+", "all"}


def test_nothing_is_written_of_what_is_refused(student, tmp_path):
    compress(settings_of(student, tmp_path / "small", "int4", problems_per_depth=0), lambda _: None)
    cases: tuple[tuple[Path, str, dict, str], ...] = (
        (tmp_path / "small", "int4", {}, "is quantised already"),
        (student, "prune:0.999", {"group_size": -1}, "nothing would be pruned"),
        (student, "int4", {"group_size": 128}, "group_size 128 does not divide the 32 inputs"),
        (student, "w4a16_gptq", {"row_length": 2}, "no calibration chain fits into 2 tokens"),
        (student, "nf4", {"group_size": 8}, "group"),
    )
    for path, scheme, changes, says in cases:
        with pytest.raises(ValueError, match=says):
            compress(settings_of(path, tmp_path / "refused", scheme, **changes), lambda _: None)
        assert not (tmp_path / "refused").exists(), says
    own = student / "student"
    with pytest.raises(ValueError, match="is the student that is read"):
        compress(settings_of(own, own, "int4", data="synthetic"), lambda _: None)
    for out in (student / "student", student / "student" / "int4", student.parent):  # at, in and above it
        with pytest.raises(ValueError, match=r"is the student that is read|holds "):
            compress(settings_of(student, out, "int4"), lambda _: None)
    before = (student / "report.json").read_bytes()
    with pytest.raises(ValueError, match="the report of something else"):
        compress(settings_of(own, tmp_path / "x", "int4", report=str(student)), lambda _: None)
    assert (student / "report.json").read_bytes() == before
    with pytest.raises(ValueError, match="rounds nothing; leave out group_size"):
        parse_method("prune:0.5", 7)
    with pytest.raises(ValueError, match="as out is"):
        settings_of(student, tmp_path / "x", "int4", report=str(tmp_path / "x"))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").touch()
    with pytest.raises(ValueError, match=r"holds thesis\.tex"):
        compress(settings_of(student, tmp_path / "mine", "int4"), lambda _: None)
    # In a process of its own: flags are defined once in a process.
    command = [sys.executable, "-m", "rtd_jax", "compress", f"--student={student}", "--scheme=int5"]
    refused = subprocess.run(command, capture_output=True, text=True)
    assert refused.returncode == 2
    assert "int5" in refused.stderr


def test_schemes_by_their_names():
    assert parse_method("w4a16_gptq").scheme == Scheme("int4", 128)
    assert parse_method("w4a16_gptq").is_gptq
    assert parse_method("nf4").scheme == Scheme("nf4", 64)
    assert parse_method("fp8").scheme == Scheme("fp8", 0)
    assert parse_method("int8", 32, symmetric=False).scheme == Scheme("int8", 32, symmetric=False)
    assert parse_method("prune:0.5").share == 0.5
    for text in ("prune:1.5", "prune:half", "prune:0", "awq"):
        with pytest.raises(ValueError, match=f"scheme is '{text}'"):
            parse_method(text)


def test_changes_are_paired_by_problem():
    depths, before, after = [1, 1, 4, 5, 6], [1, 0, 1, 1, 1], [1, 1, 0, 0, 1]

    def of(right):
        return Measured({}, [{"depth": d, "correct": bool(x)} for d, x in zip(depths, right, strict=True)])

    found = measured.differences(of(before), of(after))
    assert {depth: x.value for depth, x in found.items()} == pytest.approx(
        {"1": 0.5, "4": -1.0, "5+": -0.5, "4+": -2 / 3, "all": -0.2}
    )
    assert found["4+"].stderr == pytest.approx(np.std([1, 1, 0], ddof=1) / np.sqrt(3))
