"""The numbers that a text mentions."""

from collections.abc import Sequence
from fractions import Fraction

from rtd_jax.eval.judge.tokens import Token, tokens

_LABELLED = {"step", "phase", "part", "method", "equation", "case", "day", "week", "year", "player", "option", "round"}


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


def is_computed(text: str) -> bool:
    """Whether a text has an operator, a fraction or an unknown in it."""
    return any(token.kind in ("operator", "fraction", "unknown", "other") for token in tokens(text))


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
