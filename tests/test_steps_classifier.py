"""A classifier is fitted, kept, refused where it does not belong, and bundled for the tiny teacher."""

import dataclasses
import functools
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from rtd_jax.base.files import json_digest, write_record
from rtd_jax.base.records import save_arrays
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

ROOT = Path(__file__).resolve().parents[1]
BUNDLED = ROOT / "rtd_jax" / "bundled" / "tiny_boundaries"
OLD = ROOT / "tests" / "golden" / "artefacts" / "boundaries"
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
    path = folder / "classifier.json"
    described = json.loads(path.read_text())

    def refused(message: str, **changes: object) -> None:
        record = {key: value for key, value in (described | changes).items() if key not in ("digest", *removed)}
        path.write_text(json.dumps(record | {"digest": json_digest(record)}))
        with pytest.raises(ValueError, match=message) as caught:
            load_classifier(folder)
        assert str(folder) in str(caught.value)

    removed: tuple[str, ...] = ()
    refused("has format 99, this version reads 1 or 2", format=99)
    refused(r"there is shape \[8\], its settings ask for shape \[9\]", head=described["head"] | {"width": 9})
    refused("head.safetensors is not the file that the JSON", weights_sha256="0")
    for threshold in (2, -0.1, 1e300, "0.5", None):
        refused("threshold", threshold=threshold)
    for layers in ([1], [1, 2, 3], [-1, 2], [], "12", [1.5, 2]):
        refused("layers|of_cosine", layers=layers)
    for min_tokens in (0, 10**9, 1.5, True):
        refused("min_tokens", min_tokens=min_tokens)
    for head in ({}, {"width": 10**400}, {"width": 8, "depth": 3}, {"width": 8, "dilations": [0]}, [], None):
        refused("head|blocks", head=head)
    refused("slope", slope="x")
    refused("text", text={"kind": "other"})
    for key in described.keys() - {"format", "digest"}:
        removed = (key,)
        refused(f"classifier.json has no '{key}'")
    # A changed character, without a new digest.
    for change in ({"threshold": 0.1}, {"layers": [2, 1]}, {"slope": 1.0}, {"format": 1}):
        path.write_text(json.dumps(described | change))
        with pytest.raises(ValueError, match=r"classifier\.json was changed or damaged after it was written"):
            load_classifier(folder)


def test_weights_of_another_shape_or_without_finite_values_are_refused_by_name(fitted, tmp_path):
    folder = save_classifier(tmp_path / "c", fitted)
    arrays = load_file(folder / "head.safetensors")
    described = json.loads((folder / "classifier.json").read_text())

    def refused(message: str, changed: dict) -> None:
        digest = save_arrays(folder / "head.safetensors", changed)
        write_record(
            folder / "classifier.json", 2, {**without(described, "format", "digest"), "weights_sha256": digest}
        )
        with pytest.raises(ValueError, match=rf"{folder}.*{message}"):
            load_classifier(folder)

    for name, array in arrays.items():
        refused(rf"'{name}': there is no such array|of_cosine|has no", without(arrays, name))
        refused(rf"'{name}' has values that are not finite", arrays | {name: np.full_like(array, np.nan)})
    refused("'more': there is shape .*no such array", arrays | {"more": np.zeros(3, np.float32)})
    refused(
        "'scale.deviation' has values that are not positive", arrays | {"scale.deviation": arrays["scale.mean"] * 0}
    )


def without(values: dict, *names: str) -> dict:
    return {name: value for name, value in values.items() if name not in names}


@pytest.mark.parametrize("folder", [BUNDLED, OLD], ids=["bundled", "earlier format"])
def test_kept_classifiers_load(folder):
    assert len(load_classifier(folder).fingerprint) == 64
    assert load_classifier(BUNDLED).fingerprint == load_classifier(OLD).fingerprint


def test_an_earlier_file_of_another_shape_is_refused_by_name(tmp_path):
    folder = Path(shutil.copytree(OLD, tmp_path / "c"))
    described = json.loads((folder / "classifier.json").read_text())
    for key in described:
        for value in (None, -1, [], {}, "x", [None], 10**400):
            if (key, value) in (
                ("fitted", {}),
                ("text", {}),
                ("teacher", "x"),
                ("teacher_name", "x"),
                ("tokenizer", "x"),
            ):
                continue
            if key in ("slope", "intercept", "threshold") and value == -1 and key != "threshold":
                continue  # any number may be right
            (folder / "classifier.json").write_text(json.dumps(described | {key: value}))
            with pytest.raises(ValueError, match=str(folder)):
                load_classifier(folder)
