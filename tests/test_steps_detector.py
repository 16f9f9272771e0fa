"""Chains are cut by the classifier wherever a recipe's traces are read; here by the bundled one."""

import dataclasses
import datetime
import importlib
import json
import math
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from safetensors.numpy import load_file, save_file

from rtd_jax.apps.cache import cache_teacher
from rtd_jax.apps.diagnose.diagnose import DiagnoseSettings
from rtd_jax.apps.diagnose.diagnose import _cut as cut_chains
from rtd_jax.apps.distill.prepare import prepare
from rtd_jax.apps.segment import SegmentSettings, segment
from rtd_jax.base.files import json_digest, write_jsonl
from rtd_jax.base.settings import build
from rtd_jax.base.sharding import MeshSettings, make_mesh
from rtd_jax.data.encoding import encode_traces
from rtd_jax.data.generators.word_problems import generate
from rtd_jax.data.sources import SourceSettings, load_traces
from rtd_jax.data.trace import Trace
from rtd_jax.models.open import ModelSettings, OpenModel, open_model
from rtd_jax.steps.classifier import load_classifier, text_boundaries, text_probabilities
from rtd_jax.steps.detector import Detector
from rtd_jax.steps.prose import joined_steps, read
from rtd_jax.steps.token_states import kept_states, token_states
from rtd_jax.train.recipe import Recipe
from rtd_jax.train.saved_models import load_model

BUNDLED = Path(__file__).resolve().parents[1] / "rtd_jax" / "bundled"
TEACHER, CLASSIFIER = BUNDLED / "tiny_teacher", BUNDLED / "tiny_boundaries"


@pytest.fixture(scope="module")
def loaded() -> OpenModel:
    return open_model(ModelSettings(str(TEACHER), "float32", "float32"), make_mesh(MeshSettings()), lambda _: None)


@pytest.fixture(scope="module")
def detector(loaded) -> Detector:
    return Detector(
        load_classifier(CLASSIFIER),
        loaded.tokenizer,
        loaded.mesh,
        lambda: (loaded.model, loaded.params),
        note=lambda _: None,
    )


@pytest.fixture(scope="module")
def problems() -> list[Trace]:
    return generate(24, (1, 2, 4), "test", 7)


def prose(trace: Trace) -> Trace:
    return Trace.of_steps(trace.prompt, (joined_steps(trace)[0],), trace.answer, trace.final, trace.source)


def test_the_bundled_classifier_is_small_and_belongs_to_the_bundled_teacher(detector, loaded):
    assert sum(path.stat().st_size for path in CLASSIFIER.iterdir()) < 300_000
    detector.classifier.check_teacher(loaded.fingerprint, detector.classifier.tokenizer, "tiny")


def test_prose_is_cut_into_the_steps_that_it_was_joined_from(detector, problems):
    texts = [prose(trace) for trace in problems]
    found = detector.cut(texts)
    expected = [tuple(joined_steps(trace)[0][a:b] for a, b in joined_steps(trace)[1]) for trace in problems]
    assert [trace.steps for trace in found] == expected
    assert [trace.completion for trace in found] == [trace.completion for trace in texts]  # not a character changed
    assert [trace.depth for trace in found] == [trace.depth for trace in problems]


def test_marks_neither_help_nor_hinder(detector, problems):
    """With line ends and calculator marks in it, the text is cut at the same places, and stays as it was."""
    found = detector.cut(problems)
    assert [trace.steps for trace in found] == [trace.steps for trace in problems]
    assert [trace.completion for trace in found] == [trace.completion for trace in problems]


def test_a_mark_behind_a_step_stays_with_it(detector, problems):
    trace = next(trace for trace in problems if trace.depth == 4)
    steps = [f"{joined_steps(Trace.of_steps(trace.prompt, (step,), trace.answer))[0]}<<1=1>>" for step in trace.steps]
    text = "\n".join(f"{i}. {step}" for i, step in enumerate(steps, start=1))
    (spans,) = detector.find([(trace.prompt, text, "x")])
    assert [text[a:b] for a, b in spans] == [f"{i}. {step}" for i, step in enumerate(steps, start=1)]


