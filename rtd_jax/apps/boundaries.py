"""Fits a boundary classifier to a teacher, and measures it against baselines that need no teacher.

The steps of both fitting and scoring are annotated; their marks (line ends, calculator marks, list numbers) are taken
away before the teacher reads them. Hidden states are read once and kept on disk.
"""

import dataclasses
import functools
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from rtd_jax.apps.report.segments import plot_examples, plot_scores
from rtd_jax.base.console import print_table
from rtd_jax.base.files import check_writable, write_json
from rtd_jax.base.hub import model_name
from rtd_jax.base.lock import one_writer
from rtd_jax.base.settings import LAYER, check_distinct, check_filled, check_ranges
from rtd_jax.base.sharding import MeshSettings, make_mesh
from rtd_jax.data.formats import TextFormat
from rtd_jax.data.sources import SourceSettings, load_traces
from rtd_jax.data.trace import Trace
from rtd_jax.eval.segmentation import boundary_scores, step_counts
from rtd_jax.models.open import OpenModel, open_model
from rtd_jax.models.quantized import as_float
from rtd_jax.steps.classifier import BoundaryClassifier, save_classifier, text_boundaries, text_probabilities
from rtd_jax.steps.fit import Examples, FitSettings, fit_classifier
from rtd_jax.steps.head import HeadSettings
from rtd_jax.steps.prose import FORMS, Reading, joined_steps, read
from rtd_jax.steps.scores import calibration, line_ends, sentence_ends
from rtd_jax.steps.token_states import kept_states, token_states
from rtd_jax.train.recipe import TeacherSettings


@dataclass(frozen=True)
class HeldOut:
    """One set of held-out chains on which the fitted classifier is scored. Nothing is fitted to them."""

    source: SourceSettings
    chains: int  # the first so many by a hash of the prompt
    form: str = "plain"  # marks taken away; "marked": left in; "bare": lower case and without end punctuation too

    def __post_init__(self) -> None:
        check_ranges(self, chains="[1, 1e7]")
        if self.form not in FORMS:
            raise ValueError(f"form is {self.form!r}; use one of {', '.join(FORMS)}")


@dataclass(frozen=True)
class BoundaryRecipe:
    """A fit and its evaluation."""

    teacher: TeacherSettings
    layers: tuple[int, ...]  # whose states are read; 0 embeddings, i output of layer i, -1 final normed state
    train: SourceSettings
    train_chains: int  # the first so many by a hash of the prompt
    validation_chains: int  # the next so many
    tests: dict[str, HeldOut]  # by name; chains of the first are shown in the picture
    text: TextFormat = TextFormat()
    head: HeadSettings = field(default_factory=HeadSettings)
    fit: FitSettings = field(default_factory=FitSettings)
    baselines: bool = True  # also fit the same head on token embeddings, on positions, and without neighbours
    states: str = ".cache/boundaries"  # folder that keeps hidden states
    batch_size: int = 16  # rows that the teacher reads at one time
    examples: int = 6  # chains in the picture
    resamples: int = 1000  # for intervals
    mesh: MeshSettings = MeshSettings()

    def __post_init__(self) -> None:
        check_ranges(self, layers=LAYER, train_chains="[1, 1e7]", validation_chains="[1, 1e7]", batch_size="[1, 1e6]")
        check_ranges(self, examples="[0, 1000]", resamples="[20, 1e6]")
        check_filled(self, "layers", "tests")
        check_distinct(self, "layers")


