"""Reading results out of text: what a step concludes, what a solution answers, and when two answers are the same.

Numbers are compared as exact fractions after dropping thousands commas, currency signs and a sentence's full stop, so
"18.0" equals "18" and "1,000" equals "1000". The two GSM8K readings, strict and flexible, use the patterns of
lm-evaluation-harness (`lm_eval/tasks/gsm8k/gsm8k.yaml`); the same model can differ by sixty points between them, so
both are always reported.
"""

import re
import threading
from fractions import Fraction
from typing import NamedTuple

from rtd_jax.data.trace import Problem, Trace

_STRICT = re.compile(r"#### (\-?[0-9\.\,]+)")
_FLEXIBLE = re.compile(r"(-?[$0-9.,]{2,})|(-?[0-9]+)")
_MARK = re.compile(r"<<(.*?)>>")
# A sign counts only where it cannot be a subtraction: "10-3" ends in 3, "(-3" and "= -3" end in -3.
_NUMBER = re.compile(r"(?:(?<![\w)\]%.])[-−])?\$?(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|(?<![\w.])\.\d+)")
_FRACTION = re.compile(rf"{_NUMBER.pattern}(?:/\d+)?")
_PARSED = re.compile(r"-?(?:\d+(?:\.\d*)?|\.\d+)(?:/\d+)?")
_ANSWER_LINE = re.compile(r"####[ \t]*(.*)")
_MINERVA = re.compile(r"[Tt]he final answer is(.*?)\.? I hope it is correct")
_YES_NO = {"yes": "yes", "true": "yes", "no": "no", "false": "no"}
_LETTER = re.compile(r"[A-H]")
_MAX_EXPRESSION = 4_000  # characters at the end of a solution in which its answer is looked for
_VERIFY_SECONDS = 5  # for one answer; sympy would work on 9^{9^{9^9}} for ever
_MAX_CHARACTERS = 200  # a number longer than this is a model stuck in a loop; Python refuses to parse 4,300 digits


class AnswerMatch(NamedTuple):
    """Whether the final answer is right: read from where it is stated, and from wherever the text ends.

    `math_verify` is that library's own verdict, which `flexible` contains; None where the answer is no expression.
    """

    strict: bool
    flexible: bool
    math_verify: bool | None = None


def parse_number(text: str) -> Fraction | None:
    """The exact value of "1,234.50", "$18.", "-3", ".5" or "3/4"; None for anything else.

    Commas, dollar signs and full stops at the end are dropped first.
    """
    text = re.sub(r"[,$\s]", "", text[: _MAX_CHARACTERS + 1]).replace("−", "-").rstrip(".")
    if len(text) > _MAX_CHARACTERS or not _PARSED.fullmatch(text):
        return None
    try:
        numerator, _, denominator = text.partition("/")
        return Fraction(numerator) / Fraction(denominator or 1)
    except ZeroDivisionError:
        return None


def result_span(step: str) -> tuple[int, int] | None:
    """Characters [start, end) of what a step concludes; None if it has no number.

    That is the value after the last `=` in the last `<<...>>` mark, else the last number of the step. Signs and
    currency belong to it, a full stop does not.
    """
    marks = list(_MARK.finditer(step))
    if marks and "=" in marks[-1][1]:
        start = marks[-1].start(1) + marks[-1][1].rindex("=") + 1
        values = list(_FRACTION.finditer(step, start, marks[-1].end(1)))
        if values:
            return values[-1].span()
    numbers = list(_NUMBER.finditer(step))
    return numbers[-1].span() if numbers else None


def step_result(step: str) -> Fraction | None:
    """The number that a step concludes (see `result_span`); None if it has none."""
    span = result_span(step)
    return None if span is None else parse_number(step[slice(*span)])


def strict_answer(text: str) -> str | None:
    """The first `#### number` of a solution, as written; None if there is none. Harness filter `strict-match`."""
    match = _STRICT.search(text)
    return match[1] if match else None


def flexible_answer(text: str) -> str | None:
    """The last thing that looks like a number, as written; None if nothing does. Harness filter `flexible-extract`."""
    matches = list(_FLEXIBLE.finditer(text))
    return matches[-1][0] if matches else None


def harness_match(stated: str | None, answer: str) -> bool:
    """`exact_match` of lm-evaluation-harness' gsm8k: texts, without commas, dollar signs and a full stop at the end.

    Stricter than equality of numbers: "18.0" is not "18".
    """
    return stated is not None and _harness_form(stated) == _harness_form(answer)


