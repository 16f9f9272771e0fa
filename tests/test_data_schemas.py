"""Row schemas: expected traces are written by hand, or counted from the published files."""

import dataclasses
import json
from pathlib import Path

import pytest

from rtd_jax.data import schemas
from rtd_jax.data.schemas import SCHEMAS
from rtd_jax.data.schemas.arc import choices_from_arc, from_arc
from rtd_jax.data.schemas.gsm8k import from_gsm8k
from rtd_jax.data.schemas.math import boxed, from_math
from rtd_jax.data.schemas.prose import from_prose
from rtd_jax.data.schemas.stepwise import from_stepwise
from rtd_jax.data.schemas.strategyqa import from_strategyqa
from rtd_jax.data.sources import SourceSettings
from rtd_jax.data.trace import Trace

GSM8K_ROW = {
    "question": " How many? ",
    "answer": "She sold 48/2 = <<48/2=24>>24 clips.\n\nIn all 48+24 = <<48+24=72>>72.\n#### 72",
}
ARC_ROW = {
    "question": "Which burns?",
    "choices": {"text": ["stone", "wood", "sand"], "label": ["1", "2", "3"]},
    "answerKey": "2",
    "reasoning": "Stone and sand are minerals.\nWood is organic.",
}


def test_every_schema_is_a_file_that_is_listed():
    files = {path.stem for path in Path(schemas.__path__[0]).glob("*.py")} - {"__init__", "schema"}
    assert set(SCHEMAS) == files
    settings = {field.name for field in dataclasses.fields(SourceSettings)}
    for schema in SCHEMAS.values():
        assert schema.trace or schema.labelled
        assert set(schema.options) <= settings


def test_gsm8k():
    trace = from_gsm8k(GSM8K_ROW, "train.jsonl:1")
    assert trace == Trace.of_steps(
        "How many?",
        ("She sold 48/2 = <<48/2=24>>24 clips.", "In all 48+24 = <<48+24=72>>72."),
        "72",
        "#### 72",
        "train.jsonl:1",
    )
    assert trace.depth == 2
    assert trace.completion == "\n".join([*trace.steps, "#### 72"])


def test_gsm8k_without_marks():
    assert from_gsm8k(GSM8K_ROW, keep_marks=False).steps == ("She sold 48/2 = 24 clips.", "In all 48+24 = 72.")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"question": "q"}, r"test.jsonl:7: field 'answer' is missing; the row has \['question'\]"),
        ({"answer": "a\n#### 1"}, "test.jsonl:7: field 'question' is missing"),
        ({"question": "q", "answer": "#### 1"}, "test.jsonl:7: the chain is empty"),
        ({"question": "q", "answer": "one\ntwo"}, "test.jsonl:7: the last line of 'answer' is 'two'"),
        ({"question": "q", "answer": ""}, "test.jsonl:7: the last line of 'answer' is ''"),
        ({"question": "q", "answer": 72}, "test.jsonl:7: field 'answer' is 72; expected text"),
        ({"question": " ", "answer": "a\n#### 1"}, "test.jsonl:7: the prompt is empty"),
    ],
)
def test_gsm8k_bad_rows_are_named(row, message):
    with pytest.raises(ValueError, match=message):
        from_gsm8k(row, "test.jsonl:7")


def test_gsm8k_published_files(shared_data):
    # Step counts of the test split as its source lists them (non-empty lines before ####).
    rows = [json.loads(line) for line in (shared_data / "gsm8k" / "test.jsonl").open()]
    depths = [from_gsm8k(row).depth for row in rows]
    counts = {depth: depths.count(depth) for depth in sorted(set(depths))}
    assert counts == {2: 326, 3: 371, 4: 297, 5: 175, 6: 87, 7: 40, 8: 20, 9: 2, 11: 1}


