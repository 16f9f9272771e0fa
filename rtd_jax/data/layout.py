r"""How a solution is laid out: its lines and what each of them is (a title, a list item, a formula, ...).

`rtd_jax.data.prose` puts the pieces together to reasoning steps. Every pattern looks at a character a bounded number of
times, so that hostile text takes no longer than other text of its length.
"""

import itertools
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from rtd_jax.data.trace import Span, is_answer_line

Kind = Literal[
    "section",  # the title of a numbered step: "Step 2: ...", "2. **Profit:**"
    "heading",  # another title
    "item",  # of a list
    "display",  # nothing but formulas that are set off from the text
    "formula",  # nothing but one formula: 2 + 3 = 5
    "continued",  # goes on with what is before it: "= 5", a row of a table, "---"
    "text",
]
NUMBERED = 7  # level of "2." without #, below "Step 2" and the six levels of Markdown


@dataclass(frozen=True)
class Piece:
    """A line, or a part of a line that begins with "First," or the like: nothing smaller than it is a step."""

    start: int  # characters of the text, white space around the piece left out
    end: int
    kind: Kind
    indent: int  # characters before the line's first
    level: int = 0  # of titles: number of #; NUMBERED: of a list item or title with a number
    leads: bool = False  # a heading, a line that ends with ":", or an announcement
    plans: bool = False  # it leads to the whole solution, not to one step
    has_equation: bool = False
    in_sequence: bool = False  # begins with "First," or the like
    is_lower: bool = False  # begins with a small letter


# Marks of formulas. Two backslashes are LaTeX's line break. No formula has a blank line in it, so a mark that is never
# closed does no harm beyond its paragraph.
_MARK = re.compile(r"\\\\|\\[\[\]()]|\$\$|\\(?:begin|end)\{\w{1,20}\*?\}|\n[ \t\r]*\n")

_AFTER_SENTENCE = r"(?:(?<=[.!?:])|(?<=\\\])|(?<=\\\)))"
_ORDINAL = "First|Second|Third|Fourth|Fifth|Sixth|Seventh|Eighth|Ninth|Tenth"
# A comma, or "we" or "let's", tells "First, ..." and "Then we ..." from "First graders ..." and "Next year ...".
_SEQUENCE = rf"(?:(?:(?:{_ORDINAL})(?:ly)?|Next|Then|Now|Finally|Lastly|After that|Afterwards?)(?:,|\s(?=we\b|let\b))"
_SEQUENCE += r"|Step\s\d{1,3}\b)"
_BEGINS_SEQUENCE = re.compile(_SEQUENCE)
_NEXT_IN_SEQUENCE = re.compile(rf"{_AFTER_SENTENCE}\s+(?={_SEQUENCE})")
# Not after the full stop of "Mr.", "Mrs.", "Dr." or "St.".
_SENTENCE_END = re.compile(rf"(?<![MDS][rst]\.)(?<!Mrs\.){_AFTER_SENTENCE}(?<!:)[\"'”’)*]{{0,3}}\s+(?=[A-Z$\\(\"'“*])")

_ITEM = re.compile(r"(?:[-*•–]|\(?\d{1,3}[.)]|\(?[A-Za-z][.)])\s+(?=\S)")
_NUMBER = re.compile(r"(?:\*\*)?\(?\d{1,3}[.)]\s")
_STEP = re.compile(r"(?:\*\*)?step\s(?:\d{1,3}|one|two|three|four|five|six|seven|eight|nine|ten)\b", re.IGNORECASE)
_HASHES = re.compile(r"#{1,6}(?!#)\s*")
_CONTINUES = re.compile(r"[=≈+×÷|]|&\s?=|\\approx\b|\\times\b")
_WRITTEN_FORMULA = re.compile(r"(?:\$[^$]+\$|\$*\\boxed\{[^{}]*(?:\{[^{}]*\}[^{}]*)*\}\$*)[.,;]?")
_WORD = re.compile(r"(?<![\\A-Za-z])[A-Za-z]{2}")  # neither a variable of one letter nor a LaTeX command
_AMOUNT = re.compile(r"[$(]{0,3}\d")

