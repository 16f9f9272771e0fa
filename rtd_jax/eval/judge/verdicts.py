"""STUB."""

from dataclasses import dataclass


@dataclass(frozen=True)
class StepVerdict:
    right: bool | None
    reason: str


@dataclass(frozen=True)
class Judgement:
    first_error: int
    answer_right: bool | None
    steps: tuple[StepVerdict, ...]
