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
from rtd_jax.base.sharding import MeshSettings, make_mesh
from rtd_jax.data.formats import TextFormat
from rtd_jax.data.sources import SourceSettings, load_traces
from rtd_jax.data.trace import Span, Trace
from rtd_jax.eval.segmentation import boundary_scores, step_counts
from rtd_jax.models.open import OpenModel, open_model
from rtd_jax.models.quantized import as_float
from rtd_jax.steps.classifier import BoundaryClassifier, save_classifier, text_boundaries, text_probabilities
from rtd_jax.steps.fit import Examples, FitSettings, Identity, fit_classifier
from rtd_jax.steps.head import HeadSettings
from rtd_jax.steps.prose import Reading, bare_steps, joined_steps, read
from rtd_jax.steps.scores import calibration, line_ends, sentence_ends
from rtd_jax.steps.token_states import kept_states, token_states
from rtd_jax.train.recipe import TeacherSettings

FORMS: dict[str, Callable[[Trace], tuple[str, tuple[Span, ...]]]] = {
    "plain": joined_steps,
    "marked": functools.partial(joined_steps, marked=True),
    "bare": bare_steps,
}


Note = Callable[[str], None]


@dataclass(frozen=True)
class HeldOut:
    """One set of held-out chains that the fitted classifier is scored on, untouched."""

    source: SourceSettings
    chains: int  # the first so many by a hash of the prompt
    form: str = "plain"  # marks taken away; "marked": left in; "bare": lower case and without end punctuation too

    def __post_init__(self) -> None:
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
        if not self.tests or not self.layers or min(self.train_chains, self.validation_chains) < 1:
            raise ValueError("a fit needs layers, train_chains, validation_chains and at least one of tests")


@dataclass(frozen=True, eq=False)
class Chains:
    """Chains as the teacher read them, with their texts and states."""

    texts: Sequence[str]
    readings: Sequence[Reading]
    examples: Examples


def boundaries(recipe: BoundaryRecipe, workdir: Path) -> Path:
    """Fits, scores, and writes `classifier/`, report.json and two PNGs into `workdir`. Returns the report's path.

    Raises:
      ValueError: data, teacher or settings that cannot be used, with the way out.
    """
    check_writable(workdir)
    note = functools.partial(print, flush=True)
    reader = _Reader(recipe, open_model(recipe.teacher, make_mesh(recipe.mesh), note))
    wanted = recipe.train_chains + recipe.validation_chains
    traces = _first(load_traces(recipe.train), wanted, "train_chains + validation_chains")
    train = reader.read(traces[: recipe.train_chains], "plain", "training chains")
    validation = reader.read(traces[recipe.train_chains :], "plain", "validation chains")
    classifier = fit_classifier(reader.identity, recipe.head, recipe.fit, train.examples, validation.examples, note)
    save_classifier(workdir / "classifier", classifier)  # of use before it is measured
    baselines = _fitted_baselines(reader, train, validation, note) if recipe.baselines else {}

    report: dict[str, Any] = {"settings": dataclasses.asdict(recipe), "tests": {}}
    shown: list[dict[str, Any]] = []
    for name, settings in recipe.tests.items():
        test = reader.read(_first(load_traces(settings.source), settings.chains, name), settings.form, name)
        result, found = _scored(classifier, test, recipe.resamples)
        result["baselines"] = {
            "sentence ends": _rule(sentence_ends, test, recipe.resamples),
            "line ends": _rule(line_ends, test, recipe.resamples),
        }
        for baseline, (fitted, examples_of) in baselines.items():
            as_read = dataclasses.replace(test, examples=examples_of(test))
            result["baselines"][baseline] = _scored(fitted, as_read, recipe.resamples)[0]["scores"]
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
        self.identity = Identity(
            teacher.fingerprint, teacher.directory.name, teacher.tokenizer_fingerprint, self.layers, recipe.text
        )
        dtypes = f"{recipe.teacher.param_dtype},{recipe.teacher.compute_dtype}"
        self.described = teacher.fingerprint + ("" if dtypes == "float32,float32" else f":{dtypes}")

    def read(self, traces: Sequence[Trace], form: str, name: str) -> Chains:
        texts, readings = [], []
        for trace in traces:
            text, spans = FORMS[form](trace)
            texts.append(text)
            readings.append(read(self.teacher.tokenizer, trace.prompt, text, self.recipe.text, spans, trace.source))
        self.teacher.note(f"{name}: {len(readings)} chains, {sum(len(x.tokens_L) for x in readings)} tokens")
        states: list[np.ndarray] = []
        folder = Path(self.recipe.states).expanduser()
        for shard in kept_states(folder, self.described, readings, self.layers, self._run, self.teacher.note):
            states += shard
        examples = Examples(states, [x.labels_T for x in readings], [x.candidates_T for x in readings])
        return Chains(texts, readings, examples)

    def _run(self, readings: Sequence[Reading]) -> list[np.ndarray]:
        teacher, recipe = self.teacher, self.recipe
        return token_states(
            teacher.model, teacher.params, teacher.mesh, readings, self.layers, batch_size=recipe.batch_size
        )

    def embedded(self, chains: Chains) -> Examples:
        """The same chains with token embeddings in place of states: what does a token say without its context?"""
        embedding_VD = np.asarray(as_float(self.teacher.params["embedding"], "float32"))
        embedding_VD = embedding_VD / np.sqrt(np.mean(embedding_VD**2, -1, keepdims=True) + 1e-6)
        states = [embedding_VD[x.tokens_L[x.prompt_length :], None].astype(np.float16) for x in chains.readings]
        return dataclasses.replace(chains.examples, states=states)


