"""What a row schema has to offer, and how the fields of a row are read."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from rtd_jax.data.trace import LabelledChain, Problem, Trace

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Schema:
    """One published form of rows, and what can be made of them.

    Every function takes one row (a dict with the fields of the schema) and its source, the place it came from
    ("train.jsonl:17"), which every error repeats. It raises ValueError for a row that has a field missing, a field of
    the wrong type, a chain without steps, or no answer.

    Attributes:
      name: what a recipe calls it.
      trace: (row, source, **options) -> the row's chain of thought; None where rows have none to imitate.
      options: fields of `SourceSettings` that `trace` takes as keyword arguments.
      labelled: (row, source) -> the row's chains with a label at every step; None where rows have no labels.
      problem: (row, source) -> prompt and answer, where rows may come without reasoning; None takes them from `trace`.
      has_levels: rows have a level of difficulty, 1 to 5.
    """

    name: str
    trace: Callable[..., Trace] | None = None
    options: tuple[str, ...] = ()
    labelled: Callable[[Row, str], list[LabelledChain]] | None = None
    problem: Callable[[Row, str], Problem] | None = None
    has_levels: bool = False


def shown(value: Any) -> str:
    """A value as errors show it: on one line, and not all of a long one."""
    try:
        text = repr(value)
    except (RecursionError, ValueError):  # nested too deeply, or an integer of more digits than Python writes
        return f"a {type(value).__name__} that is too large to show"
    return text if len(text) <= 200 else f"{text[:200]}..."


def fields_of(row: Row) -> str:
    """The names of a row's fields, as errors list them."""
    return shown(sorted(map(str, row)))


def text_field(row: Row, field: str, source: str) -> str:
    """The text in a field. Raises ValueError where it is missing or no text."""
    value = row.get(field)
    if value is None:
        raise ValueError(f"{source}: field {field!r} is missing; the row has {fields_of(row)}")
    if not isinstance(value, str):
        raise ValueError(f"{source}: field {field!r} is {shown(value)}; expected text")
    return value


def texts_field(row: Row, field: str, source: str) -> list[str]:
    """The texts in a field, each on one line. Raises ValueError where it is missing, empty or no list of texts."""
    value = row.get(field)
    if value is None:
        raise ValueError(f"{source}: field {field!r} is missing; the row has {fields_of(row)}")
    if not isinstance(value, list | tuple) or not all(isinstance(item, str) for item in value):
        raise ValueError(f"{source}: field {field!r} is {shown(value)}; expected a list of texts")
    if not value:
        raise ValueError(f"{source}: field {field!r} is an empty list; expected at least one step")
    return [one_line(item) for item in value]


def answer_field(row: Row, source: str) -> str:
    """The text or number in the field `answer`, as it was written; "" where it is absent, null or blank.

    Raises:
      ValueError: it is something else (true, a list, NaN).
    """
    answer = row.get("answer")
    if answer is None:
        return ""
    text = as_written(answer)
    if text is None:
        raise ValueError(
            f"{source}: field 'answer' is {shown(answer)}; expected text or a number, or null where there is none"
        )
    lines = text.strip().splitlines()  # the line that states it is one line
    return one_line(text) if len(lines) > 1 else text.strip()


def as_written(value: Any) -> str | None:
    """The text of a text or a number; None of everything else: true and false, NaN and infinity, null, lists."""
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        return None
    return None if isinstance(value, float) and not math.isfinite(value) else str(value)


def whole_number(value: Any) -> int | None:
    """A whole number as int, also where a table with missing values made 5.0 of 5; None of everything else."""
    if isinstance(value, bool) or not isinstance(value, int | float) or value != value // 1:
        return None
    return int(value)


def one_line(text: str) -> str:
    """A step on one line: the evaluation tells the steps of a generated text apart by their lines."""
    return " ".join(text.split())
