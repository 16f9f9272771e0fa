"""Evaluates one side of an equation, with the units, remarks and titles that stand around its numbers."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from fractions import Fraction

from rtd_jax.eval.judge.arithmetic import (
    Linear,
    NoValue,
    Tree,
    add,
    divide,
    is_share_value,
    multiply,
    of_hundred,
    power,
)
from rtd_jax.eval.judge.tokens import Token

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
_SHARES = {"half", "third", "thirds", "quarter", "quarters", "fourth", "fourths", "fifth", "fifths", "tenth", "tenths"}


@dataclass(slots=True)
class Side:
    """One side of an equation: its value, None where it has none, and what comparing it needs to know."""

    value: Linear | None
    operands: list[Fraction] = field(default_factory=list)  # numbers as written
    decimals: int = 0  # most digits after the point of a number in it
    is_bare: bool = True  # one number or one unknown, without an operator
    is_share: bool = False  # one fraction, such as 1/2
    is_named: bool = False  # words stand beside its numbers
    start: int = -1  # of its first and last token in the text; -1 where it was not read
    end: int = -1


def first_side(found: Sequence[Token]) -> Side:
    """What stands right after an `=`."""
    return _Parser(found[:_MAX_SIDE]).first()


def last_side(found: Sequence[Token]) -> Side:
    """What stands right before an `=`: words and other expressions before it are passed over."""
    return _Parser(found).last() if len(found) <= _MAX_SIDE else Side(None)


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
        except NoValue:
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
        except NoValue:
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
            raise NoValue  # a name is an operand
        if begin < self.at and self._is_operator("-") and not self._is_sign():
            raise NoValue

    def _refuse_scales(self, begin: int) -> None:
        said = {token.text for token in self.found[begin : self.at]}
        self.side.is_named = self.side.is_named or bool(said)
        if said & _SCALES or (said & _SHARES and said & {"of", "as"}):
            raise NoValue

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
            self._words()  # units
            if not self._is_operator("+", "-"):
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
                raise NoValue  # "1 hour + 15 minutes"
            self.at = here
            if self._ends_in_percent() and not is_share:
                raise NoValue  # "$20 - 10%" takes a tenth of the amount, or of another
            value = add(value, other, sign)

    def _refuse_range(self) -> None:
        """Raises where the `-` here stands between two numbers of a title: "weeks 1-2 = ...", "pages 10–20"."""
        if not 0 < self.at < len(self.found) - 1 or not self.side.is_named:
            return
        before, here, after = self.found[self.at - 1 : self.at + 2]
        is_tight = here.text == "-" and not here.is_spaced and not after.is_spaced
        if is_tight and before.value is not None and after.value is not None and before.value < after.value:
            raise NoValue

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
                    other = divide(other, self._factor(depth)[0])
                value = multiply(value, other) if token.text == "*" else divide(value, other)
                continue
            words = [word.text for word in self.found[gap : self.at]]
            begins = token.kind in ("number", "(", "fraction", "unknown")
            # "20% of 50" and "1/4 of 20" are products, "5 of 20" is not; 3x, 5(2 + 1) and (2)(3) are.
            if begins and (
                (words in (["of"], ["of", "the"]) and (is_share or is_share_value(value)))
                or (not words and token.kind != "number" and (not token.is_spaced or is_fraction))
                or (not words and token.kind == "fraction" and self.found[gap - 1].kind == "number")
            ):
                is_mixed = token.kind == "fraction" and not words and self.found[gap - 1].kind == "number"
                self.side.is_bare = self.side.is_share = False
                other, is_share = self._factor(depth)
                # 2\\frac{1}{2} is two and a half.
                value = add(value, other, 1) if is_mixed and is_share_value(other) else multiply(value, other)
                continue
            return value

    def _factor(self, depth: int) -> tuple[Linear, bool]:
        """(value, whether it is a percentage) of a number, an unknown, a fraction or brackets, with `%` and `^`."""
        if depth > _MAX_DEPTH:
            raise NoValue
        sign = 1
        while self._is_operator("-", "+"):
            sign = -sign if self.found[self.at].text == "-" else sign
            self.at += 1
        token = self._peek()
        if token is None:
            raise NoValue
        is_share = False
        if token.kind == "number" and token.value is not None:
            if token.text == "nth":
                raise NoValue  # places count differently from amounts
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
            value = divide(self._group(depth), self._group(depth))
            is_share = True
        elif token.kind == "(":
            value = self._group(depth)
        else:
            raise NoValue
        if self._is_operator("%"):
            self.at += 1
            value, is_share = of_hundred(value), True
            self.side.decimals += 2
        if self._is_operator("^"):
            self.at += 1
            value = power(value, self._factor(depth + 1)[0])
            self.side.is_bare = False
        begin = self.at
        self._words()
        self._refuse_scales(begin)
        self.at = begin
        return (value if sign > 0 else multiply(value, Linear(Fraction(-1), tree=Tree(Fraction(-1))))), is_share

    def _group(self, depth: int) -> Linear:
        token = self._peek()
        if token is None or token.kind != "(":
            raise NoValue
        self.at += 1
        self._lead()
        value = self._expression(depth + 1)
        self._words()
        closing = self._peek()
        if closing is None or closing.kind != ")":
            raise NoValue
        self.at += 1
        return value


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
