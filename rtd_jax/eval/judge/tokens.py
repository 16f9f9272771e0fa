r"""Splits a solution's text, plain or LaTeX, into what matters for its arithmetic: numbers, operators, words, breaks.

Time is linear in the text. LaTeX is read, not rewritten: `\frac`, `\times`, `\text{...}`, `\$`, `\%`, `\boxed` and the
marks of formulas are tokens, or nothing. A calculator mark repeats the equation before it ("8*1=<<8*1=8>>8") and is
left out; where there is none ("in all: <<8*1=8>>8"), it is the equation.
"""

import functools
import re
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Literal

Kind = Literal["number", "operator", "(", ")", "fraction", "word", "unknown", "equals", "break", "other"]

_MAX_DIGITS = 40  # a longer number is a model stuck in a loop
_UNITS = {"m", "g", "h", "s", "l", "L", "km", "kg", "cm", "mm", "ft", "lb", "oz"}
_VULGAR = {
    "½": (1, 2), "⅓": (1, 3), "⅔": (2, 3), "¼": (1, 4), "¾": (3, 4), "⅕": (1, 5), "⅖": (2, 5), "⅗": (3, 5), "⅘": (4, 5),
    "⅙": (1, 6), "⅚": (5, 6), "⅛": (1, 8), "⅜": (3, 8), "⅝": (5, 8), "⅞": (7, 8),
}  # fmt: skip
_OPERATORS = {
    "+": "+", "-": "-", "−": "-", "–": "-", "*": "*", "×": "*", "·": "*", "⋅": "*", "∗": "*", "/": "/", "÷": "/",
    "^": "^", r"\times": "*", r"\cdot": "*", r"\ast": "*", r"\div": "/", "**": "*",
}  # fmt: skip
_BEGINS_WITH_NUMBER = re.compile(r"\\\w+\s?\{\s*-?(?:\\?\$)?\s?\d")  # \text{18 eggs}
_TOKEN = re.compile(
    r"""
    (?P<mark><<[^<>\n]{0,200}>>)
  | (?P<item>(?m:^)[ \t]*(?:\(?\d{1,2}\)|\(?[a-h]\)|[•▪◦])(?=\s+[^\s+\-*/×÷=]))
  | (?P<words>\\(?:text|mathrm|mathbf|textbf|textit|textrm|mbox|operatorname)\s?\{[^{}]{0,400}\})
  | (?P<nothing>\\(?:left|right|displaystyle|quad|qquad|big|Big|bigg|Bigg)(?![A-Za-z])
      |\\[,;:!\s()]|&|~|\^\{?\\circ\}?|°|(?<![\d)])\*\*|\*\*(?!\s?\d)|(?<=\d)\*\*(?=\W|$)|`|\$(?!\$)|\\\$|[€£¥])
  | (?P<space>\n[ \t]*\n|\n|\\\\|\\\[|\\\]|\$\$|\\(?:begin|end)\{[a-z*]{0,20}\})
  | (?P<blank>[ \t\r\f\v\u00a0\u2009\u202f]+)
  | (?P<arrow>\\(?:implies|Rightarrow|rightarrow|to|le|leq|ge|geq|ne|neq|lt|gt)(?![A-Za-z])|[<>≤≥≠→⇒;:?!"“”|]|=>|->)
  | (?P<equals>\\approx(?![A-Za-z])|\\equiv(?![A-Za-z])|≈|=+)
  | (?P<times>(?<=[\d)\s])[xX](?=\s*(?:\\?\$|\\\()?\s*[\d(.]))
  | (?P<operator>\\(?:times|cdot|ast|div)(?![A-Za-z])|[-+*/^−–×·⋅∗÷])
  | (?P<fraction>\\[dt]?frac(?![A-Za-z]))
  | (?P<percent>\\?%|percent\b)
  | (?P<clock>\d{1,2}:\d{2}(?!\d))
  | (?P<number>
      (?:\d{1,3}(?:(?:,|\{,\}|\\,)\d{3})+(?!\d)|\d{1,3}(?:[ \u00a0\u202f]\d{3})+(?![\d.,]\d)(?!\d)|\d+)(?:\.\d+)?|\.\d+
    )(?P<nth>(?:st|nd|rd|th)\b)?(?P<hyphen>-[A-Za-z]{2})?
  | (?P<vulgar>[½⅓⅔¼¾⅕⅖⅗⅘⅙⅚⅛⅜⅝⅞])
  | (?P<superscript>[⁰¹²³⁴-⁹])
  | (?P<word>[^\W\d_]+(?:['’\-][^\W\d_]+)*\.?(?:_\{?\w{1,20}\}?)?)
  | (?P<open>[({\[])
  | (?P<close>[)}\]])
  | (?P<comma>,)
  | (?P<stop>\.)
  | (?P<command>\\[A-Za-z]+)
  | (?P<other>.)
    """,
    re.VERBOSE | re.DOTALL,
)


