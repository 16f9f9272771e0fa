"""Statistics of the study against numbers worked by hand, its report, and a study of two tiny runs."""

import ast
import contextlib
import hashlib
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from configs import (
    rtd_8b,
    rtd_smollm2_sentences,
    rtd_tiny,
    study_8b,
    study_compression,
    study_curricula,
    study_on_policy,
    study_smollm2,
    study_states,
    study_tiny,
)
from rtd_jax.apps.compress.compress import CompressSettings
from rtd_jax.apps.report.sections import write_sections
from rtd_jax.apps.study import runner
from rtd_jax.apps.study.claims import (
    TaskRuns,
    component_gains,
    gains_by_depth,
    p_and_seeds,
    shares,
    smaller_gain,
    verdict,
)
from rtd_jax.apps.study.compressed import gains_left
from rtd_jax.apps.study.finished import read_outcome
from rtd_jax.apps.study.jobs import Group, Job, Preparation, groups_of
from rtd_jax.apps.study.recipe import Method, StudyRecipe
from rtd_jax.apps.study.report import markdown, study_report
from rtd_jax.apps.study.runner import prepare_once, run_jobs
from rtd_jax.apps.study.statistics import (
    Difference,
    Outcome,
    accuracy,
    difference,
    seeds_to_find,
    share_interval,
    share_of_gain_lost,
    solving_ratio,
    updates_to_solve,
)
from rtd_jax.apps.study.study import study as write_study
from rtd_jax.base.lock import locked
from rtd_jax.base.settings import build
from rtd_jax.eval.estimates import Estimate, over_seeds
from rtd_jax.models.schemes import Scheme
from rtd_jax.train.ensemble import NO_ENSEMBLE
from rtd_jax.train.recipe import Recipe

ROOT = Path(__file__).resolve().parents[1]