def test_one_program_finds_what_kept_states_give(detector, loaded, problems, tmp_path):
    """Fitting reads states from disk, use never stores them: both must see the same."""
    classifier = detector.classifier
    readings = [
        read(detector.tokenizer, trace.prompt, joined_steps(trace)[0], classifier.text, joined_steps(trace)[1])
        for trace in problems
    ]
    runs = []

    def run(some):
        runs.append(len(some))
        return token_states(loaded.model, loaded.params, loaded.mesh, some, classifier.layers, batch_size=8)

    arguments = (tmp_path, "teacher", readings, classifier.layers, run, lambda _: None)
    states = kept_states(*arguments)
    again = kept_states(*arguments)  # from disk
    assert runs == [len(problems)]
    assert [x.shape for x in states] == [(len(r.ends_T), 4, 128) for r in readings]
    assert all(np.array_equal(a, b) for a, b in zip(states, again, strict=True))
    np.testing.assert_allclose(np.mean(np.square(states[0], dtype=float), -1), 1.0, atol=1e-2)

    probabilities = text_probabilities(classifier, states)
    candidates = [r.candidates_T for r in readings]
    apart = text_boundaries(probabilities, candidates, classifier.threshold, classifier.min_tokens)
    together = dataclasses.replace(detector, batch_size=8).detect(readings)
    assert all(np.array_equal(a, b) for a, b in zip(apart, together, strict=True))
    (path,) = tmp_path.iterdir()
    whole = path.read_bytes()
    kept = load_file(path)["states"]
    for damaged in (b"x", b"", whole[:-1], whole[:-9] + bytes([whole[-9] ^ 1]) + whole[-8:]):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=rf"{path.name} (is|was changed or) damaged .*delete it"):
            kept_states(*arguments)
    for changed in (kept[1:], kept[:, :1], kept[..., None], kept.astype(np.float32), np.full_like(kept, np.nan)):
        save_file({"states": changed}, path)
        with pytest.raises(ValueError, match=rf"{path.name} (is|was changed or) damaged.*delete it"):
            kept_states(*arguments)
    save_file({"others": kept}, path)
    with pytest.raises(ValueError, match=rf"{path.name} is damaged .*delete it"):
        kept_states(*arguments)
    save_file({"states": kept}, path)  # as an earlier version did: without a digest
    assert all(np.array_equal(a, b) for a, b in zip(states, kept_states(*arguments), strict=True))


def test_found_steps_are_kept_and_the_teacher_is_not_asked_again(detector, problems, tmp_path):
    def no_teacher():
        raise AssertionError("the teacher was asked")

    texts = [prose(trace) for trace in problems[:6]]
    first = dataclasses.replace(detector, folder=tmp_path).cut(texts)
    kept = dataclasses.replace(detector, folder=tmp_path, teacher=no_teacher)
    assert kept.cut(texts) == first
    for other in (
        dataclasses.replace(kept, classifier=dataclasses.replace(detector.classifier, threshold=0.9)),
        dataclasses.replace(kept, described="bfloat16 weights"),
    ):
        with pytest.raises(AssertionError, match="the teacher was asked"):
            other.cut(texts)

    # Kept steps that were changed are refused by name, digest or not.
    (path,) = tmp_path.iterdir()
    whole = path.read_text()
    record = json.loads(whole)
    spans = record["spans"]
    unsigned = {key: value for key, value in record.items() if key != "digest"}

    def refused(content: object) -> None:
        path.write_text(json.dumps(content))
        with pytest.raises(ValueError, match=rf"{path.name}.*delete it, and the steps are found and written again"):
            kept.cut(texts)

    refused(record | {"spans": [spans[0][:-1], *spans[1:]]})  # a last step that is dropped leaves a text that could be
    for wrong in (
        spans[1:],
        spans[::-1],
        [],
        [[]] * 6,
        {},
        None,
        "x",
        [[[1]]] * 6,
        [[["a", "b"]]] * 6,
        [[[0, 1.5]]] * 6,
    ):
        for changed in (unsigned | {"spans": wrong}, unsigned | {"texts": "0" * 64}):
            refused(changed | {"digest": json_digest(changed)})
        if isinstance(wrong, list):
            refused(wrong)  # as an earlier version wrote it
    for text in ("", "[", "[" * 5000, "[NaN]", "{}"):
        path.write_text(text)
        with pytest.raises(ValueError, match=path.name):
            kept.cut(texts)
    path.write_text(json.dumps(spans))
    assert kept.cut(texts) == first


