"""Evaluation of folders with models in them, scoring again without one, and agreement with lm-evaluation-harness."""

import dataclasses
import json
import shutil
import subprocess
import sys
import types
from pathlib import Path

import pytest
from tiny_run import write_teacher
from transformers import AutoModelForCausalLM, AutoTokenizer

import rtd_jax
from rtd_jax.apps import evaluate as evaluation
from rtd_jax.apps.evaluate import NOT_KNOWN, EvaluateSettings, evaluate
from rtd_jax.data.formats import TextFormat
from rtd_jax.data.schemas.math import from_math
from rtd_jax.data.schemas.strategyqa import from_strategyqa
from rtd_jax.data.trace import Trace, problem_key, spans_of
from rtd_jax.eval import metrics
from rtd_jax.eval.answers import flexible_answer, harness_match, strict_answer
from rtd_jax.eval.chains import score_texts
from rtd_jax.eval.estimates import estimate
from rtd_jax.eval.tasks import SUBJECTS, TASKS, load_problems
from rtd_jax.models.from_hf import load_config, load_params
from rtd_jax.models.text_record import TEXT_FILE, write_text_format
from rtd_jax.models.to_hf import save_pretrained
from rtd_jax.train.saved_models import trained_text

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


def test_files_of_earlier_versions_and_what_is_scored_anew_are_read(synthetic, tmp_path):
    """What the judge says of a text is found out again, whatever a file says of it, and a file need not say it."""
    rows = [json.loads(line) for line in (synthetic / "generations.jsonl").read_text().splitlines()]
    anew = ("verdicts", "reasons", "chain_exact", "answer_right", "steps_right", "correct", "first_error")
    earlier = [{key: value for key, value in row.items() if key not in anew[:4]} for row in rows]
    strange = [row | dict.fromkeys(anew, "nonsense") for row in rows]
    for name, changed in (("earlier", earlier), ("strange", strange)):
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in changed))
        evaluate(EvaluateSettings(generations=str(path), out=str(tmp_path / name)))
        assert sections(tmp_path / name) == sections(synthetic)


def test_chains_to_the_letter_and_answers_as_the_judge_reads_them(tmp_path, capsys):
    """Another way to the answer is right, but not to the letter; a boxed answer is right, but not read strictly."""
    row = {"prompt": "2 and 2, and 1?", "reference": ["2+2=4", "4+1=5"], "answer": "5"}
    texts = ["2+2=4\n4+1=5\n#### 5", "2+1=3\n3+2=5\n#### 5", "So 2+2+1 = \\boxed{5} of the 7.", "2+2=5\n#### 5"]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row | {"text": text}) + "\n" for text in texts))
    evaluate(EvaluateSettings(generations=str(tmp_path / "rows.jsonl"), out=str(tmp_path)))
    found = sections(tmp_path)[""]["rows"]
    names = ("chain_accuracy", "chain_exact", "answer", "answer_strict")
    assert [found[name]["all"]["mean"] for name in names] == [0.75, 0.25, 1.0, 0.75]
    printed, page = capsys.readouterr().out, (tmp_path / "report.html").read_text()
    assert "chain, to the letter %: 25.0" in printed
    assert "<th>chain %</th><th>answer %</th><th>answer, strict %</th>" in page
    words = {"prompt": "Do cats purr?", "reference": ["They do."], "answer": "yes", "text": "They do.\n#### yes"}
    (tmp_path / "words.jsonl").write_text(json.dumps(words) + "\n")
    evaluate(EvaluateSettings(generations=str(tmp_path / "words.jsonl"), out=str(tmp_path)))
    found = sections(tmp_path)[""]["words"]
    assert (found["chain_exact"], found["answer"]["all"]["mean"]) == ({}, 1.0)
    assert "chain, to the letter" not in capsys.readouterr().out


