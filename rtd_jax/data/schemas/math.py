"""MATH (arXiv:2103.03874): competition problems whose solutions are prose and formulas."""

import re
from dataclasses import replace

from rtd_jax.data.schemas.schema import Row, Schema, text_field
from rtd_jax.data.sentences import sentences
from rtd_jax.data.trace import Trace

_LEVEL = re.compile(r"(?:Level )?([1-5])")
_BOX = re.compile(r"\\(?:boxed|fbox)(?![a-zA-Z])")
_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)  # a brace, or a backslash with the character that it belongs to


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
    r"""What `last_box` reads in a reference solution.

    Raises:
      ValueError: there is no box, its braces are not balanced, or it is empty.
    """
    if not _BOX.search(solution):
        raise ValueError(rf"{source}: no \boxed{{}} in 'solution'; expected the answer there")
    answer = last_box(solution)
    if answer is None:
        raise ValueError(rf"{source}: the last \boxed in 'solution' has no balanced {{...}}")
    if not answer:
        raise ValueError(rf"{source}: the last \boxed in 'solution' is empty; expected the answer there")
    return answer


def last_box(text: str) -> str | None:
    r"""Content of the last `\boxed{...}` (or `\fbox{...}`, or `\boxed 5`), with balanced braces; None without one.

    References and replies are read by this one function.
    """
    boxes = list(_BOX.finditer(text))
    if not boxes:
        return None
    rest = text[boxes[-1].end() :].lstrip()
    if not rest.startswith("{"):
        words = rest.split("$")[0].split()
        return words[0].rstrip(".,;:") or None if words else None
    depth = 0
    for brace in _BRACE.finditer(rest):
        depth += {"{": 1, "}": -1}.get(brace[0], 0)  # \{ is a printed brace and groups nothing
        if depth == 0 and brace[0] == "}":
            return rest[1 : brace.start()].strip()
    return None


SCHEMA = Schema("math", from_math, has_levels=True)