def same_expression(text: str, answer: str) -> bool:
    """Whether `text` ends in an expression that equals the LaTeX `answer`, by math-verify (sets and intervals too)."""
    from math_verify import parse, verify  # it loads sympy, which takes a second

    # Its timeouts are signals, which work in the main thread only.
    seconds = _VERIFY_SECONDS if threading.current_thread() is threading.main_thread() else None
    gold = parse(f"\\boxed{{{answer}}}", parsing_timeout=seconds)
    stated = parse(text[-_MAX_EXPRESSION:], parsing_timeout=seconds)
    return bool(verify(gold, stated, timeout_seconds=seconds))


def is_expression(trace: Trace | Problem) -> bool:
    """Whether the answer is LaTeX that math-verify judges: it has no `####` line, or is no number, yes/no or letter."""
    answer = trace.answer.strip()
    known = parse_number(answer) is not None or answer.lower() in _YES_NO or bool(_LETTER.fullmatch(answer))
    return bool(answer) and (not trace.final or not known)


def answer_matches(trace: Trace | Problem, text: str) -> AnswerMatch:
    """Whether `text` reaches the answer of `trace`, read strictly and flexibly.

    The kind of the reference answer decides what is looked for: a number, yes/no (true/false), a choice letter, or an
    expression. That is other text, and any answer of a chain without a `####` line (MATH); it is taken from the `####`
    line, the sentence of Minerva's prompt or the last `\\boxed{...}`, and compared without LaTeX's spacing or, if read
    flexibly, by math-verify. A chain that has no answer of its own answers with the result of its last step.
    """
    answer = trace.answer.strip()
    if not answer:
        lines = [line for line in text.splitlines() if line.strip()]
        result = step_result(trace.steps[-1])
        right = bool(lines) and result is not None and step_result(lines[-1]) == result
        return AnswerMatch(right, right)
    line = _ANSWER_LINE.search(text)
    stated = line[1].strip() if line else ""
    if is_expression(trace):
        phrase_or_line = stated or (phrase[1].strip() if (phrase := _MINERVA.search(text)) else "")
        box = boxed(text)
        strict_text = _same(phrase_or_line, answer) or (not phrase_or_line and _same(box, answer))
        verified = same_expression(text, answer)
        return AnswerMatch(strict_text, strict_text or _same(box, answer) or verified, verified)
    if (number := parse_number(answer)) is not None:
        strict, flexible = strict_answer(text), flexible_answer(text)
        return AnswerMatch(
            strict is not None and parse_number(strict) == number,
            flexible is not None and parse_number(flexible) == number,
        )
    if (verdict := _YES_NO.get(answer.lower())) is not None:
        words = re.findall(r"\b(yes|no|true|false)\b", text.lower())
        return AnswerMatch(
            _YES_NO.get(stated.rstrip(".").lower()) == verdict, bool(words) and _YES_NO[words[-1]] == verdict
        )
    # Lower-case letters and the article "A" would be read as choices: only capitals that stand as one.
    letters = re.findall(r"\(([A-H])\)|(?:\b(?:answer|choice|option)(?: is)?:? *|#### *)([A-H])\b|\b([B-H])\b", text)
    last = "".join(letters[-1]) if letters else ""
    return AnswerMatch(stated.strip("().") == answer, last == answer)


def boxed(text: str) -> str | None:
    """What stands in the last `\\boxed{...}`, nested braces included; None if there is none or it does not close."""
    start = text.rfind("\\boxed{")
    if start < 0:
        return None
    start += len("\\boxed{")
    depth = 1
    for end in range(start, len(text)):
        depth += {"{": 1, "}": -1}.get(text[end], 0)
        if depth == 0:
            return text[start:end]
    return None


def _harness_form(text: str) -> str:
    for ignored in (",", r"\$", r"(?s).*#### ", r"\.$"):
        text = re.sub(ignored, "", text)
    return text.lower()


def _same(stated: str | None, answer: str) -> bool:
    return stated is not None and _plain(stated) == _plain(answer)


def _plain(text: str) -> str:
    """Text in lower case, without the LaTeX that changes only how it is set."""
    text = re.sub(r"\\(?:left|right|[!,;: ])|[$\s]", "", text)
    inner = boxed(text)
    return (inner if inner is not None else text).replace("dfrac", "frac").replace("tfrac", "frac").rstrip(".").lower()