@pytest.mark.parametrize("name", ["set[1]", "a*b", "x?"])
def test_folders_may_have_glob_characters(detector, problems, tmp_path, name):
    shutil.copytree(CLASSIFIER, tmp_path / name)
    assert load_classifier(tmp_path / name).fingerprint == detector.classifier.fingerprint
    texts = [prose(trace) for trace in problems[:2]]
    keeping = dataclasses.replace(detector, folder=tmp_path / name / "steps")
    assert keeping.cut(texts) == keeping.cut(texts)
    assert len(list((tmp_path / name / "steps").iterdir())) == 1


def test_cut_chains_encode_with_a_boundary_at_every_step(detector, problems):
    cut = detector.cut([prose(trace) for trace in problems])
    chains, _ = encode_traces(detector.tokenizer, cut, detector.classifier.text, row_length=256)
    assert [chain.depth for chain in chains] == [trace.depth for trace in problems]


def tiny_recipe(**data) -> Recipe:
    values = importlib.import_module("configs.rtd_tiny").get_config().to_dict()
    values["teacher"]["path"] = str(TEACHER)
    values["data"]["train"]["limit"], values["data"]["validation"]["limit"] = 40, 40
    return build(Recipe, values | {"data": values["data"] | data})


@pytest.mark.slow
def test_a_recipe_names_its_classifier_and_the_teacher_cache_goes_by_what_it_found(tmp_path):
    """Kept steps are enough: with the cache the teacher's weights are never loaded."""
    recipe = tiny_recipe(segmentation=f"classifier:{CLASSIFIER}", steps_cache=str(tmp_path / "steps"))
    recipe = dataclasses.replace(
        recipe,
        teacher=dataclasses.replace(recipe.teacher, cache=str(tmp_path / "cache")),
        curriculum=dataclasses.replace(recipe.curriculum, validation_chains=2),
    )
    cache_teacher(recipe, tmp_path)
    notes: list[str] = []
    experiment, _ = prepare(recipe, notes.append)
    assert not any(note.startswith("loading the weights") for note in notes)
    assert {trace.depth for trace in experiment.train.traces} == {1, 2, 3, 4, 5, 6}
    assert experiment.cache is not None


def test_a_classifier_of_another_teacher_is_refused_before_any_weights_are_loaded(tmp_path):
    from tiny_run import write_teacher

    recipe = tiny_recipe(segmentation=f"classifier:{CLASSIFIER}")
    other = dataclasses.replace(recipe.teacher, path=str(write_teacher(tmp_path / "other")))
    notes: list[str] = []
    with pytest.raises(ValueError, match="fitted to the states of tiny_teacher"):
        prepare(dataclasses.replace(recipe, teacher=other), notes.append)
    assert not any(note.startswith("loading") for note in notes)


