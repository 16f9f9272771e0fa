"""Stages, budgets and endings: plain logic, no arrays."""

import json
from dataclasses import asdict

import numpy as np
import pytest

from rtd_jax.apps.distill.own_chains import draw_problems
from rtd_jax.data.encoding import encode_traces
from rtd_jax.data.generators.word_problems import generate
from rtd_jax.data.loader import BatchLoader
from rtd_jax.data.tiny_tokenizer import TINY_FORMAT, tiny_tokenizer
from rtd_jax.train.curriculum import (
    FEW_PROBLEMS,
    CurriculumSettings,
    StageRecord,
    few_problems,
    open_record,
    reason_to_end,
    record_validation,
    stage_budget,
    stages,
)
from rtd_jax.train.splits import Chains


def record(**changes) -> StageRecord:
    return StageRecord(**{"depth": "1", "threshold": 0.1, "teacher_coherence": 0.1, "budget": 100, **changes})


def test_stages_cover_every_depth_once():
    plan = stages(CurriculumSettings(depths=(1, 2, 3, 4, 5)))
    assert [stage.name for stage in plan] == ["1", "2", "3", "4", "5+"]
    for depth in range(1, 12):
        assert sum(stage.holds(depth) for stage in plan) == 1
    assert [stage.is_last for stage in plan] == [False] * 4 + [True]
    assert [stage.name for stage in stages(CurriculumSettings(depths=(2, 4)))] == ["1-2", "3+"]


def test_without_a_curriculum_one_stage_holds_all():
    (only,) = stages(CurriculumSettings(enabled=False))
    assert only.name == "1+"
    assert only.is_last
    assert all(only.holds(depth) for depth in (1, 5, 9))


def test_unspent_budget_passes_on():
    plan = stages(CurriculumSettings(depths=(1, 2, 3, 4, 5)))
    assert stage_budget(1000, 0, plan[0], 5) == 200
    assert stage_budget(1000, 40, plan[1], 5) == 240  # stage 1 left 160 of its 200
    assert stage_budget(1000, 940, plan[4], 5) == 60
    # Whatever is spent, the budgets never exceed the total.
    spent = 0
    for stage in plan:
        spent += stage_budget(1003, spent, stage, 5)
    assert spent == 1003


def test_threshold_ends_a_stage_only_at_a_fresh_validation():
    settings = CurriculumSettings(plateau_patience=0)
    first = stages(settings)[0]
    open_record = record(updates=10)
    assert reason_to_end(open_record, first, settings) is None
    record_validation(open_record, 0.1)  # at the threshold counts
    assert reason_to_end(open_record, first, settings) == "threshold"
    assert open_record.reached_threshold_at == 10
    open_record.updates = 11
    assert reason_to_end(open_record, first, settings) is None


def test_budget_ends_a_stage_and_threshold_is_looked_at_first():
    settings = CurriculumSettings(plateau_patience=0)
    first = stages(settings)[0]
    spent = record(updates=100)
    assert reason_to_end(spent, first, settings) == "budget"
    record_validation(spent, 0.05)
    assert reason_to_end(spent, first, settings) == "threshold"


def test_plateau_needs_patience_without_improvement():
    settings = CurriculumSettings(plateau_patience=2, plateau_tolerance=0.1)
    first = stages(settings)[0]
    slow = record()
    endings = []
    for updates, coherence in ((10, 1.0), (20, 0.8), (30, 0.79), (40, 0.75)):
        slow.updates = updates
        record_validation(slow, coherence)
        endings.append(reason_to_end(slow, first, settings))
    # 0.79 and 0.75 are both above 0.9 x 0.8 = 0.72: two validations without a tenth's improvement.
    assert endings == [None, None, None, "plateau"]


def test_min_updates_holds_back_threshold_and_plateau_not_budget():
    settings = CurriculumSettings(min_updates=50)
    first = stages(settings)[0]
    early = record(updates=10)
    record_validation(early, 0.0)
    assert reason_to_end(early, first, settings) is None
    assert reason_to_end(record(updates=40, budget=40), first, settings) == "budget"


def test_the_last_stage_spends_its_budget_and_still_notes_the_threshold():
    settings = CurriculumSettings(spend_budget=True)
    last = stages(settings)[-1]
    deep = record(updates=10)
    record_validation(deep, 0.0)
    assert reason_to_end(deep, last, settings) is None
    assert deep.reached_threshold_at == 10
    deep.updates = 100
    assert reason_to_end(deep, last, settings) == "budget"
    assert (
        reason_to_end(record(updates=10, validations=[(10, 0.0)]), last, CurriculumSettings(spend_budget=False))
        == "threshold"
    )