@pytest.mark.parametrize(
    ("solution", "answer"),
    [
        (r"So $x = \boxed{5}$.", "5"),
        (r"First \boxed{1}, in fact \boxed{\frac{1}{2}}.", r"\frac{1}{2}"),
        (r"The set is $\boxed{\left\{1, \{2\}\right\}}$.", r"\left\{1, \{2\}\right\}"),
        (r"Hence $\boxed{\text{(A)} \sqrt{3}^{2}}$", r"\text{(A)} \sqrt{3}^{2}"),
        (r"We get $\boxed 7$ at last.", "7"),
        (r"An older form: \fbox{12}", "12"),
    ],
)
def test_boxed_answers(solution, answer):
    assert boxed(solution) == answer


@pytest.mark.parametrize(
    "solution", ["The answer is 5.", r"Then \boxed{\frac{1}{2}", r"Cut off at \boxed", r"Empty $\boxed$."]
)
def test_boxed_missing_or_unbalanced(solution):
    with pytest.raises(ValueError, match=r"math.jsonl:3: .*\\boxed"):
        boxed(solution, "math.jsonl:3")


def test_math_steps_are_sentences_outside_formulas():
    solution = (
        "Let $x. Y$ be given. Then\n\\[x = 1. \\\\\n Y = 2.\\]\nWe add 1.5 and 2. So $z = 3. $\n\n"
        "Therefore $\\boxed{3}$."
    )
    row = {"problem": "Find z.", "level": "Level 4", "type": "Algebra", "solution": solution}
    trace = from_math(row)
    assert trace.steps == (
        "Let $x. Y$ be given.",
        "Then",
        r"\[x = 1. \\ Y = 2.\]",
        "We add 1.5 and 2.",
        "So $z = 3. $",
        r"Therefore $\boxed{3}$.",
    )
    assert trace.answer == "3"
    assert trace.final == ""
    assert trace.completion == "\n".join(trace.steps)


def test_math_keeps_an_environment_whole():
    row = {
        "problem": "p",
        "solution": "We have \\begin{align*}\na &= 1. \\\\\nB &= 2.\n\\end{align*} Now: \\$5. Hence \\boxed{2}.",
    }
    assert from_math(row).steps == (
        r"We have \begin{align*} a &= 1. \\ B &= 2. \end{align*} Now: \$5.",
        r"Hence \boxed{2}.",
    )


def test_strategyqa_pairs_questions_with_facts_where_there_are_as_many():
    row = {"question": "Can a cow fly?", "answer": False, "decomposition": ["Has it wings?", "Is #1 yes?"]}
    row["facts"] = ["No.", "n"]
    trace = from_strategyqa(row)
    assert trace.steps == ("Has it wings? No.", "Is #1 yes? n")
    assert (trace.answer, trace.final) == ("no", "#### no")


def test_strategyqa_puts_facts_first_otherwise():
    row = {"question": "q?", "answer": True, "decomposition": ["a?", "b?"], "facts": ["f."]}
    assert from_strategyqa(row).steps == ("f.", "a?", "b?")
    assert from_strategyqa(row).answer == "yes"


def test_strategyqa_bad_answer_and_published_file(shared_data):
    for answer in ("yes", "False", 0, 1, None):
        with pytest.raises(ValueError, match=f"row:1: field 'answer' is {answer!r}; expected true or false"):
            from_strategyqa({"question": "q", "answer": answer, "decomposition": ["a"], "facts": ["b"]}, "row:1")
    rows = [json.loads(line) for line in (shared_data / "strategyqa" / "train.jsonl").open()]
    answers = [from_strategyqa(row).answer for row in rows]
    assert (answers.count("yes"), answers.count("no")) == (1071, 1219)


