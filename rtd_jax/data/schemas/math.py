"""MATH (arXiv:2103.03874): competition problems whose solutions are prose and formulas."""

import re
from dataclasses import replace

from rtd_jax.data.schemas.schema import Row, Schema, text_field
from rtd_jax.data.sentences import sentences
from rtd_jax.data.trace import Trace

_LEVEL = re.compile(r"(?:Level )?([1-5])")


def from_math(row: Row, source: str = "row") -> Trace:
    r"""`problem`, `level`, `type`, `solution` with the answer in its last `\boxed{}`.

    Copies of the data that say `subject` for `type`, and 4 for "Level 4", are read too; a level that is no number, like
    MATH's own "Level ?", is 0. The steps are the sentences of the solution. The last of them states the answer, so the
    chain has no final line.
    """
    solution = text_field(row, "solution", source)
    level = _LEVEL.fullmatch(str(row.get("level", "")).strip())
    prompt, answer = text_field(row, "problem", source).strip(), boxed(solution, source)
    trace = Trace.of_steps(prompt, sentences(solution), answer, source=source)
    subject = str(row.get("type") or row.get("subject") or "")
    return replace(trace, subject=subject, level=int(level[1]) if level else 0)


def boxed(solution: str, source: str = "row") -> str:
    r"""Content of the last `\boxed{...}` (or `\fbox{...}`, or `\boxed 5`), with balanced braces.

    Raises:
      ValueError: there is none, or its braces are not balanced.
    """
    start = max(solution.rfind(r"\boxed"), solution.rfind(r"\fbox"))
    if start < 0:
        raise ValueError(rf"{source}: no \boxed{{}} in 'solution'; expected the answer there")
    rest = solution[start:].removeprefix(r"\boxed").removeprefix(r"\fbox").lstrip()
    if not rest.startswith("{"):
        words, rest = rest.split("$")[0].split(), ""
        if words:
            return words[0]
    depth = 0
    for index, character in enumerate(rest):
        if index and rest[index - 1] == "\\" and character in "{}":  # \{ is a printed brace and groups nothing
            continue
        depth += (character == "{") - (character == "}")
        if depth == 0:
            return rest[1:index].strip()
    raise ValueError(rf"{source}: the last \boxed in 'solution' has no balanced {{...}}")


SCHEMA = Schema("math", from_math, has_levels=True)
