"""PRM800K (arXiv:2305.20050): a tree of rated steps for each problem of MATH."""

from collections.abc import Mapping, Sequence
from typing import Any

from rtd_jax.data.schemas.schema import Row, Schema, fields_of, one_line, shown, text_field, whole_number
from rtd_jax.data.trace import LabelledChain, Trace

_RATINGS = {1: True, 0: True, -1: False}  # neutral counts as right, as in the paper


def labelled_from_prm800k(row: Row, source: str = "row") -> list[LabelledChain]:
    """`question.problem`, `label.steps[].completions[].{text, rating}` with `chosen_completion` or `human_completion`.

    The chosen completions are one chain. Every other completion that was rated gives one more chain: the steps before
    it, unlabelled because the first chain has their labels, and the completion itself.
    """
    question, label = row.get("question"), row.get("label")
    if not isinstance(question, Mapping) or not isinstance(label, Mapping) or not isinstance(label.get("steps"), list):
        raise ValueError(
            f"{source}: expected PRM800K's fields 'question.problem' and 'label.steps'; has {fields_of(row)}"
        )
    prompt = text_field(question, "problem", f"{source}: question").strip()
    steps: list[str] = []
    labels: list[bool | None] = []
    others: list[LabelledChain] = []

    def chain(steps: Sequence[str], labels: Sequence[bool | None]) -> LabelledChain:
        return LabelledChain(Trace.of_steps(prompt, steps, "", source=source), tuple(labels))

    for number, step in enumerate(label["steps"], start=1):
        place = f"{source}: step {number}"
        completions = _mapping(step, place).get("completions") or []
        if not isinstance(completions, list):
            raise ValueError(f"{place}: completions are {shown(completions)}; expected a list")
        chosen = step.get("chosen_completion")
        for index, completion in enumerate(completions):
            right = _is_right(completion, place)
            if right is not None and index != chosen:
                text = one_line(text_field(completion, "text", place))
                others.append(chain([*steps, text], [*[None] * len(steps), right]))
        if chosen is not None:
            at = whole_number(chosen)
            if at is None or not 0 <= at < len(completions):
                raise ValueError(f"{place}: chosen_completion is {shown(chosen)} of {len(completions)} completions")
            taken = completions[at]
        else:
            taken = step.get("human_completion")
            if not taken or (isinstance(taken, Mapping) and taken.get("text") is None):  # tables write null so
                break
        labels.append(_is_right(taken, place))
        steps.append(one_line(text_field(taken, "text", place)))
    if not steps and not others:
        raise ValueError(f"{source}: the row has no rated completion; leave it out")
    return [*([chain(steps, labels)] if steps else []), *others]


def _mapping(value: Any, place: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise ValueError(f"{place}: {shown(value)} is no object; expected PRM800K's steps and completions")
    return value


def _is_right(completion: Any, place: str) -> bool | None:
    rating = _mapping(completion, place).get("rating")
    number = whole_number(rating)
    if rating is not None and number not in _RATINGS:
        raise ValueError(f"{place}: rating is {shown(rating)}; expected -1, 0, 1 or null")
    return None if number is None else _RATINGS[number]


SCHEMA = Schema("prm800k", labelled=labelled_from_prm800k)
