"""Where a solution states its answer, when that is a number."""

import re
from fractions import Fraction

from rtd_jax.data.schemas.math import last_box
from rtd_jax.data.trace import stated_answer
from rtd_jax.eval.answers import parse_number
from rtd_jax.eval.judge.equations import amount, equations
from rtd_jax.eval.judge.mentions import is_computed, mentioned

_SAID = re.compile(r"\banswer(?: to [^.\n]{1,80})?\**\s*(?:is|=|would be|:)\**[:\s]*([^\n]{1,120})", re.IGNORECASE)
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+(?=\S)|\n+")
_MAX_END = 4_000  # characters at the end in which the last number and the last equation are looked for


def final_number(text: str, *, is_whole: bool = True) -> Fraction | None:
    r"""The number that a solution states as its answer; None where it has none.

    It is looked for after `####`, then in the last `\boxed{...}`, then after the last "the answer is"; there the result
    of an equation comes before a single number ("8 * 9 = 72 dollars"). Without any of them it is the last number of the
    text; but where the last sentence repeats the result of the last equation, it is that ("34 hours in 4 weeks" after
    14 + 20 = 34). Of a text that was cut off (`is_whole` False) its last number is none.
    """
    if (value := _number(stated_answer(text))) is not None:
        return value
    box = last_box(text) or ""
    if (value := _number(box)) is not None or is_computed(box):
        return value  # a box with an unknown in it states no number
    if (value := _number(_last_said(text))) is not None:
        return value
    if not is_whole:
        return None
    end = text[-_MAX_END:]
    sentences = _SENTENCE_END.split(end.strip())
    results = equations(end)
    result = results[-1].right.value if results else None
    if result is not None and not result.unknown and result.constant in mentioned(sentences[-1]):
        return result.constant
    numbers = mentioned(end, is_signed=True)
    return numbers[-1] if numbers else None


def _last_said(text: str) -> str:
    said = _SAID.findall(text)
    return said[-1] if said else ""


def _number(place: str) -> Fraction | None:
    if (value := parse_number(place)) is not None:
        return value
    results = [equation.right.value for equation in equations(place)]
    if results and results[-1] is not None and not results[-1].unknown:
        return results[-1].constant
    if (value := amount(place.replace("\\%", "").replace("%", ""))) is not None:  # "40%" answers 40
        return value
    numbers = mentioned(place)
    return numbers[0] if numbers and not is_computed(place) else None
