"""Stages by reasoning depth: what each trains on, how long it may take, and what ends it. Plain Python, no arrays."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar, Literal

from rtd_jax.base.settings import check_ranges

EndsBy = Literal["coherence", "solved", "share"]
EndedBy = Literal["threshold", "plateau", "budget"]
# Training problems of a stage: with fewer a run says that its stages may do harm. In docs/study.md some 40 did on the
# word problems, and with 500 on the cups no harm was certain; nothing between was tried.
FEW_PROBLEMS = 100


@dataclass(frozen=True)
class CurriculumSettings:
    """The schedule from one-step problems to long chains."""

    # Settings that are read only where something is measured on validation chains: the coherence loss, the chains that
    # are solved, or either.
    FOR_COHERENCE: ClassVar = ("threshold_factor", "calibration_shots")
    FOR_SOLVED: ClassVar = ("solved_share", "teacher_solves")
    FOR_EITHER: ClassVar = (
        *("validate_every", "validation_chains", "min_updates"),
        *("plateau_patience", "plateau_tolerance"),
    )
    enabled: bool = True  # False: one stage with all depths at once (the article's ablation)
    depths: tuple[int, ...] = (1, 2, 3, 4, 5)  # reasoning steps, one stage each; the last is open (5 means 5 and more)
    mixture: Literal["replay", "equal"] = "replay"  # of depths in a stage; equal: those up to its own have equal shares
    replay: float = 0.3  # share of chains drawn from the earlier stages' depths
    ends_by: EndsBy = "coherence"  # what ends a stage: coherence loss, or chains solved, on validation; equal shares
    threshold_factor: float = 1.0  # x the teacher's own coherence loss under another context
    calibration_shots: int = 1  # solved problems put before the prompt to change the teacher's context
    solved_share: float = 0.9  # x the share of the validation problems that the teacher solves
    teacher_solves: float = 0.0  # share of them that the teacher solves; 0: measured, which needs the teacher online
    validate_every: int = 100  # updates
    validation_chains: int = 128  # per stage: read for the coherence loss, or problems to solve
    min_updates: int = 0  # before a stage may end by threshold or plateau
    plateau_patience: int = 5  # validations without improvement; 0 switches the plateau rule off
    plateau_tolerance: float = 0.02  # relative improvement that counts
    spend_budget: bool = True  # the last stage trains to the last update, so that the cosine reaches its end

    def __post_init__(self) -> None:
        check_ranges(self, depths="[1, 1000]", validate_every="[1, 1e9]", validation_chains="[1, 1e7]")
        check_ranges(self, threshold_factor="[0, 1e6]", calibration_shots="[0, 100]", min_updates="[0, 1e9]")
        check_ranges(self, replay="[0, 1)", plateau_patience="[0, 1e9]", plateau_tolerance="[0, 1)")
        check_ranges(self, solved_share="[0, 1]", teacher_solves="[0, 1]")
        if not self.depths or list(self.depths) != sorted(set(self.depths)) or self.depths[0] < 1:
            raise ValueError(f"depths is {self.depths}; give increasing step counts, e.g. (1, 2, 3, 4, 5)")

    @property
    def by_coherence(self) -> bool:
        """Whether the coherence loss on validation chains can end a stage before its budget is spent."""
        return self.enabled and self.measures == "coherence" and bool(self.threshold_factor or self.plateau_patience)

    @property
    def measures(self) -> Literal["coherence", "solved"] | None:
        """What is measured on a stage's validation chains; None where nothing is."""
        if self.ends_by == "share" or (self.ends_by == "solved" and not self.enabled and self.spend_budget):
            return None  # solving problems costs much more than reading chains, and would end nothing there
        return self.ends_by

    @property
    def solves_with_teacher(self) -> bool:
        """Whether the teacher solves validation problems at the start of each stage."""
        return self.measures == "solved" and not self.teacher_solves

    def unread_settings(self) -> dict[str, str]:
        unread: dict[str, str] = {}
        why = f"curriculum.ends_by is {self.ends_by!r}"
        if self.ends_by == "solved" and self.measures is None:
            why = "curriculum.enabled is False, and the one stage trains to the last update"
        if self.measures != "coherence":
            unread |= dict.fromkeys(self.FOR_COHERENCE, why)
        if self.measures != "solved":
            unread |= dict.fromkeys(self.FOR_SOLVED, why)
        if self.measures is None:
            unread |= dict.fromkeys(self.FOR_EITHER, why)
        if self.ends_by == "share":
            unread["spend_budget"] = why
        if not self.plateau_patience:
            unread["plateau_tolerance"] = "curriculum.plateau_patience is 0"
        if self.mixture == "equal":
            unread["replay"] = "curriculum.mixture is 'equal'"
        if not self.enabled:
            unread |= dict.fromkeys(("depths", "mixture", "replay"), "curriculum.enabled is False")
        if not self.enabled and self.spend_budget:
            names = ("min_updates", "plateau_patience", "plateau_tolerance")
            unread |= dict.fromkeys(names, "curriculum.enabled is False, and the one stage trains to the last update")
        return unread


@dataclass(frozen=True)
class Stage:
    """Depths `low` to `high`, both included; the last stage is open (`high` is None). See `Chains.mixture` too."""

    index: int
    low: int
    high: int | None

    @property
    def is_last(self) -> bool:
        return self.high is None

    @property
    def name(self) -> str:
        """ "3", "5+", or "1-4" for a stage of several depths."""
        if self.high is None:
            return f"{self.low}+"
        return str(self.low) if self.low == self.high else f"{self.low}-{self.high}"

    def holds(self, depth: int) -> bool:
        return self.low <= depth and (self.high is None or depth <= self.high)