def test_a_problem_to_show_that_is_not_there_is_refused_before_a_model_is_loaded(tmp_path, teacher, monkeypatch):
    monkeypatch.setattr(evaluation, "load_model", lambda *_: pytest.fail("a model was loaded"))
    settings = EvaluateSettings((str(teacher),), ("synthetic",), out=str(tmp_path / "out"), limit=12, show=(12,))
    with pytest.raises(ValueError, match="show is 12; expected numbers from 0 and below 12, the number of problems"):
        evaluate(settings, note=lambda _: None)


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

    def read(settings, asked_of):
        asked.append((settings.location, settings.subset, settings.split, settings.revision))
        question = {"question": "q", "choices": {"text": ["a", "b", "c"], "label": ["A", "B", "C"]}, "answerKey": "C"}
        math = {"problem": "p", "level": "Level 5", "type": settings.subset, "solution": "$\\boxed{1}$"}
        row = question if "arc" in settings.location else math
        place = f"{asked_of.name}/{settings.subset}/{settings.split}"
        return iter([(f"{place}:1", row), (f"{place}:2", row)])

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
    for bad, words in (('{"prompt": "x"}', "'reference' is missing"), ("{", "not valid JSON")):
        path.write_text(bad)
        with pytest.raises(ValueError, match=f"theirs.jsonl:1: {words}"):
            evaluate(EvaluateSettings(generations=str(path), out=str(tmp_path / "y")))
    with pytest.raises(ValueError, match="tasks are"):
        EvaluateSettings(("m",), tasks=("gsm9k",))
    with pytest.raises(ValueError, match="set a temperature"):
        EvaluateSettings(("m",), samples=4)


def score(tmp_path, rows):
    """(report, printed nothing): the sections of a file of rows that something else wrote."""
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return json.loads(evaluate(EvaluateSettings(generations=str(path), out=str(tmp_path / "out"))).read_text())


TEXT = {"prompt": "q", "reference": ["2+3=5."], "answer": "5", "text": "2+3=5.\n#### 5"}
CHOICE = {"prompt": "q", "choices": ["a", "b"], "answer": 1, "log_likelihoods": [-1, -2]}
OWN = {"reference_nats": 1.5, "reference_tokens": 3, "max_new_tokens": 8, "text_format": "plain", "decoding": "greedy"}
OWN |= {"teacher_forced": [True]}


@pytest.mark.parametrize(
    ("row", "field"),
    [
        (TEXT | {"text": None}, "text"),
        (TEXT | {"text": 5}, "text"),
        (TEXT | {"reference": "2+3=5."}, "reference"),
        (TEXT | {"reference": []}, "reference"),
        (TEXT | {"reference": ["a", None]}, "reference"),
        (TEXT | {"reference": ["a", " "]}, "reference"),
        (TEXT | {"answer": None}, "answer"),
        (TEXT | {"answer": True}, "answer"),
        (TEXT | {"answer": ["5"]}, "answer"),
        (TEXT | {"prompt": " "}, "prompt"),
        (TEXT | {"prompt": 3}, "prompt"),
        (TEXT | {"finished": "yes"}, "finished"),
        (TEXT | {"problem": [1]}, "problem"),
        (TEXT | {"problem": True}, "problem"),
        (TEXT | {"level": "3"}, "level"),
        (TEXT | {"subject": 1}, "subject"),
        (TEXT | {"task": None}, "task"),
        (TEXT | {"model": 7}, "model"),
        (TEXT | {"model": ""}, "model"),
        ({**TEXT, "text": "x", "completions": ["a"], "final": None}, "final"),
        (TEXT | OWN | {"teacher_forced": [True, True]}, "teacher_forced"),
        (TEXT | OWN | {"teacher_forced": [1]}, "teacher_forced"),
        (TEXT | OWN | {"reference_nats": "1.5"}, "reference_nats"),
        (TEXT | OWN | {"reference_tokens": 0}, "reference_tokens"),
        (TEXT | OWN | {"max_new_tokens": 1.5}, "max_new_tokens"),
        (TEXT | OWN | {"decoding": None}, "decoding"),
        (CHOICE | {"answer": "B"}, "answer"),
        (CHOICE | {"answer": 2}, "answer"),
        (CHOICE | {"answer": -1}, "answer"),
        (CHOICE | {"answer": True}, "answer"),
        (CHOICE | {"log_likelihoods": [-1, None]}, "log_likelihoods"),
        (CHOICE | {"log_likelihoods": [-1]}, "log_likelihoods"),
        (CHOICE | {"log_likelihoods": ["-1", "-2"]}, "log_likelihoods"),
        (CHOICE | {"choices": "ab"}, "choices"),
        (CHOICE | {"choices": ["a", None]}, "choices"),
        (CHOICE | {"choices": ["a", ""]}, "choices"),
    ],
)
def test_a_row_of_another_shape_is_refused_by_its_place_and_field(tmp_path, row, field):
    good = CHOICE if "choices" in row else TEXT
    with pytest.raises(ValueError, match=rf"rows.jsonl:2: field '{field}' is .*; expected "):
        score(tmp_path, [good, row])