def test_a_record_survives_json():
    full = record(updates=10)
    record_validation(full, 0.25)
    assert StageRecord.from_dict(json.loads(json.dumps(full.to_dict()))) == full
    solved = solved_record(updates=10)
    record_validation(solved, 0.25)
    assert StageRecord.from_dict(json.loads(json.dumps(solved.to_dict()))) == solved


def test_a_record_of_the_coherence_loss_has_the_keys_of_earlier_versions():
    """Reports and checkpoints of the default are unchanged, and those of earlier versions are read."""
    earlier = {"depth": "1", "threshold": 0.1, "teacher_coherence": 0.1, "budget": 9, "updates": 3, "coherence": 0.2}
    earlier |= {"reached_threshold_at": None, "ended_by": None, "validations": [[3, 0.2]]}
    found = StageRecord.from_dict(earlier).to_dict()
    assert list(found) == list(earlier)
    assert json.loads(json.dumps(found)) == earlier


def solved_record(**changes) -> StageRecord:
    """Of a stage that ends where nine tenths of what the teacher solves are solved; it solves eight tenths."""
    settings = CurriculumSettings(ends_by="solved", solved_share=0.9)
    opened = open_record(stages(settings)[0], settings, 0.8, budget=100)
    assert (opened.threshold, opened.teacher_solved, opened.teacher_coherence) == (pytest.approx(0.72), 0.8, None)
    return StageRecord(**(asdict(opened) | changes))


def test_chains_solved_end_a_stage_from_the_threshold_up():
    settings = CurriculumSettings(ends_by="solved", plateau_patience=0)
    first, last = stages(settings)[0], stages(settings)[-1]
    found = solved_record(updates=10)
    record_validation(found, 0.71)
    assert reason_to_end(found, first, settings) is None
    found.updates = 20
    record_validation(found, 0.9 * 0.8)
    assert reason_to_end(found, first, settings) == "threshold"
    assert (found.reached_threshold_at, found.solved, found.coherence) == (20, 0.9 * 0.8, None)
    assert reason_to_end(found, last, settings) is None  # the last stage spends its budget
    exact = solved_record(updates=10, threshold=0.9 * 0.75)  # which rounds to a little more than 27 of 40
    record_validation(exact, 27 / 40)
    assert reason_to_end(exact, first, settings) == "threshold"


def test_where_the_teacher_solves_nothing_no_share_of_it_ends_a_stage():
    settings = CurriculumSettings(ends_by="solved", plateau_patience=0)
    first = stages(settings)[0]
    found = open_record(first, settings, 0.0, budget=20)
    found.updates = 10
    record_validation(found, 0.0)
    assert found.threshold is None
    assert reason_to_end(found, first, settings) is None
    found.updates = 20
    assert reason_to_end(found, first, settings) == "budget"


@pytest.mark.parametrize(
    ("values", "endings"),
    [
        ((0.4, 0.5, 0.52, 0.54), [None, None, None, "plateau"]),  # 0.54 is below 1.1 x 0.5
        ((0.4, 0.5, 0.52, 0.56), [None] * 4),
        ((0.4, 0.3, 0.2, 0.1), [None, None, "plateau", "plateau"]),  # forgetting is no improvement
        ((0.0, 0.0, 0.0, 0.0), [None] * 4),  # what is learned suddenly shows nothing before
    ],
)
def test_a_plateau_of_chains_solved_is_where_no_more_are_solved(values, endings):
    settings = CurriculumSettings(ends_by="solved", plateau_patience=2, plateau_tolerance=0.1)
    first, found = stages(settings)[0], solved_record()
    reasons = []
    for i, value in enumerate(values, start=1):
        found.updates = 10 * i
        record_validation(found, value)
        reasons.append(reason_to_end(found, first, settings))
    assert reasons == endings


def test_equal_shares_end_every_stage_after_the_same_number_of_updates():
    settings = CurriculumSettings(ends_by="share", depths=(1, 2, 3, 4), min_updates=10**6)
    spent = []
    for stage in stages(settings):
        found = open_record(stage, settings, None, stage_budget(42, sum(spent), stage, 4))
        assert (found.threshold, found.teacher_solved, found.ends_by) == (None, None, "share")
        while reason_to_end(found, stage, settings) is None:
            found.updates += 1
        assert reason_to_end(found, stage, settings) == "budget"
        spent.append(found.updates)
    assert sum(spent) == 42
    assert max(spent) - min(spent) <= 1


