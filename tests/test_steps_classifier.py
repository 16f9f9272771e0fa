"""A classifier is fitted, kept, refused where it does not belong, and bundled for the tiny teacher."""

import dataclasses
import functools
import json

import numpy as np
import pytest

from rtd_jax.data.formats import TextFormat
from rtd_jax.eval.segmentation import boundary_scores
from rtd_jax.steps import classifier as module
from rtd_jax.steps.classifier import (
    BoundaryClassifier,
    in_rows,
    load_classifier,
    out_of_rows,
    row_ids,
    save_classifier,
    text_boundaries,
    text_probabilities,
)
from rtd_jax.steps.fit import Examples, FitSettings, fit_classifier
from rtd_jax.steps.head import HeadSettings
from rtd_jax.steps.prose import Reading

make_classifier = functools.partial(BoundaryClassifier, "a" * 64, "teacher", "b" * 64, (1, 2), TextFormat())


def examples(count: int, seed: int, hint: float = 2.0) -> Examples:
    """States that are noise, but for the token *after* each boundary: one of its dimensions is shifted by `hint`."""
    rng = np.random.default_rng(seed)
    states, labels = [], []
    for _ in range(count):
        ends = np.cumsum(rng.integers(3, 9, rng.integers(1, 6))) - 1
        states.append(rng.normal(size=(ends[-1] + 1, 2, 4)).astype(np.float16))
        states[-1][ends[:-1] + 1, 1, 2] += np.float16(hint * 4)
        labels.append(np.zeros(len(states[-1]), bool))
        labels[-1][ends] = True
    return Examples([reading(x) for x in labels], states)


def reading(labels: np.ndarray) -> Reading:
    """A text of as many tokens, at each of which a step may end."""
    count = len(labels)
    return Reading("", np.zeros(count, np.int32), np.arange(count, dtype=np.int32), np.ones(count, bool), labels)


@pytest.fixture(scope="module")
def fitted() -> BoundaryClassifier:
    settings = FitSettings(epochs=30, rows=1, learning_rate=1e-2, thresholds=(0.3, 0.5, 0.7), min_tokens=(1, 3))
    quiet = lambda _: None  # noqa: E731
    return fit_classifier(
        make_classifier, HeadSettings(8, (1,), 0.0), settings, examples(120, 0), examples(40, 1), quiet
    )


def score(classifier: BoundaryClassifier, held_out: Examples) -> float:
    probabilities = text_probabilities(classifier, held_out.states)
    found = text_boundaries(probabilities, held_out.candidates, classifier.threshold, classifier.min_tokens)
    places = [np.flatnonzero(x) for x in found]
    return boundary_scores(places, held_out.right, resamples=20)["inner"]["exact"]["f1"]["value"]


def test_rows_hold_texts_whole_and_give_them_back(monkeypatch):
    monkeypatch.setattr(module, "ROW_LENGTH", 5)
    np.testing.assert_array_equal(row_ids([3, 2, 4, 1]), [[1, 1, 1, 2, 2], [3, 3, 3, 3, 4]])
    np.testing.assert_array_equal(row_ids([7, 1]), [[1] * 7, [2] + [0] * 6])
    texts = [np.arange(1, n + 1) for n in (3, 2, 4)]
    np.testing.assert_array_equal(in_rows(texts), [[1, 2, 3, 1, 2], [1, 2, 3, 4, 0]])
    np.testing.assert_array_equal(row_ids([3, 2, 4]), [[1, 1, 1, 2, 2], [3, 3, 3, 3, 0]])
    assert in_rows(texts, rows=4).shape == (4, 5)
    for before, after in zip(texts, out_of_rows(in_rows(texts), [3, 2, 4]), strict=True):
        np.testing.assert_array_equal(before, after)


def test_it_finds_boundaries_that_only_the_next_token_shows_and_none_in_noise(fitted):
    assert score(fitted, examples(60, 2)) > 0.9
    assert score(fitted, examples(60, 2, hint=0.0)) < 0.5


def test_texts_without_a_second_step_cannot_be_fitted_to():
    one = Examples([reading(np.array([False, False, True]))], [np.zeros((3, 1, 2), np.float16)])
    with pytest.raises(ValueError, match="none of the 1 training texts has two steps"):
        fit_classifier(make_classifier, HeadSettings(4, ()), FitSettings(), one, one, print)


def test_what_is_saved_decides_as_before(fitted, tmp_path):
    loaded = load_classifier(save_classifier(tmp_path / "c", fitted))
    assert loaded.fingerprint == fitted.fingerprint
    assert dataclasses.replace(loaded, threshold=0.9).fingerprint != fitted.fingerprint
    assert (loaded.text, loaded.layers, loaded.head) == (fitted.text, fitted.layers, fitted.head)
    held_out = examples(20, 3)
    pairs = zip(*(text_probabilities(c, held_out.states) for c in (fitted, loaded)), strict=True)
    assert max(np.abs(a - b).max() for a, b in pairs) < 2e-2  # the input layer is kept in float16


def test_another_teacher_is_refused(fitted):
    fitted.check_teacher("a" * 64, "b" * 64, "teacher")
    with pytest.raises(ValueError, match=r"fitted to the states of teacher .*but other has cccc"):
        fitted.check_teacher("c" * 64, "b" * 64, "other")
    with pytest.raises(ValueError, match="tokenizer fingerprint"):
        fitted.check_teacher("a" * 64, "c" * 64, "other")


def test_a_damaged_folder_is_refused_by_name(fitted, tmp_path):
    with pytest.raises(ValueError, match=r"no classifier\.json; give a folder that launch/boundaries\.py wrote"):
        load_classifier(tmp_path)
    folder = save_classifier(tmp_path / "c", fitted)
    described = json.loads((folder / "classifier.json").read_text())
    for change, message in (
        ({"format": 99}, "has format 99, this version reads 1"),
        ({"head": described["head"] | {"width": 9}}, "does not hold a head of the shape"),
        ({"weights_sha256": "0"}, "is not the file that"),
    ):
        (folder / "classifier.json").write_text(json.dumps(described | change))
        with pytest.raises(ValueError, match=message):
            load_classifier(folder)
    del described["layers"]
    (folder / "classifier.json").write_text(json.dumps(described))
    with pytest.raises(ValueError, match=r"is damaged \(KeyError: 'layers'\)"):
        load_classifier(folder)
