"""Stages by reasoning depth: what each trains on, how long it may take, and what ends it. Plain Python, no arrays."""

import math
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from rtd_jax.base.settings import check_ranges

EndedBy = Literal["threshold", "plateau", "budget"]


@dataclass(frozen=True)
class CurriculumSettings:
    """The schedule from one-step problems to long chains."""

    # Settings about the coherence loss on validation chains, which can end a stage.
    READ_BY_VALIDATION: ClassVar = (
        *("threshold_factor", "calibration_shots", "validate_every", "validation_chains", "min_updates"),
        *("plateau_patience", "plateau_tolerance"),
    )
    enabled: bool = True  # False: one stage with all depths at once (the article's ablation)
    depths: tuple[int, ...] = (1, 2, 3, 4, 5)  # reasoning steps, one stage each; the last is open (5 means 5 and more)
    replay: float = 0.3  # share of chains drawn from the earlier stages' depths
    threshold_factor: float = 1.0  # x the teacher's own coherence loss under another context
    calibration_shots: int = 1  # solved problems put before the prompt to change the teacher's context
    validate_every: int = 100  # updates
    validation_chains: int = 128  # per stage
    min_updates: int = 0  # before a stage may end by threshold or plateau
    plateau_patience: int = 5  # validations without improvement; 0 switches the plateau rule off
    plateau_tolerance: float = 0.02  # relative improvement that counts
    spend_budget: bool = True  # the last stage trains to the last update, so that the cosine reaches its end

    def __post_init__(self) -> None:
        check_ranges(self, depths="[1, 1000]", validate_every="[1, 1e9]", validation_chains="[1, 1e7]")
        check_ranges(self, threshold_factor="[0, 1e6]", calibration_shots="[0, 100]", min_updates="[0, 1e9]")
        check_ranges(self, replay="[0, 1)", plateau_patience="[0, 1e9]", plateau_tolerance="[0, 1)")
        if not self.depths or list(self.depths) != sorted(set(self.depths)) or self.depths[0] < 1:
            raise ValueError(f"depths is {self.depths}; give increasing step counts, e.g. (1, 2, 3, 4, 5)")

    @property
    def by_coherence(self) -> bool:
        """Whether the coherence loss on validation chains can end a stage before its budget is spent."""
        return self.enabled and bool(self.threshold_factor or self.plateau_patience)

    def unread_settings(self) -> dict[str, str]:
        unread = {}
        if not self.plateau_patience:
            unread["plateau_tolerance"] = "curriculum.plateau_patience is 0"
        if not self.enabled:
            unread |= dict.fromkeys(("depths", "replay"), "curriculum.enabled is False")
        if not self.enabled and self.spend_budget:
            names = ("min_updates", "plateau_patience", "plateau_tolerance")
            unread |= dict.fromkeys(names, "curriculum.enabled is False, and the one stage trains to the last update")
        return unread


@dataclass(frozen=True)
class Stage:
    """Depths `low` to `high`, both included; the last stage is open (`high` is None). Earlier depths are replayed."""

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
    threshold: float  # coherence at or below which the stage ends
    teacher_coherence: float  # the teacher against itself under another context; threshold = factor x this
    budget: int  # updates
    updates: int = 0
    coherence: float | None = None  # last validation; None before the first
    reached_threshold_at: int | None = None  # updates into the stage, at the validation that first met it
    ended_by: EndedBy | None = None
    validations: list[tuple[int, float]] = field(default_factory=list)  # (updates into the stage, coherence)

    @classmethod
    def from_dict(cls, value: dict[str, Any]) -> "StageRecord":
        """The record of a dict that `dataclasses.asdict` made and that went through JSON."""
        return cls(**{**value, "validations": [(int(u), float(c)) for u, c in value["validations"]]})


def record_validation(record: StageRecord, coherence: float) -> None:
    """Adds the coherence loss of a validation after `record.updates` updates of the stage."""
    record.coherence = coherence
    record.validations.append((record.updates, coherence))
    if coherence <= record.threshold and record.reached_threshold_at is None:
        record.reached_threshold_at = record.updates


def reason_to_end(record: StageRecord, stage: Stage, settings: CurriculumSettings) -> EndedBy | None:
    """Which of the three conditions ends the stage now, if any. The threshold goes before the others."""
    may_end_early = record.updates >= settings.min_updates and not (stage.is_last and settings.spend_budget)
    is_validated = bool(record.validations) and record.validations[-1][0] == record.updates
    if may_end_early and is_validated and record.validations[-1][1] <= record.threshold:
        return "threshold"
    if record.updates >= record.budget:
        return "budget"
    if may_end_early and is_validated and _has_plateaued(record, settings):
        return "plateau"
    return None


def _has_plateaued(record: StageRecord, settings: CurriculumSettings) -> bool:
    patience, values = settings.plateau_patience, [coherence for _, coherence in record.validations]
    if not patience or len(values) <= patience:
        return False
    return min(values[-patience:]) > min(values[:-patience]) * (1.0 - settings.plateau_tolerance)