def outcome(method, seed, correct, depths=None):
    depths = np.array([1, 4] * (len(correct) // 2)) if depths is None else np.array(depths)
    return Outcome("task", method, seed, depths, np.array(correct, bool), None, 0.9, 1.1, 10, 5.0)


def everything(depths):
    return depths > 0


# All methods of the bundled study, and those of its conditions and grid.
METHODS = {
    **study_on_policy.on_policy(),
    **study_tiny.conditions(),
    **study_tiny.weight_grid(False),
    **study_tiny.methods(),
}


def reported(outcomes, methods=METHODS):
    """The report over runs of the study's methods."""
    names = ["kd", *dict.fromkeys(outcome.method for outcome in outcomes)]
    recipe = StudyRecipe("base", {"task": ()}, {name: methods[name] for name in names}, (0,))
    return study_report(recipe, outcomes)


def of_task(runs):
    return TaskRuns(runs, METHODS, "kd", 4)


def test_accuracy_is_the_mean_over_seeds_and_problems_of_the_depths_asked_for():
    runs = [outcome("kd", 0, [1, 0, 1, 0]), outcome("kd", 1, [1, 1, 1, 0])]
    assert accuracy(runs, everything).value == 5 / 8
    assert accuracy(runs, lambda depths: depths == 4).value == 1 / 4


def test_the_interval_covers_seeds_as_well_as_problems():
    """Seeds that disagree wholly: over problems alone the interval would have no width."""
    runs = [outcome("kd", seed, [seed % 2] * 40) for seed in range(4)]
    interval = accuracy(runs, everything)
    assert (interval.low, interval.high) == pytest.approx((0.0, 1.0))
    runs = [outcome("kd", seed, [1, 0] * 200) for seed in range(4)]  # and problems alone: mean 1/2, sd 1/2 of 400
    interval = accuracy(runs, everything)
    assert interval.high - interval.low == pytest.approx(2 * 1.96 * 0.5 / 400**0.5, rel=0.1)


def test_a_difference_is_paired_by_seed_and_tested_over_seeds():
    rng = np.random.default_rng(1)
    method = [outcome("rtd", seed, rng.random(50) < 0.8) for seed in range(5)]
    base = [outcome("kd", seed, rng.random(50) < 0.5) for seed in (4, 2, 3, 1, 0, 7)]
    found = difference(method, base, everything)
    by_seed = {run.seed: run.correct.mean() for run in base}
    per_seed = [run.correct.mean() - by_seed[run.seed] for run in method]
    assert found.value == pytest.approx(np.mean(per_seed))
    assert found.p_value == pytest.approx(
        stats.ttest_rel([r.correct.mean() for r in method], [by_seed[s] for s in range(5)])[1]
    )
    assert found.low < found.value < found.high
    assert found.n == 5
    assert difference(method, [outcome("kd", 9, [0] * 50)], everything) is None


@pytest.mark.parametrize(("effect", "seeds"), [(0.2, 199), (0.5, 34), (0.8, 15), (-1.0, 10), (1e-6, 1000), (200.0, 2)])
def test_seeds_that_would_tell_are_those_of_the_power_tables(effect, seeds):
    """Two-sided one-sample t-test at 5% and 80% power, as in Cohen's tables; spread 1, mean `effect`."""
    assert seeds_to_find(np.array([effect - 0.5**0.5, effect + 0.5**0.5])) == seeds


def test_a_difference_that_was_found_says_nothing_of_more_seeds():
    assert p_and_seeds(Difference(0.1, -0.1, 0.3, 5, p_value=0.2, seeds_needed=21)) == ("0.200", "21")
    assert p_and_seeds(Difference(0.1, -0.1, 0.3, 5, p_value=0.9, seeds_needed=1000)) == ("0.900", "1,000 or more")
    assert p_and_seeds(Difference(0.3, 0.1, 0.5, 5, p_value=0.01, seeds_needed=4)) == ("0.010", "")
    assert p_and_seeds(Difference(0.3, 0.1, 0.5, 1, p_value=None, seeds_needed=None)) == ("-", "")


def test_runs_on_different_problems_are_not_compared():
    with pytest.raises(ValueError, match="kd seed 1 was tested on other problems than seed 0"):
        accuracy([outcome("kd", 0, [1, 0]), outcome("kd", 1, [1, 0], depths=[1, 2])], everything)


def test_share_of_gain_and_verdicts():
    full, ablated, base = (Estimate(mean, 0, 1, 5) for mean in (0.8, 0.5, 0.4))
    assert share_of_gain_lost(full, ablated, base) == pytest.approx(0.75)
    assert share_of_gain_lost(base, ablated, full) is None
    good = [outcome("rtd", seed, [1] * 20) for seed in range(3)]
    bad = [outcome("kd", seed, [0] * 20) for seed in range(3)]
    assert verdict(difference(good, bad, everything)) == "agrees"
    assert verdict(difference(bad, good, everything)) == "disagrees"
    one = difference([outcome("rtd", 0, [1] * 20)], [outcome("kd", 0, [0] * 20)], everything)
    assert verdict(one) == "undecided"  # sure of these problems, not of another seed
    unclear = difference([outcome("rtd", 0, [1, 0] * 4)], [outcome("kd", 0, [0, 1] * 4)], everything)
    assert verdict(unclear) == verdict(None) == "undecided"


def test_a_share_of_the_gain_has_an_interval_where_there_is_a_gain():
    full = [outcome("rtd", seed, [1] * 40) for seed in range(4)]
    ablated = [outcome("no", seed, [1, 1, 1, 0] * 10) for seed in range(4)]
    base = [outcome("kd", seed, [1, 0] * 20) for seed in range(4)]
    low, high = share_interval(full, ablated, base, everything)
    assert low < 0.5 < high  # (1 - 0.75) / (1 - 0.5)
    assert share_interval(full, full, base, everything) == (0.0, 0.0)  # problems are drawn alike for all three
    assert share_interval(base, ablated, full, everything) is None  # no gain
    # One seed without a gain: the few draws that have nothing but this seed are no share of anything.
    lucky = [outcome("kd", 0, [1] * 40), *base[1:]]
    with np.errstate(all="raise"):
        assert share_interval(full, ablated, lucky, everything) is not None
    assert share_interval(full, ablated, [outcome("kd", 9, [1, 0] * 20)], everything) is None  # no common seed


def test_numbers_of_seeds_have_students_interval():
    found = over_seeds([1.0, 2.0, 3.0])
    assert (found.value, found.low, found.high) == pytest.approx((2.0, 2 - 4.302653 / 3**0.5, 2 + 4.302653 / 3**0.5))
    assert verdict(over_seeds([1.0])) == "undecided"  # one seed says nothing about others
    assert verdict(over_seeds([1.0, 1.1, 1.2])) == "agrees"


def drift(ckas, area):
    steps = [{"step": i, "cka_same_chains": x if x is None else {"value": x}} for i, x in enumerate([0.99, *ckas])]
    return {"steps": steps, "relation": {"next_step": {"auroc_within": {"value": area}}}}


def curve(*accuracies):
    numbered = enumerate(accuracies, start=1)
    return tuple({"update": 10 * i, "seconds": 2.0 * i, "chain_accuracy": {"all": x}} for i, x in numbered)


def study_runs():
    """kd, rtd and an ablation of it, three seeds each, with everything that a run can report."""
    kd = [
        replace(
            outcome("kd", seed, [1, 0] * 20),
            step_accuracy_by_depth={"1": 1.0, "4": 0.9 + seed / 100},
            perplexity=1.01 + seed / 1000,
            teacher_perplexity=1.0,
            curve=curve(0.2, 0.5),
            drift=drift((0.9, 0.6 + seed / 50, None), 0.5),
        )
        for seed in range(3)
    ]
    kd[0] = replace(kd[0], teacher_correct=np.array([1] * 40, bool))
    rtd = [
        replace(
            outcome("rtd", seed, [1, 1] * 20),
            drift=drift((0.9, 0.8), 0.7 + seed / 100),
            seconds=8.0 + seed / 10,
            curve=curve(0.1, 0.4, 0.9, 0.9),
        )
        for seed in range(3)
    ]
    ablated = [outcome("rtd_no_coherence", seed, [1, 1, 1, 0] * 10) for seed in range(3)]
    return kd, rtd, ablated


def test_the_report_says_what_was_found(tmp_path):
    kd, rtd, ablated = study_runs()
    report = reported([*kd, *rtd, *ablated])
    text, numbers = markdown(report), report.numbers
    assert (
        "| rtd | 3 | 100.0 [100, 100] | 100.0 [100, 100] | 100.0 [100, 100] | 100.0 [100, 100] | 100, 100, 100 |"
        in text
    )
    assert "| teacher |  | 100.0 [100, 100] |" in text
    assert "| 4 | +100.0 [+100.0, +100.0] | - | not in the article |" in text
    assert "| 4+ | +100.0 [+100.0, +100.0] | +18.7 | agrees |" in text
    claim = "RTD keeps more deep chains than logit matching"
    assert f"| {claim} | `rtd` - `kd` = +100.0 [+100.0, +100.0] | +18.7 | agrees |" in text
    of = {claim["claim"]: claim for claim in numbers["task"]["claims"]}
    # Steps at depth 4: 0.90, 0.91, 0.92 right, chains 0: 91 points, t(2) 4.303 x 0.01 / sqrt(3) = 2.5.
    gap = of["`kd`: single steps are right far more often than whole deep chains"]
    assert gap["found"] == "+91.0 [+88.5, +93.5]"
    assert gap["verdict"] == "agrees"
    assert of["`kd`'s perplexity is within 3% of the teacher's"]["verdict"] == "agrees"  # 1.0, 1.1, 1.2% above
    cost = of["RTD adds to the training time of KD"]
    assert cost["found"].startswith("+62.0%")  # 8.0, 8.1, 8.2 s against 5
    assert cost["verdict"] == "agrees"
    fall = next(found for name, found in of.items() if "falls from the first step" in name)
    assert fall["found"].startswith("0.280 [")  # 0.9 - (0.60, 0.62, 0.64)
    assert fall["verdict"] == "agrees"
    area = next(found for name, found in of.items() if "cosine of a transition" in name)
    assert area["found"].startswith("0.210 [")
    # When kd had finished, at 4 s, rtd stood at its second look; its curve settled at the third.
    assert "| rtd | 90.0 | 30 | 6 | 40.0 |" in text
    assert "| kd | 50.0 | 20 | 4 | 50.0 |" in text
    assert "| kd | 0.900 | 0.620 | 0.500 |" in text
    assert numbers["task"]["share_of_gain_lost"] == {"rtd_no_coherence": pytest.approx(0.5)}
    json.dumps(numbers, allow_nan=False)
    page = write_sections(tmp_path, report.title, report.intro, report.sections, report.pictures).read_text()
    assert page.count("<figure") == len(report.pictures) == 5
    assert next(iter(report.pictures[0].rows)) == "rtd"  # the largest difference to the baseline is at the top
    assert (tmp_path / "differences_task.png").stat().st_size > 1000
    assert f"<td>{claim}</td>" in page
    assert (tmp_path / "chains_task.png").stat().st_size > 1000


def solving(method, seed, *shares, every=100):
    """A run whose curve has these shares of its deep chains right, every 100 updates."""
    rows = [
        {"update": every * i, "seconds": 1.0, "chain_accuracy": {"1": 1.0, "4": x, "6": x, "all": 0.9}}
        for i, x in enumerate(shares, start=1)
    ]
    return replace(outcome(method, seed, [1, 0]), curve=tuple(rows))


def test_updates_to_solve_are_those_of_the_first_evaluation_with_the_share_and_censored_without():
    run = solving("kd", 0, 0.1, 0.5, 0.4, 0.9)
    assert [updates_to_solve(run, share, 4) for share in (0.1, 0.5, 0.9, 0.95)] == [100, 200, 400, math.inf]
    assert updates_to_solve(run, 0.93, 1) == 400  # with the shallow ones: 2.8 of 3
    assert updates_to_solve(run, 0.5, 7) is None  # nobody looked at such chains
    assert updates_to_solve(outcome("kd", 0, [1, 0]), 0.5, 4) is None


def test_the_ratio_of_updates_is_restricted_to_the_budget_and_the_sign_test_is_not():
    """Ratios 1/2, 1/4 and, of a baseline that never gets there, 200 to its 400 updates; the fourth pair is unsolved."""
    kd = [
        solving("kd", 0, 0, 1, 1, 1),
        solving("kd", 1, 0, 0, 0, 1),
        solving("kd", 2, 0, 0, 0, 0),
        solving("kd", 3, 0, 0, 0, 0),
    ]
    rtd = [
        solving("rtd", 0, 1, 1, 1, 1),
        solving("rtd", 1, 1, 1, 1, 1),
        solving("rtd", 2, 0, 1, 1, 1),
        solving("rtd", 3, 0, 0, 0, 0),
    ]
    found = solving_ratio(rtd, [*kd[::-1], solving("kd", 9, 1)], 0.5, 4)
    logarithms = np.log([1 / 2, 1 / 4, 1 / 2, 1])
    expected = over_seeds(logarithms)
    assert (found.value, found.low, found.high) == pytest.approx(
        tuple(np.exp([expected.value, expected.low, expected.high]))
    )
    assert (found.n, found.faster, found.slower, found.p_value) == (4, 3, 0, 0.25)  # 2 x (1/2)^3
    back = solving_ratio(kd, rtd, 0.5, 4)
    assert back.value == pytest.approx(1 / found.value)
    assert (back.faster, back.slower) == (0, 3)
    # A longer run is looked at only as long as the other was there: solved after 500 of its 600, it lost to 400.
    late = solving_ratio([solving("rtd", 1, 0, 0, 0, 0, 1, 1)], kd, 0.5, 4)
    assert (late.value, late.slower) == (1.0, 1)
    never = solving_ratio(kd[2:], rtd[3:], 0.5, 4)
    assert (never.value, never.n, never.p_value) == (1.0, 1, None)
    assert solving_ratio(kd, rtd[:0], 0.5, 4) is None


def test_the_report_has_updates_to_solve_where_the_recipe_asks_for_them():
    runs = [solving("kd", 0, 0, 1), solving("kd", 1, 0, 0), solving("rtd", 0, 1, 1), solving("rtd", 1, 1, 1)]
    recipe = StudyRecipe("base", {"task": ()}, {name: METHODS[name] for name in ("kd", "rtd")}, (0, 1))
    before = study_report(recipe, runs)
    assert "Updates until" not in markdown(before)
    assert "updates_to_solve" not in before.numbers["task"]
    asked = study_report(replace(recipe, solved_share=0.5), runs)
    text = markdown(asked)
    assert "### Updates until 50% of the validation chains of 4 steps and more are right" in text
    assert "| kd | 1 of 2 | more than 200 | - | - | - | - |" in text
    assert "| rtd | 2 of 2 | 100 | 0.50 [0.50, 0.50] | 2 | 0 | 0.500 |" in text
    numbers = asked.numbers["task"]["updates_to_solve"]["methods"]
    assert numbers["kd"]["by_seed"] == {"0": 200, "1": None}
    assert numbers["rtd"]["ratio"]["ratio"] == pytest.approx(0.5)
    json.dumps(asked.numbers, allow_nan=False)
    unsolved = study_report(replace(recipe, solved_share=0.5), [solving("kd", 0, 0), solving("rtd", 0, 0)])
    assert "| rtd | 0 of 1 | more than 100 | - | 0 | 0 | - |" in markdown(unsolved)  # not 1.00 [1.00, 1.00]


def test_the_report_says_that_members_of_an_ensemble_share_its_time():
    kd, rtd, _ = study_runs()
    assert "one program" not in markdown(reported([*kd, *rtd]))
    assert "trained as one program share its time" in markdown(reported([*kd, *(replace(x, members=3) for x in rtd)]))


def test_the_report_says_how_stages_ended_and_what_was_solved_by_then():
    def stage(depth, threshold, loss, ended_by, updates):
        return {"depth": depth, "threshold": threshold, "coherence": loss, "ended_by": ended_by, "updates": updates}

    def look(update, *shares):
        return {"update": update, "seconds": 1.0, "chain_accuracy": {"4": shares[0], "5": shares[1], "all": 0.5}}

    stages = [stage("4", 0.2, 0.1, "threshold", 15), stage("5+", 0.2, 0.3, "budget", 20)]
    others = [stage("4", 0.2, 0.3, "budget", 25), stage("5+", 0.2, 0.3, "budget", 20)]
    looks = (look(10, 0.9, 0.9), look(20, 0.25, 0.9), look(30, 0.75, 0.9), look(35, 0.9, 0.2))
    first = replace(outcome("rtd", 0, [1, 0]), stages=tuple(stages), curve=looks)
    second = replace(outcome("rtd", 1, [1, 0]), stages=tuple(others), curve=looks)
    text = markdown(reported([first, second]))
    # Stages 4 end after 15 and 25 updates, looked at after 20 and 30; the second run's last one ends after its looks.
    assert "| 4 | 0.200 | 0.200 | 1 of 2 | 20 | 50.0 |" in text
    assert "| 5+ | 0.200 | 0.300 | 0 of 2 | 20 | 20.0 |" in text
    wide = replace(first, stages=({**stages[0], "depth": "4-5"}, stages[1]))
    assert "| 4-5 | 0.200 | 0.100 | 1 of 1 | 15 | 57.5 |" in markdown(reported([wide]))
    empty = replace(first, stages=(stages[0], stage("5+", 0.2, None, "budget", 0)))  # fewer updates than stages
    assert "| 5+ | 0.200 | - | 0 of 1 | 0 | 90.0 |" in markdown(reported([empty]))
    text = markdown(reported([replace(first, stages=(stages[0],))]))
    assert "How the stages" not in text  # all depths at once


def test_the_report_says_what_a_changed_coherence_loss_adds():
    right = {"kd": [1, 0], "coherence_only": [1, 1], "coherence_lengths": [1, 0], "rtd_no_curriculum": [1, 1]}
    right |= {"alignment_only": [1, 1], "both_one_map": [1, 0], "both_no_map": [1, 1], "alignment_no_map": [1, 0]}
    runs = [outcome(name, seed, of) for name, of in right.items() for seed in range(2)]
    text = markdown(reported(runs))
    none, worse = "+0.0 [+0.0, +0.0] | -", "-100.0 [-100.0, -100.0] | -"
    assert f"| nothing | +100.0 [+100.0, +100.0] | - | {none} |" in text  # coherence_only, rtd_no_curriculum
    assert f"| lengths | {none} | - | - |" in text
    assert f"| one_map | - | - | {worse} |" in text
    assert "| no_map | - | - | +100.0 [+100.0, +100.0] | - |" in text  # against the alignment without a map
    unchanged = [run for run in runs if METHODS[run.method].role != "condition"]
    assert "changed" not in markdown(reported(unchanged))
    # What a method is called does not matter.
    other = {"kd": "a", "coherence_only": "b", "coherence_lengths": "c"}
    methods = {
        other[name]: replace(
            METHODS[name], compared_with=dict.fromkeys(map(other.get, METHODS[name].compared_with), "")
        )
        for name in other
    }
    recipe = StudyRecipe("base", {"task": ()}, methods, (0,), baseline="a")
    renamed = [replace(run, method=other[run.method]) for run in runs if run.method in other]
    assert f"| lengths | {none} | - | - |" in markdown(study_report(recipe, renamed))


def test_every_compared_line_has_a_verdict_and_shares_are_compared_as_numbers():
    kd, rtd, ablated = study_runs()
    runs = {"kd": kd, "rtd": rtd, "rtd_no_coherence": ablated}
    (share,) = shares(of_task(runs))
    assert share.found.startswith("50% [")
    assert share.article == "62% (from its points 62%)"
    low, high = share_interval(rtd, ablated, kd, lambda depths: depths >= 4)
    assert share.verdict == ("agrees" if low <= 0.62 <= high else "disagrees")
    assert shares(of_task({**runs, "rtd": kd}))[0].verdict == "undecided"  # no gain to share out
    says = {claim.claim: claim.verdict for claim in gains_by_depth(of_task(runs))}
    assert says == {"1": "not in the article", "4": "not in the article", "4+": "agrees", "all": "not in the article"}
    equal = [outcome("rtd", seed, [1, 0] * 20) for seed in range(3)]
    tasks = {"large": of_task(runs), "small": of_task({"kd": kd, "rtd": equal})}
    (claim,) = smaller_gain(tasks, {"small": "large"})
    assert claim.verdict == "agrees"
    assert claim.found.endswith("+100.0 [+100.0, +100.0] less")


def test_a_component_is_worth_the_mean_of_what_it_adds_to_each_combination():
    # Of 8 problems, alignment solves one more, coherence two, and the curriculum three.
    def solved(parts):
        return 1 + sum(n for n, there in zip((1, 2, 3), parts, strict=True) if there)

    runs = {
        name: [outcome(name, seed, [1] * solved(parts) + [0] * (8 - solved(parts)), depths=[4] * 8) for seed in (0, 1)]
        for name, parts in ((name, METHODS[name].components) for name in study_tiny.PARTS)
    }
    rows = component_gains(of_task(runs))
    means = [(component, found.value) for component, to, found in rows if to == "mean of the 4"]
    assert means == [("alignment", 1 / 8), ("coherence", 2 / 8), ("curriculum", 3 / 8)]
    assert len(rows) == 15
    of_coherence = {to: found.value for component, to, found in rows if component == "coherence"}
    assert of_coherence["`kd_curriculum` (gives `rtd_no_alignment`)"] == 2 / 8
    # What a component does differs with its company; seeds that one combination lacks are left out of the mean.
    runs["rtd"] = [outcome("rtd", 0, [1] * 8, depths=[4] * 8)]
    found = {to: found for component, to, found in component_gains(of_task(runs)) if component == "coherence"}
    assert found["mean of the 4"].value == pytest.approx((2 + 2 + 2 + 3) / 4 / 8)
    assert found["mean of the 4"].n == 1
    del runs["rtd"]  # then the two without the curriculum are left
    rows = component_gains(of_task(runs))
    assert [(x, to, found.value) for x, to, found in rows if to.startswith("mean")] == [
        ("alignment", "mean of the 2", 1 / 8),
        ("coherence", "mean of the 2", 2 / 8),
    ]
    assert len(rows) == 6
    del runs["alignment_only"]
    assert component_gains(of_task(runs)) == []


def test_a_grid_names_its_best_weights():
    runs = [outcome(f"grid_a{a}_c50", seed, [1, good] * 20) for a, good in ((10, 0), (30, 1)) for seed in range(3)]
    text = markdown(reported(runs))
    assert "| 0.3 | 0.5 | 100.0 [100, 100] |\n| 0.1 | 0.5 | 0.0 [0, 0] |" in text
    assert "Here 0.3 and 0.5 come out best: agrees." in text


@pytest.fixture
def fake_train(monkeypatch, tmp_path):
    """A trainer that counts its calls, and fails for seed 1 as long as the file `broken` is there."""
    script = tmp_path / "program.py"
    script.write_text(
        "import json, os, pathlib, sys\n"
        "assert sys.argv[1] == 'train'\n"
        "flags = dict(flag.lstrip('-').split('=', 1) for flag in sys.argv[2:])\n"
        "workdir = pathlib.Path(flags['workdir'])\n"
        "print(len(os.sched_getaffinity(0)), flags)\n"
        "assert os.environ['JAX_COMPILATION_CACHE_DIR'].endswith('compiled')\n"  # programs are shared between runs
        "calls = workdir / 'calls'\n"
        "calls.write_text(calls.read_text() + 'x' if calls.exists() else 'x')\n"
        "if flags['config.seed'] == '1' and pathlib.Path('broken').exists(): sys.exit(2)\n"
        "report = {'student': {'chain_accuracy': {'all': {'mean': 0.25}}}}\n"
        "(workdir / 'report.json').write_text(json.dumps(report))\n"
    )
    monkeypatch.setattr("rtd_jax.apps.study.runner.PROGRAM", (sys.executable, str(script)))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("rtd_jax.apps.study.runner.POLL_SECONDS", 0.01)
    base = tmp_path / "base.py"
    base.write_text("# a config\n")
    return base


def test_finished_runs_are_kept_and_failed_ones_named_and_repeated(fake_train, tmp_path, capsys):
    jobs = [Job("task", "kd", seed, (f"seed={seed}",), tmp_path / "runs" / str(seed)) for seed in range(3)]
    (tmp_path / "broken").touch()
    with pytest.raises(ValueError, match=r"1 of 3 runs failed, first task kd seed 1: its log is .*runs/1/log.txt"):
        run_jobs(jobs, fake_train, 1, tmp_path / "compiled")
    out = capsys.readouterr().out
    assert out.count("chain accuracy 25.0%") == 2
    assert "task kd seed 1: FAILED, see" in out
    (tmp_path / "broken").unlink()
    run_jobs(jobs, fake_train, 2, tmp_path / "compiled")
    assert [(job.workdir / "calls").read_text() for job in jobs] == ["x", "xx", "x"]


def test_a_workdir_of_another_study_is_refused_before_anything_starts(fake_train, tmp_path, monkeypatch):
    job = Job("task", "kd", 0, ("seed=0",), tmp_path / "runs" / "0")
    run_jobs([job], fake_train, 1, tmp_path / "compiled")
    other = Job("task", "kd", 0, ("seed=0", "loss.alpha=0.5"), job.workdir)
    with pytest.raises(ValueError, match=r"runs/0 was begun with other settings .* give the study another --workdir"):
        run_jobs([other], fake_train, 1, tmp_path / "compiled")
    text = fake_train.read_bytes()
    fake_train.write_text("# another config\n")
    with pytest.raises(ValueError, match="begun with other settings"):
        run_jobs([job], fake_train, 1, tmp_path / "compiled")
    # The same settings were written otherwise before: such runs go on.
    monkeypatch.setitem(runner.EARLIER_TEXTS, fake_train.name, hashlib.sha256(text).hexdigest())
    run_jobs([job], fake_train, 1, tmp_path / "compiled")


def jobs_of(tmp_path, methods, seeds):
    """Jobs as a study has them."""
    recipe = StudyRecipe("base.py", {"task": ()}, dict.fromkeys(methods, ()), seeds, baseline=methods[0])
    return recipe.jobs(tmp_path)


def test_runs_that_differ_in_their_seed_share_a_process_and_go_on_as_they_were_begun(tmp_path):
    jobs = jobs_of(tmp_path, ("kd", "rtd"), (0, 1, 2, 3, 4))

    def shared(ensemble=3):
        return [(group.jobs[0].method, [job.seed for job in group.jobs]) for group in groups_of(jobs, ensemble)]

    assert shared() == [("kd", [0, 1, 2]), ("rtd", [0, 1, 2]), ("kd", [3, 4]), ("rtd", [3, 4])]
    assert shared(0) == shared(1) == [(method, [seed]) for seed in range(5) for method in ("kd", "rtd")]
    kd = tmp_path / "runs" / "task" / "kd"
    (kd / "seed_1").mkdir(parents=True)
    (kd / "seed_1" / "report.json").touch()
    (kd / "seed_2" / "checkpoints").mkdir(parents=True)  # begun by itself
    assert shared()[:3] == [("kd", [0, 3, 4]), ("rtd", [0, 1, 2]), ("kd", [2])]
    begun = kd / "ensemble_3"
    begun.mkdir()
    (begun / "seeds.json").write_text("[3, 0]")
    assert shared()[0] == ("kd", [0, 3, 4])  # it had not come to a checkpoint
    (begun / "checkpoints").mkdir()
    assert shared()[:2] == [("kd", [3, 0]), ("rtd", [0, 1, 2])]
    assert ("kd", [4]) in shared()
    (kd / "seed_0").mkdir()
    (kd / "seed_0" / "report.json").touch()  # it was killed among its reports
    assert ("kd", [3, 0]) in shared()


def test_an_ensemble_is_one_process_and_what_cannot_be_one_has_a_process_each(fake_train, tmp_path, capsys):
    """The study says why; what fails in an ensemble is named run by run."""
    script = Path(runner.PROGRAM[1])
    script.write_text(
        "import json, pathlib, sys\n"
        "flags = dict(flag.lstrip('-').split('=', 1) for flag in sys.argv[2:])\n"
        "workdir, folders = pathlib.Path(flags['workdir']), None\n"
        "if sys.argv[1] == 'train': folders = [workdir]\n"
        "elif workdir.name == 'rtd':\n"
        "    print('error: stages end when their run is ready')\n"
        f"    sys.exit({NO_ENSEMBLE})\n"
        "else: folders = [workdir / f'seed_{x}' for x in json.loads('[' + flags['config.seeds'][1:-1] + ']')]\n"
        "for folder in folders:\n"
        "    if pathlib.Path('broken').exists() and folder.name == 'seed_1': sys.exit(2)\n"
        "    report = {'student': {'chain_accuracy': {'all': {'mean': 0.25}}}}\n"
        "    (folder / 'report.json').write_text(json.dumps(report))\n"
        "    (folder / 'command').write_text(' '.join(sys.argv[1:]))\n"
    )
    jobs = jobs_of(tmp_path, ("kd", "rtd"), (0, 1))
    run_jobs(jobs, fake_train, 1, tmp_path / "compiled", 2)
    commands = {f"{job.method} {job.seed}": (job.workdir / "command").read_text() for job in jobs}
    assert commands["kd 0"] == commands["kd 1"]
    assert "--config.seeds=(0,1)" in commands["kd 0"]
    assert "--config.seed=" not in commands["kd 0"]
    assert commands["rtd 1"].startswith("train ")
    said = capsys.readouterr().out
    assert "[2/4] task kd seeds 0, 1: chain accuracy 25.0%" in said
    assert "task rtd seeds 0, 1: a process each. stages end when their run is ready\n" in said
    assert "[4/4] task rtd seed 1" in said
    more = jobs_of(tmp_path / "more", ("kd",), (0, 1))
    (tmp_path / "broken").touch()
    with pytest.raises(ValueError, match=r"1 of 2 runs failed, first task kd seed 1: .*kd/ensemble_0/log.txt"):
        run_jobs(more, fake_train, 1, tmp_path / "compiled", 8)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
@pytest.mark.parametrize("preparing", [False, True])
def test_a_study_that_is_stopped_or_killed_takes_its_runs_along(tmp_path, number, preparing):
    """While it prepares as well; a killed one cannot tell them, so they watch it."""
    started, log = tmp_path / "started", tmp_path / "prepared" / "cache.log"
    program = tmp_path / "program.py"
    program.write_text(
        "import os, pathlib, sys, time\n"
        f"sys.path.insert(0, {str(ROOT)!r})\n"
        "from rtd_jax.base.signals import stoppable\n"
        "with stoppable(ends_process=True):\n"
        f"    pathlib.Path({str(started)!r}).write_text(str(os.getpid()))\n"
        "    time.sleep(600)\n"
    )
    (tmp_path / "base.py").write_text("# a config\n")
    text = (
        "import sys\n"
        "from pathlib import Path\n"
        "from rtd_jax.apps.study import recipe, runner, study\n"
        f"runner.PROGRAM = (sys.executable, {str(program)!r})\n"
        f"made = recipe.StudyRecipe({str(tmp_path / 'base.py')!r}, {{'task': ()}}, {{'kd': ('x={{cache}}',)}}, (0,),\n"
        f"    prepare={{'cache': ('make',)}} if {preparing} else {{}})\n"
        f"study.study(made, Path({str(tmp_path)!r}))\n"
    )
    study = subprocess.Popen([sys.executable, "-c", text], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 120
    while not (started.exists() and started.read_text()):
        assert study.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert log.exists() == preparing
    study.send_signal(number)
    said = study.communicate(timeout=60)[1].decode()
    assert study.returncode == (128 + number if number == signal.SIGTERM else -number), said
    assert "Traceback" not in said
    pid = int(started.read_text())
    with contextlib.suppress(ProcessLookupError, FileNotFoundError):
        while Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z":  # perhaps nobody has asked how it ended
            assert time.monotonic() < deadline
            time.sleep(0.05)


def test_without_runs_there_is_nothing_to_report(fake_train, tmp_path):
    recipe = StudyRecipe(str(fake_train), {"task": ()}, {"kd": ()}, (0,), parallel=0)
    with pytest.raises(ValueError, match=r"only a report of finished runs, but .*empty has none; use 1 or more"):
        write_study(recipe, tmp_path / "empty")
    assert not (tmp_path / "empty" / "runs").exists()


def test_what_is_prepared_is_made_once_and_only_where_it_is_asked_for(tmp_path, monkeypatch):
    recipe = StudyRecipe(
        base="b",
        tasks={"t": ("x=1",), "u": ()},
        methods={"kd": ("cache={cache}",), "rtd": ("model={reward}/model",), "cot": ("at={traces}",)},
        seeds=(0,),
        prepare={
            "traces": ("make", "--to={traces}"),
            "cache": ("launch/make.py", "--to={cache}"),  # as configs had it before
            "reward": ("make", "--to={reward}", "--from={traces}"),
        },
        only=("kd", "rtd"),
        task_methods={"u": ("kd",)},
    )
    assert [(job.task, job.method) for job in recipe.jobs(tmp_path)] == [("t", "kd"), ("t", "rtd"), ("u", "kd")]
    assert recipe.jobs(tmp_path)[0].overrides == ("x=1", f"cache={tmp_path}/prepared/cache", "seed=0")
    made = recipe.preparations(tmp_path)
    assert [preparation.name for preparation in made] == ["traces", "cache", "reward"]  # reward asks for traces
    assert made[2].command == ("make", f"--to={tmp_path}/prepared/reward", f"--from={tmp_path}/prepared/traces")
    (only,) = replace(recipe, only=("kd",)).preparations(tmp_path)
    assert only.name == "cache"

    program = tmp_path / "program.py"
    program.write_text(
        "import sys\n"
        "if sys.argv[1] != 'make': raise SystemExit(f'error: there is no command {sys.argv[1]}')\n"
        "open('calls', 'a').write(sys.argv[2] + '\\n')\n"
    )
    monkeypatch.setattr("rtd_jax.apps.study.runner.PROGRAM", (sys.executable, str(program)))
    monkeypatch.chdir(tmp_path)  # where commands are started
    prepare_once(made[:2])
    prepare_once(made[:2])
    calls = (tmp_path / "calls").read_text().splitlines()
    assert calls == [f"--to={tmp_path}/prepared/traces", f"--to={tmp_path}/prepared/cache"]
    # Records of earlier versions name scripts.
    assert json.loads(made[1].record.read_text()) == ["make", calls[1]]
    made[0].record.write_text(json.dumps(["launch/make.py", calls[0]]))
    prepare_once(made[:2])
    assert len((tmp_path / "calls").read_text().splitlines()) == 2
    other = Preparation("cache", ("make", "--to=elsewhere"), made[1].folder)
    with pytest.raises(ValueError, match=r"prepared/cache was made by another command"):
        prepare_once([other])
    with pytest.raises(ValueError, match=r"preparing x failed \(error: there is no command none\): its log is .*x.log"):
        prepare_once([Preparation("x", ("none",), tmp_path / "x")])
    for changes, says in (
        ({"only": ("kdd",)}, "only names the method 'kdd'"),
        ({"task_methods": {"v": ()}}, "names the task 'v'"),
        ({"methods": {"kd": Method((), "whole"), "rtd": Method((), "whole")}}, "kd and rtd have the role 'whole'"),
        ({"tasks": {"../../elsewhere": ()}}, "tasks has the name '../../elsewhere', which names a folder too"),
        ({"methods": {"kd": (), "a/b": ()}}, "methods has the name 'a/b'"),
        ({"prepare": {"..": ("traces",)}}, "prepare has the name '..'"),
    ):
        with pytest.raises(ValueError, match=says):
            replace(recipe, **changes)


@pytest.mark.parametrize(
    ("config", "arg"),
    [
        *((c, a) for c in (study_tiny, study_8b) for a in ("", "grid", "cached")),
        (study_tiny, "smoke"),
        (study_tiny, "conditions"),
        (study_tiny, "lift"),
        (study_curricula, ""),
        (study_on_policy, ""),
        (study_states, ""),
        (study_compression, ""),
        (study_smollm2, ""),
        (study_smollm2, "six+cpu"),
    ],
    ids=lambda x: x if isinstance(x, str) else x.__name__.split(".")[-1],
)
def test_every_run_of_the_studies_is_a_recipe_of_the_trainer(config, arg, tmp_path):
    """Overrides as the command line applies them, and the settings that they give, for every method of every task."""
    recipe = build(StudyRecipe, config.get_config(*([arg] if arg else [])).to_dict())
    every = {name: recipe.method(name) for name in recipe.methods}
    bases = {f"configs/{x.__name__.split('.')[-1]}.py": x for x in (rtd_tiny, rtd_8b, rtd_smollm2_sentences)}
    recipes = {}
    for job in recipe.jobs(tmp_path):
        if job.kind == "compress":
            flags = dict(flag.split("=", 1) for flag in job.overrides)
            own = CompressSettings(**{"student": flags["student"], "scheme": flags["scheme"]})
            assert own.method.scheme is not None, job
            continue
        base = bases[recipe.base].get_config()
        for override in job.overrides:
            key, value = override.split("=", 1)
            with contextlib.suppress(ValueError, SyntaxError):  # else it is text
                value = ast.literal_eval(value)
            *groups, last = key.split(".")
            group = base
            for name in groups:
                group = group[name]
            assert last in group, override
            group[last] = value
        found = recipes[job.task, job.method] = build(Recipe, base.to_dict())
        # What the report is told of a method is what the method is.
        method = every[job.method]
        weights = (found.loss.alignment_weight, found.loss.coherence_weight)
        assert (*weights, found.curriculum.enabled) == (method.alignment, method.coherence, method.curriculum)
    known = {"teacher", *every, *METHODS, "kd_plateau", "self_kd"}
    assert all(set(method.compared_with) <= known for method in every.values())
    assert len({method.place for method in every.values()}) == len(every)
    of = {study_8b: "gsm8k", study_on_policy: "taught_student", study_smollm2: "six"}.get(config, "few_problems")
    of = "lift" if arg == "lift" else of
    whole = {job.name: job for job in build(StudyRecipe, study_tiny.get_config().to_dict()).jobs(tmp_path)}
    shared = [job for job in recipe.jobs(tmp_path) if job.name in whole]
    common = {"conditions": 6, "lift": 4}.get(arg) or {study_curricula: 2 * 4, study_states: 3 + 1 + 1}.get(config)
    if common:  # what these have in common with the whole study are the same runs
        assert len(shared) == 5 * common
        assert all(job == whole[job.name] for job in shared)
    assert recipes[of, "kd"].loss.alignment_weight == 0.0
    if arg == "conditions":
        alone, both = recipes[of, "coherence_fourfold"].loss, recipes[of, "both_fourfold"].loss
        assert (alone.alignment_weight, alone.coherence_weight) == (0.0, 2.0)
        assert (both.alignment_weight, both.coherence_weight) == (0.3, 2.0)
        assert recipes[of, "coherence_no_map"].loss.projections == "none"
        assert not any(recipe.curriculum.enabled for recipe in recipes.values())
        return
    if config is study_states:
        assert not any(recipe.curriculum.enabled for recipe in recipes.values())
        forms = {name: (r.loss.step_state, r.loss.layers, r.loss.distance) for (_, name), r in recipes.items()}
        assert forms["alignment_states"] == forms["coherence_stride"] == ("mean", "evenly:4", "squared")
        cuts = {name: r.data.segmentation for (_, name), r in recipes.items()}
        assert cuts["alignment_soft"] == cuts["coherence_soft"] == "soft:12"
        assert forms["alignment_ends"] == ("end", "evenly:4", "squared")
        assert forms["rtd_no_curriculum"] == ("end", "", "cosine")
        return
    if config is study_compression:
        assert recipes[of, "soft_through_int3"].student.scheme == Scheme("int3", 32)
        assert recipes[of, "soft_then_int2"].student.path == f"{tmp_path}/runs/{of}/soft_225/seed_4/student"
        assert recipes[of, "soft_then_int2"].total_updates + recipes[of, "soft_225"].total_updates == 300
        assert recipes[of, "kd_pruned"].student.init == "pruned"
        return
    if config is study_smollm2:
        layers = {task: r.student.layers for (task, _), r in recipes.items()}
        assert layers == ({"six": 6} if arg else {"six": 6, "ten": 10, "fifteen": 15})
        assert {r.teacher.path for r in recipes.values()} == {f"{tmp_path}/prepared/teacher/student"}
        assert {(r.data.test.wording, r.data.test.keep_marks) for r in recipes.values()} == {("natural", False)}
        computes = {(r.teacher.compute_dtype, r.student.compute_dtype) for r in recipes.values()}
        assert computes == ({("float32",) * 2} if arg else {("bfloat16",) * 2})
        matched = recipes[of, "alignment_states"].loss
        assert (matched.step_state, matched.layers, matched.distance) == ("mean", "evenly:4", "squared")
        return
    if config is study_curricula:
        ends = {name: (r.curriculum.ends_by, r.curriculum.mixture) for (task, name), r in recipes.items() if task == of}
        assert ends["kd_curriculum_share"] == ("share", "equal")
        assert ends["kd_curriculum_solved"] == ends["rtd_curriculum_solved"] == ("solved", "equal")
        assert ends["rtd"] == ("coherence", "replay")
        return
    if arg == "lift" or config is study_on_policy:
        assert not any(recipe.curriculum.enabled for recipe in recipes.values())
        return
    if arg == "grid":
        assert {(r.loss.alignment_weight, r.loss.coherence_weight) for r in recipes.values()} >= {
            (0.3, 0.5),
            (1.0, 0.1),
        }
        assert {r.curriculum.enabled for r in recipes.values()} == {False} if config is study_tiny else {False, True}
        return
    assert not recipes[of, "cot_ft"].loss.teaches()
    made = [preparation.name for preparation in recipe.preparations(tmp_path)]
    if config is study_tiny and arg == "cached":  # the cache holds word problems alone
        assert {r.data.test.schema for r in recipes.values()} == {"synthetic"}
    elif config is study_tiny and arg != "smoke":
        assert recipes["cups", "rtd"].teacher.path.endswith("prepared/cups_teacher/model")
        assert {getattr(recipes["cups", "rtd"].data, x).schema for x in ("train", "validation", "test")} == {"cups"}
        lift = recipes["lift", "rtd"]
        assert (lift.data.test.schema, lift.student.init) == ("lift", "random")
        assert lift.teacher.path.endswith("prepared/lift_teacher/model")
        assert recipes[of, "rtd_plateau"].total_updates == 2 * recipes[of, "rtd"].total_updates
        assert {"cups_teacher", "lift_teacher"} <= set(made)
    assert recipes[of, "step_reward"].reward.model.endswith("prepared/reward/model")
    # The same data budget and the same order of the data, whatever the method.
    budgets = {
        (r.total_updates, r.batch_size, r.seed)
        for (task, name), r in recipes.items()
        if task == of and name in study_tiny.methods()
    }
    assert len(budgets) == 1
    assert ("cache" in made) == (arg in ("cached", "smoke"))
    assert "reward" in made


def write_run(workdir: Path, right: tuple[bool, ...] = (True, False), **changes) -> None:
    """What a finished run leaves, as far as a study reads it; `changes` replaces keys of the report."""
    mean = {"mean": float(np.mean(right)), "stderr": None, "n": len(right)}
    student = {"step_accuracy": {"1": mean, "all": mean}, "chain_accuracy": {"1": mean, "all": mean}}
    student["perplexity"] = float(np.exp(0.5))
    stage = {"depth": "1+", "updates": 3, "threshold": 0.1, "coherence": None, "ended_by": "budget"}
    report = {"student": student, "updates": 3, "wall_seconds": 1.5, "stages": [stage]} | changes
    row = {"model": "student", "depth": 1, "reference_nats": 2.0, "reference_tokens": 4, "prompt": "a\u2028b"}
    rows = [row | {"correct": x} for x in right]
    workdir.mkdir(parents=True, exist_ok=True)
    (workdir / "report.json").write_text(json.dumps(report))
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (workdir / "generations.jsonl").write_text(text, encoding="utf-8")


def test_a_finished_run_is_read_also_where_its_student_diverged(tmp_path):
    write_run(tmp_path)
    found = read_outcome("task", "kd", 0, tmp_path)
    assert (found.correct.tolist(), found.perplexity, found.seconds) == ([True, False], np.exp(0.5), 1.5)
    report = json.loads((tmp_path / "report.json").read_text())
    report["student"]["perplexity"] = None
    (tmp_path / "report.json").write_text(json.dumps(report))
    row = '{"model": "student", "depth": 1, "correct": true, "reference_nats": null, "reference_tokens": 4}\n'
    (tmp_path / "generations.jsonl").write_text(row + row.replace("true", "false"))
    assert read_outcome("task", "kd", 0, tmp_path).perplexity == np.inf


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{}",
        "[]",
        "null",
        '{"kind": "evaluation", "sections": {}}',
        {"student": None},
        {"student": {}},
        {"student": {"step_accuracy": {}, "chain_accuracy": {}, "perplexity": 1.0}},
        {"updates": "3"},
        {"stages": [1]},
        {"stages": {"a": 1}},
        {"stages": [{"depth": "x", "updates": 1, "threshold": 0.1, "coherence": None, "ended_by": "budget"}]},
        {"curve": [{"update": 1, "seconds": 1.0, "chain_accuracy": {"1": 0.5}}]},
        {"curve": 5},
        {"drift": {"steps": []}},
        {"drift": {"steps": [{"step": 1}], "relation": 0}},
        {"teacher": {"perplexity": "low", "step_accuracy": {}, "chain_accuracy": {}}},
        {"wall_seconds": None},
    ],
)
def test_a_report_that_no_run_wrote_is_refused_by_name(tmp_path, content):
    write_run(tmp_path, **(content if isinstance(content, dict) else {}))
    if isinstance(content, str):
        (tmp_path / "report.json").write_text(content)
    with pytest.raises(ValueError, match=rf"report.json.*delete {tmp_path} and run again"):
        read_outcome("task", "kd", 0, tmp_path)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ('{"model": "student", "depth": 1, "correct": tr\n', r"generations.jsonl:1: not valid JSON"),
        ('{"model": "student", "depth": 1}\n', r"generations.jsonl:1: .*row.correct is missing"),
        ('{"model": "student", "depth": 1, "correct": "yes"}\n', r"generations.jsonl:1: .*row.correct is 'yes'"),
        ('{"model": "mine", "depth": 1, "correct": true}\n', r"generations.jsonl:1: .*its model is 'mine'"),
        ('{"model": "student", "depth": -1, "correct": true}\n', r"generations.jsonl:1: .*its depth -1"),
        ("", r"generations.jsonl has 0 texts of the student"),
        ('{"model": "student", "depth": 1, "correct": true}\n', r"are of two runs \(their student differs\)"),
    ],
)
def test_texts_that_are_not_the_reports_are_refused_by_name(tmp_path, content, words):
    write_run(tmp_path)
    (tmp_path / "generations.jsonl").write_text(content)
    with pytest.raises(ValueError, match=rf"{words}.*delete {tmp_path} and run again"):
        read_outcome("task", "kd", 0, tmp_path)


