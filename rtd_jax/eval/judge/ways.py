"""The values on a way to the answer: those of the reference, and those of its sums and products in another order.

Two right solutions share few intermediate results. What they share is arithmetic: (5 + 15 + 30) * 2 can be computed as
5 * 2 + 15 * 2 + 30 * 2, so 10, 30 and 60 lie on a way to the same answer. `on_the_way` names the values of every part
of the reference's computation under the laws of sums, products and distribution.
"""

import bisect
import functools
import re
from collections.abc import Iterable
from dataclasses import dataclass
from fractions import Fraction
from itertools import combinations

from rtd_jax.eval.judge.arithmetic import Tree
from rtd_jax.eval.judge.equations import Equation, equations, solution
from rtd_jax.eval.judge.mentions import mentioned

_MOST = 4_000  # values of one reference; more would make every number one of them
_TERMS = 8  # of a sum that are taken in any order; longer sums only in theirs
_FACTORS = 7
_DEPTH = 12  # of results inside results
# Days, hours, minutes, months, weeks, cents, grams, inches; and the numbers that need no source.
CONSTANTS = frozenset(map(Fraction, (0, 1, 2, 7, 12, 24, 52, 60, 100, 365, 1000, 1440, 3600)))
_WORDS = (
    "one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen twenty"
)
_NUMBER_WORDS: dict[str, Fraction | int] = {
    **{word: i + 1 for i, word in enumerate(_WORDS.split())},
    "thirty": 30, "forty": 40, "fifty": 50, "sixty": 60, "seventy": 70, "eighty": 80, "ninety": 90, "hundred": 100,
    "thousand": 1000, "dozen": 12, "half": Fraction(1, 2), "twice": 2, "double": 2, "triple": 3, "thrice": 3,
    "third": Fraction(1, 3), "quarter": Fraction(1, 4), "fourth": Fraction(1, 4), "fifth": Fraction(1, 5), "once": 1,
    "couple": 2, "pair": 2, "pairs": 2, "week": 7, "weeks": 7, "day": 24, "days": 24, "year": 12, "years": 12,
    "hour": 60, "hours": 60, "minute": 60, "minutes": 60,
}  # fmt: skip


class Values:
    """A set of numbers in which a rounded one is found too."""

    def __init__(self, values: Iterable[Fraction] = ()):
        self.exact = set(values)
        self._sorted = sorted(map(float, self.exact))

    def add(self, value: Fraction) -> None:
        if value not in self.exact:
            self.exact.add(value)
            bisect.insort(self._sorted, float(value))

    def __contains__(self, value: Fraction) -> bool:
        """Whether `value` is one of them, or, where it is no whole number, within half a percent of one."""
        if value in self.exact or value.denominator == 1:
            return value in self.exact
        margin = abs(float(value)) / 200
        place = bisect.bisect_left(self._sorted, float(value) - margin)
        return place < len(self._sorted) and self._sorted[place] <= float(value) + margin


@dataclass(frozen=True)
class Ways:
    """What a chain may conclude on the way to an answer.

    `results` are the values of the reference; `given` those of the problem; `others` those of the reference's parts in
    another order. `computed` has the operands of each of the reference's equations.
    """

    results: Values
    given: Values
    others: Values
    computed: frozenset[tuple[Fraction, ...]]


@functools.lru_cache(maxsize=4096)
def ways(problem: str, reference: str) -> Ways:
    """The values on a way from a problem to the answer of its reference solution."""
    results: set[Fraction] = set(mentioned(reference))
    others: set[Fraction] = set()
    computed: set[tuple[Fraction, ...]] = set()
    made: dict[Fraction, Tree] = {}  # how each earlier result was computed
    for equation in equations(reference):
        results |= {*equation.left.operands, *equation.right.operands}
        computed.add(operands(equation))
        solved = solution(equation)
        if solved is not None:
            results.add(solved[1])
        left, right = equation.left.value, equation.right.value
        if right is not None and not right.unknown:
            results.add(right.constant)
            if left is not None and left.tree is not None and left.tree.kind != "leaf":
                _collect(_expanded(left.tree, made), others)
                made.setdefault(right.constant, left.tree)
    given = set(mentioned(problem)) | {
        Fraction(_NUMBER_WORDS[word]) for word in re.findall(r"[a-z]+", problem.lower()) if word in _NUMBER_WORDS
    }
    return Ways(Values(_scaled(results)), Values(_scaled(given)), Values(_scaled(others)), frozenset(computed))


