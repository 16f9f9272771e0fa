"""The texts on a report's page: what a reader sees of each step's verdict, in a real browser too."""

import hashlib
import json

import pytest
from chromium import browser, open_page

from rtd_jax.apps.evaluate import EvaluateSettings, evaluate
from rtd_jax.apps.report.examples import examples, lines, served_verdict
from rtd_jax.apps.report.page import write_report
from rtd_jax.base.files import write_jsonl
from rtd_jax.data.trace import Trace
from rtd_jax.eval.chains import score_texts
from rtd_jax.eval.judged_texts import verdict_fields

EGGS = Trace.of_steps(
    "Ducks lay 16 eggs. 3 are eaten, 4 are baked. The others are sold at $2 each. For how much?",
    ("16 - 3 - 4 = <<16-3-4=9>>9 eggs are sold.", "9 * 2 = <<9*2=18>>18 dollars."),
    "18",
    "#### 18",
)
WRONG = "Let us <b>see</b>.\n16 - 3 - 4 = 10 eggs.\n10 * 2 = $20.\n#### 20"
RIGHT = "We count the eggs.\n16 - 3 - 4 = 9\n9 * 2 = 18\n#### 18"
PROSE = "Eggs that are left:\n\\[ 16 - 3 - 4 = 9 \\]\n\nThey bring 9 * 2 = 19 dollars, so \\boxed{19}."


def record(text, trace=EGGS):
    return score_texts([trace], [[text]])[0]


def shown(text, trace=EGGS):
    """(verdict, reason) of each line that the page shows."""
    return [(line.verdict, line.reason) for line in lines(record(text, trace))]


def test_every_step_and_the_answer_line_have_a_verdict_and_wrong_ones_a_reason():
    assert shown(WRONG) == [
        ("– concludes nothing", ""),
        ("✗ first wrong step", "16 - 3 - 4 = 10 is 9"),
        ("✗ wrong step", "20 is not on a way to the answer (10 * 2 = $20)"),
        ("✗ wrong answer", "20 is not on a way to the answer"),
    ]
    assert shown(RIGHT) == [
        ("– concludes nothing", ""),
        ("✓ right step", ""),
        ("✓ right step", ""),
        ("✓ right answer", ""),
    ]


def test_prose_has_its_answer_in_a_step_and_keeps_its_lines(tmp_path):
    found = lines(record(PROSE))
    assert [line.verdict for line in found] == ["✓ right step", "✗ first wrong step"]
    assert found[0].text == "Eggs that are left:\n\\[ 16 - 3 - 4 = 9 \\]"
    page = write_report(tmp_path, {"title": "t"}, [record(PROSE)]).read_text(encoding="utf-8")
    assert f'<span class="step">{found[0].text}</span>' in page


def test_a_chain_that_no_arithmetic_decides_has_a_verdict_on_its_answer_only():
    trace = Trace.of_steps("Do cats purr?", ("Cats purr.",), "yes", "#### yes")
    assert shown("They do.\n#### yes", trace) == [("", ""), ("✓ right answer", "")]
    assert shown("They bark.\n#### no", trace) == [("", ""), ("✗ wrong answer", "")]
    (_, missing) = lines(record("They do.", trace))
    assert (missing.text, missing.kind) == ("(no answer line)", "wrong")


def test_a_right_answer_of_a_wrong_chain_is_said_to_be_right():
    (example,) = examples([record("16 - 3 - 4 = 10\n9 * 2 = 18\n#### 18")])
    assert example["label"] == "problem 0 · 2 steps · wrong, but the answer is right"
    assert example["lines"][-1].verdict == "✓ right answer"


def test_the_page_escapes_what_a_model_wrote(tmp_path):
    page = write_report(tmp_path, {"title": "t"}, [record(WRONG), record("<i>16</i> = <17>\n#### 17")]).read_text()
    assert "<b>" not in page
    assert "Let us &lt;b&gt;see&lt;/b&gt;." in page
    assert "<i>" not in page


def test_records_of_earlier_versions_still_make_a_page(tmp_path):
    old = {"prompt": "p", "reference": ["a"], "answer": "1", "completions": ["b", "c"], "final": "", "depth": 1}
    old |= {"first_error": 1, "model": "m", "problem": 0, "sample": 0, "correct": False}
    found = lines(old)
    assert [line.text for line in found] == ["b", "c", "(no answer line)"]
    assert [(line.kind, line.verdict) for line in found] == [("", ""), ("wrong", "✗ first wrong step"), ("after", "")]
    assert [line.kind for line in lines(old | {"first_error": -1, "final": "#### 1"})] == ["", "", ""]
    assert "m · 1 step · wrong" in write_report(tmp_path, {"title": "t"}, [old]).read_text()