def test_the_report_of_another_run_is_told_by_its_numbers(tmp_path):
    write_run(tmp_path)
    report = json.loads((tmp_path / "report.json").read_text())
    report["student"]["perplexity"] *= 1.001
    (tmp_path / "report.json").write_text(json.dumps(report))
    with pytest.raises(ValueError, match="are of two runs"):
        read_outcome("task", "kd", 0, tmp_path)


def test_a_report_of_a_run_with_other_settings_is_refused_by_the_key(tmp_path):
    settings = {"seed": 1, "loss": {"alpha": 0.5}, "curriculum": {"enabled": False, "depths": [1, 2]}}
    write_run(tmp_path, settings=settings)
    fits = ("seed=0", "seed=1", "loss.alpha=5e-1", "curriculum.enabled=false", "curriculum.depths=(1,2)", "new.key=3")
    assert read_outcome("task", "kd", 1, tmp_path, fits).seed == 1
    for override in ("seed=0", "loss.alpha=0.7", "loss.alpha=1", "curriculum.enabled=True", "curriculum.depths=(1,)"):
        with pytest.raises(ValueError, match=f"report.json is of another run: its {override.partition('=')[0]} is"):
            read_outcome("task", "kd", 1, tmp_path, (override,))
    write_run(tmp_path)  # an earlier version did not say it
    read_outcome("task", "kd", 1, tmp_path, ("seed=0",))