def test_nothing_is_measured_where_it_would_end_nothing():
    assert CurriculumSettings().measures == "coherence"
    assert CurriculumSettings(ends_by="share").measures is None
    assert CurriculumSettings(ends_by="solved").solves_with_teacher
    assert not CurriculumSettings(ends_by="solved", teacher_solves=0.9).solves_with_teacher
    assert CurriculumSettings(ends_by="solved", enabled=False).measures is None
    assert CurriculumSettings(ends_by="solved", enabled=False, spend_budget=False).measures == "solved"
    assert not CurriculumSettings(ends_by="solved").by_coherence


@pytest.fixture(scope="module")
def chains() -> Chains:
    """Chains of one to six steps; the deeper, the fewer."""
    traces = [trace for depth, count in enumerate((32, 16, 8, 8, 4, 2), 1) for trace in generate(count, (depth,))]
    return Chains(tuple(traces), tuple(encode_traces(tiny_tokenizer(), traces, TINY_FORMAT, row_length=256)[0]))


def drawn_depths(chains: Chains, settings: CurriculumSettings, stage: int, batches: int = 30) -> np.ndarray:
    """How many chains of each depth, from 0 on, the loader of a stage gives."""
    pools = [(group.encoded, share) for group, share in chains.mixture(stages(settings)[stage], settings)]
    loader = BatchLoader(pools, rows=4, row_length=256, chains_per_row=4, max_boundaries=7, seed=0)
    counts = np.zeros(7, int)
    for _ in range(batches):
        ends_BC = next(loader).boundary_mask_BCK.sum(axis=-1)
        counts += np.bincount(ends_BC[ends_BC > 0] - 1, minlength=7)
    return counts


def test_an_equal_mixture_gives_every_depth_up_to_the_stages_own_the_same_share_of_the_chains(chains):
    settings = CurriculumSettings(mixture="equal")
    third = drawn_depths(chains, settings, 2)
    assert third[4:].sum() == 0
    np.testing.assert_allclose(third[1:4] / third.sum(), 1 / 3, atol=0.02)
    # The last stage is open: its depths share one fifth, in the data's own proportions, here two to one.
    last = drawn_depths(chains, settings, 4, batches=60)
    np.testing.assert_allclose(last[1:5] / last.sum(), 1 / 5, atol=0.02)
    np.testing.assert_allclose(last[5:] / last.sum(), (2 / 15, 1 / 15), atol=0.02)


def test_a_replaying_mixture_is_the_stages_own_depth_and_a_share_of_all_earlier_ones(chains):
    third = drawn_depths(chains, CurriculumSettings(), 2)
    np.testing.assert_allclose(third[1:4] / third.sum(), (0.3 * 2 / 3, 0.3 / 3, 0.7), atol=0.02)
    first = drawn_depths(chains, CurriculumSettings(), 0)
    assert first.sum() == first[1]


def test_problems_are_drawn_as_the_mixture_says_and_replayed_ones_as_they_always_were(chains):
    plan, replay, equal = stages(CurriculumSettings()), CurriculumSettings(), CurriculumSettings(mixture="equal")
    drawn = draw_problems(chains.mixture(plan[3], equal), 4000, np.random.default_rng(0))
    np.testing.assert_allclose(np.bincount([trace.depth for _, trace in drawn])[1:] / 4000, 1 / 4, atol=0.03)
    assert all(chain.depth == trace.depth for chain, trace in drawn)
    # In earlier versions a binomial number was replayed.
    rng, stage = np.random.default_rng(1), plan[2]
    own, earlier = chains.of_stage(stage), chains.before(stage)
    again = rng.binomial(6, 0.3)
    known = [
        (group.encoded[i], group.traces[i])
        for group, number in ((own, 6 - again), (earlier, again))
        for i in rng.choice(len(group.encoded), number, replace=len(group.encoded) < number)
    ]
    assert draw_problems(chains.mixture(stage, replay), 6, np.random.default_rng(1)) == known
    assert 0 < again < 6


def test_a_curriculum_of_stages_with_few_problems_is_warned_of():
    few = {"1": FEW_PROBLEMS, "2": FEW_PROBLEMS - 1, "3+": 41}
    line = few_problems(few, CurriculumSettings())
    assert "stage 3+ has 41 training problems" in line
    assert "set curriculum.enabled=False" in line
    assert "\n" not in line
    assert few_problems({"1": FEW_PROBLEMS, "2+": 10**4}, CurriculumSettings()) == ""
    assert few_problems({"1+": 41}, CurriculumSettings(enabled=False)) == ""


@pytest.mark.parametrize(
    "changes", [{"depths": ()}, {"depths": (0, 1)}, {"replay": 1.0}, {"validate_every": 0}, {"solved_share": 1.1}]
)
def test_impossible_settings_are_refused(changes):
    with pytest.raises(ValueError, match=next(iter(changes))):
        CurriculumSettings(**changes)
