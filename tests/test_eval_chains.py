"""Chain scores, estimates by depth and step spans, against results worked by hand."""

import json
import math

import numpy as np
import pytest

from rtd_jax.data.schemas.gsm8k import from_gsm8k
from rtd_jax.data.trace import Trace
from rtd_jax.eval.chains import score_chain, split_solution
from rtd_jax.eval.estimates import by_depth, depth_key, difference, estimate, perplexity_estimate
from rtd_jax.eval.metrics import independent_chain_accuracy
from rtd_jax.eval.reference import scored_spans, tokens_in_spans
from rtd_jax.eval.scored import ScoredTexts

TRACE = Trace.of_steps("q", ("48/2 = <<48/2=24>>24 clips.", "48+24 = <<48+24=72>>72 in all."), "72", "#### 72")


@pytest.mark.parametrize(
    ("text", "exact", "first_error", "steps"),
    [
        ("24 clips\n72 in all\n#### 72", True, -1, 2),
        ("<<48/2=24>>24.0\n\n  Then, nothing to see.\n72\n#### 72", True, -1, 3),  # a line without a number is skipped
        ("24\n72\n#### 72\nQuestion: 5 + 5?\n#### 10", True, -1, 2),  # runs on after the answer
        # Right by the judge, but not the reference's results in their places.
        ("72\n#### 72", False, -1, 1),
        ("48 * 1.5 = 72\n#### 72", False, -1, 1),
        ("72\n24\n#### 72", False, -1, 2),
        ("24\n72\n72+1=73\n#### 72", False, -1, 3),
        ("48/2 = 23\n72\n#### 72", False, 0, 2),
        ("24\n48+24 = 71\n#### 72", False, 1, 2),
        ("24\n72\n#### 71", False, 2, 2),  # steps right, answer wrong
        ("24\n48+24+1 = 73\n#### 73", False, 1, 2),
        ("", False, 0, 0),
    ],
)
def test_the_judge_and_the_letter_of_the_reference(text, exact, first_error, steps):
    score = score_chain(text, TRACE)
    assert (score["chain_exact"], score["first_error"], len(split_solution(text)[0])) == (exact, first_error, steps)
    assert score["correct"] == (first_error < 0)
    assert len(score["verdicts"]) == len(score["reasons"]) == steps + ("####" in text)
    assert score["steps_right"] == [verdict for verdict in score["verdicts"][:steps] if verdict is not None]


def test_prose_without_an_answer_line_is_cut_into_its_steps():
    text = (
        "Let's solve it step by step.\n\nHalf of them:\n\\[ \\frac{48}{2} = 24 \\]\n\n"
        "In all 48 + 24 = 72 clips.\n\nThe answer is \\(\\boxed{72}\\)."
    )
    score = score_chain(text, TRACE)
    assert score["correct"]
    assert len(score["completions"]) == 2
    assert score["completions"][1].startswith("In all")
    assert score["verdicts"] == [True, True]
    assert not score["chain_exact"]


def test_a_text_that_was_cut_off_has_to_state_its_answer():
    assert score_chain("24\n72", TRACE)["correct"]
    cut = score_chain("24\n72", TRACE, finished=False)
    assert not cut["correct"]
    assert cut["reasons"][cut["first_error"]] == "the answer is 72, not stated"
    assert score_chain("24\n72\n#### 72", TRACE, finished=False)["correct"]


def test_a_reference_without_an_answer_is_followed_to_the_letter():
    trace = Trace.of_steps("q", ("48/2 = 24", "48+24 = 72"), "")
    assert score_chain("24\n72", trace)["correct"]
    assert score_chain("23\n72", trace)["first_error"] == 0


def test_answer_may_be_right_while_the_chain_is_wrong():
    score = score_chain("1+1=3\n2\n#### 72", TRACE)
    assert (score["answer_strict"], score["answer_flexible"], score["correct"]) == (True, True, False)
    unstated = score_chain("24\n72", TRACE)
    assert (unstated["answer_strict"], unstated["answer_flexible"]) == (False, True)


def test_prose_chains_are_as_right_as_their_answer():
    trace = Trace.of_steps("q", ("The battle was in 1066.", "Phones came 800 years later."), "no", "#### no")
    assert score_chain("Nobody had phones.\n#### no", trace)["correct"]
    assert score_chain("Nobody had phones.\n#### yes", trace)["first_error"] == 1


def test_split_solution_drops_blank_lines():
    assert split_solution(" a \n\nb\n####  3\nc") == (["a", "b"], "####  3")
    assert split_solution("a\nb") == (["a", "b"], "")


def test_estimate_is_the_sample_deviation_over_root_n():
    # 1, 0, 0, 1: mean 1/2, sample variance (4 * 1/4) / 3 = 1/3, stderr sqrt(1/3) / 2
    result = estimate([1, 0, 0, 1])
    assert result.value == 0.5
    assert result.stderr == pytest.approx(math.sqrt(1 / 3) / 2)
    assert result.n == 4
    assert estimate([1]).error_row() == {"mean": 1.0, "stderr": None, "n": 1}
    with pytest.raises(ValueError, match="at least one value"):
        estimate([])


