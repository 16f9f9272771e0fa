"""Chain accuracy: is every intermediate result right, in order, and the final answer too?

Perplexity and step accuracy hide compounding errors; this does not. It is measured on text that the model wrote freely,
so one wrong step spoils what follows, as in use.
"""

import dataclasses
from collections.abc import Sequence
from fractions import Fraction

from rtd_jax.eval.answers import Reference, answer_matches, parse_number, step_result


@dataclasses.dataclass(frozen=True)
class ChainScore:
    """How one generated solution fares against its reference.

    `first_error` is the index, among the generated lines, of the first step whose result is not the reference's; the
    answer line counts as the line after the last step, and a missing step counts at the line that stands in its place.
    -1 exactly when `chain_correct`. (ProcessBench's `label`.)
    """

    depth: int  # steps of the reference
    steps: int  # steps generated
    chain_correct: bool
    answer_strict: bool
    answer_flexible: bool
    first_error: int
    math_verify: bool | None = None  # None where the answer is no expression


def split_solution(text: str) -> tuple[list[str], str]:
    """(steps, answer line) of a solution, one line each, blank lines dropped; "" if no line starts with `####`.

    What follows the first answer line is not part of the solution.
    """
    lines = [line.strip() for line in text.splitlines()]
    lines = [line for line in lines if line]
    for i, line in enumerate(lines):
        if line.startswith("####"):
            return lines[:i], line
    return lines, ""


def score_chain(text: str, trace: Reference) -> ChainScore:
    """Scores one generated solution.

    Lines that conclude no number are not compared, on either side. Where the reference answer is not a number (yes/no,
    a choice, an expression) its steps are prose that cannot be compared, and the chain is as right as its answer. The
    answer has to be right in the strict reading: a solution that never states it is unfinished.
    """
    steps, answer_line = split_solution(text)
    # A base model may go on with a problem of its own; the harness stops it by stop words, we by the answer line.
    solution = "\n".join([*steps, answer_line]) if answer_line else text
    strict, flexible, verified = answer_matches(trace, solution)
    first_error = -1
    if comparable(trace):
        first_error = _first_wrong_step(steps, trace.steps)
    if first_error < 0 and not strict:
        first_error = len(steps)
    return ChainScore(
        depth=trace.depth,
        steps=len(steps),
        chain_correct=first_error < 0,
        answer_strict=strict,
        answer_flexible=flexible,
        first_error=first_error,
        math_verify=verified,
    )


def results_right(steps: Sequence[str], reference: Sequence[str]) -> tuple[list[bool | None], list[bool]]:
    """Whether results agree, place by place: for every generated step, and for every reference step that has a result.

    The n-th result of one side is compared with the n-th of the other; steps that conclude no number are None, results
    beyond the reference's wrong, and reference results that were not reached wrong too.
    """
    found, expected = _results(steps), _results(reference)
    of_generated: list[bool | None] = [None] * len(steps)
    of_reference = [False] * len(expected)
    for place, (line, value) in enumerate(found):
        right = place < len(expected) and value == expected[place][1]
        of_generated[line] = right
        if place < len(expected):
            of_reference[place] = right
    return of_generated, of_reference


def comparable(trace: Reference) -> bool:
    """Whether the steps of a reference can be compared: it has no answer of its own, or a number on a `####` line.

    MATH's are prose, also where its answer is a number: two right solutions share no sequence of results.
    """
    return not trace.answer or (bool(trace.final) and parse_number(trace.answer) is not None)


def _first_wrong_step(steps: Sequence[str], reference: Sequence[str]) -> int:
    found = _results(steps)
    expected = _results(reference)
    for (line, value), (_, right) in zip(found, expected, strict=False):
        if value != right:
            return line
    if len(found) > len(expected):
        return found[len(expected)][0]
    return -1 if len(found) == len(expected) else len(steps)


def _results(steps: Sequence[str]) -> list[tuple[int, Fraction]]:
    results = ((i, step_result(step)) for i, step in enumerate(steps))
    return [(i, result) for i, result in results if result is not None]
