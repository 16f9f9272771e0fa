"""GSM8K (arXiv:2110.14168): grade-school word problems with a step a line."""

import re

from rtd_jax.data.schemas.schema import Row, Schema, shown, text_field
from rtd_jax.data.trace import Trace, answer_line, is_answer_line, split_answer

_CALCULATOR_MARK = re.compile(r"<<[^<>\n]*>>")


def from_gsm8k(row: Row, source: str = "row", *, keep_marks: bool = True) -> Trace:
    """`question`, `answer`: one step a line, `<<48/2=24>>` calculator marks, last line `#### 72`."""
    body, answer = split_answer(text_field(row, "answer", source))
    if not answer:
        seen = body.splitlines()[-1].strip() if body else ""
        raise ValueError(f"{source}: the last line of 'answer' is {shown(seen)}; expected the answer as '#### 72'")
    steps = [line.strip() for line in body.splitlines() if line.strip()]
    if earlier := [step for step in steps if is_answer_line(step)]:
        raise ValueError(
            f"{source}: 'answer' states an answer twice: {earlier[0]!r} stands before its last line '#### {answer}'; "
            "keep one of the two lines"
        )
    if not keep_marks:
        steps = [_CALCULATOR_MARK.sub("", step) for step in steps]
    return Trace.of_steps(text_field(row, "question", source).strip(), steps, answer, answer_line(answer), source)


SCHEMA = Schema("gsm8k", from_gsm8k, options=("keep_marks",))
