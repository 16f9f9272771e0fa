r"""Reads the equations of a solution's text and evaluates both sides exactly.

A side is a number, or linear in one unknown; anything else (a name instead of a number, two unknowns, a clock time, a
place such as "6th") has no value and is never called wrong. Units and remarks beside numbers ("5 boxes", "(per day)")
are passed over, so `8 topaz * 1 inch = 8 inches` is read as 8 * 1 = 8.
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Literal

from rtd_jax.eval.judge.tokens import Token, tokens

_MAX_BITS = 512  # of a numerator or denominator; 9^{9^{9^9}} has no value
_MAX_DEPTH = 40  # of brackets in one another
_MAX_SIDE = 400  # tokens of one side
_MAX_LED = 4  # words between `=` and a number that is still the result: "= a total of 150"
_SPOKEN = {"times": "*", "plus": "+", "minus": "-"}
# Beside a number they change its value, so such a side has none. A share does only before "of" or "as".
_SCALES = {
    "twice", "double", "triple", "dozen", "dozens", "hundred", "thousand", "million", "billion", "squared", "cubed",
    "than", "am", "pm", "a.m", "p.m", "remainder",
}  # fmt: skip
# What each unit measures: of two that measure the same, a sum has no value until one is converted. Without their "s".
UNITS = {
    unit: dimension
    for dimension, units in {
        "time": "second sec minute min hour hr day week month year",
        "money": "dollar cent penny pennie nickel dime quarter",
        "length": "inch inche foot feet yard mile mm cm m km meter metre centimeter kilometer",
        "weight": "gram g kg kilogram ounce oz pound lb ton",
        "volume": "cup pint quart gallon liter litre milliliter ml l",
    }.items()
    for unit in units.split()
}
_CENTS = {"cent", "cents", "penny", "pennies"}
_LABELLED = {"step", "phase", "part", "method", "equation", "case", "day", "week", "year", "player", "option", "round"}
_SHARES = {"half", "third", "thirds", "quarter", "quarters", "fourth", "fourths", "fifth", "fifths", "tenth", "tenths"}


@dataclass(frozen=True, slots=True)
class Tree:
    """A number as it was computed: a leaf, a sum of `parts` (each times its weight), or a product (to its weight)."""

    value: Fraction
    kind: Literal["leaf", "sum", "product"] = "leaf"
    parts: tuple[tuple["Tree", int], ...] = ()


@dataclass(frozen=True, slots=True)
class Linear:
    """`slope * unknown + constant`; a number where `unknown` is ""."""

    constant: Fraction
    slope: Fraction = Fraction(0)
    unknown: str = ""
    tree: Tree | None = field(default=None, compare=False)  # how a number was computed; None with an unknown


@dataclass(slots=True)
class Side:
    """One side of an equation: its value, None where it has none, and what comparing it needs to know."""

    value: Linear | None
    operands: list[Fraction] = field(default_factory=list)  # numbers as written
    parts: list[Fraction] = field(default_factory=list)  # values of the bracketed and partial results
    decimals: int = 0  # most digits after the point of a number in it
    is_bare: bool = True  # one number or one unknown, without an operator
    is_share: bool = False  # one fraction, such as 1/2
    is_named: bool = False  # words stand beside its numbers
    start: int = -1  # of its first and last token in the text; -1 where it was not read
    end: int = -1


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
    value = (_first_side(sentence).value or _first_side(sentence[:remark]).value) if sentence else None
    return None if value is None or value.unknown else value.constant


def is_computed(text: str) -> bool:
    """Whether a text has an operator, a fraction or an unknown in it."""
    return any(token.kind in ("operator", "fraction", "unknown", "other") for token in tokens(text))


def mentioned(text: str, *, is_signed: bool = False) -> list[Fraction]:
    """The numbers that a text mentions, percentages as written; those of list items and of headings are left out.

    With `is_signed` a minus sign that is no subtraction belongs to its number.
    """
    found = tokens(text)
    values = []
    for i, token in enumerate(found):
        if token.kind != "number" or token.value is None:
            continue
        before = found[i - 1] if i else None
        after = found[i + 1] if i + 1 < len(found) else None
        # Of a fraction the parts are not mentioned; its value is.
        if _is_in_fraction(found, i):
            continue
        is_label = before is not None and before.kind == "word" and before.text in _LABELLED
        is_item = (before is None or (before.kind == "break" and before.text == "line")) and (
            after is not None and after.kind in ("break", ")")
        )
        # "m^2" and "m2" name a unit.
        is_exponent = before is not None and (
            (before.kind == "operator" and before.text == "^")
            or (before.kind in ("word", "unknown") and before.text != "-" and not token.is_spaced)
        )
        if not (is_label or is_item or is_exponent):
            values.append(-token.value if is_signed and _has_sign(found, i) else token.value)
    return values


def solution(equation: Equation) -> tuple[str, Fraction] | None:
    """(unknown, value) where an equation in one unknown has one solution."""
    left, right = equation.left.value, equation.right.value
    if left is None or right is None or (left.unknown and right.unknown and left.unknown != right.unknown):
        return None
    slope = left.slope - right.slope
    return (left.unknown or right.unknown, (right.constant - left.constant) / slope) if slope else None


def _has_sign(found: Sequence[Token], i: int) -> bool:
    """Whether the number at `i` has a minus sign of its own: "of -5", not "10 - 5" or "10-5"."""
    if not i or found[i - 1].kind != "operator" or found[i - 1].text != "-" or found[i].is_spaced:
        return False
    return i < 2 or found[i - 2].kind not in ("number", "unknown", ")")


def _is_in_fraction(found: Sequence[Token], i: int) -> bool:
    r"""Whether the number at `i` is a part of `\frac{3}{4}` or of 3/4."""
    around = [found[j] if 0 <= j < len(found) else None for j in (i - 3, i - 2, i - 1, i + 1)]
    if any(t is not None and t.kind == "fraction" for t in around[1:2]):
        return True
    before, after = around[2], around[3]
    if before is not None and before.kind == "(" and i >= 2 and found[i - 2].kind == ")":
        return any(t.kind == "fraction" for t in found[max(0, i - 6) : i])
    slash = [t for t in (before, after) if t is not None and t.kind == "operator" and t.text == "/" and not t.is_spaced]
    return bool(slash)


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
        left, right = _last_side(sides[i]), _first_side(sides[i + 1])
        own = {token.text for token in (*sides[i], *sides[i + 1]) if token.kind in ("word", "operator")}
        converted = {word.rstrip("s") for word in own} & UNITS.keys()
        units = spoken | ({"converted"} if len({UNITS[unit] for unit in converted}) < len(converted) else set())
        units = units | ({"percent"} if "%" in own else set()) | ({"cents"} if own & _CENTS else set())
        is_rounded = rounded or sentence[place].text == "approximately"
        start = left.start if left.start >= 0 else sentence[place].start
        end = right.end if right.end >= 0 else sentence[place].end
        yield Equation(left, right, is_rounded, frozenset(units), start, end)


def _first_side(found: Sequence[Token]) -> Side:
    """What stands right after an `=`."""
    return _Parser(found[:_MAX_SIDE]).first()


def _last_side(found: Sequence[Token]) -> Side:
    """What stands right before an `=`: words and other expressions before it are passed over."""
    return _Parser(found[-_MAX_SIDE:]).last() if len(found) <= _MAX_SIDE else Side(None)


class _NoValue(Exception):
    """A side that cannot be evaluated."""


class _Parser:
    """Recursive descent over the tokens of one side."""

    def __init__(self, found: Sequence[Token]):
        self.found = _spoken(found)
        self.at = 0
        self.units_end = 0  # where the words that were passed over last end
        self.side = Side(None)

    def first(self) -> Side:
        try:
            self._lead()
            led = self.at
            value = self._expression(0)
            if led > _MAX_LED or (led and not self.side.is_bare):
                return Side(None)  # a name that holds a number: "the time to 400 degrees - 5 minutes"
            self._words()
            if self.at < len(self.found):
                following = self.found[self.at]
                # A number after words begins another phrase; right behind another, what it means is not known, and
                # "1 hour 15 minutes" is one amount.
                is_phrase = following.kind in ("number", "(", "fraction", "unknown") and self._after_words()
                before = self.found[self.at - 1]
                if not is_phrase or (following.kind == "number" and before.text.rstrip("s") in UNITS):
                    return Side(None)
            self._place(0)
            self.side.value = value
            return self.side
        except _NoValue:
            return Side(None)

    def last(self) -> Side:
        start = 0
        try:
            while True:
                self.side = Side(None)
                self._lead()
                start = self.at
                value = self._expression(0)
                self._words()
                if self.at == len(self.found):
                    self._place(start)
                    self.side.value = value
                    return self.side
                if not self._after_words() or self.found[self.at].kind not in ("number", "(", "fraction", "unknown"):
                    return Side(None)
        except _NoValue:
            return Side(None)

    def _place(self, start: int) -> None:
        self.side.is_named = self.side.is_named or start > 0  # "5 shirts at $20 = ...": a title with numbers
        self.side.start = self.found[start].start
        self.side.end = self.found[self.at - 1].end

    def _peek(self) -> Token | None:
        return self.found[self.at] if self.at < len(self.found) else None

    def _is_operator(self, *texts: str) -> bool:
        token = self._peek()
        return token is not None and token.kind == "operator" and token.text in texts

    def _lead(self) -> None:
        """Passes over the words before an expression."""
        begin = self.at
        self._words()
        self._refuse_scales(begin)
        if begin < self.at and self._is_operator("+", "*", "/", "^", "%"):
            raise _NoValue  # a name is an operand
        if begin < self.at and self._is_operator("-") and not self._is_sign():
            raise _NoValue

    def _refuse_scales(self, begin: int) -> None:
        said = {token.text for token in self.found[begin : self.at]}
        self.side.is_named = self.side.is_named or bool(said)
        if said & _SCALES or (said & _SHARES and said & {"of", "as"}):
            raise _NoValue

    def _is_tight_slash(self) -> bool:
        after = self.found[self.at + 1] if self.at + 1 < len(self.found) else None
        return (
            self._is_operator("/")
            and not self.found[self.at].is_spaced
            and after is not None
            and after.kind == "number"
            and not after.is_spaced
        )

    def _is_fraction(self) -> bool:
        token = self._peek()
        return token is not None and token.kind == "fraction"

    def _is_sign(self) -> bool:
        """Whether the `-` here is written as a number's sign: spaced before, not after."""
        here = self.found[self.at]
        after = self.found[self.at + 1] if self.at + 1 < len(self.found) else None
        return here.is_spaced and after is not None and after.kind == "number" and not after.is_spaced

    def _words(self) -> None:
        """Passes over words, over brackets that hold no number, and over "/hour" behind a unit."""
        while (token := self._peek()) is not None:
            if token.kind == "word":
                self.at += 1
            elif token.kind == "(" and token.is_spaced and (end := self._remark()) is not None:
                self.at = end
            elif self._is_unit_slash():
                self.at += 2
            elif token.kind == "operator" and token.text == "^" and self._after_words():
                self.at += self._exponent_tokens()  # of a unit: "25 m^2"
            else:
                return
            self.units_end = self.at

    def _exponent_tokens(self) -> int:
        """How many tokens `^2` or `^{2}` has here."""
        after = self.found[self.at + 1 : self.at + 4]
        kinds = [token.kind for token in after]
        return 4 if kinds == ["(", "number", ")"] else 2 if kinds[:1] == ["number"] else 1

    def _is_unit_slash(self) -> bool:
        """Whether `/` and a word follow that belong to a unit: "miles / hour", "$10/day", but not "300 / people"."""
        here = self._peek()
        after = self.found[self.at + 1] if self.at + 1 < len(self.found) else None
        if here is None or here.kind != "operator" or here.text != "/" or after is None or after.kind != "word":
            return False
        if not (here.is_spaced or after.is_spaced):
            return True
        beyond = self.found[self.at + 2] if self.at + 2 < len(self.found) else None
        return self._after_words() and (beyond is None or beyond.kind != "word")

    def _after_words(self) -> bool:
        return self.at > 0 and self.units_end == self.at

    def _remark(self) -> int | None:
        """Where brackets without a number, a single unknown or an operator end that open here."""
        depth = 0
        for i in range(self.at, min(len(self.found), self.at + 60)):
            token = self.found[i]
            if token.kind in ("number", "unknown", "fraction"):
                return None
            depth += (token.kind == "(") - (token.kind == ")")
            if depth == 0:
                return i + 1
        return None

    def _expression(self, depth: int) -> Linear:
        value = self._term(depth)
        while True:
            here = self.at
            self._words()
            if not self._is_operator("+", "-"):
                self._back(here)
                return value
            self._refuse_range()
            is_share, unit = self._ends_in_percent(), self._unit()
            sign = 1 if self.found[self.at].text == "+" else -1
            self.at += 1
            self.side.is_bare = self.side.is_share = False
            other = self._term(depth)
            here = self.at
            self._words()
            if unit and self._unit() and UNITS[unit] == UNITS[self._unit()] and unit != self._unit():
                raise _NoValue  # "1 hour + 15 minutes"
            self.at = here
            if self._ends_in_percent() and not is_share:
                raise _NoValue  # "$20 - 10%" takes a tenth of the amount, or of another
            value = _sum(value, other, sign)
            self._note(value)

    def _back(self, here: int) -> None:
        """Words stay passed over; they are units."""
        del here

    def _refuse_range(self) -> None:
        """Raises where the `-` here stands between two numbers of a title: "weeks 1-2 = ...", "pages 10–20"."""
        if not 0 < self.at < len(self.found) - 1 or not self.side.is_named:
            return
        before, here, after = self.found[self.at - 1 : self.at + 2]
        is_tight = here.text == "-" and not here.is_spaced and not after.is_spaced
        if is_tight and before.value is not None and after.value is not None and before.value < after.value:
            raise _NoValue

    def _unit(self) -> str:
        """The unit that was passed over last; "" without one."""
        text = self.found[self.at - 1].text.rstrip("s") if self.at else ""
        return text if text in UNITS else ""

    def _ends_in_percent(self) -> bool:
        """Whether what was read last is a percentage."""
        at = self.at - 1
        while at >= 0 and self.found[at].kind == "word":
            at -= 1
        return at >= 0 and self.found[at].kind == "operator" and self.found[at].text == "%"

    def _term(self, depth: int) -> Linear:
        is_fraction = self._is_fraction()
        value, is_share = self._factor(depth)
        while True:
            gap = self.at
            self._words()
            token = self._peek()
            if token is None:
                return value
            if self._is_operator("*", "/"):
                self.side.is_share = self.side.is_bare and self._is_tight_slash()
                self.side.is_bare = False
                self.at += 1
                is_loose = token.is_spaced or ((following := self._peek()) is not None and following.is_spaced)
                other, is_share = self._factor(depth)
                if is_loose and self._is_tight_slash():  # "2 cups / 1/4 cup" divides by a quarter
                    self.at += 1
                    other = _quotient(other, self._factor(depth)[0])
                value = _product(value, other) if token.text == "*" else _quotient(value, other)
                self._note(value)
                continue
            words = [word.text for word in self.found[gap : self.at]]
            begins = token.kind in ("number", "(", "fraction", "unknown")
            # "20% of 50" and "1/4 of 20" are products, "5 of 20" is not; 3x, 5(2 + 1) and (2)(3) are.
            if begins and (
                (words in (["of"], ["of", "the"]) and (is_share or _is_share(value)))
                or (not words and token.kind != "number" and (not token.is_spaced or is_fraction))
                or (not words and token.kind == "fraction" and self.found[gap - 1].kind == "number")
            ):
                is_mixed = token.kind == "fraction" and not words and self.found[gap - 1].kind == "number"
                self.side.is_bare = self.side.is_share = False
                other, is_share = self._factor(depth)
                # 2\\frac{1}{2} is two and a half.
                value = _sum(value, other, 1) if is_mixed and _is_share(other) else _product(value, other)
                self._note(value)
                continue
            return value

    def _factor(self, depth: int) -> tuple[Linear, bool]:
        """(value, whether it is a percentage) of a number, an unknown, a fraction or brackets, with `%` and `^`."""
        if depth > _MAX_DEPTH:
            raise _NoValue
        sign = 1
        while self._is_operator("-", "+"):
            sign = -sign if self.found[self.at].text == "-" else sign
            self.at += 1
        token = self._peek()
        if token is None:
            raise _NoValue
        is_share = False
        if token.kind == "number" and token.value is not None:
            if token.text == "nth":
                raise _NoValue  # places count differently from amounts
            self.at += 1
            value = Linear(token.value, tree=Tree(token.value))
            self.side.operands.append(token.value)
            self.side.decimals = max(self.side.decimals, token.decimals)
        elif token.kind == "unknown":
            self.at += 1
            value = Linear(Fraction(0), Fraction(1), token.text)
        elif token.kind == "fraction":
            self.at += 1
            self.side.is_bare = False
            value = _quotient(self._group(depth), self._group(depth))
            is_share = True
            self._note(value)
        elif token.kind == "(":
            value = self._group(depth)
        else:
            raise _NoValue
        if self._is_operator("%"):
            self.at += 1
            value, is_share = _share(value), True
            self.side.decimals += 2
            self._note(value)
        if self._is_operator("^"):
            self.at += 1
            value = _power(value, self._factor(depth + 1)[0])
            self.side.is_bare = False
            self._note(value)
        begin = self.at
        self._words()
        self._refuse_scales(begin)
        self.at = begin
        return (value if sign > 0 else _product(value, Linear(Fraction(-1), tree=Tree(Fraction(-1))))), is_share

    def _group(self, depth: int) -> Linear:
        token = self._peek()
        if token is None or token.kind != "(":
            raise _NoValue
        self.at += 1
        self._lead()
        value = self._expression(depth + 1)
        self._words()
        closing = self._peek()
        if closing is None or closing.kind != ")":
            raise _NoValue
        self.at += 1
        return value

    def _note(self, value: Linear) -> None:
        if not value.unknown:
            self.side.parts.append(value.constant)


