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
    """A chain of the word problems with each step made wrong with probability `rate`.

    Each step goes on from the value that the step before it states.
    """
    facts = [match for step in trace.steps if (match := _STEP.fullmatch(step))]
    assert len(facts) == trace.depth, trace
    value, place = int(facts[0]["value"]), 0
    steps: list[str] = []
    labels: list[bool | None] = []
    while place < len(facts):
        kinds = []
        if rng.random() < rate:
            kinds = [_wrong_result, _wrong_operand, *([_skipped_fact] if place + 1 < len(facts) else [])]
            rng.shuffle(kinds)
        for kind in [*kinds, _right_step]:
            written = kind(facts, place, value, rng)
            if written is not None:
                break
        else:  # the wrong value has left the numbers that a step can be written with
            break
        text, value, place = written
        steps.append(text)
        labels.append(kind is _right_step)
        place += 1
    return LabelledChain(Trace.of_steps(trace.prompt, steps, "", source=trace.source), tuple(labels))


_Written = tuple[str, int, int]  # the step's text, the value it states, and the place of the fact it used


def _wrong_result(facts: list[re.Match], place: int, value: int, rng: random.Random) -> _Written:
    fact = facts[place]
    right = _apply(value, fact["sign"], int(fact["operand"]))
    middle = value if right is None else right
    near = [middle + sign * distance for distance in (1, 2, 3, 5, 10) for sign in (1, -1)]
    wrong = rng.choice([result for result in near if 0 <= result <= _MAX_RESULT])
    return f"{fact['said']}: <<{value}{fact['sign']}{fact['operand']}={wrong}>>{wrong}.", wrong, place


def _wrong_operand(facts: list[re.Match], place: int, value: int, rng: random.Random) -> _Written | None:
    fact = facts[place]
    if fact["sign"] in "*/":  # "all doubled" says no number
        return None
    operands = [operand for operand in OPERANDS if operand != int(fact["operand"])]
    rng.shuffle(operands)
    for operand in operands:
        said = re.sub(rf"\b{fact['operand']}\b", str(operand), fact["said"])
        written = _write(said, value, fact["sign"], operand, place)
        if written is not None:
            return written
    return None


def _skipped_fact(facts: list[re.Match], place: int, value: int, rng: random.Random) -> _Written | None:
    return _right_step(facts, place + 1, value, rng)


def _right_step(facts: list[re.Match], place: int, value: int, rng: random.Random) -> _Written | None:
    fact = facts[place]
    return _write(fact["said"], value, fact["sign"], int(fact["operand"]), place)


def _write(said: str, value: int, sign: str, operand: int, place: int) -> _Written | None:
    """None where the result cannot be written."""
    result = _apply(value, sign, operand)
    return None if result is None else (f"{said}: <<{value}{sign}{operand}={result}>>{result}.", result, place)


def _apply(value: int, sign: str, operand: int) -> int | None:
    """None where the result is no number from 0 to 99."""
    if sign == "/" and value % operand:
        return None
    result = {"+": value + operand, "-": value - operand, "*": value * operand, "/": value // operand}[sign]
    return result if 0 <= result <= _MAX_RESULT else None