@dataclass(frozen=True, slots=True)
class Token:
    """A piece of a text: `text` as the parser compares it, `value` of a number, `start` and `end` in the text."""

    kind: Kind
    text: str
    start: int
    end: int
    value: Fraction | None = None
    decimals: int = 0  # digits after the point
    is_spaced: bool = False  # white space stands before it


@functools.lru_cache(maxsize=256)  # a step's equations and its numbers are read from the same tokens
def tokens(text: str) -> tuple[Token, ...]:
    """The tokens of a text, in order. White space, dollar signs, marks of bold type and of inline formulas are none."""
    found: list[Token] = []
    spaced = True
    at_line_start = True
    for match in _TOKEN.finditer(text):
        name = match.lastgroup or ""
        name = "number" if name in ("nth", "hyphen") else name
        start, end = match.span()
        raw = match[0]
        if name == "mark" and not (found and found[-1].kind == "equals"):
            found.extend(_mark(raw, start))
        if name == "words" and _BEGINS_WITH_NUMBER.match(raw):
            at = raw.index("{") + 1
            found.extend(_inner(raw[at:-1], start + at))
            spaced = at_line_start = False
            continue
        if name in ("blank", "mark", "nothing", "item"):
            spaced = spaced or name == "blank" or raw[-1].isspace()
            continue
        made = _made(name, raw, match, start, end, spaced, at_line_start, found)
        found.extend(made)
        spaced = name == "space"
        at_line_start = name == "space"
    return tuple(found)


def _mark(raw: str, start: int) -> list[Token]:
    """The tokens of a calculator mark that stands for itself, apart from what is around it."""
    return [Token("break", "", start, start), *_inner(raw[2:-2], start + 2), Token("break", "", start, start)]


def _inner(text: str, start: int) -> list[Token]:
    """The tokens of a part of a text that begins at `start`."""
    return [replace(token, start=token.start + start, end=token.end + start) for token in tokens(text)]


def _made(
    name: str, raw: str, match: re.Match, start: int, end: int, spaced: bool, at_line_start: bool, found: list[Token]
) -> list[Token]:
    def token(kind: Kind, text: str = raw, value: Fraction | None = None, decimals: int = 0) -> Token:
        return Token(kind, text, start, end, value, decimals, spaced)

    if name == "number":
        digits = match["number"].replace("{,}", "").replace("\\,", "").replace(",", "")
        digits = re.sub(r"\s", "", digits)
        if len(digits) > _MAX_DIGITS:
            return [token("other")]
        decimals = len(digits.partition(".")[2])
        made = token("number", "nth" if match["nth"] else "", Fraction(digits), decimals)
        return [made, token("word", "-")] if match["hyphen"] else [made]
    if name == "vulgar":
        value = Fraction(*_VULGAR[raw])
        last = found[-1] if found else None
        if last is not None and last.kind == "number" and last.value is not None:  # 3½
            found.pop()
            value += last.value
        return [token("number", "", value, 4)]
    if name == "percent":
        return [token("operator", "%")]
    if name in ("operator", "times"):
        if at_line_start and raw in "-*+–−" and match.string[end : end + 1].isspace():
            return []  # a list's bullet
        return [token("operator", _OPERATORS.get(raw, "*"))]
    if name == "word":
        is_letter = len(raw.rstrip(".")) == 1 or "_" in raw
        before = found[-1].kind if found else ""
        is_unit = spaced and raw.rstrip(".") in _UNITS and before in ("number", ")")
        is_article = raw.rstrip(".") in ("a", "A", "I") and (spaced or before != "number")
        if is_letter and not is_article and not is_unit:
            made_word = token("unknown", raw.rstrip("."))
        else:
            made_word = token("word", raw.rstrip(".").lower())
        return [made_word, token("break", ".")] if raw.endswith(".") else [made_word]
    if name == "equals":
        return [token("equals", "=" if raw[0] == "=" else "approximately")]
    if name == "space":
        return [token("break", "line")]
    if name in ("arrow", "comma", "stop"):
        return [token("break")]
    if name == "open":
        return [token("(")]
    if name == "close":
        return [token(")")]
    if name == "fraction":
        return [token("fraction")]
    if name == "words":
        inner = raw[raw.index("{") + 1 : -1].strip()
        return [token("word", inner.lower())] if inner else []
    if name == "command":
        if raw == r"\boxed":
            return []
        if raw[1:] in ("alpha", "beta", "theta", "lambda", "mu", "pi"):
            return [token("unknown")]
    return [token("other")]