@one_writer(lambda recipe, workdir: workdir)
def boundaries(recipe: BoundaryRecipe, workdir: Path) -> Path:
    """Fits, scores, and writes `classifier/`, report.json and two PNGs into `workdir`. Returns the report's path.

    Raises:
      ValueError: data, teacher or settings that cannot be used, with the way out.
    """
    check_writable(Path(recipe.states).expanduser(), "--config.states")
    check_writable(workdir / "classifier")
    note = functools.partial(print, flush=True)
    teacher = open_model(recipe.teacher, make_mesh(recipe.mesh), note)
    reader = _Reader(recipe, teacher)
    wanted = recipe.train_chains + recipe.validation_chains
    traces = _first(load_traces(recipe.train), wanted, "train_chains + validation_chains")
    tests = {  # before the fit, which takes longer
        name: _first(load_traces(held_out.source), held_out.chains, f"tests.{name}.chains")
        for name, held_out in recipe.tests.items()
    }
    train = reader.read(traces[: recipe.train_chains], "plain", "training chains")
    validation = reader.read(traces[recipe.train_chains :], "plain", "validation chains")
    fit = functools.partial(fit_classifier, reader.make_classifier, settings=recipe.fit, note=note)
    classifier = fit(recipe.head, train=train, validation=validation)
    save_classifier(workdir / "classifier", classifier)  # of use before it is measured
    fitted: dict[str, tuple[BoundaryClassifier, Callable[[Examples], Examples]]] = {}
    if recipe.baselines:
        for name, (head, view) in _baselines(reader).items():
            note(f"fitting the baseline: {name}")
            fitted[name] = fit(head, train=view(train), validation=view(validation)), view

    settings = dataclasses.asdict(recipe)
    report: dict[str, Any] = {"settings": settings, "teacher_commit": teacher.commit, "tests": {}}
    shown: list[dict[str, Any]] = []
    for name, chains in tests.items():
        test = reader.read(chains, recipe.tests[name].form, name)
        result, found = _score(classifier, test, recipe.resamples)
        rules = {"sentence ends": sentence_ends, "line ends": line_ends}
        result["baselines"] = {
            rule: boundary_scores([ends(reading) for reading in test.readings], test.right, resamples=recipe.resamples)
            for rule, ends in rules.items()
        }
        for baseline, (other, view) in fitted.items():
            result["baselines"][baseline] = _score(other, view(test), recipe.resamples)[0]["scores"]
        report["tests"][name] = result
        shown = shown or _shown(test, found)[: recipe.examples]
    classifier = dataclasses.replace(classifier, fitted=_summary(recipe, report))
    save_classifier(workdir / "classifier", classifier)
    report |= {key: getattr(classifier, key) for key in ("threshold", "min_tokens", "slope", "intercept")}
    write_json(workdir / "report.json", report)
    plot_examples(workdir / "examples.png", shown)
    plot_scores(workdir / "scores.png", report["tests"])
    print_boundaries(report, workdir)
    return workdir / "report.json"


class _Reader:
    """Reads chains with the teacher, or from disk."""

    def __init__(self, recipe: BoundaryRecipe, teacher: OpenModel):
        self.recipe, self.teacher = recipe, teacher
        self.layers = tuple(teacher.config.layer_index(layer) for layer in recipe.layers)
        fingerprints = teacher.fingerprint, model_name(teacher.directory), teacher.tokenizer_fingerprint
        self.make_classifier = functools.partial(BoundaryClassifier, *fingerprints, self.layers, recipe.text)

    def read(self, traces: Sequence[Trace], form: str, name: str) -> Examples:
        """The chains in one of `FORMS` as texts whose steps are known, with the teacher's states at their tokens."""
        teacher, recipe = self.teacher, self.recipe
        readings = []
        for trace in traces:
            text, spans = joined_steps(trace, form)
            readings.append(read(teacher.tokenizer, trace.prompt, text, recipe.text, spans, trace.source))
        teacher.note(f"{name}: {len(readings)} chains, {sum(len(x.tokens_L) for x in readings)} tokens")

        def run(shard: Sequence[Reading]) -> list[np.ndarray]:
            return token_states(teacher.model, teacher.params, teacher.mesh, shard, self.layers, recipe.batch_size)

        dtypes = f"{recipe.teacher.param_dtype},{recipe.teacher.compute_dtype}"
        described = teacher.fingerprint + ("" if dtypes == "float32,float32" else f":{dtypes}")
        folder = Path(recipe.states).expanduser()
        return Examples(readings, kept_states(folder, described, readings, self.layers, run, teacher.note))

    def embedded(self, examples: Examples) -> Examples:
        """The same texts with token embeddings in place of states: what does a token say without its context?"""
        embedding_VD = np.asarray(as_float(self.teacher.params["embedding"], "float32"))
        embedding_VD = embedding_VD / np.sqrt(np.mean(embedding_VD**2, -1, keepdims=True) + 1e-6)
        tokens = (reading.tokens_L[reading.prompt_length :] for reading in examples.readings)
        return Examples(examples.readings, [embedding_VD[tokens_T, None].astype(np.float16) for tokens_T in tokens])


def _first(traces: Sequence[Trace], count: int, name: str) -> list[Trace]:
    """By a stable hash of the prompt, so that the split does not depend on the order of the file."""
    if len(traces) < count:
        raise ValueError(f"{name} asks for {count} chains, but there are {len(traces)}; ask for fewer")
    return sorted(traces, key=lambda trace: hashlib.sha256(trace.prompt.encode()).digest())[:count]


def _score(classifier: BoundaryClassifier, test: Examples, resamples: int) -> tuple[dict[str, Any], list[np.ndarray]]:
    """Scores on held-out texts, and the tokens of each text at which the classifier ends steps."""
    probabilities = text_probabilities(classifier, test.states)
    ends = text_boundaries(probabilities, test.candidates, classifier.threshold, classifier.min_tokens)
    places = [np.flatnonzero(x) for x in ends]
    counted = np.concatenate(test.counted)
    result = {
        "scores": boundary_scores(places, test.right, resamples=resamples),
        "step_counts": step_counts(places, test.right, resamples=resamples),
        "calibration": calibration(np.concatenate(probabilities)[counted], np.concatenate(test.labels)[counted]),
    }
    return result, places


