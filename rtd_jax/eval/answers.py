"""Reading results out of text: what a step concludes, what a solution answers, and when two answers are the same.

A reference and a reply are read by the same functions, so that a reference's own text is always judged right. Numbers
are compared as exact fractions after dropping thousands separators, currency signs and a sentence's full stop, so
"18.0" equals "18" and "1,000" equals "1000". `strict_answer` and `flexible_answer` are the two GSM8K readings of
lm-evaluation-harness (`lm_eval/tasks/gsm8k/gsm8k.yaml`); the same model can differ by sixty points between them, so
both are always reported. They cannot read "3/4" or "$5" after `####`; `answer_matches` looks in the same places, and
can.
"""

import re
import threading
import unicodedata
from fractions import Fraction
from typing import NamedTuple

from rtd_jax.data.schemas.math import last_box
from rtd_jax.data.trace import Problem, Trace, stated_answer

_STRICT = re.compile(r"#### (\-?[0-9\.\,]+)")
_FLEXIBLE = re.compile(r"(-?[$0-9.,]{2,})|(-?[0-9]+)")
_END_OF_FORMULA = re.compile(r"\.?\$+[.,]*")
_MARK = re.compile(r"<<((?:(?!<<).)*?)>>")  # without another "<<" in it: of many, each would be read to the end
# A sign counts only where it cannot be a subtraction: "10-3" ends in 3, "(-3" and "= -3" end in -3.
_NUMBER = re.compile(r"(?:(?<![\w)\]%.])[-−])?\$?(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|(?<![\w.])\.\d+)")
_FRACTION = re.compile(rf"{_NUMBER.pattern}(?:/\d+)?")
_VULGAR = {c: unicodedata.normalize("NFKC", c).replace("⁄", "/") for c in "¼½¾⅐⅑⅒⅓⅔⅕⅖⅗⅘⅙⅚⅛⅜⅝⅞"}
_ALIKE = str.maketrans(  # characters that stand for an ASCII one, each for one
    dict.fromkeys("\u2212\ufe63\u2013", "-")  # minus signs, and the dash that is typed for one
    | dict.fromkeys("\u00a0\u2007\u2009\u202f", " ")  # spaces between groups of digits
    | {chr(code): chr(code - 0xFEE0) for code in range(0xFF01, 0xFF5F)}  # full-width forms
)
_CURRENCY = r"\\?[$€£¥]"
_GROUPED = re.compile(r"(?<!\d)\d{1,3}(?: \d{3})+(?![\d/])")
_PARSED = re.compile(r"(-?)(?:(\d+) (?=\d+/))?((?:\d+(?:\.\d*)?|\.\d+)(?:[eE][-+]?\d{1,2})?)(?:/(\d+))?")
# A number in running text, as `parse_number` reads it: "-$1,234.50", "1 000", "3/4", "3 1/2", "½", "2e3".
_WRITTEN = re.compile(
    rf"(?:(?<![\w)\]%.])- ?)?(?:{_CURRENCY} ?)?-?"
    rf"(?:(?:\d+ ?)?[{''.join(_VULGAR)}]|(?:\d+ (?=\d+ ?/ ?\d))?"
    r"(?:(?:\d{1,3}(?:[ ,]\d{3})+(?!\d)|\d+)(?:\.\d+)?(?:[eE][-+]?\d{1,2}(?!\w))?|(?<![\w.])\.\d+)(?: ?/ ?\d+)?)"
)
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
    """The exact value of "1,234.50", "$18.", "-3", ".5", "3/4", "3 1/2", "1 000" or "1e3"; None for anything else.

    Commas, currency signs and full stops at the end are dropped first.
    """
    text = text[: _MAX_CHARACTERS + 1].translate(_ALIKE)
    for character, fraction in _VULGAR.items():
        text = text.replace(character, f" {fraction}")
    text = re.sub(rf"{_CURRENCY}|,", "", text)
    text = re.sub(r" */ *", "/", " ".join(text.split())).rstrip(". ")
    text = _GROUPED.sub(lambda groups: groups[0].replace(" ", ""), text)
    written = _PARSED.fullmatch(re.sub(r"^- ", "-", text))
    if len(text) > _MAX_CHARACTERS or not written:
        return None
    sign, whole, numerator, denominator = written.groups()
    try:
        value = int(whole or 0) + Fraction(numerator) / Fraction(denominator or 1)
    except ZeroDivisionError:
        return None
    return -value if sign else value


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


