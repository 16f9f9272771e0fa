"""Rationales whose steps nobody has marked."""

from rtd_jax.data.prose import prose_steps
from rtd_jax.data.schemas.schema import Row, Schema, answer_field, shown, text_field
from rtd_jax.data.trace import Trace, answer_line, split_answer


def from_prose(row: Row, source: str = "row") -> Trace:
    """`prompt`, `text`[, `answer`]: the text stays as it is; its steps are those of `prose_steps`.

    A boundary classifier may cut it elsewhere (`data.segmentation`). A last line `#### 72` is not part of the text; it
    gives the answer where the row has no other (absent, null, blank).
    """
    text, stated = split_answer(text_field(row, "text", source))
    if not text:
        raise ValueError(f"{source}: field 'text' is {shown(row['text'])}; expected a chain of reasoning")
    answer = answer_field(row, source) or stated
    final = answer_line(answer) if answer else ""
    return Trace(text_field(row, "prompt", source).strip(), text, tuple(prose_steps(text)), answer, final, source)


SCHEMA = Schema("prose", from_prose)