Claim = tuple[tuple[Fraction, ...], Fraction | None]


@functools.lru_cache(maxsize=4096)
def claims(reference: str) -> frozenset[Claim]:
    """What the equations of a reference say (`claim`). They are taken as true, as people wrote them."""
    return frozenset(map(claim, equations(reference)))


def claim(equation: Equation) -> Claim:
    """(numbers of both sides, result) of an equation; None for the result where there is an unknown or no value."""
    right = equation.right.value
    result = None if right is None or right.unknown else right.constant
    return tuple(sorted(equation.left.operands + equation.right.operands)), result


def operands(equation: Equation) -> tuple[Fraction, ...]:
    """The numbers of which an equation computes its result, in order of size."""
    side = equation.right if equation.left.is_bare else equation.left
    return tuple(sorted(side.operands))


def _scaled(values: set[Fraction]) -> frozenset[Fraction]:
    """With percentages as shares and cents as dollars, and what is left of a share, or is there after it is added."""
    scaled = values | {value * 100 for value in values} | {value / 100 for value in values}
    shares = {value for value in scaled if 0 < value < 1}
    return frozenset(scaled | {1 - share for share in shares} | {1 + share for share in shares})


def _expanded(tree: Tree, made: dict[Fraction, Tree], depth: int = 0) -> Tree:
    """`tree` with earlier results replaced by how they were computed; sums in sums and products in products joined."""
    if tree.kind == "leaf":
        earlier = made.get(tree.value) if depth < _DEPTH else None
        if earlier is None:
            return tree
        return _expanded(earlier, {value: other for value, other in made.items() if value != tree.value}, depth + 1)
    parts: list[tuple[Tree, int]] = []
    for part, weight in tree.parts:
        inner = _expanded(part, made, depth + 1)
        parts += [(own, by * weight) for own, by in inner.parts] if inner.kind == tree.kind else [(inner, weight)]
    return Tree(tree.value, tree.kind, tuple(parts))


def _collect(tree: Tree, found: set[Fraction]) -> None:
    """Adds the values of every part of `tree`, taken in any order."""
    if len(found) > _MOST:
        return
    found.add(abs(tree.value))
    if tree.kind == "sum":
        found |= _sums(tree)
    if tree.kind == "product":
        factors = [(part, _powered(part.value, weight)) for part, weight in tree.parts[:_FACTORS]]
        values = [value for _, value in factors]
        for product in _products(values):
            found.add(abs(product))
            if product:
                found.add(abs(1 / product))
        for i, ((part, weight), value) in enumerate(zip(tree.parts, values, strict=False)):
            inner: set[Fraction] = _sums(part) if part.kind == "sum" and weight > 0 else set()
            if 0 < value < 1:
                inner |= {1 - value, 1 + value}  # an amount less or more by a share
            rest = [Fraction(1), *_products(values[:i] + values[i + 1 :])]
            found |= {abs(one * product) for one in inner for product in rest}
    for part, _ in tree.parts:
        _collect(part, found)


def _powered(value: Fraction, weight: int) -> Fraction:
    return value if weight > 0 else 1 / value if value else Fraction(0)


def _products(values: list[Fraction]) -> list[Fraction]:
    products = [Fraction(1)]
    for value in values:
        products += [product * value for product in products]
    return products[1:]


def _sums(tree: Tree) -> set[Fraction]:
    """The values of every choice of the terms of a sum."""
    terms = [part.value * weight for part, weight in tree.parts]
    if len(terms) > _TERMS:
        runs = [terms[i:j] for i in range(len(terms)) for j in range(i + 1, min(len(terms), i + 40) + 1)]
        return {abs(sum(run, Fraction(0))) for run in runs}
    return {
        abs(sum(chosen, Fraction(0))) for count in range(1, len(terms) + 1) for chosen in combinations(terms, count)
    }