def test_arc_numeric_labels_become_letters():
    trace = from_arc(ARC_ROW)
    assert trace.prompt == "Which burns?\nA. stone\nB. wood\nC. sand"
    assert trace.steps == ("Stone and sand are minerals.", "Wood is organic.")
    assert (trace.answer, trace.final) == ("B", "#### B")
    assert from_arc({**ARC_ROW, "reasoning": ["One\n step.", "Two."]}).steps == ("One step.", "Two.")
    assert from_arc({**ARC_ROW, "why": "x"}, reasoning_field="why").steps == ("x",)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"answerKey": "D"}, r"answerKey 'D' is not among the labels \['1', '2', '3'\]"),
        ({"reasoning": None}, "field 'reasoning' is None; ARC itself has no reasoning"),
        ({"reasoning": []}, "field 'reasoning' is an empty list"),
        ({"reasoning": " \n"}, "the chain is empty"),
        ({"choices": ["stone"]}, "field 'choices' is"),
        ({"choices": {"text": ["a", "b"], "label": ["A"]}}, "2 choice texts and 1 labels"),
    ],
)
def test_arc_bad_rows_are_named(change, message):
    with pytest.raises(ValueError, match=f"arc.jsonl:2: .*{message}|arc.jsonl:2: {message}"):
        from_arc({**ARC_ROW, **change}, "arc.jsonl:2")


def test_arc_published_files(shared_data):
    # Real questions with 3 and 5 choices and with labels 1-4, given reasoning made up here.
    rows = [json.loads(line) for line in (shared_data / "arc_challenge" / "test.jsonl").open()]
    assert {len(row["choices"]["label"]) for row in rows} >= {3, 4, 5}
    numeric = [row for row in rows if row["choices"]["label"][0] == "1"]
    assert len(numeric) == 22
    for row in rows:
        letter = from_arc({**row, "reasoning": "Because."}).answer
        assert row["choices"]["label"].index(row["answerKey"]) == "ABCDE".index(letter)


def test_stepwise():
    row = {"prompt": "p", "completions": ["a\n b", "c"], "labels": [True, True], "answer": 4}
    assert from_stepwise(row) == Trace.of_steps("p", ("a b", "c"), "4", "#### 4", "row")


def test_stepwise_ends_before_the_first_wrong_step():
    row = {"prompt": "p", "completions": ["a", "b", "c"], "labels": [True, False, True], "answer": "4"}
    assert from_stepwise(row) == Trace.of_steps("p", ("a",), "", "", "row")


def test_stepwise_keeps_steps_that_nobody_judged():
    row = {"prompt": "p", "completions": ["a", "b", "c"], "answer": "4"}
    assert from_stepwise(row | {"labels": [True, None, None]}) == from_stepwise(row)
    assert from_stepwise(row | {"labels": [None, False, None]}).steps == ("a",)


def test_stepwise_without_an_answer_has_no_answer_line():
    for answer in ({}, {"answer": None}, {"answer": ""}, {"answer": " \n"}):
        trace = from_stepwise({"prompt": "p", "completions": ["so 4"]} | answer)
        assert (trace.answer, trace.final) == ("", "")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"completions": []}, "field 'completions' is an empty list"),
        ({"completions": "a"}, "expected a list of texts"),
        ({"completions": ["a", " "]}, "step 2 of 2 is blank"),
        ({"labels": [True]}, "expected one label for each of the 2 steps"),
        ({"labels": [False, True]}, "its first step is labelled wrong"),
        ({"labels": [1, -1]}, "label 1 is 1; expected true, false or null"),
        ({"labels": [1, 0]}, "label 1 is 1; expected true, false or null"),
        ({"labels": [True, 0.0]}, "label 2 is 0.0; expected true, false or null"),
        ({"labels": ["True", "False"]}, "label 1 is 'True'; expected true, false or null"),
        ({"labels": ["+", "-"]}, r"label 1 is '\+'; expected true, false or null"),
        ({"labels": [True, []]}, r"label 2 is \[\]; expected true, false or null"),
        ({"labels": "TF"}, "expected one label for each of the 2 steps"),
        ({"answer": True}, "field 'answer' is True; expected text or a number"),
        ({"answer": float("nan")}, "field 'answer' is nan; expected text or a number"),
        ({"answer": ["1"]}, r"field 'answer' is \['1'\]; expected text or a number"),
        ({"prompt": None}, "field 'prompt' is missing"),
    ],
)
def test_stepwise_bad_rows_are_named(change, message):
    with pytest.raises(ValueError, match=f"s.jsonl:9: .*{message}"):
        from_stepwise({"prompt": "p", "completions": ["a", "b"], **change}, "s.jsonl:9")


