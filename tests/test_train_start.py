"""What the end of a run needs is tried at its start, before days of training."""

import dataclasses
import json

import pytest
from tiny_run import recipe, source, write_teacher

from rtd_jax.apps.distill import run
from rtd_jax.apps.distill.report import print_report, write_page
from rtd_jax.apps.distill.stages import Trainer
from rtd_jax.apps.pretrain import Phase, PretrainRecipe, SizeSettings, pretrain
from rtd_jax.data.sources import SourceSettings
from rtd_jax.data.tiny_tokenizer import TINY_FORMAT
from rtd_jax.train.optimizer import OptimizerSettings
from rtd_jax.train.outputs import check_outputs, check_saves
from rtd_jax.train.recipe import Recipe


@pytest.fixture(scope="module")
def settings(tmp_path_factory) -> Recipe:
    return recipe(write_teacher(tmp_path_factory.mktemp("teacher")))


def refuse_training(*_):
    raise AssertionError("the run began to train")


def with_test(settings: Recipe, test: SourceSettings) -> Recipe:
    return dataclasses.replace(settings, data=dataclasses.replace(settings.data, test=test))


def evaluated(settings: Recipe, **changes) -> Recipe:
    return dataclasses.replace(settings, evaluation=dataclasses.replace(settings.evaluation, **changes))


def test_a_test_set_that_cannot_be_used_is_found_at_the_start(settings, tmp_path, monkeypatch):
    monkeypatch.setattr(Trainer, "train_stages", refuse_training)
    (tmp_path / "data").mkdir()
    file = tmp_path / "data" / "test.jsonl"

    def refused(words: str, test: SourceSettings) -> None:
        with pytest.raises(ValueError, match=words):
            run.train(with_test(settings, test), tmp_path / "run")

    stepwise = SourceSettings(schema="stepwise", location=str(tmp_path / "data"), split="test")
    refused(r"data.test: .*nowhere", dataclasses.replace(stepwise, location=str(tmp_path / "nowhere")))
    file.write_text("")
    refused(r"data.test: .*data", stepwise)
    row = {"prompt": "Zyx?", "completions": ["A b c 1 ."], "answer": "1"}
    file.write_text(json.dumps(row) + "\n")
    refused(r"data.test: .*test", stepwise)  # words that the tokenizer does not know
    long = dataclasses.replace(settings.data.test, depths=(8,), limit=4)
    refused(r"data.test: .*row", long)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"batch_size": 0}, "batch_size"),
        ({"problems_per_depth": 0}, "problems_per_depth"),
        ({"max_new_tokens": 10**6}, "max_new_tokens is 1000000, but the student has 1024 positions"),
    ],
)
def test_an_evaluation_that_cannot_be_made_is_found_at_the_start(settings, tmp_path, monkeypatch, changes, words):
    monkeypatch.setattr(Trainer, "train_stages", refuse_training)
    with pytest.raises(ValueError, match=words):
        run.train(evaluated(settings, **changes), tmp_path / "run")


def test_drift_that_cannot_be_measured_is_found_at_the_start(settings, tmp_path, monkeypatch):
    monkeypatch.setattr(Trainer, "train_stages", refuse_training)
    data = dataclasses.replace(settings.data, validation=dataclasses.replace(source("train", 1), depths=(1,)))
    curriculum = dataclasses.replace(settings.curriculum, enabled=False, threshold_factor=0.0)
    few = dataclasses.replace(evaluated(settings, drift_problems=3), data=data, curriculum=curriculum)
    with pytest.raises(ValueError, match="drift is measured on two validation chains at least, and there is 1"):
        run.train(few, tmp_path / "run")