def test_rows_that_do_not_belong_together_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"rows.jsonl:2: a row of choices, but .*rows.jsonl:1"):
        score(tmp_path, [TEXT, CHOICE])
    with pytest.raises(ValueError, match=r"rows.jsonl:1: there are 1 texts of this problem, but 2 of that of .*:2"):
        score(tmp_path, [TEXT | {"prompt": "other"}, TEXT, TEXT])
    with pytest.raises(ValueError, match=r"rows.jsonl:1: NaN is not JSON|rows.jsonl:1: not valid JSON"):
        score(tmp_path, [CHOICE | {"log_likelihoods": [-1, float("nan")]}])
    with pytest.raises(ValueError, match=r"rows.jsonl:1: its answer is '6', but its own text is read as"):
        score(tmp_path, [{**TEXT, "reference": ["#### 5"], "answer": "6"}])


def test_steps_and_a_final_line_are_read_in_place_of_a_text(tmp_path):
    row = {"prompt": "q", "reference": ["2+3=5."], "answer": 5, "completions": ["2+3=5."]}
    found = score(tmp_path, [row | {"final": "#### 5"}, row])["sections"][""]["rows"]
    assert [found[name]["all"]["mean"] for name in ("chain_accuracy", "chain_exact", "answer_strict")] == [
        1.0,
        0.5,
        0.5,
    ]


def test_a_separator_of_lines_inside_a_text_is_read_and_written(tmp_path):
    """U+2028 and its like are legal inside JSON, and may come from a data set: what is written has to be read again."""
    row = TEXT | {"text": "2+3=\u20285.\x85\n#### 5", "prompt": "q\u2029"}
    first = score(tmp_path, [row])
    again = EvaluateSettings(generations=str(tmp_path / "out" / "generations.jsonl"), out=str(tmp_path / "again"))
    assert json.loads(evaluate(again).read_text())["sections"] == first["sections"]
    written = (tmp_path / "out" / "generations.jsonl").read_bytes()
    assert written == (tmp_path / "again" / "generations.jsonl").read_bytes()
    assert "\u2028".encode() in written


def test_steps_that_share_lines_are_scored_again_alike(tmp_path):
    body = "a = 1. b = 2.\nc = 3"
    trace = Trace("question", body, spans_of(body, (6, 13)), "3", "#### 3")
    (record,) = score_texts([trace], [["a = 1. b = 2.\nc = 3\n#### 3"]])
    assert score(tmp_path, [record])["sections"][""]["rows"]["chain_accuracy"]["all"]["mean"] == 1.0


def test_joined_files_that_number_their_problems_alike_are_told_apart(tmp_path):
    """Two files of one problem each, both number 0 and both right: 100%, not one problem with a wrong text."""
    other = {"prompt": "r", "reference": ["3+3=6."], "answer": "6", "text": "3+3=6.\n#### 6"}
    rows = [row | {"problem": 0, "sample": 0} for row in (TEXT, other)]
    found = score(tmp_path, rows)["sections"][""]["rows"]
    assert found["chain_accuracy"]["all"]["mean"] == 1.0
    assert (found["problems"], found["samples"]) == (2, 1)
    same_prompt = other | {"prompt": "q", "problem": 0}
    assert score(tmp_path, [rows[0], same_prompt])["sections"][""]["rows"]["problems"] == 2


HOSTILE = "/../../../X", "$x_{$\u202e", "[red]x[/]", "\x1b[31mred", "_<b>&", ".." + "n" * 300


def test_hostile_names_stay_names(tmp_path, capsys):
    """Tasks, models and subjects are foreign text: no path, no mathematics, no markup, no control of the terminal."""
    before = set(tmp_path.parent.rglob("*.png"))
    rows = [TEXT | {"task": name, "model": name, "subject": name, "level": 1} for name in HOSTILE]
    score(tmp_path, rows)
    new = set(tmp_path.parent.rglob("*.png")) - before
    assert {path.parent for path in new} == {tmp_path / "out"}
    assert len([path for path in new if path.name.startswith("chain_accuracy_")]) == len(HOSTILE)
    printed, page = capsys.readouterr().out, (tmp_path / "out" / "report.html").read_text()
    assert "\x1b" not in printed
    assert "[red]x[/]: [red]x[/]" in printed
    assert "<b>" not in page
    assert "_&lt;b&gt;&amp;:" in page
    assert "$x_{$" in page