EQUATION = re.compile(r"[=≈]|\\approx\b|\\boxed\b")
OPERATOR = re.compile(r"[+×÷]|(?<!\*)\*(?!\*)|\s[-−/]\s|\d[-−]\d|\d\s?x\s?\d|\\(?:times|cdot|div)\b")
_STATED_NUMBER = re.compile(
    r"\b(?:is|are|was|were|gives?|gets?|equals?|makes?|leaves?)\s(?:[^\s\d]{1,20}\s){0,2}[$\\(]{0,4}\d"
)
_ACTION = "find|determine|calculate|compute|solve|figure|work|get|answer|know|use|start|begin|break|follow|add|subtract"
_ACTION += "|multiply|divide|set|do|look|go|consider|identify|convert|verify|simplify|count"
_ANNOUNCEMENT = re.compile(
    rf"(?:(?:{_SEQUENCE}|So),?\s?)?(?:(?:(?:in order )?to )?(?:{_ACTION})|let[’']?s|let us|let me"
    r"|(?:we|I)(?:[’']ll|\s(?:will|can|must|need to|have to|should|want to))\s(?:first\s)?"
    rf"(?:{_ACTION})|here(?:[’']s| is| are)|we are given|sure|ok|okay|of course|certainly|solution"
    r"|I(?:[’']d| would| can))\b",
    re.IGNORECASE,
)
_PLAN = re.compile(r"\b(?:steps?|solution|as follows|break)\b", re.IGNORECASE)
_MARKDOWN = " \t\r\n#*_"  # around words


def pieces(text: str) -> list[Piece]:
    """The pieces of a text in order; every character but white space is in one of them.

    A formula is never cut, over however many lines it goes.
    """
    formulas, displays = _formulas(text)
    lines = list(_lines(text, _Inside(formulas)))
    alone = zip(_outside(text, lines, displays), _outside(text, lines, formulas), strict=True)
    found: list[Piece] = []
    is_inside = _Inside(formulas)
    for (start, end, indent), (beside_displays, beside_formulas) in zip(lines, alone, strict=True):
        line = text[start:end]
        is_cut = re.search(r"\w", beside_formulas) is not None and not _ITEM.match(line)
        matches = _NEXT_IN_SEQUENCE.finditer(text, start, end) if is_cut else ()
        cuts = [match.span() for match in matches if not is_inside(match.start())]
        found += [_piece(text[first:last], first, indent) for first, last in _between(start, end, cuts)]
        if _ITEM.match(line) or not re.search(r"\w", line):
            continue
        if not re.search(r"\w", beside_displays):
            found[-1] = Piece(start, end, "display", indent, has_equation=True)
        elif not re.search(r"\w", beside_formulas):
            found[-1] = Piece(start, end, "formula", indent, has_equation=True)
    return found


def sentence_pieces(text: str, piece: Piece) -> list[Piece]:
    """The sentences of a piece of text. None ends within a formula."""
    is_inside = _Inside(_formulas(text)[0])
    cuts = [
        match.span() for match in _SENTENCE_END.finditer(text, piece.start, piece.end) if not is_inside(match.end() - 1)
    ]
    return [_piece(text[start:end], start, piece.indent) for start, end in _between(piece.start, piece.end, cuts)]


def _between(start: int, end: int, cuts: Sequence[Span]) -> Iterator[Span]:
    """The parts of [start, end) that the white space at `cuts` leaves."""
    return zip([start, *(after for _, after in cuts)], [*(before for before, _ in cuts), end], strict=True)


def _piece(words: str, start: int, indent: int) -> Piece:
    """A line or a part of it, with its kind as far as LaTeX's marks of formulas do not decide it."""
    end, has_equation = start + len(words), EQUATION.search(words) is not None
    is_item = _ITEM.match(words) is not None
    if not re.search(r"\w", words):
        return Piece(start, end, "continued", indent, leads=True)  # leads where nothing is before it
    if _CONTINUES.match(words):
        return Piece(start, end, "continued", indent, has_equation=True)
    if not is_item and (_WRITTEN_FORMULA.fullmatch(words) or (has_equation and _is_plain_formula(words))):
        return Piece(start, end, "formula", indent, has_equation=True)
    hashes = "" if _states_answer(words) else (match[0] if (match := _HASHES.match(words)) else "")
    title, level = words[len(hashes) :], len(hashes.strip())
    is_bold = title.startswith("**") and title.rstrip(":. ").endswith("**") and title.count("**") == 2
    is_title = bool(hashes) or is_bold or title.rstrip(_MARKDOWN).endswith(":")
    in_sequence = _BEGINS_SEQUENCE.match(words) is not None
    plans = not in_sequence and _PLAN.search(title) is not None
    if _STEP.match(title):
        return Piece(start, end, "section", indent, level)
    if is_title and _NUMBER.match(title):
        return Piece(start, end, "section", indent, level or NUMBERED)
    if hashes or is_bold:
        return Piece(start, end, "heading", indent, level, leads=True, plans=plans)
    return Piece(
        start,
        end,
        "item" if is_item else "text",
        indent,
        level=NUMBERED if is_item and _NUMBER.match(words) else 0,
        leads=is_title or _announces(words),
        plans=plans,
        has_equation=has_equation,
        in_sequence=in_sequence,
        is_lower=words[0].islower(),
    )