def test_a_place_where_no_steps_can_be_kept_is_refused_before_any_weights_are_loaded():
    recipe = tiny_recipe(segmentation=f"classifier:{CLASSIFIER}", steps_cache="/dev/null/steps")
    notes: list[str] = []
    with pytest.raises(ValueError, match=r"cannot write in /dev/null/steps: .* with --config\.data\.steps_cache"):
        prepare(recipe, notes.append)
    assert not any(note.startswith("loading") for note in notes)


def test_a_classifier_may_cut_texts_elsewhere_than_the_rules_of_their_schema(detector, problems, tmp_path):
    rows = [{"prompt": t.prompt, "text": joined_steps(t)[0].replace("So ", "First, ")} for t in problems[:4]]
    write_jsonl(tmp_path / "prose.jsonl", rows)
    source = {"schema": "prose", "location": str(tmp_path / "prose.jsonl")}
    assert all(tiny_recipe(train=source, segmentation=x) for x in ("annotated", "random", "classifier:x"))
    by_rules = load_traces(SourceSettings(**source))
    cut = detector.cut([dataclasses.replace(trace, spans=((0, len(trace.body)),)) for trace in by_rules])
    assert detector.cut(by_rules) == cut  # whatever the steps were before
    assert [trace.body for trace in cut] == [row["text"] for row in rows]


def test_segment_writes_stepwise_rows(tmp_path, problems):
    data = tmp_path / "texts.jsonl"
    rows = [{"id": i, "q": t.prompt, "why": f"{joined_steps(t)[0]}\n{t.final}"} for i, t in enumerate(problems[:5])]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = SegmentSettings(
        str(TEACHER),
        str(CLASSIFIER),
        str(data),
        str(tmp_path / "out.jsonl"),
        text_field="why",
        prompt_field="q",
        keep="",
    )
    out = [json.loads(line) for line in segment(settings).read_text().splitlines()]
    assert [row["id"] for row in out] == list(range(5))
    assert [row["answer"] for row in out] == [trace.answer for trace in problems[:5]]
    for row, trace in zip(out, problems, strict=False):
        assert row["prompt"] == trace.prompt
        assert " ".join(row["completions"]) == joined_steps(trace)[0]
        assert len(row["completions"]) == trace.depth
    with pytest.raises(ValueError, match=r"field 'text' is None; .*The row has \['id', 'q', 'why'\]; name the field"):
        segment(dataclasses.replace(settings, text_field="text"))


def test_a_least_length_of_steps_leaves_the_boundaries_where_they_are(detector, problems):
    """Steps of these problems are longer than two tokens, so a classifier that asks for two finds the same."""
    least = dataclasses.replace(detector, classifier=dataclasses.replace(detector.classifier, min_tokens=2))
    texts = [prose(trace) for trace in problems[:6]]
    assert [trace.spans for trace in least.cut(texts)] == [trace.spans for trace in detector.cut(texts)]


def test_segment_cuts_by_rules_without_a_model(tmp_path, monkeypatch):
    """What is written is what the stepwise schema reads back, and steps of several lines are written on one."""
    monkeypatch.setattr("rtd_jax.apps.segment.open_model", None)
    text = "First, add:\n\\[\n2 + 3 = 5\n\\]\n\nNext, double it: 2 * 5 = 10.\n#### 10"
    write_jsonl(tmp_path / "texts.jsonl", [{"prompt": "p", "text": text}])
    settings = SegmentSettings(data=str(tmp_path / "texts.jsonl"), out=str(tmp_path / "out.jsonl"), rules="prose")
    steps = ["First, add: \\[ 2 + 3 = 5 \\]", "Next, double it: 2 * 5 = 10."]
    rows = [json.loads(line) for line in segment(settings).read_text().splitlines()]
    assert rows == [{"prompt": "p", "completions": steps, "answer": "10"}]
    (trace,) = load_traces(SourceSettings("stepwise", settings.out))
    assert (trace.steps, trace.answer) == (tuple(steps), "10")


