"""Makes steps of the word problems wrong, in three ways, and labels every step:

- wrong result: the arithmetic of the step is wrong;
- wrong operand: the step says another number than the problem does, and computes rightly with it;
- skipped fact: a fact of the problem is left out, and the next one is applied to the value before it.

A corrupted chain goes on from the value that it wrote. Its later steps are labelled by whether the step *itself* is
right, given the problem and the value that the step before it states: each step is judged by itself, not by whether the
chain can still reach the answer.
"""

import random
import re

from rtd_jax.data.generators.word_problems import OPERANDS
from rtd_jax.data.trace import LabelledChain, Trace

# A step of the word problems: what it says, then "<<value sign operand = result>>result."
_STEP = re.compile(r"(?P<said>.*): <<(?P<value>\d+)(?P<sign>[-+*/])(?P<operand>\d+)=(?P<result>\d+)>>(?P=result)\.")
_MAX_RESULT = 99  # numbers up to here are one token of the bundled tokenizer


def corrupt(trace: Trace, rng: random.Random, rate: float) -> LabelledChain:
    """A generator's chain with each step made wrong with chance `rate`, going on from what was written.

    Raises:
      ValueError: a step that the generator did not write.
    """
    facts = []
    for index, step in enumerate(trace.steps):
        match = _STEP.fullmatch(step)
        if match is None:
            raise ValueError(f"{trace.source}: step {index + 1} is {step!r}; expected one that the generator wrote")
        facts.append(match)
    value = int(facts[0]["value"])
    steps: list[str] = []
    labels: list[bool | None] = []
    place = 0
    while place < len(facts):
        fact, is_right = facts[place], True
        if rng.random() < rate:
            kinds = [_wrong_result, _wrong_operand, *([_skip] if place + 1 < len(facts) else [])]
            rng.shuffle(kinds)
            made = next((found for kind in kinds if (found := kind(facts, place, value, rng)) is not None), None)
        else:
            made = None
        if made is not None:
            text, value, place, is_right = *made, False
        else:
            honest = _written(fact["said"], value, fact["sign"], int(fact["operand"]))
            if honest is None:  # the wrong value has left the numbers that a step can be written with
                break
            text, value = honest
        steps.append(text)
        labels.append(is_right)
        place += 1
    return LabelledChain(Trace.of_steps(trace.prompt, steps, "", source=trace.source), tuple(labels))


_Made = tuple[str, int, int]  # the step's text, the value it states, and the place of the fact it used


def _wrong_result(facts: list[re.Match], place: int, value: int, rng: random.Random) -> _Made | None:
    fact = facts[place]
    right = _apply(value, fact["sign"], int(fact["operand"]))
    middle = value if right is None else right
    options = [middle + sign * d for d in (1, 2, 3, 5, 10) for sign in (1, -1)]
    options = [x for x in options if 0 <= x <= _MAX_RESULT]
    wrong = rng.choice(options)
    return f"{fact['said']}: <<{value}{fact['sign']}{fact['operand']}={wrong}>>{wrong}.", wrong, place


def _wrong_operand(facts: list[re.Match], place: int, value: int, rng: random.Random) -> _Made | None:
    fact = facts[place]
    if fact["sign"] in "*/":  # "all doubled" says no number
        return None
    operands = [x for x in OPERANDS if x != int(fact["operand"])]
    rng.shuffle(operands)
    for operand in operands:
        said = re.sub(rf"\b{fact['operand']}\b", str(operand), fact["said"])
        made = _written(said, value, fact["sign"], operand)
        if made is not None:
            return *made, place
    return None


def _skip(facts: list[re.Match], place: int, value: int, rng: random.Random) -> _Made | None:
    fact = facts[place + 1]
    made = _written(fact["said"], value, fact["sign"], int(fact["operand"]))
    return None if made is None else (*made, place + 1)


def _written(said: str, value: int, sign: str, operand: int) -> tuple[str, int] | None:
    result = _apply(value, sign, operand)
    return None if result is None else (f"{said}: <<{value}{sign}{operand}={result}>>{result}.", result)


def _apply(value: int, sign: str, operand: int) -> int | None:
    """None where the result is no number from 0 to 99."""
    if sign == "/" and value % operand:
        return None
    result = {"+": value + operand, "-": value - operand, "*": value * operand, "/": value // operand}[sign]
    return result if 0 <= result <= _MAX_RESULT else None