def _stated_number(stated: str) -> Fraction | None:
    """The number on a `####` line: the whole of it, or what it begins with ("12 apples")."""
    whole = parse_number(stated)
    begin = None if whole is not None else _WRITTEN.match(stated.translate(_ALIKE))
    return parse_number(begin[0]) if begin else whole


def _last_numbers(text: str) -> list[Fraction | None]:
    """The last number of a text: what the harness reads, and what is written there if it cannot read that ("3/4")."""
    # The end of a formula, "$." after "$\boxed{5}", is a number to the harness, and would hide the one before it.
    harness = [match for match in _FLEXIBLE.finditer(text) if not _END_OF_FORMULA.fullmatch(match[0])]
    written = list(_WRITTEN.finditer(text.translate(_ALIKE)))
    last = written[-1] if written else None
    if last and harness and not (last.start() <= harness[-1].start() < last.end() or last.start() >= harness[-1].end()):
        last = None  # a part of what the harness reads, which takes the sign of a subtraction for the number's
    return [parse_number(match[0]) for match in (harness[-1] if harness else None, last) if match]


def states_number(text: str, *, is_strict: bool) -> bool:
    """Whether a text states any number: on its `####` line, or, read flexibly, anywhere."""
    is_stated = _stated_number(stated_answer(text)) is not None
    return is_stated or (not is_strict and any(number is not None for number in _last_numbers(text)))


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
    answer, strict = trace.answer.strip(), states_right_answer(trace, text)
    if not answer:
        return AnswerMatch(strict, strict)
    if is_expression(trace):
        verified = same_expression(text, answer)
        return AnswerMatch(strict, strict or _same(last_box(text), answer) or verified, verified)
    if (number := parse_number(answer)) is not None:
        return AnswerMatch(strict, number in _last_numbers(text))
    if (verdict := _YES_NO.get(answer.lower())) is not None:
        words = re.findall(r"\b(yes|no|true|false)\b", text.lower())
        return AnswerMatch(strict, bool(words) and _YES_NO[words[-1]] == verdict)
    # Lower-case letters and the article "A" would be read as choices: only capitals that stand as one.
    letters = re.findall(r"\(([A-H])\)|(?:\b(?:answer|choice|option)(?: is)?:? *|#### *)([A-H])\b|\b([B-H])\b", text)
    last = "".join(letters[-1]) if letters else ""
    return AnswerMatch(strict, last == answer)


def states_right_answer(trace: Trace | Problem, text: str) -> bool:
    """The strict reading of `answer_matches` alone, which takes no time."""
    answer = trace.answer.strip()
    if not answer:
        return _ends_in_step(text, trace.steps[-1])
    stated = stated_answer(text)
    if is_expression(trace):
        box = last_box(text)
        if not trace.final and box is not None:
            return _same(box, answer)  # where the reference has its answer, a reply's is looked for first
        phrase_or_line = stated or (phrase[1].strip() if (phrase := _MINERVA.search(text)) else "")
        return _same(phrase_or_line, answer) or (not phrase_or_line and _same(box, answer))
    if (number := parse_number(answer)) is not None:
        return _stated_number(stated) == number
    if (verdict := _YES_NO.get(answer.lower())) is not None:
        return _YES_NO.get(stated.rstrip(".").lower()) == verdict
    return stated.strip("().") == answer


def _ends_in_step(text: str, step: str) -> bool:
    """Whether a text concludes, in its number or else in words, as its reference's last step of one or more lines."""
    count = len([line for line in step.splitlines() if line.strip()])
    lines = " ".join([line for line in text.splitlines() if line.strip()][-count:])
    result = step_result(step)
    return _plain(lines) == _plain(step) if result is None else step_result(lines) == result


def _harness_form(text: str) -> str:
    for ignored in (",", r"\$", r"(?s).*#### ", r"\.$"):
        text = re.sub(ignored, "", text)
    return text.lower()


def _same(stated: str | None, answer: str) -> bool:
    return stated is not None and _plain(stated) == _plain(answer)


def _plain(text: str) -> str:
    """Text in lower case, without the LaTeX that changes only how it is set."""
    text = re.sub(r"\\(?:left|right|[!,;: ])|[$\s]", "", text)
    inner = last_box(text)
    return (inner if inner is not None else text).replace("dfrac", "frac").replace("tfrac", "frac").rstrip(".").lower()
