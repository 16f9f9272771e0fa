"""Scores of judges, by values worked out by hand; and what a served judge is asked and how its reply is read."""

import math

import numpy as np
import pytest

from rtd_jax.eval.estimates import cohen_kappa, estimate, harmonic_mean
from rtd_jax.eval.judge.scores import agreement, score_verdicts
from rtd_jax.eval.judge.served import ServedJudgeFlags, Solution, prompt_for, read_index


def test_a_judge_is_scored_as_processbench_counts():
    # Of four right solutions three are kept, of two wrong ones one is found at its step.
    labels, verdicts = [-1, -1, -1, -1, 2, 0], [-1, -1, -1, 1, 2, -1]
    found = score_verdicts(labels, verdicts, range(6))
    assert found["accuracy_right"] == 75.0
    assert found["accuracy_right_stderr"] == pytest.approx(100 * 0.5 / math.sqrt(4))  # sd of 1, 1, 1, 0
    assert found["accuracy_wrong"] == 50.0
    assert found["f1"] == pytest.approx(60.0)  # 2 * 75 * 50 / 125
    assert (found["n_right"], found["n_wrong"], found["no_verdict"]) == (4, 2, 0)


def test_a_wrong_solution_called_wrong_at_another_step_is_not_found():
    assert score_verdicts([2, 2, -1], [1, 3, -1], range(3))["accuracy_wrong"] == 0.0


def test_no_verdict_is_a_wrong_one_and_is_counted():
    found = score_verdicts([-1, -1, 1, 1], [None, -1, None, 1], range(4))
    assert (found["accuracy_right"], found["accuracy_wrong"], found["no_verdict"]) == (50.0, 50.0, 2)


def test_what_has_no_solutions_is_none():
    found = score_verdicts([-1, -1], [-1, 0], range(2))
    assert (found["accuracy_right"], found["n_wrong"]) == (50.0, 0)
    assert {found[key] for key in ("accuracy_wrong", "accuracy_wrong_stderr", "f1", "f1_stderr")} == {None}


def test_solutions_of_one_problem_are_a_cluster():
    labels, verdicts = [-1] * 4 + [0] * 2, [-1, -1, 0, 0, 0, 1]
    alone = score_verdicts(labels, verdicts, range(6))
    pairs = score_verdicts(labels, verdicts, "aabbcd")
    assert pairs["accuracy_right"] == alone["accuracy_right"]
    assert pairs["accuracy_right_stderr"] == pytest.approx(50.0)  # sqrt(2 / 1 * (0.25^2 + 0.25^2)), two clusters
    assert alone["accuracy_right_stderr"] == pytest.approx(100 * math.sqrt(1 / 12))


def test_the_error_of_a_harmonic_mean_is_that_of_many_samples():
    rng = np.random.default_rng(0)

    def draw():
        return rng.random(100) < 0.9, rng.random(80) < 0.5

    groups = np.arange(100), np.arange(100, 180)
    means = [harmonic_mean(x, groups[0], y, groups[1]) for x, y in (draw() for _ in range(2000))]
    spread = float(np.std([mean.value for mean in means]))
    assert np.mean([mean.stderr for mean in means]) == pytest.approx(spread, rel=0.05)
    assert harmonic_mean([1, 0], [0, 1], [1, 0], [2, 3]).value == 0.5
    assert harmonic_mean([0, 0], [0, 1], [0, 0], [2, 3]).value == 0.0
    assert harmonic_mean([1, 0], [0, 1], [1], [2]).stderr is None


def test_kappa_is_agreement_beyond_chance():
    # 40 of 50 alike; chance gives 0.5 * 0.6 + 0.5 * 0.4 = 0.5: (0.8 - 0.5) / 0.5.
    first = [1] * 25 + [0] * 25
    second = [1] * 20 + [0] * 5 + [1] * 5 + [0] * 20
    found = cohen_kappa(first, second)
    assert found.value == pytest.approx(0.6)
    # Both marginals are one half, where the variance is (p (1 - p)) / (1 - e)^2 / n; here with n - 1.
    assert found.stderr == pytest.approx(math.sqrt(0.8 * 0.2 / 0.25 / 49))
    assert cohen_kappa(first, first).value == 1.0
    assert math.isnan(cohen_kappa([1, 1], [1, 1]).value)


def test_two_judges_are_compared_where_both_gave_a_verdict():
    found = agreement([-1, 0, 1, None, -1], [-1, 0, 2, 1, 0], range(5))
    assert (found["n"], found["no_verdict"]) == (4, 1)
    assert found["same_verdict"] == 50.0
    assert found["same_verdict_stderr"] == pytest.approx(100 * estimate([1, 1, 0, 0]).stderr)
    assert found["same_right"] == 75.0
    assert found["kappa"] == pytest.approx(0.5)  # by chance: 0.5 * 0.25 + 0.5 * 0.75
    nothing = agreement([None], [0], range(1))
    assert (nothing["n"], nothing["same_verdict"], nothing["kappa"]) == (0, None, None)


def test_the_prompt_has_every_step_between_its_tags_as_it_was_written():
    prompt = prompt_for(Solution("How many {x}?", [" First:\n2 + 2 = 4 ", r"So \boxed{4}."]))
    assert "[Problem]\n\nHow many {x}?\n\n[Solution]" in prompt
    tagged = "<paragraph_0>\nFirst:\n2 + 2 = 4\n</paragraph_0>\n\n<paragraph_1>\nSo \\boxed{4}.\n</paragraph_1>"
    assert tagged in prompt
    assert prompt.endswith(r"\boxed{}.")


@pytest.mark.parametrize(
    ("text", "index"),
    [
        (r"It adds up. \boxed{-1}", -1),
        (r"\boxed{1}", 1),
        (r"First \boxed{0}, but no: $\boxed{2}$.", 2),
        (r"\boxed{paragraph_1}", 1),
        (r"\boxed{<paragraph_1>}", 1),
        (r"\boxed{\text{-1}}", -1),
        ("\\boxed{\u22121}", -1),
        (r"<think>is it \boxed{0}?</think> \boxed{2}", 2),
        (r"<think>is it \boxed{0}?", None),
        (r"\boxed{3}", None),  # three steps are 0, 1 and 2
        (r"\boxed{-2}", None),
        (r"\boxed{1.5}", None),
        (r"\boxed{none}", None),
        (r"\boxed{" + "1" * 5000 + "}", None),
        ("The first wrong paragraph is 1.", None),
        ("", None),
    ],
)
def test_the_index_is_in_the_last_box(text, index):
    assert read_index(text, 3) == index


def test_a_server_that_judges_needs_a_model_and_a_model_a_server():
    with pytest.raises(ValueError, match="judge_model is empty; give the name"):
        ServedJudgeFlags().check_asked(True)
    with pytest.raises(ValueError, match="judge_model is 'm', but no server is to judge; add --judge=openai"):
        ServedJudgeFlags(judge_model="m").check_asked(False)
    with pytest.raises(ValueError, match=r"^judge_base_url is empty"):
        ServedJudgeFlags(judge_base_url="")
    with pytest.raises(ValueError, match=r"^judge_extra_body is '7'; expected a JSON object"):
        ServedJudgeFlags(judge_extra_body="7")