def test_clusters_widen_the_error_of_values_that_move_together():
    # Two chains of two equal steps carry the information of two values: 1, 0 -> sd sqrt(1/2), over root 2 = 1/2.
    assert estimate([1, 1, 0, 0], clusters=[7, 7, 3, 3]).stderr == pytest.approx(0.5)
    assert estimate([1, 1, 0, 0], clusters=[0, 1, 2, 3]) == estimate([1, 1, 0, 0])


def test_depth_buckets():
    assert [depth_key(d, 5) for d in (1, 4, 5, 9)] == ["1", "4", "5+", "5+"]
    assert depth_key(9, None) == "9"
    table = by_depth([1, 0, 1, 1], [10, 1, 5, 1], open_from=5)
    assert list(table) == ["1", "5+", "all"]
    assert table["5+"].error_row() == {"mean": 1.0, "stderr": 0.0, "n": 2}
    assert table["1"].value == 0.5
    assert table["all"].error_row() == {"mean": 0.75, "stderr": pytest.approx(0.25), "n": 4}
    assert list(by_depth([1, 0], [10, 2])) == ["2", "10", "all"]
    assert by_depth([], []) == {}
    with pytest.raises(ValueError, match="2 values but 1 depths"):
        by_depth([1, 0], [1])


def test_scored_tokens_are_those_that_cover_the_result():
    steps = ["a=<<1+2=3>>3.", "no number"]
    text = "Q " + "\n".join(steps)
    spans = scored_spans(steps, [2, 2 + len(steps[0]) + 1])
    assert [text[slice(*span)] for span in spans] == ["3", "no number"]
    #            "Q "    "a=<<1+2" "=3"     ">>3."    "\n"      "no"      " number"
    offsets = [(0, 2), (2, 9), (9, 11), (11, 15), (15, 16), (16, 18), (18, 25)]
    tokens = tokens_in_spans([(0, 0), *offsets], spans)  # a bos token covers nothing
    assert [t.tolist() for t in tokens] == [[3], [6, 7]]
    with pytest.raises(ValueError, match="no token covers characters 30 to 31"):
        tokens_in_spans(offsets, [(30, 31)])


def independent(right, depths, open_from=None, problems=None):
    columns = zip(right, depths, problems or range(len(right)), strict=True)
    records = [{"right": steps, "depth": depth, "problem": problem} for steps, depth, problem in columns]
    return independent_chain_accuracy(ScoredTexts(records, open_from), "right")


def test_independent_errors_compound():
    # The article's example: 92% of steps give 72% of four-step chains.
    found = independent([[1] * 23 + [0] * 2], [4], 4)
    assert found.keys() == {"4+"}
    assert found["4+"].error_row() == {"mean": pytest.approx(0.7164, abs=1e-4), "stderr": None, "n": 1}
    both = independent([[1] * 12, [1] * 11 + [0] * 2], [4, 5], 4)
    assert both["4+"].value == pytest.approx((0.92**4 + 0.92**5) / 2)
    assert independent([[], [1]], [1, 2], 4).keys() == {"2"}  # the first has nothing to compare


def test_standard_error_of_step_accuracy_to_the_depth():
    # a = 3/4 of steps, a^2 = 9/16. stderr of a, by chains: residual sums are 1/2 and -1/2, over 4: 1/4. Times 2 a.
    found = independent([[1, 1], [1, 0]], [2, 2])
    assert found["2"].error_row() == {"mean": 9 / 16, "stderr": pytest.approx(2 * 3 / 4 * 1 / 4), "n": 2}
    # Two samples of one problem that make up for each other leave nothing to vary between problems.
    found = independent([[1, 1], [1, 0], [1, 0], [1, 1]], [2] * 4, problems=[0, 0, 1, 1])
    assert found["2"].stderr == pytest.approx(0.0)


def test_standard_error_of_perplexity():
    # 6 nats over 4 tokens; residuals 2 - 1.5 * 2 = -1 and 4 - 1.5 * 2 = 1, over 4: sqrt(2 * (1/16 + 1/16)) = 1/2.
    found = perplexity_estimate([2.0, 4.0], [2, 2])
    assert found.error_row() == {"mean": pytest.approx(np.exp(1.5)), "stderr": pytest.approx(np.exp(1.5) / 2), "n": 2}
    assert perplexity_estimate([3.0, 6.0], [2, 4]).stderr == 0.0  # the same per token
    assert perplexity_estimate([3.0], [2]).stderr is None
    assert perplexity_estimate([800.0], [1]).value == math.inf


def test_standard_error_of_a_gap_knows_that_steps_and_chains_go_together():
    found = difference([1, 1], [0, 1], [1, 0], [0, 1])
    assert found.error_row() == {"mean": 0.5, "stderr": pytest.approx(0.5), "n": 2}
    assert difference([1, 0], [0, 1], [1, 0], [0, 1]).error_row() == {"mean": 0.0, "stderr": 0.0, "n": 2}


@pytest.mark.parametrize("keep_marks", [True, False])
def test_every_gsm8k_solution_is_right_by_its_own_measure(shared_data, keep_marks):
    lines = (shared_data / "gsm8k" / "test.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(lines) == 1319
    for i, line in enumerate(lines):
        trace = from_gsm8k(json.loads(line), f"test.jsonl:{i + 1}", keep_marks=keep_marks)
        score = score_chain(trace.completion, trace)
        assert (score["correct"], score["answer_strict"], score["answer_flexible"]) == (True, True, True), trace
