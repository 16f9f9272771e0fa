"""Judges the steps of a solution by their arithmetic and by the values that lead to the answer.

Deterministic and without a model, for problems whose answer is a number. What is decided how:

- A step is **false** if an equation in it is: both sides are evaluated exactly (`equations`), and have to be equal up
  to the rounding that the result's digits show or the text says ("approximately", "rounded"); shares and percentages,
  and dollars and cents, are the same amount. So is an equation in one unknown that has another solution than the
  equations before it. A side that has no value (words, two unknowns, a place such as "6th") is never false, nor is an
  equation that the reference has as well.
- A chain is **right** if its answer is, and no step is false: its steps are on a way to the answer, also where the
  reference goes another.
- A chain with another answer is wrong. Its **first wrong step** is the first that is false, or that leaves the way:
  it mentions a number that comes from nowhere (not the problem, the reference, an earlier step, or a constant such as
  12 months), or it concludes a value that is neither the reference's nor one of its sums and products in another order
  (`ways`). A value of the latter kind also leaves the way where it is only used for values that do. If a step only
  evaluates what the step before it set up, the step before is the wrong one. If every value is on the way, the wrong
  step is the one that computes the answer that was given, because a value on the way was taken for it.
- A step **concludes nothing** (None) if none of its equations has a value.

Without a reference only false equations are wrong.
"""

import re
from collections.abc import Sequence, Set
from dataclasses import dataclass, field
from fractions import Fraction
from typing import NamedTuple

from rtd_jax.data.trace import Problem, Trace
from rtd_jax.eval.answers import parse_number
from rtd_jax.eval.judge.equations import Equation, equations, solution
from rtd_jax.eval.judge.final import final_number
from rtd_jax.eval.judge.mentions import mentioned
from rtd_jax.eval.judge.verdicts import Judgement, StepVerdict
from rtd_jax.eval.judge.ways import CONSTANTS, Claim, Values, Ways, claim, claims, operands, ways

RULES = 1  # their version; raise it where a change can change a verdict, which a resumed run must not meet
_RENAMES = re.compile(r"\b(?:let|denote|denoted|represent|represents|assume|suppose|call|if|case|try)\b", re.IGNORECASE)
_WHOLE = re.compile(
    r"\b(?:remainder|left|extra|part of|can't|cannot|only|whole|full|complete|completely|integer)\b", re.IGNORECASE
)
_MIXED = re.compile(r"\d+ and \(?\d+/\d")  # "1 and 1/3"
_SCALES = (Fraction(1), Fraction(100), Fraction(1, 100))
# Between units of one kind: minutes, hours, days, months, inches, feet, ounces, cups, cents, grams.
_CONVERSIONS = tuple(
    scale
    for n in (60, 3600, 24, 1440, 7, 12, 52, 365, 30, 3, 36, 5280, 16, 2000, 2, 4, 8, 10, 100, 1000, 5, 25)
    for scale in (Fraction(n), Fraction(1, n))
)
_MAX_TEXT = 12_000  # characters of a solution that are read; more is a model stuck in a loop
_MAX_USES = 50  # of a value that are looked at


@dataclass
class _Step:
    """What is read from one step."""

    text: str
    equations: list[Equation]
    mentions: list[Fraction]
    false: str = ""  # why an equation of it is false

    def concluded(self) -> list[tuple[Equation, Fraction]]:
        """(equation, the value that it gives to its right side or to its unknown), for those that do."""
        found = []
        for equation in self.equations:
            right, solved = equation.right.value, solution(equation)
            if solved is not None:
                found.append((equation, solved[1]))
            elif right is not None and not right.unknown:
                found.append((equation, right.constant))
        return found


@dataclass
class _Known:
    """What the steps so far have established."""

    rounded: set[Fraction] = field(default_factory=set)  # results that are not exact
    unknowns: dict[str, Fraction] = field(default_factory=dict)  # solutions
    assigned: set[str] = field(default_factory=set)  # unknowns that were set, not solved for