def stages(settings: CurriculumSettings) -> list[Stage]:
    """The stages in order; without a curriculum, one that holds every depth.

    A stage holds the depths above those of the one before it, up to its own: depths (2, 4) give 1-2 and 3+.
    """
    depths = settings.depths if settings.enabled else (1,)
    lows, highs = (1, *(depth + 1 for depth in depths[:-1])), (*depths[:-1], None)
    return [Stage(i, low, high) for i, (low, high) in enumerate(zip(lows, highs, strict=True))]


def stage_budget(total_updates: int, spent: int, stage: Stage, stage_count: int) -> int:
    """Updates that a stage may spend: an equal share of what is left, so later stages get what earlier ones saved."""
    return math.ceil((total_updates - spent) / (stage_count - stage.index))


@dataclass
class StageRecord:
    """What happened in a stage; written into its checkpoint and into report.json."""

    depth: str
    threshold: float | None  # ends the stage: a coherence loss of at most, or a share of chains solved of at least
    teacher_coherence: float | None  # the teacher against itself under another context; threshold = factor x this
    budget: int  # updates
    updates: int = 0
    coherence: float | None = None  # last validation; None before the first
    reached_threshold_at: int | None = None  # updates into the stage, at the validation that first met it
    ended_by: EndedBy | None = None
    validations: list[tuple[int, float]] = field(default_factory=list)  # (updates into the stage, what was measured)
    ends_by: EndsBy = "coherence"
    teacher_solved: float | None = None  # share of the validation problems; threshold = solved_share x this
    solved: float | None = None  # share that the student solved at the last validation; None before the first

    @property
    def measured(self) -> float | None:
        """What the last validation measured; None before the first."""
        return self.solved if self.ends_by == "solved" else self.coherence

    @property
    def is_validated(self) -> bool:
        """Whether a validation belongs to the update at which the stage stands."""
        return bool(self.validations) and self.validations[-1][0] == self.updates

    def to_dict(self) -> dict[str, Any]:
        """The record as JSON; one of the coherence loss has the keys that it always had."""
        found = asdict(self)
        new = ("ends_by", "teacher_solved", "solved") if self.ends_by == "coherence" else ()
        return {key: value for key, value in found.items() if key not in new}

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> "StageRecord":
        """The record of a dict that `to_dict` made and that went through JSON."""
        return cls(**{**value, "validations": [(int(u), float(c)) for u, c in value["validations"]]})


def open_record(stage: Stage, settings: CurriculumSettings, teacher: float | None, budget: int) -> StageRecord:
    """The record of a stage that begins.

    Args:
      teacher: the teacher's own coherence loss or share of chains solved, whichever is measured; None where none is.
      budget: updates.
    """
    if settings.measures == "coherence":
        coherence = teacher or 0.0
        return StageRecord(stage.name, settings.threshold_factor * coherence, coherence, budget)
    # Where the teacher solves nothing, every student has reached a share of it: no threshold then.
    threshold = settings.solved_share * (teacher or 0.0) or None
    ends_by = settings.measures or "share"
    return StageRecord(stage.name, threshold, None, budget, ends_by=ends_by, teacher_solved=teacher)


def record_validation(record: StageRecord, value: float) -> None:
    """Adds what a validation after `record.updates` updates of the stage measured."""
    if record.ends_by == "solved":
        record.solved = value
    else:
        record.coherence = value
    record.validations.append((record.updates, value))
    if _is_reached(record) and record.reached_threshold_at is None:
        record.reached_threshold_at = record.updates


def reason_to_end(record: StageRecord, stage: Stage, settings: CurriculumSettings) -> EndedBy | None:
    """Which of the three conditions ends the stage now, if any. The threshold goes before the others."""
    may_end_early = record.updates >= settings.min_updates and not (stage.is_last and settings.spend_budget)
    if may_end_early and record.is_validated and _is_reached(record):
        return "threshold"
    if record.updates >= record.budget:
        return "budget"
    if may_end_early and record.is_validated and _has_plateaued(record, settings):
        return "plateau"
    return None


def few_problems(problems: Mapping[str, int], settings: CurriculumSettings) -> str:
    """A warning where stages have too few training problems of their own; "" where they have enough.

    Args:
      problems: of each stage, by its name.
    """
    if not settings.enabled or min(problems.values()) >= FEW_PROBLEMS:
        return ""
    stage = min(problems, key=lambda name: problems[name])
    return (
        f"curriculum stage {stage} has {problems[stage]} training problems; stages of some 40 did great harm in "
        "docs/study.md: set curriculum.enabled=False to train on all depths at once"
    )


def _is_reached(record: StageRecord) -> bool:
    """Whether the last validation met the threshold."""
    if record.threshold is None:
        return False
    value = record.validations[-1][1]
    if record.ends_by == "solved":
        return value >= record.threshold - 1e-9  # shares of counts: 0.9 x 0.75 need not round to 27 / 40
    return value <= record.threshold


def _has_plateaued(record: StageRecord, settings: CurriculumSettings) -> bool:
    """Whether the last `plateau_patience` validations are no better than those before, by `plateau_tolerance`.

    As long as no problem was solved there is no plateau: what is learned suddenly shows nothing before.
    """
    patience, values = settings.plateau_patience, [value for _, value in record.validations]
    if not patience or len(values) <= patience:
        return False
    recent, before = values[-patience:], values[:-patience]
    if record.ends_by == "solved":
        return max(recent) < max(before) * (1.0 + settings.plateau_tolerance)
    return min(recent) > min(before) * (1.0 - settings.plateau_tolerance)