def test_math_rows_have_a_subject_and_a_level():
    row = {"problem": "p", "level": "Level 4", "type": "Geometry", "solution": r"It is $\boxed{1}$."}
    trace = from_math(row)
    assert (trace.subject, trace.level) == ("Geometry", 4)
    assert from_math(row | {"level": "Level ?"}).level == 0  # two published rows have it
    assert from_math({"problem": "p", "solution": r"\boxed{1}"}) == Trace.of_steps("p", (r"\boxed{1}",), "1", "", "row")
    for level in (5, 5.0, "5", "5.0", "Level 5", "Level 5.0", "level 5", "Level  5"):
        assert from_math(row | {"level": level}).level == 5
    for level in (None, float("nan"), "hard", ""):
        assert from_math(row | {"level": level}).level == 0
    for level in (True, 2.5, 7, 0, [5], "7", "Level 0"):
        with pytest.raises(ValueError, match=r"m.jsonl:2: field 'level' is .*; expected 1 to 5, 'Level 5', or null"):
            from_math(row | {"level": level}, "m.jsonl:2")
    assert from_math(row | {"type": None, "subject": "Algebra"}).subject == "Algebra"
    with pytest.raises(ValueError, match=r"m.jsonl:2: field 'type' is \['x'\]; expected text"):
        from_math(row | {"type": ["x"]}, "m.jsonl:2")


def test_choices_keep_the_row_s_order_and_text():
    row = {"question": " Which? ", "choices": {"text": ["x", " y", "z"], "label": ["1", "2", "3"]}, "answerKey": "3"}
    asked = choices_from_arc(row, "test.jsonl:7")
    assert (asked.question, asked.choices, asked.answer) == (" Which? ", ("x", " y", "z"), 2)
    with pytest.raises(ValueError, match=r"test.jsonl:7: answerKey 'D' is not among the labels"):
        choices_from_arc(row | {"answerKey": "D"}, "test.jsonl:7")
    for text in (" ", None, True, float("nan"), ["x"]):
        with pytest.raises(ValueError, match="a choice is blank or no text"):
            choices_from_arc(row | {"choices": {"text": ["x", text, "z"], "label": ["1", "2", "3"]}})
    with pytest.raises(ValueError, match=r"the labels of the choices are .*; expected another one for each"):
        choices_from_arc(row | {"choices": {"text": ["x", "y"], "label": ["3", "3"]}})
    with pytest.raises(ValueError, match="field 'choices' is"):
        choices_from_arc(row | {"choices": {"text": "xyz", "label": "123"}})
    numbers = row | {"choices": {"text": [1, 2.5, "3"], "label": [1, 2, 3]}, "answerKey": 2}
    assert (choices_from_arc(numbers).choices, choices_from_arc(numbers).answer) == (("1", "2.5", "3"), 1)


def test_rows_of_prose():
    assert from_prose({"prompt": "p", "text": "One.\nTwo.\n#### 7"}) == Trace.of_steps(
        "p", ("One.", "Two."), "7", "#### 7", "row"
    )
    paragraphs = from_prose({"prompt": "p", "text": "One is:\n\\[1 = 1\\]\n\nTwo.\n\n#### 7"})
    assert paragraphs.steps == ("One is:\n\\[1 = 1\\]", "Two.")  # the text itself stays as it was laid out
    assert paragraphs.completion == "One is:\n\\[1 = 1\\]\n\nTwo.\n#### 7"
    assert from_prose({"prompt": "p", "text": " One.\nTwo. ", "answer": 3}).completion == "One.\nTwo.\n#### 3"
    assert from_prose({"prompt": "p", "text": "One."}).final == ""
    for answer in (None, "", " "):  # a table gives every row an answer, if it has one anywhere
        assert from_prose({"prompt": "p", "text": "One.\n#### 7", "answer": answer}).final == "#### 7"
    with pytest.raises(ValueError, match="expected a chain of reasoning"):
        from_prose({"prompt": "p", "text": "#### 7"})
