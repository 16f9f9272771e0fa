"""Evaluation of folders with models in them, scoring again without one, and agreement with lm-evaluation-harness."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_run import write_teacher

from rtd_jax.apps.evaluate import EvaluateSettings, evaluate
from rtd_jax.data.schemas.math import from_math
from rtd_jax.data.schemas.strategyqa import from_strategyqa
from rtd_jax.eval import metrics
from rtd_jax.eval.answers import flexible_answer, harness_match, strict_answer
from rtd_jax.eval.estimates import estimate
from rtd_jax.eval.tasks import SUBJECTS, TASKS, load_problems

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
    # As SmolLM2-135M-Instruct wrote them on GSM8K.
    " 20 x 3 = <<20*3=60>>60.\nTherefore, the total is 120 x 2 = <<120*2=240>>240.\n#### 240\n\n",
    "The original price of the book is $1.50 - $1.50 = $1.\n#### 1.5\n\n",
    "The total cost of the chicken meal is $1 - $1 = $1.\nThe total cost of the chicken meal is $",
    "He will make 8000*$2.00 = $16000.  He will sell 16000*$2.00 = $52000.  He will make 52000*$2.00 = $10",
    " 200 GB / 200 GB / 1000 MB / 1000 MB / ",
    "He runs 1 / 3 = <<1/3=3/4>>3 meters.\nHe runs 1 / 4 = <<1/4=4/5>>4",
    "",
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


MATH = [  # (problem, level, type, solution), our own
    ("What is 2+3?", "Level 3", "Algebra", "We add. So it is $\\boxed{5}$."),
    ("What is half of 3?", "Level 4", "Algebra", "Half of 3 is $\\frac{3}{2}$, so $\\boxed{\\frac{3}{2}}$."),
    ("How many sides has a cube's face?", "Level 5", "Geometry", "A face is a square. It has $\\boxed{4}$ sides."),
    ("What is 1+1?", "Level 1", "Prealgebra", "It is $\\boxed{2}$."),
    ("What is 7-3?", "Level ?", "Geometry", "It is $\\boxed{4}$."),
]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return write_teacher(tmp_path_factory.mktemp("evaluate") / "model")


@pytest.fixture(scope="module")
def synthetic(tmp_path_factory, teacher):
    """Folder of an evaluation of two models on generated problems, with two samples of each."""
    out = tmp_path_factory.mktemp("synthetic")
    other = write_teacher(out / "other", seed=1)
    options = {"limit": 12, "max_new_tokens": 4, "tasks": ("synthetic",), "temperature": 1.0, "samples": 2}
    evaluate(EvaluateSettings((str(teacher), str(other)), out=str(out), **options), note=lambda _: None)
    return out


def sections(folder):
    return json.loads((folder / "report.json").read_text())["sections"]


def test_models_are_evaluated_side_by_side(synthetic):
    both = sections(synthetic)["synthetic"]
    assert list(both) == ["model", "other"]
    found = both["model"]
    assert found["chain_accuracy"]["all"] == {"mean": 0.0, "stderr": 0.0, "n": 24}
    assert list(found["step_accuracy"]) == ["1", "2", "3", "4", "5+", "all"]
    assert found["text_format"] == "plain, 0-shot"
    assert both["other"]["perplexity"] != found["perplexity"]
    for table in ("independent_chain_accuracy", "perplexity_by_depth"):
        assert all(entry["stderr"] is not None for entry in found[table].values())
    # Four steps and more: two of each depth 4, 5 and 6, each with two samples; 2 * (4 + 5 + 6) reference steps.
    assert {key: entry["n"] for key, entry in found["gap"].items()} == {"steps": 30, "chains": 12, "difference": 6}
    page = (synthetic / "report.html").read_text()
    picture = page[page.index('id="chain_accuracy_synthetic"') : page.index('id="compounding_synthetic"')]
    assert ">model<" in picture
    assert ">other<" in picture


def test_what_was_written_is_scored_again_without_the_model(synthetic, tmp_path):
    again = EvaluateSettings(generations=str(synthetic / "generations.jsonl"), out=str(tmp_path))
    evaluate(again)
    assert sections(tmp_path) == sections(synthetic)  # teacher-forced scores and perplexity included
    assert (tmp_path / "generations.jsonl").read_text() == (synthetic / "generations.jsonl").read_text()


def test_a_metric_in_the_list_is_in_the_report_the_printed_tables_and_the_page(tmp_path, monkeypatch, capsys):
    words = metrics.Metric(
        "words", lambda scored: scored.by_depth(lambda record: [len(record["text"].split())]), "words", is_share=False
    )
    lines = dataclasses.replace(words, name="lines", measure=lambda scored: {"all": estimate([3, 5])}, is_column=False)
    monkeypatch.setattr(metrics, "TEXT_METRICS", (*metrics.TEXT_METRICS, words, lines))
    row = {"prompt": "How many?", "reference": ["2+2=4"], "answer": "4", "text": "2+2=4\n#### 4"}
    (tmp_path / "theirs.jsonl").write_text(json.dumps(row) + "\n" + json.dumps(row | {"text": "4"}) + "\n")
    evaluate(EvaluateSettings(generations=str(tmp_path / "theirs.jsonl"), out=str(tmp_path)))
    found = sections(tmp_path)[""]["theirs"]
    assert found["words"] == {key: {"mean": 2.0, "stderr": None, "n": 2} for key in ("1", "all")}
    printed, page = capsys.readouterr().out, (tmp_path / "report.html").read_text()
    assert [line.split()[-2] for line in printed.splitlines() if line.startswith("│ ")] == ["2.000"] * 2
    assert "<th>words</th>" in page
    assert page.count("<td>2.000</td>") == 2
    assert "words: 4.000 ± 1.000" in printed
    assert "<p>words: 4.000 ± 1.000</p>" in page


def test_math_by_level_and_subject(tmp_path, teacher):
    keys = ("problem", "level", "type", "solution")
    folder = tmp_path / "math"
    folder.mkdir()
    rows = [dict(zip(keys, row, strict=True)) for row in MATH]
    for split in ("train", "test"):
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = {"tasks": ("math",), "data_root": str(tmp_path), "max_new_tokens": 2, "few_shot": 1}
    evaluate(EvaluateSettings((str(teacher),), out=str(tmp_path / "out"), **options), note=lambda _: None)
    records = [json.loads(line) for line in (tmp_path / "out" / "generations.jsonl").read_text().splitlines()]
    assert [(r["prompt"], r["level"], r["subject"]) for r in records] == [
        (MATH[i][0], i + 3, MATH[i][2]) for i in range(3)
    ]
    # The texts of a better model in place of this one's: right by boxes, right by math-verify only, wrong.
    for record, text in zip(records, ["So $\\boxed{5}$.", "It is 1.5.", "\\boxed{6}"], strict=True):
        record["text"] = text
    (tmp_path / "better.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    evaluate(EvaluateSettings(generations=str(tmp_path / "better.jsonl"), out=str(tmp_path / "out")))
    found = sections(tmp_path / "out")["math"]["model"]
    assert found["answer_strict"]["all"]["mean"] == pytest.approx(1 / 3)
    assert found["math_verify"]["all"]["mean"] == pytest.approx(2 / 3)
    by_subject = found["groups"]["subject"]
    assert list(by_subject) == ["Algebra", "Geometry"]
    assert by_subject["Algebra"]["answer_flexible"] == {"mean": 1.0, "stderr": 0.0, "n": 2}
    assert by_subject["Algebra"]["chain_accuracy"] == {"mean": 0.5, "stderr": 0.5, "n": 2}  # a chain's answer is strict
    assert by_subject["Geometry"]["math_verify"] == {"mean": 0.0, "stderr": None, "n": 1}
    assert list(found["groups"]["level"]) == ["3", "4", "5"]
    page = (tmp_path / "out" / "report.html").read_text()
    assert "math: model, by subject" in page
    assert 'id="by_subject_math"' in page


def test_math_in_a_folder_for_each_subject_is_cut_evenly(tmp_path):
    for subject in SUBJECTS:
        (tmp_path / "math" / subject).mkdir(parents=True)
        rows = [
            {"problem": f"{subject} {i}", "level": "Level 5", "type": subject, "solution": "$\\boxed{1}$"}
            for i in range(3)
        ]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / "math" / subject / "test.jsonl").write_text(text)
    problems = load_problems("math", data_root=str(tmp_path), limit=9, few_shot=0, levels=(5,))
    assert [trace.prompt for trace in problems.items] == [f"{s} 0" for s in SUBJECTS] + [f"{s} 1" for s in SUBJECTS[:2]]
    assert len(load_problems("math", data_root=str(tmp_path), few_shot=0).items) == 21


def test_strategyqa_as_published(shared_data, tmp_path, teacher):
    options = {"tasks": ("strategyqa",), "data_root": str(shared_data), "limit": 6, "max_new_tokens": 2, "few_shot": 2}
    evaluate(EvaluateSettings((str(teacher),), out=str(tmp_path), **options), note=lambda _: None)
    records = [json.loads(line) for line in (tmp_path / "generations.jsonl").read_text().splitlines()]
    assert records[0]["prompt"] == "Are more people today related to Genghis Khan than Julius Caesar?"
    assert {record["answer"] for record in records} == {"yes", "no"}
    everything = load_problems("strategyqa", data_root=str(shared_data), few_shot=5)
    assert len(everything.items) == 2290  # examples come from the same split, and every question is still asked
    for trace, text in zip(everything.items, everything.texts, strict=True):
        assert text.context.count("Question: ") == 5
        assert f"Question: {trace.prompt}\n" not in text.context


def test_rows_in_the_schemas_of_the_hub_copies():
    row = {"question": "Is it so?", "answer": True, "facts": "One is odd. Two is even."}  # ChilleD/StrategyQA
    assert from_strategyqa(row).steps == ("One is odd.", "Two is even.")
    row = {"problem": "p", "solution": "$\\boxed{1}$", "subject": "Algebra", "level": 4, "answer": "1"}  # MATH-500
    assert (from_math(row).subject, from_math(row).level) == ("Algebra", 4)


def test_where_the_hub_would_be_asked(monkeypatch):
    asked = []

    def read(settings):
        asked.append((settings.location, settings.subset, settings.split, settings.revision))
        question = {"question": "q", "choices": {"text": ["a", "b", "c"], "label": ["A", "B", "C"]}, "answerKey": "C"}
        math = {"problem": "p", "level": "Level 5", "type": settings.subset, "solution": "$\\boxed{1}$"}
        return [question if "arc" in settings.location else math] * 2

    monkeypatch.setattr("rtd_jax.data.sources._read_hub", read)
    problems = load_problems("arc_challenge")
    assert problems.items[0].answer == 2
    assert asked == [("allenai/ai2_arc", "ARC-Challenge", "test", TASKS["arc_challenge"].revision)]
    asked.clear()
    problems = load_problems("math", few_shot=0, revision="main")
    assert asked == [("EleutherAI/hendrycks_math", subject, "test", "main") for subject in SUBJECTS]
    assert len({trace.source for trace in problems.items}) == 14  # places tell rows apart


def test_few_shot_needs_rows_to_draw_from(tmp_path):
    (tmp_path / "gsm8k").mkdir()
    for split in ("train", "test"):
        (tmp_path / "gsm8k" / f"{split}.jsonl").write_text('{"question": "q", "answer": "1\\n#### 1"}\n')
    with pytest.raises(ValueError, match="1 rows of train are too few to draw 5 solved examples"):
        load_problems("gsm8k", data_root=str(tmp_path))
    with pytest.raises(ValueError, match=r"arc_challenge: no such folder; --data_root needs arc_challenge/test.jsonl"):
        load_problems("arc_challenge", data_root=str(tmp_path))


@pytest.mark.slow
def test_a_list_of_levels_is_made_of_numbers():
    command = [sys.executable, "launch/evaluate.py", "--model=nowhere", "--levels=3,x"]
    run = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True, timeout=300)
    assert run.returncode == 2
    assert run.stderr.splitlines()[-1] == "error: --levels is ['3', 'x']; expected whole numbers with commas between"


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
        EvaluateSettings(("m",), tasks=("gsm9k",))
    with pytest.raises(ValueError, match="set a temperature"):
        EvaluateSettings(("m",), samples=4)
