"""STUB: a step is wrong where it says "wrong", or has an equation of two whole numbers that is false."""

import re
from collections.abc import Sequence

from rtd_jax.data.trace import Trace
from rtd_jax.eval.judge.verdicts import Judgement, StepVerdict


def judge_steps(problem: str, steps: Sequence[str], reference: Trace | None = None) -> Judgement:
    verdicts = []
    for step in steps:
        false = [
            f"{m[0]} is {int(m[1]) + int(m[2])}"
            for m in re.finditer(r"(\d+) \+ (\d+) = (\d+)", step)
            if int(m[1]) + int(m[2]) != int(m[3])
        ]
        verdicts.append(StepVerdict(not false if "=" in step else None, false[0] if false else ""))
    rights = [verdict.right for verdict in verdicts]
    first = rights.index(False) if False in rights else -1
    numbers = re.findall(r"\d+", " ".join(steps))
    right = None if reference is None else bool(numbers) and numbers[-1] == reference.answer
    if first < 0 and right is False:
        first = len(steps) - 1
    return Judgement(first, right, tuple(verdicts))
