"""Stages by reasoning depth: what each trains on, how long it may take, and why it ended. Plain Python, no arrays."""

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

EndedBy = Literal["threshold", "plateau", "budget"]


@dataclass(frozen=True)
class CurriculumSettings:
    """The schedule from one-step problems to long chains."""

    # Settings of the coherence loss on validation chains, which may end a stage.
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
        if not self.depths or list(self.depths) != sorted(set(self.depths)) or self.depths[0] < 1:
            raise ValueError(f"curriculum.depths is {self.depths}; give increasing step counts, e.g. (1, 2, 3, 4, 5)")
        if not 0.0 <= self.replay < 1.0:
            raise ValueError(f"curriculum.replay is {self.replay}; give a share in [0, 1), e.g. 0.3")
        if self.validate_every < 1 or self.validation_chains < 1:
            raise ValueError(
                f"curriculum.validate_every is {self.validate_every} and validation_chains {self.validation_chains}; "
                "both must be at least 1"
            )

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
    """Depths `low` to `high` (inclusive; None: open), replaying `low - 1` and below down to the first stage's depth."""

    index: int
    low: int
    high: int | None
    is_last: bool

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

    A stage holds the depths from the one before it (exclusive) to its own (inclusive): depths (2, 4) give 1-2 and 3+.
    """
    if not settings.enabled:
        return [Stage(0, 1, None, True)]
    count = len(settings.depths)
    lows = [1, *(depth + 1 for depth in settings.depths[:-1])]
    return [
        Stage(i, low, None if i == count - 1 else depth, i == count - 1)
        for i, (low, depth) in enumerate(zip(lows, settings.depths, strict=True))
    ]


def stage_budget(total_updates: int, spent: int, stage: Stage, stage_count: int) -> int:
    """Updates this stage may spend: an equal share of what is left, so that what earlier stages saved passes on."""
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

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, value: dict[str, Any]) -> "StageRecord":
        return cls(**{**value, "validations": [(int(u), float(c)) for u, c in value["validations"]]})


def record_validation(record: StageRecord, coherence: float) -> None:
    """Notes a validation after `record.updates` updates of the stage."""
    record.coherence = coherence
    record.validations.append((record.updates, coherence))
    if coherence <= record.threshold and record.reached_threshold_at is None:
        record.reached_threshold_at = record.updates


def ended(record: StageRecord, stage: Stage, settings: CurriculumSettings) -> EndedBy | None:
    """Which of the three conditions ends the stage now, if any; the threshold is looked at before the others."""
    may_stop = record.updates >= settings.min_updates and not (stage.is_last and settings.spend_budget)
    fresh = bool(record.validations) and record.validations[-1][0] == record.updates
    if may_stop and fresh and record.validations[-1][1] <= record.threshold:
        return "threshold"
    if record.updates >= record.budget:
        return "budget"
    if may_stop and fresh and _plateaued(record.validations, settings):
        return "plateau"
    return None


def _plateaued(validations: list[tuple[int, float]], settings: CurriculumSettings) -> bool:
    if not settings.plateau_patience or len(validations) <= settings.plateau_patience:
        return False
    values = [coherence for _, coherence in validations]
    best_before = min(values[: -settings.plateau_patience])
    best_since = min(values[-settings.plateau_patience :])
    return best_since > best_before * (1.0 - settings.plateau_tolerance)