def _spoken(found: Sequence[Token]) -> list[Token]:
    """Tokens with "times", "plus", "minus", "divided by" and "multiplied by" before a number as operators."""
    made: list[Token] = []
    i = 0
    while i < len(found):
        token = found[i]
        following = found[i + 1] if i + 1 < len(found) else None
        if token.kind == "word" and made and following is not None:
            operator = _SPOKEN.get(token.text)
            if token.text in ("divided", "multiplied") and following.text == "by":
                operator = "/" if token.text == "divided" else "*"
                i += 1
                following = found[i + 1] if i + 1 < len(found) else None
            if operator and following is not None and following.kind in ("number", "(", "fraction", "unknown"):
                made.append(Token("operator", operator, token.start, token.end, is_spaced=True))
                i += 1
                continue
        made.append(token)
        i += 1
    return made


def _share(value: Linear) -> Linear:
    """A percentage: "40%" is the number 0.4, not a product."""
    part = _product(value, Linear(Fraction(1, 100)))
    return part if part.unknown else Linear(part.constant, tree=Tree(part.constant))


def _is_share(value: Linear) -> bool:
    return not value.unknown and 0 < value.constant < 1


def _checked(value: Linear) -> Linear:
    for part in (value.constant, value.slope):
        if max(part.numerator.bit_length(), part.denominator.bit_length()) > _MAX_BITS:
            raise _NoValue
    return value if value.slope else Linear(value.constant, tree=Tree(value.constant))


