"""ARC (arXiv:1803.05457): science questions with choices. Its rows have no reasoning until somebody adds it."""

from collections.abc import Mapping
from dataclasses import dataclass

from rtd_jax.data.schemas.schema import Row, Schema, as_written, shown, text_field, texts_field
from rtd_jax.data.trace import Problem, Trace

_LETTERS = "ABCDEFGHIJ"  # of the choices


@dataclass(frozen=True)
class ChoiceQuestion:
    """A question with the texts of its choices, in the row's order, and the index of the right one."""

    question: str
    choices: tuple[str, ...]
    answer: int
    source: str = ""


def from_arc(row: Row, source: str = "row", *, reasoning_field: str = "reasoning") -> Trace:
    """`question`, `choices` {text, label}, `answerKey`, and reasoning (text, one step a line, or a list of steps).

    Choices are shown as A, B, C, ... whatever labels the row has (a few have 1 to 4), so that a letter always means
    the same place.
    """
    problem = arc_problem(row, source)
    reasoning = row.get(reasoning_field)
    if isinstance(reasoning, str):
        steps = [line.strip() for line in reasoning.splitlines() if line.strip()]
    elif isinstance(reasoning, list | tuple):
        steps = texts_field(row, reasoning_field, source)
    else:
        raise ValueError(
            f"{source}: field {reasoning_field!r} is {shown(reasoning)}; ARC itself has no reasoning: add it to each "
            "row as text with one step a line, or as a list of steps"
        )
    return Trace.of_steps(problem.prompt, steps, problem.answer, problem.final, source)


def arc_problem(row: Row, source: str = "row") -> Problem:
    """`question`, `choices`, `answerKey` of ARC as it is published, without reasoning. The answer is a letter."""
    asked = choices_from_arc(row, source)
    choices = "\n".join(f"{letter}. {text}" for letter, text in zip(_LETTERS, asked.choices, strict=False))
    return Problem(f"{asked.question.strip()}\n{choices}", _LETTERS[asked.answer], 0, source)


def choices_from_arc(row: Row, source: str = "row") -> ChoiceQuestion:
    """`question`, `choices` {text, label}, `answerKey` of ARC as it is published. Texts are kept as they are."""
    choices = row.get("choices")
    lists = [choices.get("text"), choices.get("label")] if isinstance(choices, Mapping) else [None]
    if not all(isinstance(items, list | tuple) for items in lists):
        raise ValueError(f"{source}: field 'choices' is {shown(choices)}; expected {{'text': [...], 'label': [...]}}")
    texts, labels = ([as_written(item) or "" for item in items or ()] for items in lists)
    if len(texts) != len(labels) or not 2 <= len(texts) <= len(_LETTERS):
        raise ValueError(
            f"{source}: {len(texts)} choice texts and {len(labels)} labels; expected as many of each, 2 to 10"
        )
    if not all(text.strip() for text in texts):
        raise ValueError(f"{source}: a choice is blank or no text: {shown(lists[0])}; expected text in each")
    if len(set(labels)) < len(labels) or "" in labels:
        raise ValueError(f"{source}: the labels of the choices are {shown(lists[1])}; expected another one for each")
    key = (as_written(row.get("answerKey")) or text_field(row, "answerKey", source)).strip()
    if key not in labels:
        raise ValueError(f"{source}: answerKey {key!r} is not among the labels {labels}")
    return ChoiceQuestion(text_field(row, "question", source), tuple(texts), labels.index(key), source)


SCHEMA = Schema("arc", from_arc, options=("reasoning_field",), problem=arc_problem)