def test_a_number_that_is_not_finite_is_null_with_its_reason(tmp_path, capsys):
    rows = [TEXT | OWN | {"reference_nats": nats, "prompt": str(nats)} for nats in (1e6, 2.0)]
    report = score(tmp_path, rows)
    found = report["sections"][""]["rows"]
    assert found["perplexity"] is None
    assert found["perplexity_by_depth"]["all"] == {"mean": None, "stderr": None, "n": 2}
    (note,) = report["notes"]
    assert note.startswith("null in the report, because the number overflowed or is none: sections..rows.perplexity")
    page = (tmp_path / "out" / "report.html").read_text()
    assert "perplexity is inf" in page
    assert "<td>–</td>" in page
    assert f"warning: {note}" in capsys.readouterr().out
    rows[0]["reference_nats"] = None  # as it is written for nats that are not finite
    assert score(tmp_path, rows)["sections"][""]["rows"]["perplexity"] is None


def test_models_under_unequal_conditions_are_said_to_be(tmp_path):
    other = OWN | {"text_format": "chat", "max_new_tokens": 16}
    rows = [TEXT | OWN | {"model": "a"}, TEXT | other | {"model": "b"}, TEXT | OWN | {"model": "c", "prompt": "r"}]
    notes = score(tmp_path, rows)["notes"]
    start = "texts: the models of this table are not comparable: "
    mixed = [TEXT | OWN | {"problem": i, "max_new_tokens": 8 * (i + 1)} for i in range(2)]
    assert score(tmp_path, mixed)["notes"] == [
        f"{start}the tokens decoded at most differs between the rows of rows: 16, 8"
    ]
    assert notes == [
        f"{start}the form of text differs: a plain, b chat, c plain",
        f"{start}the tokens decoded at most differs: a 8, b 16, c 8",
        f"{start}a and c were asked different problems",
    ]


BUNDLED = Path(rtd_jax.__file__).parent / "bundled" / "tiny_teacher"
ASKED = TextFormat("plain", "Question: {prompt}\nAnswer:\n", "")


def folder(path, text=None):
    """A copy of the bundled teacher whose folder says that it was trained on `text`."""
    shutil.copytree(BUNDLED, path)
    (path / TEXT_FILE).unlink()
    if text is not None:
        write_text_format(path, text)
    return str(path)


def test_a_model_is_asked_as_it_was_trained_and_all_of_a_table_alike(tmp_path):
    """The bundled teacher in its own form, and so beside a folder that does not say its form."""
    options = {"tasks": ("synthetic",), "limit": 6, "max_new_tokens": 128, "out": str(tmp_path / "out")}
    models = folder(tmp_path / "silent"), str(BUNDLED)
    report = json.loads(evaluate(EvaluateSettings(models, **options), note=lambda _: None).read_text())
    both = report["sections"]["synthetic"].values()
    assert [found["chain_accuracy"]["all"]["mean"] > 0.9 for found in both] == [True, True]
    assert report["protocol"]["synthetic"]["prompt"] == ASKED.template
    assert list(report["protocol"]["synthetic"]["trained_on"].values()) == [NOT_KNOWN, "this form"]
    assert report["notes"] == [f"synthetic: {models[0]} does not say on which form of text it was trained"]


def test_which_form_is_asked_is_decided_by_flags_then_by_the_first_model_that_says_one(tmp_path, monkeypatch):
    def asked(models, **options):
        protocol, notes = {}, []
        settings = EvaluateSettings(models, tasks=("synthetic",), limit=2, **options)
        next(evaluation._measure(settings, protocol, notes, lambda _: None), None)
        return protocol["synthetic"]["prompt"], [note.partition(";")[0] for note in notes]

    monkeypatch.setattr(evaluation, "load_model", lambda *_: types.SimpleNamespace(name="m"))
    monkeypatch.setattr(evaluation, "_solve", lambda *_: ({}, []))
    monkeypatch.setattr(evaluation, "check_model", lambda _: None)
    other = TextFormat("plain", "Q: {prompt}", " ")
    first, second = folder(tmp_path / "first", other), folder(tmp_path / "second", ASKED)
    was = f"synthetic: {second} was trained on another form, 'Question: {{prompt}}\\nAnswer:\\n'"
    assert asked((first, second)) == ("Q: {prompt}", [was])
    template, notes = asked((second,), prompt_template="Say: {prompt}")
    assert (template, notes) == ("Say: {prompt}", [was])
    assert asked((second,), chat=True)[0] == "Question: {prompt}\nAnswer:"
    assert asked((second,)) == (ASKED.template, [])
    assert "no model says on which form" in asked((folder(tmp_path / "silent"),))[1][0]
    (tmp_path / "second" / TEXT_FILE).write_text((tmp_path / "second" / TEXT_FILE).read_text().replace("Answer", "A"))
    with pytest.raises(ValueError, match=r"rtd_jax.json was changed or damaged"):
        asked((second,))