def _first(traces: Sequence[Trace], count: int, name: str) -> list[Trace]:
    """By a stable hash of the prompt, so that the split does not depend on the order of the file."""
    if len(traces) < count:
        raise ValueError(f"{name} asks for {count} chains, but there are {len(traces)}; ask for fewer")
    return sorted(traces, key=lambda trace: hashlib.sha256(trace.prompt.encode()).digest())[:count]


def _scored(classifier: BoundaryClassifier, test: Chains, resamples: int) -> tuple[dict[str, Any], list[np.ndarray]]:
    probabilities = text_probabilities(classifier, test.examples.states)
    found = text_boundaries(probabilities, test.examples.candidates, classifier.threshold, classifier.min_tokens)
    places = [np.flatnonzero(x) for x in found]
    counted = np.concatenate(test.examples.counted)
    result = {
        "scores": boundary_scores(places, test.examples.right, resamples=resamples),
        "step_counts": step_counts(places, test.examples.right, resamples=resamples),
        "calibration": calibration(
            np.concatenate(probabilities)[counted], np.concatenate(test.examples.labels)[counted]
        ),
    }
    return result, places


def _rule(rule: Callable[..., np.ndarray], test: Chains, resamples: int) -> dict[str, Any]:
    found = [
        rule(text, reading.ends_T, reading.candidates_T)
        for text, reading in zip(test.texts, test.readings, strict=True)
    ]
    return boundary_scores(found, test.examples.right, resamples=resamples)


def _fitted_baselines(
    reader: _Reader, train: Chains, validation: Chains, note: Note
) -> dict[str, tuple[BoundaryClassifier, Callable[[Chains], Examples]]]:
    """By name: a classifier fitted to the same chains as it sees them, and how it sees chains."""
    recipe, found = reader.recipe, {}
    alone = dataclasses.replace(recipe.head, dilations=())
    kinds: dict[str, tuple[HeadSettings, Callable[[Chains], Examples]]] = {
        "same head on token embeddings": (recipe.head, reader.embedded),
        "same states, no neighbours": (alone, lambda chains: chains.examples),
        "positions only": (alone, _positions),
    }
    for name, (head, examples_of) in kinds.items():
        note(f"fitting the baseline: {name}")
        fitted = fit_classifier(reader.identity, head, recipe.fit, examples_of(train), examples_of(validation), note)
        found[name] = fitted, examples_of
    return found


def _positions(chains: Chains) -> Examples:
    """The same chains with nothing but where a token stands: from both ends, and as a share. [T, 1, 19] each."""

    def features(count: int) -> np.ndarray:
        t = np.arange(count)
        angles = [2 * np.pi * x / period for x in (t, count - t) for period in (8, 16, 32, 64)]
        waves = [f(angle) for angle in angles for f in (np.sin, np.cos)]
        return np.stack([*waves, t / 64, (count - t) / 64, t / count], -1)[:, None].astype(np.float16)

    return dataclasses.replace(chains.examples, states=[features(len(x.ends_T)) for x in chains.readings])


def _shown(test: Chains, found: Sequence[np.ndarray]) -> list[dict[str, Any]]:
    """Texts of 3 to 6 steps with found and annotated ends in characters; every other one has a mistake in it."""
    chosen = [i for i, right in enumerate(test.examples.right) if 3 <= len(right) <= 6] or list(range(len(found)))
    wrong = [i for i in chosen if not np.array_equal(found[i], test.examples.right[i])]
    order = [x for pair in zip(chosen, wrong, strict=False) for x in pair] + chosen

    def ends(i: int, places: np.ndarray) -> list[int]:
        return [int(x) for x in test.readings[i].ends_T[places]]

    return [
        {"text": test.texts[i], "found": ends(i, found[i]), "annotated": ends(i, test.examples.right[i])}
        for i in dict.fromkeys(order)
    ]


def _summary(recipe: BoundaryRecipe, report: dict[str, Any]) -> dict[str, Any]:
    """What a classifier's folder says about itself."""
    f1 = {name: result["scores"]["all"]["exact"]["f1"]["value"] for name, result in report["tests"].items()}
    source = recipe.train.location or recipe.train.schema
    return {
        "chains": recipe.train_chains,
        "data": f"{Path(source).name} {recipe.train.split}",
        "exact_f1": {name: round(value, 4) for name, value in f1.items()},
    }


def print_boundaries(report: dict[str, Any], workdir: Path) -> None:
    """The table that a person reads."""

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
        exact = ", ".join(f"{depth}: {x['mean_error']['value']:+.2f}" for depth, x in result["step_counts"].items())
        print(f"found minus annotated steps, by annotated: {exact}")
        print(f"calibration error {c['expected_calibration_error']:.4f}, Brier score {c['brier']:.4f}\n")
    print(f"report: {workdir / 'report.json'}, {workdir / 'examples.png'}, {workdir / 'scores.png'}")
    print(
        f"next: cut texts with `python launch/segment.py --classifier={workdir / 'classifier'} --data=texts.jsonl`, or"
    )
    print(f"      train on them with --config.data.segmentation=classifier:{workdir / 'classifier'}")
