"""PRM800K (arXiv:2305.20050): a tree of rated steps for each problem of MATH."""

from collections.abc import Mapping, Sequence

from rtd_jax.data.schemas.schema import Row, Schema, one_line, text_field
from rtd_jax.data.trace import LabelledChain, Trace

_RATINGS = {1: True, 0: True, -1: False}  # neutral counts as right, as in the paper


def labelled_from_prm800k(row: Row, source: str = "row") -> list[LabelledChain]:
    """`question.problem`, `label.steps[].completions[].{text, rating}` with `chosen_completion` or `human_completion`.

    The chosen completions are one chain. Every other completion that was rated gives one more chain: the steps before
    it, unlabelled because the first chain has their labels, and the completion itself.
    """
    question, label = row.get("question"), row.get("label")
    if not isinstance(question, Mapping) or not isinstance(label, Mapping) or not isinstance(label.get("steps"), list):
        raise ValueError(f"{source}: expected PRM800K's fields 'question.problem' and 'label.steps'; has {sorted(row)}")
    prompt = text_field(question, "problem", f"{source}: question").strip()
    steps: list[str] = []
    labels: list[bool | None] = []
    others: list[LabelledChain] = []

    def chain(steps: Sequence[str], labels: Sequence[bool | None]) -> LabelledChain:
        return LabelledChain(Trace.of_steps(prompt, steps, "", source=source), tuple(labels))

    for number, step in enumerate(label["steps"], start=1):
        place = f"{source}: step {number}"
        completions, chosen = step.get("completions") or [], step.get("chosen_completion")
        for index, completion in enumerate(completions):
            rating = completion.get("rating")
            if rating is not None and rating not in _RATINGS:
                raise ValueError(f"{place}: rating is {rating!r}; expected -1, 0, 1 or null")
            if index != chosen and rating is not None:
                text = one_line(text_field(completion, "text", place))
                others.append(chain([*steps, text], [*[None] * len(steps), _RATINGS[rating]]))
        if chosen is not None:
            if not isinstance(chosen, int) or not 0 <= chosen < len(completions):
                raise ValueError(f"{place}: chosen_completion is {chosen!r} of {len(completions)} completions")
            taken = completions[chosen]
        elif not (taken := step.get("human_completion")):
            break
        steps.append(one_line(text_field(taken, "text", place)))
        labels.append(_RATINGS.get(taken.get("rating")))
    if not steps and not others:
        raise ValueError(f"{source}: the row has no rated completion; leave it out")
    return [*([chain(steps, labels)] if steps else []), *others]


SCHEMA = Schema("prm800k", labelled=labelled_from_prm800k)