def test_a_saved_model_keeps_its_form_of_text_and_transformers_loads_the_folder(tmp_path):
    config = load_config(BUNDLED)
    for _ in range(2):  # the folder, with its record, can be replaced
        save_pretrained(tmp_path / "model", config, load_params(BUNDLED, config), text=ASKED)
    assert trained_text(str(tmp_path / "model")) == ASKED
    assert trained_text(str(BUNDLED)) == ASKED
    AutoTokenizer.from_pretrained(str(BUNDLED))
    assert AutoModelForCausalLM.from_pretrained(str(tmp_path / "model")).config.num_hidden_layers == config.layers


@pytest.mark.parametrize(
    "values",
    [
        {"limit": -1},
        {"limit": 10**12},
        {"max_new_tokens": 10**12},
        {"few_shot": -2},
        {"samples": 0},
        {"max_new_tokens": 0},
        {"batch_size": 0},
        {"temperature": -1.0},
        {"temperature": float("nan")},
        {"top_p": 0.0},
        {"top_p": 1.5},
        {"levels": ()},
        {"levels": (0,)},
        {"prompt_template": "no place"},
    ],
)
def test_nonsense_is_refused_before_anything_is_loaded(values):
    with pytest.raises(ValueError, match=next(iter(values))):
        EvaluateSettings(("m",), **values)


def test_what_is_missing_is_found_before_a_model_is_loaded(tmp_path, monkeypatch):
    monkeypatch.setattr(evaluation, "load_model", lambda *_: pytest.fail("a model was loaded"))
    weightless, wordless = (shutil.copytree(BUNDLED, tmp_path / name) for name in ("weightless", "wordless"))
    (weightless / "model.safetensors").unlink()
    for path in wordless.glob("tokenizer*"):
        path.unlink()
    for options, words in (
        ({"tasks": ("gsm8k",), "data_root": str(tmp_path)}, "gsm8k: no such folder"),
        ({"tasks": ("synthetic",), "model": (str(BUNDLED), "./misspelt")}, "misspelt: no such directory"),
        (
            {"tasks": ("synthetic",), "model": (str(BUNDLED), str(weightless))},
            "weightless: neither model.safetensors",
        ),
        ({"tasks": ("synthetic",), "model": (str(BUNDLED), str(wordless))}, "wordless has no tokenizer"),
    ):
        settings = EvaluateSettings(**{"model": (str(BUNDLED),), "out": str(tmp_path / "out"), **options})
        with pytest.raises(ValueError, match=words):
            evaluate(settings, note=lambda _: None)


def strategyqa(folder, questions, split="train"):
    rows = [{"question": q, "answer": True, "facts": ["f."], "decomposition": ["d?"]} for q in questions]
    (folder / "strategyqa").mkdir(exist_ok=True)
    (folder / "strategyqa" / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_a_problem_never_stands_among_its_own_examples(tmp_path):
    """Repeated rows: equality is of the problem, not of the row's place, its white space or its case."""
    strategyqa(tmp_path, ["Is 0 odd?", "is  0 ODD?", "Is 0 odd?", "Is 1 odd?", "Is 2 odd?", "Is 3 odd?"])
    problems = load_problems("strategyqa", data_root=str(tmp_path), few_shot=3)
    assert len(problems.items) == 6
    for item, text in zip(problems.items, problems.texts, strict=True):
        asked = [problem_key(line) for line in text.context.splitlines() if line.startswith("Question: ")]
        assert len(set(asked)) == len(asked) == 3
        assert problem_key(f"Question: {item.prompt}") not in asked
    with pytest.raises(ValueError, match=r"train.jsonl:1: train has 3 other problems .*, too few to draw 4 solved"):
        load_problems("strategyqa", data_root=str(tmp_path), few_shot=4)


@pytest.mark.parametrize("chat", [False, True])
def test_a_test_question_that_is_in_the_training_split_too_is_no_example(tmp_path, chat):
    (tmp_path / "gsm8k").mkdir()
    rows = [{"question": f"How many are {i}?", "answer": f"{i}\n#### {i}"} for i in range(4)]
    for split, own in (("train", rows), ("test", rows[:1])):
        (tmp_path / "gsm8k" / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in own))
    for seed in range(8):
        problems = load_problems("gsm8k", data_root=str(tmp_path), few_shot=3, seed=seed, chat=chat)
        shown = str(problems.turns) + problems.texts[0].context
        assert "are 0?" not in shown
        assert all(f"are {i}?" in shown for i in (1, 2, 3))
