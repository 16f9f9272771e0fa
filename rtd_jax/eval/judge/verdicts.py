"""What the judge says of a solution."""

from dataclasses import dataclass


@dataclass(frozen=True)
class StepVerdict:
    """Of one step: whether it is right, None where it concludes nothing that could be wrong; and why."""

    right: bool | None
    reason: str = ""


@dataclass(frozen=True)
class Judgement:
    """Of a whole solution.

    `first_error` is the index of the first wrong step, -1 where the chain is right (ProcessBench's label).
    `answer_right` is None where there is no reference.
    """

    first_error: int
    answer_right: bool | None
    steps: tuple[StepVerdict, ...]
