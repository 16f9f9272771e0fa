"""A fit from a recipe to a folder: what is written, what is scored, and that hidden states are read once."""

import dataclasses
import json
from pathlib import Path

import pytest

from rtd_jax.apps import boundaries as module
from rtd_jax.apps.boundaries import BoundaryRecipe, HeldOut, boundaries
from rtd_jax.data.sources import SourceSettings
from rtd_jax.data.tiny_tokenizer import TINY_FORMAT
from rtd_jax.steps.classifier import load_classifier
from rtd_jax.steps.fit import FitSettings
from rtd_jax.steps.head import HeadSettings
from rtd_jax.train.recipe import TeacherSettings

TEACHER = Path(__file__).resolve().parents[1] / "rtd_jax" / "bundled" / "tiny_teacher"


def problems(split: str, limit: int) -> SourceSettings:
    return SourceSettings("synthetic", split=split, limit=limit, depths=(2, 3))


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> BoundaryRecipe:
    return BoundaryRecipe(
        TeacherSettings(str(TEACHER), "float32", "float32"),
        layers=(2, -1),
        train=problems("train", 120),
        train_chains=90,
        validation_chains=30,
        tests={"plain": HeldOut(problems("test", 30), 24), "marked": HeldOut(problems("test", 30), 24, "marked")},
        text=TINY_FORMAT,
        head=HeadSettings(8, (1,), 0.0),
        fit=FitSettings(epochs=8, rows=1, learning_rate=2e-2, thresholds=(0.3, 0.5, 0.7), min_tokens=(1,)),
        states=str(tmp_path_factory.mktemp("states")),
        batch_size=32,
        examples=2,
        resamples=20,
    )


def test_a_fit_leaves_a_classifier_scores_and_pictures_and_reads_states_once(recipe, tmp_path, monkeypatch):
    report = json.loads(boundaries(recipe, tmp_path / "a").read_text())
    assert set(report["tests"]) == {"plain", "marked"}
    plain = report["tests"]["plain"]
    assert plain["scores"]["chains"] == 24
    # Every generated step ends with a full stop, and nothing else does.
    assert plain["baselines"]["sentence ends"]["all"]["exact"]["f1"]["value"] == 1.0
    assert plain["scores"]["all"]["exact"]["f1"]["value"] > 0.95
    # Without marks only the chain's end is left to a rule of lines; with them it is right by construction.
    assert plain["baselines"]["line ends"]["inner"]["exact"]["recall"]["value"] == 0.0
    assert report["tests"]["marked"]["baselines"]["line ends"]["all"]["exact"]["f1"]["value"] == 1.0
    assert set(plain["baselines"]) == {
        "sentence ends",
        "line ends",
        "same head on token embeddings",
        "same states, no neighbours",
        "positions only",
    }
    for name in ("examples.png", "scores.png"):
        assert (tmp_path / "a" / name).read_bytes()[:4] == b"\x89PNG"
    classifier = load_classifier(tmp_path / "a" / "classifier")
    assert classifier.layers == (2, 4)
    assert classifier.fitted["exact_f1"]["plain"] == round(plain["scores"]["all"]["exact"]["f1"]["value"], 4)

    def no_teacher(*_, **__):
        raise AssertionError("states were read again")

    monkeypatch.setattr(module, "token_states", no_teacher)
    again = dataclasses.replace(recipe, baselines=False)
    same = json.loads(boundaries(again, tmp_path / "b").read_text())
    assert same["tests"]["plain"]["scores"] == plain["scores"]  # the same seed, the same head


def test_bad_recipes_are_refused_before_the_fit(recipe, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="form is 'prose'; use one of plain, marked, bare"):
        HeldOut(problems("test", 30), 24, "prose")
    with pytest.raises(ValueError, match="tests is empty"):
        dataclasses.replace(recipe, tests={})
    with pytest.raises(ValueError, match=r"train_chains \+ validation_chains asks for 230 chains, but there are 120"):
        boundaries(dataclasses.replace(recipe, train_chains=200), tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(module, "fit_classifier", lambda *_, **__: pytest.fail("the fit began"))
        gone = {"gone": HeldOut(SourceSettings("stepwise", str(tmp_path / "nowhere"), "test"), 2)}
        with pytest.raises(ValueError, match="nowhere"):
            boundaries(dataclasses.replace(recipe, tests=gone), tmp_path)
        many = {"many": HeldOut(problems("test", 30), 31)}
        with pytest.raises(ValueError, match=r"tests.many.chains asks for 31 chains, but there are 30"):
            boundaries(dataclasses.replace(recipe, tests=many), tmp_path)
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / "classifier").write_text("mine")
        with pytest.raises(ValueError, match=r"cannot write in .*classifier: File exists"):
            boundaries(recipe, tmp_path / "run")
    with pytest.raises(ValueError, match="hidden layer 9 does not exist"):
        boundaries(dataclasses.replace(recipe, layers=(9,)), tmp_path)
