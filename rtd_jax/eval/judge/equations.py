r"""Reads the equations of a solution's text and evaluates both sides exactly.

A side is a number, or linear in one unknown; anything else (a name instead of a number, two unknowns, a clock time, a
place such as "6th") has no value and is never called wrong. Units and remarks beside numbers ("5 boxes", "(per day)")
are passed over, so `8 topaz * 1 inch = 8 inches` is read as 8 * 1 = 8.
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction

from rtd_jax.eval.judge.sides import UNITS, Side, first_side, last_side
from rtd_jax.eval.judge.tokens import Token, tokens

_CENTS = {"cent", "cents", "penny", "pennies"}


@dataclass(frozen=True, slots=True)
class Equation:
    """Two sides with `=` or `≈` between."""

    left: Side
    right: Side
    is_rounded: bool  # said to be approximate
    units: frozenset[str]  # of "percent", "cents" and "converted" (two units of one kind), what it speaks of
    start: int
    end: int


def equations(text: str) -> list[Equation]:
    """The equations of a text, in order; of `a = b = c` both."""
    return [equation for sentence in _sentences(tokens(text)) for equation in _equations(sentence)]


def amount(text: str) -> Fraction | None:
    """The number that a text begins with, computed where it is an expression: "-5 degrees", "3/4", "2 * 10"."""
    sentence = next(_sentences(tokens(text)), [])
    remark = next((i for i, token in enumerate(sentence) if i and token.kind == "(" and token.is_spaced), len(sentence))
    value = (first_side(sentence).value or first_side(sentence[:remark]).value) if sentence else None
    return None if value is None or value.unknown else value.constant


def solution(equation: Equation) -> tuple[str, Fraction] | None:
    """(unknown, value) where an equation in one unknown has one solution."""
    left, right = equation.left.value, equation.right.value
    if left is None or right is None or (left.unknown and right.unknown and left.unknown != right.unknown):
        return None
    slope = left.slope - right.slope
    return (left.unknown or right.unknown, (right.constant - left.constant) / slope) if slope else None


def _sentences(found: Sequence[Token]) -> Iterator[list[Token]]:
    """Runs of tokens between breaks. A line that begins with `=` goes on with the one before."""
    run: list[Token] = []
    for i, token in enumerate(found):
        if token.kind == "break":
            following = next((later for later in found[i + 1 : i + 4] if later.kind != "break"), None)
            if token.text == "line" and following is not None and following.kind == "equals" and run:
                continue
            if run:
                yield run
            run = []
        else:
            run.append(token)
    if run:
        yield run


def _equations(sentence: Sequence[Token]) -> Iterator[Equation]:
    places = [i for i, token in enumerate(sentence) if token.kind == "equals"]
    if not places:
        return
    words = {token.text for token in sentence if token.kind == "word"}
    spoken = {"percent"} if words & {"percent", "percentage"} else set()
    rounded = any(word.startswith(("approx", "round", "about", "nearest", "roughly", "almost")) for word in words)
    cuts = [-1, *places, len(sentence)]
    sides = [sentence[a + 1 : b] for a, b in itertools.pairwise(cuts)]
    for i, place in enumerate(places):
        left, right = last_side(sides[i]), first_side(sides[i + 1])
        own = {token.text for token in (*sides[i], *sides[i + 1]) if token.kind in ("word", "operator")}
        converted = {word.rstrip("s") for word in own} & UNITS.keys()
        units = spoken | ({"converted"} if len({UNITS[unit] for unit in converted}) < len(converted) else set())
        units = units | ({"percent"} if "%" in own else set()) | ({"cents"} if own & _CENTS else set())
        is_rounded = rounded or sentence[place].text == "approximately"
        start = left.start if left.start >= 0 else sentence[place].start
        end = right.end if right.end >= 0 else sentence[place].end
        yield Equation(left, right, is_rounded, frozenset(units), start, end)