def test_a_foreign_report_is_found_before_the_missing_runs_are_made(fake_train, tmp_path):
    recipe = StudyRecipe(str(fake_train), {"task": ()}, {"kd": ()}, (0, 1))
    workdir = tmp_path / "study"
    run = workdir / "runs" / "task" / "kd" / "seed_1"
    run.mkdir(parents=True)
    (run / "report.json").write_text("{}")
    with pytest.raises(ValueError, match=r"seed_1/report.json is not what a run writes"):
        write_study(recipe, workdir)
    assert not (workdir / "runs" / "task" / "kd" / "seed_0" / "calls").exists()
    for content in ("", "[1]", '{"a": 1}'):
        (run / "job.json").write_text(content)
        with pytest.raises(ValueError, match=r"seed_1.*job.json"):
            runner.claim_jobs(recipe.jobs(workdir), fake_train)


def test_one_study_at_a_time_makes_runs_and_others_may_look(fake_train, tmp_path):
    recipe = StudyRecipe(str(fake_train), {"task": ()}, {"kd": ()}, (0,), deep=1)
    write_run(tmp_path / "study" / "runs" / "task" / "kd" / "seed_0")
    with locked(tmp_path / "study"):
        with pytest.raises(ValueError, match="study is in use by process"):
            write_study(recipe, tmp_path / "study")
        assert write_study(replace(recipe, parallel=0), tmp_path / "study").is_file()