def test_what_is_in_the_way_of_a_runs_files_is_found_at_the_start(settings, tmp_path, monkeypatch):
    monkeypatch.setattr(run, "prepare", refuse_training)
    foreign = tmp_path / "run" / "student" / "thesis.txt"
    foreign.parent.mkdir(parents=True)
    foreign.write_text("years of work")
    with pytest.raises(ValueError, match=r"student: holds thesis.txt, which is no part of a Hugging Face model"):
        run.train(settings, tmp_path / "run")
    assert foreign.read_text() == "years of work"
    for name in ("report.json", "report.html", "generations.jsonl", "metrics.jsonl", "settings.json", "loss.png"):
        (tmp_path / name).mkdir()
        with pytest.raises(ValueError, match=f"{name} is no file, but one may have to be written there"):
            run.train(settings, tmp_path)
        (tmp_path / name).rmdir()
    for name in ("tensorboard", "checkpoints", "student"):
        (tmp_path / name).write_text("")
        with pytest.raises(ValueError, match=name):
            check_outputs(tmp_path, "student")
        (tmp_path / name).unlink()


def test_a_tokenizer_that_cannot_be_saved_is_found_at_the_start():
    class Odd:
        name_or_path = "odd"

        def save_pretrained(self, folder):
            raise NotImplementedError("no file")

    with pytest.raises(ValueError, match=r"the tokenizer odd cannot be saved \(NotImplementedError: no file\)"):
        check_saves(Odd())  # type: ignore[arg-type]


def test_a_pretraining_tries_its_end_and_its_later_phases_at_its_start(tmp_path, monkeypatch):
    good = PretrainRecipe(
        SizeSettings(layers=1, width=16, mlp_width=24, heads=2, kv_heads=2, head_dim=8),
        source("train", 20),
        source("test", 4),
        (Phase(3, 1, 8, 96, 1), Phase(5, 2, 8, 128, 2)),
        OptimizerSettings(),
        TINY_FORMAT,
        max_new_tokens=8,
    )
    monkeypatch.setattr("rtd_jax.apps.pretrain.make_optimizer", refuse_training)
    for changes, words in (
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"max_new_tokens": 5000}, "max_new_tokens is 5000, but the model has 1024 positions"),
        ({"problems_per_depth": 0}, "problems_per_depth"),
        ({"phases": (Phase(3, 1, 8, 96, 1), Phase(5, 2, 8, 32, 2))}, "row"),
        ({"test": SourceSettings(schema="stepwise", location="/nowhere", split="test")}, "nowhere"),
    ):
        with pytest.raises(ValueError, match=words):
            pretrain(dataclasses.replace(good, **changes), tmp_path / "run")
    (tmp_path / "run" / "model" / "mine").mkdir(parents=True)
    with pytest.raises(ValueError, match="model: holds mine"):
        pretrain(good, tmp_path / "run")


def test_the_page_and_the_tables_show_what_json_can_hold(tmp_path, capsys):
    """A line separator inside a question is a character like others, and null is a dash."""
    accuracy = {"mean": 0.5, "stderr": 0.1, "n": 4}
    model = {"chain_accuracy": {"1": accuracy, "all": accuracy}, "perplexity": None}
    model["perplexity_by_depth"] = {
        "1": {"mean": None, "stderr": None, "n": 4},
        "all": {"mean": 1e200, "stderr": 1, "n": 4},
    }
    stage = {"depth": "1", "updates": 3, "threshold": None, "coherence": None, "ended_by": "budget"}
    report = {"student": model, "stages": [stage], "seconds": {}, "wall_seconds": 1.0, "not_finite": ["x is inf"]}
    record = {
        "model": "student",
        "prompt": "a\u2028b",
        "completions": ["c\u2029d"],
        "final": "",
        "first_error": 0,
        "depth": 1,
    }
    record |= {"reference": ["e"], "answer": "f"}
    lines = [json.dumps(x, ensure_ascii=False) + "\n" for x in (record, record | {"model": "teacher"})]
    (tmp_path / "generations.jsonl").write_text("".join(lines), encoding="utf-8")
    (tmp_path / "metrics.jsonl").write_text('{"update": 1, "stage": "1", "validation/threshold": null, "loss": null}\n')
    write_page(report, tmp_path)
    print_report(report, tmp_path)
    assert "a\u2028b" in (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "1.000e+200" in capsys.readouterr().out