def _sum(a: Linear, b: Linear, sign: int) -> Linear:
    if a.unknown and b.unknown and a.unknown != b.unknown:
        raise _NoValue
    total = _checked(Linear(a.constant + sign * b.constant, a.slope + sign * b.slope, a.unknown or b.unknown))
    return _grown(total, "sum", (a, 1), (b, sign))


def _product(a: Linear, b: Linear) -> Linear:
    if a.unknown and b.unknown:
        raise _NoValue
    if a.unknown:
        a, b = b, a
    return _grown(_checked(Linear(a.constant * b.constant, a.constant * b.slope, b.unknown)), "product", (a, 1), (b, 1))


def _quotient(a: Linear, b: Linear) -> Linear:
    if b.unknown or not b.constant:
        raise _NoValue
    return _grown(
        _checked(Linear(a.constant / b.constant, a.slope / b.constant, a.unknown)), "product", (a, 1), (b, -1)
    )


def _power(a: Linear, b: Linear) -> Linear:
    if (
        a.unknown
        or b.unknown
        or b.constant.denominator != 1
        or abs(b.constant) > 64
        or (not a.constant and b.constant < 0)
    ):
        raise _NoValue
    if max(a.constant.numerator.bit_length(), a.constant.denominator.bit_length()) * abs(b.constant) > _MAX_BITS:
        raise _NoValue
    raised = _checked(Linear(a.constant ** int(b.constant)))
    return Linear(raised.constant, tree=Tree(raised.constant))


def _grown(value: Linear, kind: Literal["sum", "product"], *parts: tuple[Linear, int]) -> Linear:
    """`value` with its tree: parts of the same kind are merged into one list."""
    if value.unknown or any(part.tree is None for part, _ in parts):
        return value
    merged: list[tuple[Tree, int]] = []
    for part, weight in parts:
        if part.tree is not None:
            inner = part.tree.parts if part.tree.kind == kind else ((part.tree, 1),)
            merged += [(tree, own * weight) for tree, own in inner]
    return Linear(value.constant, tree=Tree(value.constant, kind, tuple(merged)))