def _baselines(reader: _Reader) -> dict[str, tuple[HeadSettings, Callable[[Examples], Examples]]]:
    """By name: the head that is fitted, and what it sees of the texts in place of the states."""
    alone = dataclasses.replace(reader.recipe.head, dilations=())
    return {
        "same head on token embeddings": (reader.recipe.head, reader.embedded),
        "same states, no neighbours": (alone, lambda examples: examples),
        "positions only": (alone, _positions),
    }


def _positions(examples: Examples) -> Examples:
    """The same texts with nothing but where a token stands: from both ends, and as a share. [T, 1, 19] each."""

    def features(count: int) -> np.ndarray:
        t = np.arange(count)
        angles = [2 * np.pi * x / period for x in (t, count - t) for period in (8, 16, 32, 64)]
        waves = [f(angle) for angle in angles for f in (np.sin, np.cos)]
        return np.stack([*waves, t / 64, (count - t) / 64, t / count], -1)[:, None].astype(np.float16)

    return Examples(examples.readings, [features(len(reading.ends_T)) for reading in examples.readings])


def _shown(test: Examples, found: Sequence[np.ndarray]) -> list[dict[str, Any]]:
    """Texts of 3 to 6 steps with found and annotated ends in characters; every other one has a mistake in it."""
    chosen = [i for i, right in enumerate(test.right) if 3 <= len(right) <= 6] or list(range(len(found)))
    wrong = [i for i in chosen if not np.array_equal(found[i], test.right[i])]
    order = [x for pair in zip(chosen, wrong, strict=False) for x in pair] + chosen
    return [
        {
            "text": test.readings[i].text,
            "found": test.readings[i].ends_T[found[i]].tolist(),
            "annotated": test.readings[i].ends_T[test.right[i]].tolist(),
        }
        for i in dict.fromkeys(order)
    ]


def _summary(recipe: BoundaryRecipe, report: dict[str, Any]) -> dict[str, Any]:
    """What the classifier's folder says about the fit: its data, and the F1 on every set of held-out chains."""
    f1 = {name: result["scores"]["all"]["exact"]["f1"]["value"] for name, result in report["tests"].items()}
    source = recipe.train.location or recipe.train.schema
    return {
        "chains": recipe.train_chains,
        "data": f"{Path(source).name} {recipe.train.split}",
        "exact_f1": {name: round(value, 4) for name, value in f1.items()},
    }


def print_boundaries(report: dict[str, Any], workdir: Path) -> None:
    """Prints a table for each set of held-out chains, and the commands that use the classifier."""

    def cells(scores: dict[str, Any]) -> list[str]:
        exact, inner = scores["all"]["exact"], scores["inner"]["exact"]["f1"]
        percent = [f"{100 * exact[key]['value']:.1f}" for key in ("precision", "recall")]
        f1 = f"{100 * exact['f1']['value']:.1f} ({100 * exact['f1']['low']:.1f} to {100 * exact['f1']['high']:.1f})"
        near = [f"{100 * scores['all'][key]['f1']['value']:.1f}" for key in ("within_1", "within_2")]
        return [*percent, f1, *near, f"{100 * inner['value']:.1f}"]

    columns = ["segmenter", "precision", "recall", "F1 (95% interval)", "F1 ±1", "F1 ±2", "F1, inner only"]
    for name, result in report["tests"].items():
        rows = [["classifier", *cells(result["scores"])]]
        rows += [[baseline, *cells(scores)] for baseline, scores in result["baselines"].items()]
        scores, c = result["scores"], result["calibration"]
        print_table(f"{name}: {scores['chains']} chains, {scores['boundaries']} steps", columns, rows)
        errors = ", ".join(f"{depth}: {x['mean_error']['value']:+.2f}" for depth, x in result["step_counts"].items())
        print(f"found minus annotated steps, by annotated: {errors}")
        print(f"calibration error {c['expected_calibration_error']:.4f}, Brier score {c['brier']:.4f}\n")
    print(f"report: {workdir / 'report.json'}, {workdir / 'examples.png'}, {workdir / 'scores.png'}")
    print(
        f"next: cut texts with `python launch/segment.py --classifier={workdir / 'classifier'} --data=texts.jsonl`, or"
    )
    print(f"      train on them with --config.data.segmentation=classifier:{workdir / 'classifier'}")