@pytest.mark.parametrize(
    ("first", "said"),
    [
        (-1, "no wrong step, but the answer is wrong."),
        (1, "the first wrong step is step 2."),
        (3, "the first wrong step is the answer."),
        (None, "no verdict."),
    ],
)
def test_a_served_judge_is_quoted_in_a_line(tmp_path, first, said):
    text = record(WRONG)
    assert served_verdict(text) == ""
    digest = hashlib.sha256(WRONG.encode()).hexdigest()[:16]
    text |= verdict_fields(text, {"judged_by": "big", "judged_text": digest, "judged_first_error": first})
    page = write_report(tmp_path, {"title": "t"}, [text]).read_text()
    assert f'<p class="served">Served judge big: {said}</p>' in page


def test_problems_that_are_asked_for_come_first_with_all_their_texts():
    records = [
        {**record(text), "problem": problem, "model": model}
        for model in "ab"
        for problem, text in enumerate([WRONG, RIGHT, WRONG, RIGHT, RIGHT])
    ]
    names = [(example["problem"], example["model"]) for example in examples(records, (3, 0))]
    assert names[:4] == [(3, "a"), (3, "b"), (0, "a"), (0, "b")]
    assert len(set(names)) == len(names)
    assert set(names[4:]) <= {(r["problem"], r["model"]) for r in examples(records)}


def rows_file(folder):
    rows = [
        {"prompt": EGGS.prompt, "reference": list(EGGS.steps), "answer": "18", "text": text, "problem": i}
        for i, text in enumerate([WRONG, RIGHT, PROSE])
    ]
    write_jsonl(folder / "rows.jsonl", rows)
    return str(folder / "rows.jsonl")


def test_show_is_checked_against_the_number_of_problems(tmp_path):
    path, out = rows_file(tmp_path), tmp_path / "out"
    with pytest.raises(ValueError, match="show is 3; expected numbers from 0 and below 3, the number of problems"):
        evaluate(EvaluateSettings(generations=path, out=str(out), show=(1, 3)))
    assert not (out / "report.json").exists()
    choice = {"prompt": "q", "choices": ["a", "b"], "answer": 1, "log_likelihoods": [-1, -2]}
    write_jsonl(tmp_path / "choices.jsonl", [choice])
    with pytest.raises(ValueError, match="choices have no steps to show"):
        evaluate(EvaluateSettings(generations=str(tmp_path / "choices.jsonl"), out=str(out), show=(0,)))
    with pytest.raises(ValueError, match=r"show\[0\] is -1; expected 0 to"):
        EvaluateSettings(generations=path, show=(-1,))
    with pytest.raises(ValueError, match=r"show is \(2, 2\); expected each value once"):
        EvaluateSettings(generations=path, show=(2, 2))


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_verdicts_show_in_a_browser(tmp_path, scheme):
    """What is seen says right or wrong in words, in text that is legible in both schemes (WCAG AA: contrast 4.5)."""
    out = tmp_path / "out"
    evaluate(EvaluateSettings(generations=rows_file(tmp_path), out=str(out), show=(2,)))
    with browser(scheme) as window:
        page = open_page(window, out / "report.html")
        window.set_window_size(500, 900)
        narrow, seen, contrasts = window.execute_script(
            """
            const rgb = text => text.match(/[\\d.]+/g).map(Number);
            const light = text => rgb(text).slice(0, 3).map(x => x / 255)
              .map(x => x <= 0.04045 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4)
              .reduce((sum, x, i) => sum + x * [0.2126, 0.7152, 0.0722][i], 0);
            const behind = x => { const c = getComputedStyle(x).backgroundColor;
              return rgb(c)[3] === 0 ? behind(x.parentElement) : c; };
            const contrast = x => { const [a, b] = [light(getComputedStyle(x).color), light(behind(x))];
              return (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05); };
            const chains = [...document.querySelectorAll('article.chain')];
            return [document.documentElement.scrollWidth - document.documentElement.clientWidth,
              chains.map(x => [...x.querySelectorAll('.cols > div:last-child li')].map(x => x.innerText)),
              [...document.querySelectorAll('.chain .said, .chain .reason, .chain .step')].map(contrast)];
            """
        )
    assert (page["console"], page["outside"]) == ([], [])
    assert page["overflow"] <= 0
    assert narrow <= 0
    assert seen[0] == [
        "Eggs that are left:\n\\[ 16 - 3 - 4 = 9 \\]✓ right step",
        "They bring 9 * 2 = 19 dollars, so \\boxed{19}.\n✗ first wrong step: 9 * 2 = 19 is 18",
    ]
    assert "16 - 3 - 4 = 10 eggs.\n✗ first wrong step: 16 - 3 - 4 = 10 is 9" in seen[1]
    assert "#### 18✓ right answer" in seen[2]
    assert min(contrasts) >= 4.5, json.dumps(contrasts)