def judge_steps(
    problem: str, steps: Sequence[str], reference: Trace | Problem | None = None, *, is_whole: bool = True
) -> Judgement:
    """Judges a solution that is already cut into steps.

    Args:
      problem: the text of the question.
      steps: the solution's steps. An answer line may be among them.
      reference: a solution whose answer is a number; None where there is none.
      is_whole: whether the solution came to its own end. Of one that was cut off the last number is no answer.

    Returns:
      The index of the first wrong step, whether the answer is right, and a verdict with its reason for each step. The
      answer counts with the last step.
    """
    read, room = [], _MAX_TEXT
    for step in steps:
        text, room = step[:room], max(0, room - len(step))
        read.append(_Step(text, equations(text), mentioned(text)))
    _find_false(read, frozenset() if reference is None else claims(_solution_text(reference)))
    answer = None if reference is None else parse_number(reference.answer)
    if reference is None or answer is None:
        first = next((i for i, step in enumerate(read) if step.false), -1)
        return Judgement(first, None, tuple(_verdict(step, step.false) for step in read))
    stated = final_number("\n".join(steps), is_whole=is_whole)
    is_right = stated is not None and stated == answer
    if is_right:
        first = next((i for i, step in enumerate(read) if step.false), -1)
        return Judgement(first, True, tuple(_verdict(step, step.false) for step in read))
    return _wrong(read, ways(problem, _solution_text(reference)), stated, answer)


def _solution_text(reference: Trace | Problem) -> str:
    return reference.completion if isinstance(reference, Trace) else reference.final


def _verdict(step: _Step, reason: str) -> StepVerdict:
    if reason:
        return StepVerdict(False, reason)
    return StepVerdict(True if step.concluded() else None)


def _find_false(steps: Sequence[_Step], claimed: Set[Claim]) -> None:
    """Notes in each step why it is false, where it is; equations that are `claimed` by the reference are not."""
    known = _Known()
    for step in steps:
        if _RENAMES.search(step.text):
            known.unknowns.clear()
            known.assigned.clear()
        for equation in step.equations:
            reason = _falsity(equation, known, step.text) or _contradiction(equation, known, step.text)
            step.false = step.false or ("" if claim(equation) in claimed else reason)


def _falsity(equation: Equation, known: _Known, text: str) -> str:
    """Why an equation of numbers is false; "" where it holds or says something else than arithmetic."""
    left, right = equation.left, equation.right
    if left.value is None or right.value is None or left.value.unknown or right.value.unknown:
        return ""
    computed, stated = left.value.constant, right.value.constant
    if (left.is_bare and right.is_bare) or ((left.is_bare or left.is_share) and left.is_named):
        return ""  # "1 hour = 60 minutes", "12 months = 165 * 12" and "1/2 cup = 4 ounces" are no computations
    scales = (
        (Fraction(1), *_CONVERSIONS) if "converted" in equation.units else _SCALES if equation.units else _SCALES[:1]
    )
    gap = min(abs(computed * scale - stated) for scale in scales)
    if not gap or "cents" in equation.units:
        return ""  # dollars and cents in one sum are not told apart
    tolerance = Fraction(1, 10**right.decimals) if right.decimals else Fraction(0)
    if equation.is_rounded:
        tolerance = max(tolerance, Fraction(1))
    if any(operand in known.rounded for operand in left.operands):
        tolerance = max(tolerance, abs(stated) / 50, Fraction(1, 2))
    tree = right.value.tree
    if tree is not None and tree.parts and tree.parts[0][0].value == computed:
        return ""  # a running total: "3 * 5 = 15 + 4 = 19"
    if _MIXED.match(text[right.start : right.start + 40]):
        return ""
    is_cut = computed.denominator != 1 and stated.denominator == 1 and gap < 1 and bool(_WHOLE.search(text))
    if gap < tolerance or is_cut:
        known.rounded.add(stated)
        return ""
    return f"{_shown(text[left.start : left.end])} = {_number(stated)} is {_number(computed)}"


def _contradiction(equation: Equation, known: _Known, text: str) -> str:
    """Why an equation in one unknown contradicts those before it; "" where it does not."""
    solved = solution(equation)
    if solved is None or not solved[0]:
        return ""
    unknown, value = solved
    left = equation.left
    if left.is_bare and left.is_named and left.value is not None and not left.value.unknown:
        return ""  # "Section 2 = x + 200"
    is_assignment = left.is_bare and left.value is not None and bool(left.value.unknown)
    if unknown not in known.unknowns or (is_assignment and unknown in known.assigned):
        known.unknowns[unknown] = value  # "x = 4 or x = -4"; "box B = 5", then "box B = 8"
        known.assigned |= {unknown} if is_assignment else set()
        return ""
    before = known.unknowns[unknown]
    if equation.is_rounded or abs(before - value) <= abs(value) / 100:
        return ""
    return f"{_shown(text[equation.start : equation.end])} gives {unknown} = {_number(value)}, before {_number(before)}"