@pytest.mark.slow
def test_a_study_of_real_runs(tmp_path):
    """The smoke study, of two methods, one of them from a cache that is written first."""
    config = tmp_path / "study_small.py"
    config.write_text(
        "from configs import study_tiny\n"
        "def get_config():\n"
        "    c = study_tiny.get_config('smoke')\n"
        "    c.methods.matched = ('loss.intermediate_weight=1.0', 'loss.token_alignment_weight=0.3',\n"
        "                         'data.segmentation=random', 'curriculum.enabled=False')\n"
        "    c.only = ('kd', 'matched')\n"
        "    return c\n"
    )
    workdir = tmp_path / "study"
    command = [sys.executable, str(ROOT / "launch" / "study.py"), f"--config={config}", f"--workdir={workdir}"]
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}  # one device

    def study():
        return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)

    run = study()
    assert run.returncode == 0, run.stdout + run.stderr
    assert "report over 2 of 2 runs" in run.stdout
    text = (workdir / "study.md").read_text()
    assert "| matched | 1 |" in text
    assert "Accuracy against updates and time" in text
    assert "<svg" in (workdir / "report.html").read_text()

    def last(method):
        folder = workdir / "runs" / "few_problems" / method / "seed_0"
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        log, report = (folder / "log.txt").read_text(), json.loads((folder / "report.json").read_text())
        return [line for line in lines if "loss" in line][-1], report, log

    metrics, report, _ = last("matched")
    assert metrics["distill/intermediate"] > 0
    assert metrics["distill/token_alignment"] > 0
    assert report["drift"]["chains"] == 12
    assert report["drift"]["maps"] == {"f": "the run's own", "g": "the run's own"}
    _, report, log = last("kd")
    assert [look["update"] for look in report["curve"]] == [2, 4]
    assert "the teacher is read from the cache" in log
    assert report["drift"]["maps"] == {"f": "fitted", "g": "fitted"}  # nothing trained them
    assert "2 runs, 2 of them finished" in study().stdout
    (workdir / "study.md").unlink()
    command.append("--config.parallel=0")
    assert "report over 2 of 2 runs" in study().stdout
    assert (workdir / "study.md").read_text() == text


