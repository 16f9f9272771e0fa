"""ProcessBench (arXiv:2412.06559): solutions with the place of their first error."""

from collections.abc import Sequence
from typing import NamedTuple

from rtd_jax.data.schemas.schema import Row, Schema, as_written, shown, text_field, texts_field, whole_number
from rtd_jax.data.trace import LabelledChain, Trace


class LabelledSolution(NamedTuple):
    """A solution in which people looked for the first wrong step."""

    id: str  # the row's own, or its place where it has none
    generator: str  # the model that wrote it; "" where the row does not say
    problem: str
    steps: tuple[str, ...]  # as they were written, with their lines
    label: int  # index of the first wrong step; -1 where all are right
    final_answer_correct: bool | None
    source: str  # "gsm8k.jsonl:17"


def solution_from_processbench(row: Row, source: str = "row") -> LabelledSolution:
    """`problem`, `steps`, `label`; `id`, `generator` and `final_answer_correct` where they are there."""
    label, problem = _label(row, texts_field(row, "steps", source), source), text_field(row, "problem", source).strip()
    if not problem:
        raise ValueError(f"{source}: field 'problem' is blank; expected the text of the problem")
    steps = tuple(row["steps"])
    if blank := [i for i, step in enumerate(steps) if not step.strip()]:
        raise ValueError(f"{source}: field 'steps': step {blank[0]} of {len(steps)}, counted from 0, is blank")
    names = {}
    for field in ("id", "generator"):
        value = row.get(field)
        names[field] = "" if value is None else as_written(value)
        if names[field] is None:
            raise ValueError(f"{source}: field {field!r} is {shown(value)}; expected text")
    is_right = row.get("final_answer_correct")
    if not isinstance(is_right, bool | None):
        raise ValueError(f"{source}: field 'final_answer_correct' is {shown(is_right)}; expected true, false or null")
    return LabelledSolution(names["id"] or source, names["generator"] or "", problem, steps, label, is_right, source)


def labelled_from_processbench(row: Row, source: str = "row") -> list[LabelledChain]:
    """`problem`, `steps`, `label`: the index of the first wrong step, or -1. Nobody judged the steps after it."""
    steps = texts_field(row, "steps", source)
    label = _label(row, steps, source)
    right = len(steps) if label < 0 else label
    labels: list[bool | None] = [*[True] * right, *[False] * (label >= 0)]
    labels += [None] * (len(steps) - len(labels))
    prompt = text_field(row, "problem", source).strip()
    return [LabelledChain(Trace.of_steps(prompt, steps, "", source=source), tuple(labels))]


def _label(row: Row, steps: Sequence[str], source: str) -> int:
    label = whole_number(row.get("label"))
    if label is None or not -1 <= label < len(steps):
        raise ValueError(
            f"{source}: field 'label' is {shown(row.get('label'))}; expected the index of the first wrong of "
            f"{len(steps)} steps, or -1"
        )
    return label


SCHEMA = Schema("processbench", labelled=labelled_from_processbench)
