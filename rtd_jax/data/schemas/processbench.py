"""ProcessBench (arXiv:2412.06559): solutions with the place of their first error."""

from rtd_jax.data.schemas.schema import Row, Schema, shown, text_field, texts_field, whole_number
from rtd_jax.data.trace import LabelledChain, Trace


def labelled_from_processbench(row: Row, source: str = "row") -> list[LabelledChain]:
    """`problem`, `steps`, `label`: the index of the first wrong step, or -1. Nobody judged the steps after it."""
    steps, label = texts_field(row, "steps", source), whole_number(row.get("label"))
    if label is None or not -1 <= label < len(steps):
        raise ValueError(
            f"{source}: field 'label' is {shown(row.get('label'))}; expected the index of the first wrong of "
            f"{len(steps)} steps, or -1"
        )
    right = len(steps) if label < 0 else label
    labels: list[bool | None] = [*[True] * right, *[False] * (label >= 0)]
    labels += [None] * (len(steps) - len(labels))
    prompt = text_field(row, "problem", source).strip()
    return [LabelledChain(Trace.of_steps(prompt, steps, "", source=source), tuple(labels))]


SCHEMA = Schema("processbench", labelled=labelled_from_processbench)