def _states_answer(line: str) -> bool:
    """Whether a line with four # states an answer ("#### 18", "#### yes"), and is no heading of Markdown."""
    said = line[4:].strip()
    return is_answer_line(line) and not _STEP.match(said) and (len(said.split()) < 2 or _AMOUNT.match(said) is not None)


def _is_plain_formula(words: str) -> bool:
    """Whether what is before the equals sign is an expression: 2 * (x + 3), 16 eggs - 3 eggs. "Profit = 5" is not."""
    left = EQUATION.split(words, maxsplit=1)[0]
    return not _WORD.search(left) or (_AMOUNT.match(left) is not None and OPERATOR.search(left) is not None)


def _announces(words: str) -> bool:
    """Whether a piece ends with a sentence that says what will be done, and concludes nothing."""
    if EQUATION.search(words):
        return False
    last = max((match.end() for match in _SENTENCE_END.finditer(words)), default=0)
    return _ANNOUNCEMENT.match(words, last) is not None and not _STATED_NUMBER.search(words, last)


def _formulas(text: str) -> tuple[list[Span], list[Span]]:
    r"""(all formulas between LaTeX's marks, the display formulas among them), each in order and without overlap.

    A single dollar sign is money as often as a mark, and is not read.
    """
    displays: list[Span] = []
    inline: list[Span] = []
    opened: dict[str, int] = {}
    depth = 0  # of environments in environments
    for match in _MARK.finditer(text):
        mark = match[0]
        if mark in (r"\[", r"\(") or (mark == "$$" and mark not in opened):
            opened[mark] = match.start()
        elif mark == "$$":
            displays.append((opened.pop(mark), match.end()))
        elif mark == r"\]" and r"\[" in opened:
            displays.append((opened.pop(r"\["), match.end()))
        elif mark == r"\)" and r"\(" in opened:
            inline.append((opened.pop(r"\("), match.end()))
        elif mark.startswith(r"\begin"):
            depth += 1
            opened.setdefault("environment", match.start())
        elif mark.startswith(r"\end") and depth:
            depth -= 1
            if not depth:
                displays.append((opened.pop("environment"), match.end()))
        elif mark.startswith("\n"):
            opened, depth = {}, 0
    return _union(itertools.chain(displays, inline)), _union(displays)


def _union(spans: Iterable[Span]) -> list[Span]:
    union: list[Span] = []
    for start, end in sorted(spans):
        if union and start < union[-1][1]:
            union[-1] = union[-1][0], max(end, union[-1][1])
        else:
            union.append((start, end))
    return union


@dataclass
class _Inside:
    """Whether a place lies in one of the spans. Places have to be asked for in ascending order."""

    spans: Sequence[Span]
    index: int = 0

    def __call__(self, place: int) -> bool:
        while self.index < len(self.spans) and self.spans[self.index][1] <= place:
            self.index += 1
        return self.index < len(self.spans) and self.spans[self.index][0] <= place


def _lines(text: str, is_inside: _Inside) -> Iterator[tuple[int, int, int]]:
    """(start, end, indent) of each line with something on it. A formula over several lines is in one."""
    ends = [match.start() for match in re.finditer("\n", text) if not is_inside(match.start())]
    for start, end in zip([0, *(end + 1 for end in ends)], [*ends, len(text)], strict=True):
        line = text[start:end]
        indent = len(line) - len(line.lstrip())
        if line.strip():
            yield start + indent, start + len(line.rstrip()), indent


def _outside(text: str, lines: Iterable[tuple[int, int, int]], spans: Sequence[Span]) -> Iterator[str]:
    """What is left of each line without the formulas at `spans`, each of which lies within one line."""
    index = 0
    for start, end, _ in lines:
        left, place = [], start
        while index < len(spans) and spans[index][0] < end:
            left.append(text[place : spans[index][0]])
            place = spans[index][1]
            index += 1
        yield "".join([*left, text[place:end]])
