"""What a row schema has to offer, and how the fields of a row are read."""

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


def text_field(row: Row, field: str, source: str) -> str:
    """The text in a field. Raises ValueError where it is missing or no text."""
    value = row.get(field)
    if value is None:
        raise ValueError(f"{source}: field {field!r} is missing; the row has {sorted(row)}")
    if not isinstance(value, str):
        raise ValueError(f"{source}: field {field!r} is {value!r}; expected text")
    return value


def texts_field(row: Row, field: str, source: str) -> list[str]:
    """The texts in a field, each on one line. Raises ValueError where it is missing, empty or no list of texts."""
    value = row.get(field)
    if value is None:
        raise ValueError(f"{source}: field {field!r} is missing; the row has {sorted(row)}")
    if not isinstance(value, list | tuple) or not all(isinstance(item, str) for item in value):
        raise ValueError(f"{source}: field {field!r} is {value!r}; expected a list of texts")
    if not value:
        raise ValueError(f"{source}: field {field!r} is an empty list; expected at least one step")
    return [one_line(item) for item in value]


def answer_field(row: Row, source: str) -> str | None:
    """The text or number in the field `answer`, as text; None where the row has none. Raises ValueError for others."""
    answer = row.get("answer")
    if isinstance(answer, bool | list | dict):
        raise ValueError(f"{source}: field 'answer' is {answer!r}; expected text or a number")
    return None if answer is None else str(answer).strip()


def one_line(text: str) -> str:
    """A step on one line: the evaluation tells the steps of a generated text apart by their lines."""
    return " ".join(text.split())
