"""MATH (arXiv:2103.03874): competition problems whose solutions are prose and formulas."""

import re
from dataclasses import replace

from rtd_jax.data.schemas.schema import Row, Schema, shown, text_field, whole_number
from rtd_jax.data.sentences import sentences
from rtd_jax.data.trace import Trace

_LEVEL = re.compile(r"(?:level\s*)?(\d+)(?:\.0)?", re.IGNORECASE)
_BOX = re.compile(r"\\(?:boxed|fbox)(?![a-zA-Z])")
_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)  # a brace, or a backslash with the character that it belongs to


def from_math(row: Row, source: str = "row") -> Trace:
    r"""`problem`, `level`, `type`, `solution` with the answer in its last `\boxed{}`.

    Copies of the data that say `subject` for `type`, and 4 for "Level 4", are read too; a level that is missing, or a
    text without one, like MATH's own "Level ?", is 0. The steps are the sentences of the solution. The last
    of them states the answer, so the chain has no final line.
    """
    solution = text_field(row, "solution", source)
    prompt, answer = text_field(row, "problem", source).strip(), boxed(solution, source)
    trace = Trace.of_steps(prompt, sentences(solution), answer, source=source)
    return replace(trace, subject=_subject(row, source), level=_level(row, source))


def _level(row: Row, source: str) -> int:
    level = row.get("level")
    if level is None or level != level:  # NaN is how tables write that there is none
        return 0
    if isinstance(level, str):
        stated = _LEVEL.fullmatch(level.strip())
        if stated is None:
            return 0
        number: int | None = int(stated[1])
    else:
        number = whole_number(level)
    if number is None or not 1 <= number <= 5:
        raise ValueError(f"{source}: field 'level' is {shown(level)}; expected 1 to 5, 'Level 5', or null")
    return number


def _subject(row: Row, source: str) -> str:
    for field in ("type", "subject"):
        if row.get(field) not in (None, ""):
            return text_field(row, field, source)
    return ""


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
