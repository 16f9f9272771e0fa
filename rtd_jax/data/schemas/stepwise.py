"""TRL's stepwise supervision: a list of steps, each of which may be labelled right or wrong."""

from rtd_jax.data.schemas.schema import Row, Schema, answer_field, shown, text_field, texts_field
from rtd_jax.data.trace import LabelledChain, Trace, answer_line


def from_stepwise(row: Row, source: str = "row") -> Trace:
    """`prompt`, `completions` (list of steps)[, `labels` (true, false or null for each)][, `answer`].

    The chain ends before its first step that is labelled wrong, because what follows a wrong step is not to be
    imitated; such a chain has no answer line either. A step whose label is null was judged by nobody and is kept. In a
    row without `answer` (absent, null or blank) the last step states the answer, and the chain has no final line.
    """
    steps = texts_field(row, "completions", source)
    right = len(steps)
    if row.get("labels") is not None:
        labels = _labels(row, source, steps)
        right = labels.index(False) if False in labels else len(steps)
        if right == 0:
            raise ValueError(f"{source}: the chain is empty: its first step is labelled wrong; leave the row out")
    answer = answer_field(row, source) if right == len(steps) else ""
    prompt = text_field(row, "prompt", source).strip()
    return Trace.of_steps(prompt, steps[:right], answer, answer_line(answer) if answer else "", source)


def labelled_from_stepwise(row: Row, source: str = "row") -> list[LabelledChain]:
    """`prompt`, `completions` (list of steps), `labels` (one bool a step; null where nobody judged)."""
    steps = texts_field(row, "completions", source)
    labels = _labels(row, source, steps)
    prompt = text_field(row, "prompt", source).strip()
    return [LabelledChain(Trace.of_steps(prompt, steps, "", source=source), tuple(labels))]


def _labels(row: Row, source: str, steps: list[str]) -> list[bool | None]:
    labels = row.get("labels")
    if not isinstance(labels, list | tuple) or len(labels) != len(steps):
        raise ValueError(
            f"{source}: field 'labels' is {shown(labels)}; expected one label for each of the {len(steps)} steps"
        )
    for number, label in enumerate(labels, start=1):
        if label is not None and not isinstance(label, bool):
            raise ValueError(
                f"{source}: label {number} is {shown(label)}; expected true, false or null; nothing else is "
                "taken for one of them, so write the labels anew"
            )
    return list(labels)


SCHEMA = Schema("stepwise", from_stepwise, labelled=labelled_from_stepwise)