@pytest.mark.slow
def test_a_study_runs_from_an_installed_wheel(tmp_path):
    """Without the clone: what is prepared and what is run are commands of the wheel's package, started in this folder.

    The preparation shows its help and makes nothing, so the run says at once that there is no teacher.
    """
    source, installed, here = (tmp_path / name for name in ("source", "installed", "here"))
    shutil.copytree(ROOT / "rtd_jax", source / "rtd_jax", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "requirements.txt", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    shutil.copytree(ROOT / "configs", here / "configs")
    (here / "small.py").write_text(
        "from configs import study_tiny\n"
        "def get_config():\n"
        "    c = study_tiny.get_config('smoke')\n"
        "    c.only = ('rtd',)\n"
        "    c.prepare.traces = ('traces', '--help')\n"
        "    c.tasks.few_problems += ('teacher.path={traces}',)\n"
        "    return c\n"
    )
    build_wheel = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--quiet"]
    subprocess.run([*build_wheel, "--wheel-dir", str(tmp_path), str(source)], check=True)
    (wheel,) = tmp_path.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(installed)
    shutil.rmtree(source)

    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}  # one device
    study = subprocess.run(
        [sys.executable, "-m", "rtd_jax", "study", "--config=small.py", "--workdir=study"],
        capture_output=True,
        text=True,
        cwd=here,
        env=environment | {"PYTHONPATH": str(installed)},
    )
    assert study.returncode == 2
    assert "prepared traces" in study.stdout, study.stdout + study.stderr
    assert "1 of 1 runs failed, first few_problems rtd seed 0" in study.stderr
    log = (here / "study" / "runs" / "few_problems" / "rtd" / "seed_0" / "log.txt").read_text()
    assert "error: " in log.splitlines()[-1]
    assert str(here / "study" / "prepared" / "traces") in log.splitlines()[-1]