def test_segment_needs_a_classifier_with_its_teacher_or_rules():
    with pytest.raises(ValueError, match=r"teacher is empty; give --teacher and the --classifier .* cut by rules with"):
        SegmentSettings(data="x.jsonl")
    with pytest.raises(ValueError, match="classifier is empty; give --teacher and the --classifier"):
        SegmentSettings("teacher", data="x.jsonl")
    with pytest.raises(ValueError, match="rules is 'prose', which reads no classifier; leave out --rules or --class"):
        SegmentSettings(classifier="folder", data="x.jsonl", rules="prose")
    with pytest.raises(ValueError, match="data is empty"):
        SegmentSettings(rules="prose")


def test_segment_keeps_other_fields_as_they_are_or_refuses_them_before_it_cuts(tmp_path, problems, monkeypatch):
    row = {"prompt": problems[0].prompt, "text": f"{joined_steps(problems[0])[0]}\n#### 7"}
    others = {"created": "2024-01-31", "big": 2**100, "price": 7.5, "more": [None, {"a": "x\u2028y"}], "answer": None}
    table = pa.Table.from_pylist([row | {"created": datetime.date(2024, 1, 31), "labels": None}])
    settings = SegmentSettings(str(TEACHER), str(CLASSIFIER), "rows.jsonl", str(tmp_path / "out.jsonl"), keep="")
    for name, kept in (("texts.jsonl", others), ("texts.parquet", {"created": "2024-01-31"})):
        if name.endswith("jsonl"):
            write_jsonl(tmp_path / name, [row | others])
        else:
            pq.write_table(table, tmp_path / name)
        out = segment(dataclasses.replace(settings, data=str(tmp_path / name)))
        (written,) = [json.loads(line) for line in out.read_text().split("\n")[:-1]]
        assert {key: written[key] for key in kept} == kept | ({"answer": "7"} if "answer" in kept else {})
        (trace,) = load_traces(SourceSettings("stepwise", str(out)))
        assert (trace.depth, trace.answer) == (problems[0].depth, "7")
        out.unlink()
    monkeypatch.setattr("rtd_jax.apps.segment.Detector", None)
    pq.write_table(pa.Table.from_pylist([row | {"image": b"\xff", "score": math.nan}]), tmp_path / "bad.parquet")
    for columns, message in (
        (["prompt", "text", "image"], r"bad.parquet:1: field 'image' is b'\\xff', which cannot be written as JSON"),
        (["prompt", "text", "score"], r"bad.parquet:1: field 'score' is nan, which cannot be written as JSON"),
    ):
        bad = pq.read_table(tmp_path / "bad.parquet").select(columns)
        (tmp_path / "one").mkdir(exist_ok=True)
        pq.write_table(bad, tmp_path / "one" / "bad.parquet")
        with pytest.raises(ValueError, match=message):
            segment(dataclasses.replace(settings, data=str(tmp_path / "one" / "bad.parquet")))
    write_jsonl(tmp_path / "labelled.jsonl", [row | {"labels": [True]}])
    with pytest.raises(ValueError, match=r"labelled.jsonl:1: the row has a field 'labels', which belongs to steps"):
        segment(dataclasses.replace(settings, data=str(tmp_path / "labelled.jsonl")))
    assert not (tmp_path / "out.jsonl").exists()


def test_a_diagnosis_cuts_its_reference_chains_with_the_classifier_of_its_teacher(problems):
    settings = DiagnoseSettings(str(TEACHER), str(TEACHER), segmentation=f"classifier:{CLASSIFIER}")
    cut = cut_chains(settings, load_model(str(TEACHER)), [prose(trace) for trace in problems[:4]], lambda _: None)
    assert [trace.depth for trace in cut] == [trace.depth for trace in problems[:4]]
    with pytest.raises(ValueError, match="'random'; a diagnosis compares states where steps end"):
        dataclasses.replace(settings, segmentation="random")
    assert dataclasses.replace(settings, schema="prose", segmentation="annotated")  # the schema's own steps
