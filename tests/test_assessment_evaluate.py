"""Evaluation of a folder with a model in it, scoring again without one, and agreement with lm-evaluation-harness."""

import json

import pytest
from tiny_run import write_teacher

from rtd_jax.assessment.evaluate import EvaluateSettings, evaluate
from rtd_jax.evaluation.answers import flexible_answer, harness_match, strict_answer

TEXTS = [
    "48/2 = 24.\n#### 72",
    "#### 1,000.",
    "the answer is $18.00",
    "-3 or 4?",
    "no number",
    "#### -7 and then #### 8",
    "....",
    "It is 1,234.5.\n####12",
    "12 < 13, so 5.",
    "#### $5",
]


def test_answers_are_those_of_the_harness_row_by_row():
    filters = pytest.importorskip("lm_eval.filters.extraction")
    strict = filters.RegexFilter(regex_pattern=r"#### (\-?[0-9\.\,]+)")
    flexible = filters.RegexFilter(regex_pattern=r"(-?[$0-9.,]{2,})|(-?[0-9]+)", group_select=-1)
    theirs = [[x[0] for x in f.apply([[text] for text in TEXTS], [{}] * len(TEXTS))] for f in (strict, flexible)]
    for i, text in enumerate(TEXTS):
        assert (strict_answer(text) or "[invalid]") == theirs[0][i], text
        assert (flexible_answer(text) or "[invalid]") == theirs[1][i], text


def test_exact_match_is_that_of_the_harness():
    metrics = pytest.importorskip("lm_eval.api.metrics")
    options = {"regexes_to_ignore": [",", r"\$", "(?s).*#### ", r"\.$"], "ignore_case": True}
    pairs = [("1,000.", "1000"), ("$18", "18"), ("18.0", "18"), ("-3", "3"), ("72", "24+48\n#### 72")]
    for found, answer in pairs:
        theirs = metrics.exact_match_fn(predictions=[found], references=[answer], **options)["exact_match"]
        assert harness_match(found, answer) == bool(theirs), (found, answer)


def test_a_model_is_evaluated_and_its_texts_are_scored_again(tmp_path):
    teacher = write_teacher(tmp_path / "model")
    options = {"limit": 12, "max_new_tokens": 4, "tasks": ("synthetic",)}
    first = evaluate(EvaluateSettings(str(teacher), out=str(tmp_path / "a"), **options), note=lambda _: None)
    found = json.loads(first.read_text())["sections"]["synthetic"]["model"]
    assert found["chain_accuracy"]["all"] == {"mean": 0.0, "stderr": 0.0, "n": 12}
    assert list(found["step_accuracy"]) == ["1", "2", "3", "4", "5+", "all"]
    assert found["text_format"] == "plain, 0-shot"
    assert (tmp_path / "a" / "report.html").is_file()
    texts = str(tmp_path / "a" / "generations.jsonl")
    again = evaluate(EvaluateSettings(generations=texts, out=str(tmp_path / "b")))
    scores = json.loads(again.read_text())["sections"]["synthetic"]["model"]
    assert scores == {key: found[key] for key in scores}


def test_texts_made_elsewhere_and_bad_rows(tmp_path):
    path = tmp_path / "theirs.jsonl"
    row = {"prompt": "How many?", "reference": ["2+2=4"], "answer": "4", "text": "2+2=4\n#### 4"}
    path.write_text(json.dumps(row) + "\n" + json.dumps(row | {"text": "2+2=5\n#### 5"}) + "\n")
    found = json.loads(evaluate(EvaluateSettings(generations=str(path), out=str(tmp_path / "x"))).read_text())
    assert found["sections"][""]["theirs"]["chain_accuracy"]["1"]["mean"] == 0.5
    assert found["sections"][""]["theirs"]["samples"] == 2
    for bad, words in (('{"prompt": "x"}', "theirs.jsonl:1: 'reference' is missing"), ("{", "theirs.jsonl:1: damaged")):
        path.write_text(bad)
        with pytest.raises(ValueError, match=words):
            evaluate(EvaluateSettings(generations=str(path), out=str(tmp_path / "y")))
    with pytest.raises(ValueError, match="tasks are"):
        EvaluateSettings("m", tasks=("gsm9k",))
    with pytest.raises(ValueError, match="set a temperature"):
        EvaluateSettings("m", samples=4)