@pytest.mark.parametrize(
    ("arg", "says"),
    [
        ("conditions+cached", "states of one layer"),
        ("lift+cached", "bundled teacher's states"),
        ("grid+lift", "studies of their own"),
        ("grit", "this config knows smoke, grid"),
    ],
)
def test_words_that_do_not_go_together_are_refused(arg, says):
    with pytest.raises(ValueError, match=says):
        study_tiny.get_config(arg)


def begun(tmp_path, **methods) -> StudyRecipe:
    return StudyRecipe("base.py", {"task": ()}, {"kd": Method(("loss.alpha=1.0",), "baseline"), **methods}, (0, 1))


def test_a_run_may_begin_with_anothers_student_or_make_it_smaller(tmp_path):
    """It waits for that run, and is never put into an ensemble, whose members begin alike."""
    smaller = Method((), begins_with="kd", compress=("scheme=int4",))
    through = Method(("student.quantization=int4",), begins_with="kd")
    again = Method(("loss.alpha=0.5",), begins_with="through")
    recipe = begun(tmp_path, smaller=smaller, through=through, again=again)
    jobs = {job.name: job for job in recipe.jobs(tmp_path)}
    kd = tmp_path / "runs" / "task" / "kd" / "seed_1"
    assert jobs["task smaller seed 1"].overrides == ("scheme=int4", f"student={kd}")
    command = Group((jobs["task smaller seed 1"],)).command(Path("base.py"))
    own = kd.parents[1] / "smaller" / "seed_1"
    flags = ["--scheme=int4", f"--student={kd}", f"--out={own / 'student'}", f"--report={own}"]
    assert command == ["compress", *flags]
    assert f"student.path={kd / 'student'}" in jobs["task through seed 1"].overrides
    # What was trained through the rounding goes on from its floats.
    floats = kd.parents[1] / "through" / "seed_1" / "student_float"
    assert f"student.path={floats}" in jobs["task again seed 1"].overrides
    groups = groups_of(list(jobs.values()), 4)
    assert sorted(len(group.jobs) for group in groups) == [1, 1, 1, 1, 1, 1, 2]
    (tmp_path / "base.py").touch()
    alone = [job for job in jobs.values() if job.method == "smaller"]
    with pytest.raises(ValueError, match=r"begins with the student of .*kd/seed_0, which is not finished"):
        run_jobs(alone, tmp_path / "base.py", 1, tmp_path / "compiled")