def _wrong(steps: Sequence[_Step], way: Ways, stated: Fraction | None, answer: Fraction) -> Judgement:
    """The judgement of a solution whose answer is wrong."""
    exits = _exits(steps, way)
    reasons = [step.false or out.reason for step, out in zip(steps, exits, strict=True)]
    first = next((i for i, reason in enumerate(reasons) if reason), -1)
    if not steps:
        return Judgement(0, False, ())
    if first < 0:
        first = _answering(steps, way, stated)
        reasons[first] = f"the answer is {_number(answer)}, not {'stated' if stated is None else _number(stated)}"
    elif exits[first].is_computed and not steps[first].false:
        reasons[_set_up(steps, first)] = reasons[first]
        first = _set_up(steps, first)
    return Judgement(first, False, tuple(_verdict(step, why) for step, why in zip(steps, reasons, strict=True)))


class _Exit(NamedTuple):
    """Why a step is not on the way to the answer, "" where it is, and whether for a value that it computes."""

    reason: str = ""
    is_computed: bool = False


def _exits(steps: Sequence[_Step], way: Ways) -> list[_Exit]:
    """For each step whether it leaves the way to the answer, or goes on from a value that did."""
    known = Values(way.results.exact | way.given.exact | CONSTANTS)
    strayed = Values()
    uses: dict[Fraction, list[tuple[int, Fraction]]] = {}  # of each value: (step, what is computed with it)
    for i, step in enumerate(steps):
        for equation, value in [] if step.false else step.concluded():
            for used in set(operands(equation)) - {value}:
                uses.setdefault(used, []).append((i, value))

    def leads_off(value: Fraction, i: int, *allowed: Values) -> bool:
        """Whether a value is used from step `i` on, and only for values that are not on the way."""
        made = [other for step, other in uses.get(value, ())[:_MAX_USES] if step >= i]
        return bool(made) and not any(other in values for other in made for values in allowed)

    def left(i: int, step: _Step) -> _Exit:
        for equation, value in step.concluded():
            is_computed = not (equation.left.is_bare and equation.right.is_bare)
            allowed = (way.results,) if is_computed else (way.results, way.given)
            is_known = any(value in values for values in allowed) or (not is_computed and value in known)
            if not is_known or (value < 0 and value not in way.results):
                told = _shown(step.text[equation.start : equation.end])
                if value < 0 or not (value in way.others or value in way.given):
                    strayed.add(value)
                    return _Exit(f"{_number(value)} is not on a way to the answer ({told})", True)
                if leads_off(value, i, *allowed):
                    strayed.add(value)
                    return _Exit(f"{_number(value)} leads away from the answer ({told})", True)
            known.add(value)
        for value in step.mentions:
            if value in known:
                continue
            if value in strayed or value not in way.others:
                lost = "is not on a way to the answer" if value in strayed else "comes from nowhere"
                strayed.add(value)
                return _Exit(f"{_number(value)} {lost}")
            if leads_off(value, i, way.results, way.given):
                strayed.add(value)
                return _Exit(f"{_number(value)} leads away from the answer")
        return _Exit()

    return [left(i, step) for i, step in enumerate(steps)]


def _set_up(steps: Sequence[_Step], i: int) -> int:
    """The step before `i`, if it ends in a formula without a value, which `i` evaluates; else `i`."""
    if i == 0 or not steps[i - 1].equations:
        return i
    last = steps[i - 1].equations[-1]
    right, left = last.right.value, last.left.value
    is_open = (
        right is None or bool(right.unknown) or (left is not None and bool(left.unknown) and not last.left.is_bare)
    )
    return i - 1 if is_open else i


def _answering(steps: Sequence[_Step], way: Ways, stated: Fraction | None) -> int:
    """The step that computes the answer that was stated.

    That is the last one that computes it in its own way: not as the reference computes this value, and not as an
    earlier step did. If there is none, it is the first one that computes it; then the last that computes anything, or
    the last.
    """
    seen: set[tuple[Fraction, ...]] = set()
    places, fresh, computing = [], [], []
    for i, step in enumerate(steps):
        for equation, value in step.concluded():
            if equation.left.is_bare and equation.right.is_bare:
                continue
            computing.append(i)
            if value == stated:
                places.append(i)
                used = operands(equation)
                fresh += [] if used in seen or used in way.computed else [i]
                seen.add(used)
    if fresh or places:
        return _set_up(steps, fresh[-1] if fresh else places[0])
    said = [i for i, step in enumerate(steps) if stated in step.mentions]
    return said[0] if said else computing[-1] if computing else len(steps) - 1


def _shown(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= 80 else f"{text[:77]}..."


def _number(value: Fraction) -> str:
    return str(value.numerator) if value.denominator == 1 else f"{float(value):.6g}"
