"""Stages, budgets and endings: plain logic, no arrays."""

import json
from dataclasses import asdict

import pytest

from rtd_jax.train.curriculum import (
    CurriculumSettings,
    StageRecord,
    reason_to_end,
    record_validation,
    stage_budget,
    stages,
)


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
    assert StageRecord.from_dict(json.loads(json.dumps(asdict(full)))) == full


@pytest.mark.parametrize("changes", [{"depths": ()}, {"depths": (0, 1)}, {"replay": 1.0}, {"validate_every": 0}])
def test_impossible_settings_are_refused(changes):
    with pytest.raises(ValueError, match=next(iter(changes))):
        CurriculumSettings(**changes)