def test_methods_that_begin_with_one_another_or_do_two_things_are_refused(tmp_path):
    with pytest.raises(ValueError, match="the methods a, b begin with one another"):
        begun(tmp_path, a=Method((), begins_with="b"), b=Method((), begins_with="a"))
    with pytest.raises(ValueError, match=r"methods\.a\.begins_with names the method 'x'"):
        begun(tmp_path, a=Method((), begins_with="x"))
    with pytest.raises(ValueError, match="needs begins_with"):
        Method((), compress=("scheme=int4",))
    with pytest.raises(ValueError, match="compressed or trained"):
        Method(("loss.alpha=1.0",), begins_with="kd", compress=("scheme=int4",))


def test_what_is_left_of_a_gain():
    """Gains of 50 points before and 25 after: a half; nothing is said without a gain that is surely above 0."""
    methods = {
        "kd": Method((), "baseline"),
        "rtd": Method((), alignment=3.0),
        "kd_4": Method((), begins_with="kd", compress=("scheme=int4",)),
        "rtd_4": Method((), begins_with="rtd", compress=("scheme=int4",)),
    }
    right = {"kd": 4, "rtd": 8, "kd_4": 2, "rtd_4": 4}
    outcomes = {
        name: [outcome(name, seed, [i < count for i in range(8)], [4] * 8) for seed in range(4)]
        for name, count in right.items()
    }
    (line,) = gains_left(TaskRuns(outcomes, methods, "kd", 4))
    assert line.claim == "`rtd`, scheme=int4"
    assert line.found.startswith("+50.0")
    assert "-> +25.0" in line.found
    assert "50%" in line.found
    assert line.article == "18.7 -> 11.2: 60%"
    same = {**outcomes, "rtd": [replace(x, method="rtd") for x in outcomes["kd"]]}
    (line,) = gains_left(TaskRuns(same, methods, "kd", 4))
    assert line.verdict == "undecided"
