"""Exact arithmetic of what a solution computes: numbers, and what is linear in one unknown."""

from dataclasses import dataclass, field
from fractions import Fraction
from typing import Literal

_MAX_BITS = 512  # of a numerator or denominator; 9^{9^{9^9}} has no value


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


class NoValue(Exception):
    """What cannot be evaluated."""


def of_hundred(value: Linear) -> Linear:
    """A percentage: "40%" is the number 0.4, not a product."""
    part = multiply(value, Linear(Fraction(1, 100)))
    return part if part.unknown else Linear(part.constant, tree=Tree(part.constant))


def is_share_value(value: Linear) -> bool:
    """Whether it is a number between 0 and 1."""
    return not value.unknown and 0 < value.constant < 1


def _checked(value: Linear) -> Linear:
    for part in (value.constant, value.slope):
        if max(part.numerator.bit_length(), part.denominator.bit_length()) > _MAX_BITS:
            raise NoValue
    return value if value.slope else Linear(value.constant, tree=Tree(value.constant))


def add(a: Linear, b: Linear, sign: int) -> Linear:
    """a + sign * b. Raises NoValue for two unknowns; the others below do where the result would not be linear."""
    if a.unknown and b.unknown and a.unknown != b.unknown:
        raise NoValue
    total = _checked(Linear(a.constant + sign * b.constant, a.slope + sign * b.slope, a.unknown or b.unknown))
    return _grown(total, "sum", (a, 1), (b, sign))


def multiply(a: Linear, b: Linear) -> Linear:
    if a.unknown and b.unknown:
        raise NoValue
    if a.unknown:
        a, b = b, a
    return _grown(_checked(Linear(a.constant * b.constant, a.constant * b.slope, b.unknown)), "product", (a, 1), (b, 1))


def divide(a: Linear, b: Linear) -> Linear:
    if b.unknown or not b.constant:
        raise NoValue
    return _grown(
        _checked(Linear(a.constant / b.constant, a.slope / b.constant, a.unknown)), "product", (a, 1), (b, -1)
    )


def power(a: Linear, b: Linear) -> Linear:
    if (
        a.unknown
        or b.unknown
        or b.constant.denominator != 1
        or abs(b.constant) > 64
        or (not a.constant and b.constant < 0)
    ):
        raise NoValue
    if max(a.constant.numerator.bit_length(), a.constant.denominator.bit_length()) * abs(b.constant) > _MAX_BITS:
        raise NoValue
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
