r"""Cuts a solution written in prose into its reasoning steps, by rules and without a model.

What models write is laid out for a reader: paragraphs, lists, titles, formulas on lines of their own, a sentence that
says what will be done, and one that says the answer again. Steps end where lines end, except that

  1. a display formula (`\[..\]`, `$$..$$`, an environment) belongs to the text before it, and another formula alone on
     a line to the line before it, if that says no equation itself; "= 5" goes on with the formula before it, and so
     does text after a display formula that begins with a small letter ("where x is the price");
  2. "Step 2" and a numbered title ("2. **Profit:**") begin a step that holds all that stands under them;
  3. other titles, and lines that end with ":", belong to what follows, and the list that follows belongs to them; the
     items of other lists, and of a list of the whole solution ("Follow these steps:"), are a step each;
  4. an announcement ("To find the profit, we need the costs.") belongs to the step after it;
  5. a closing that says a result again ("So, the answer is 18.") belongs to the step before it, as does the answer
     line: neither is a piece of reasoning that can be right or wrong by itself;
  6. "First,", "Next,", "Finally," at the beginning of a sentence begin a step within a line too;
  7. a solution of one line is cut at the ends of its sentences.

The time is linear in the length of the text.
"""

import re
from collections.abc import Sequence
from dataclasses import replace

from rtd_jax.data.layout import NUMBERED, OPERATOR, Piece, pieces, sentence_pieces
from rtd_jax.data.trace import Span, is_answer_line

_FAREWELL = re.compile(r"(?:I hope|let me know|feel free)\b", re.IGNORECASE)
_ANSWER = re.compile(
    r"(?:(?:so|thus|therefore|hence|finally|in conclusion|in summary),?\s)?(?:the\s)?(?:final\s|correct\s)?answer\b"
    r"|(?:in\s)?conclusion\b|in summary\b|\$*\\boxed\b",
    re.IGNORECASE,
)
_THEREFORE = re.compile(
    r"(?:and\s)?(?:so|thus|therefore|hence|in total|overall|this means|which means)\b", re.IGNORECASE
)
_NUMERAL = re.compile(r"\d[\d,]*(?:\.\d+)?")
_DECORATION = " \t\r\n#*_>"  # of Markdown, around words


def prose_steps(text: str) -> list[Span]:
    """The reasoning steps of a solution: characters [start, end) of `text`, in order.

    Steps do not overlap, neither begin nor end with white space, and only white space lies outside of them. A text of
    white space has none.
    """
    found = pieces(text)
    if (line := _only_line(text, found)) is not None:
        found[line : line + 1] = _grouped(sentence_pieces(text, found[line]))
    steps: list[_Step] = []
    known: set[str] = set()  # numbers
    for piece in found:
        words = text[piece.start : piece.end]
        numbers = _numbers(words)
        is_title = piece.kind in ("section", "heading")  # which waits for what stands under it
        is_closing = bool(steps) and not is_title and _says_again(words, steps[-1].numbers, known)
        if steps and (is_closing or _belongs(piece, steps[-1])):
            is_end = is_closing or piece.kind == "continued"  # what follows is not waited for
            steps[-1].add(replace(piece, leads=False) if is_end else piece, numbers)
        else:
            steps.append(_Step(piece, numbers))
        known |= numbers
    return [(step.start, step.end) for step in _without_closings(text, steps)]


class _Step:
    """The pieces of a step that have been read so far."""

    def __init__(self, piece: Piece, numbers: set[str]):
        self.start, self.end, self.last, self.numbers = piece.start, piece.end, piece, set(numbers)
        self.section: Piece | None = None  # the title that it stands under
        self.content = 0  # indent of the first line under that title
        self.item = -1  # indent of its list items; -1 without a list
        self.owns_list = False
        self._note(piece)

    def add(self, piece: Piece, numbers: set[str]) -> None:
        if piece.kind == "item" and self.last.leads:
            self.owns_list = not self.last.plans
        if self.last is self.section:
            self.content = piece.indent
        self.end, self.last = piece.end, piece
        self.numbers |= numbers
        self._note(piece)

    def _note(self, piece: Piece) -> None:
        if piece.kind == "section" and self.section is None:
            self.section, self.content = piece, piece.indent
        if piece.kind == "item" and self.item < 0:
            self.item = piece.indent


def _belongs(piece: Piece, step: _Step) -> bool:
    """Whether a piece goes on with the step before it."""
    if piece.kind in ("display", "continued"):
        return True
    if step.section is not None:
        return _is_under(piece, step.section, step.content)
    if step.last.leads:
        return True
    if piece.kind in ("section", "heading"):
        return False
    if piece.indent > step.item >= 0 and not piece.in_sequence:
        return True  # Markdown indents what belongs to a list item
    if piece.kind == "item":
        return step.owns_list and piece.indent == step.item
    if piece.kind == "formula":
        return not step.last.has_equation
    return step.last.kind == "display" and piece.is_lower  # the sentence goes on: "where x is the price"


def _is_under(piece: Piece, section: Piece, content: int) -> bool:
    """Whether a piece stands under the title of a numbered step, whose first line has the indent `content`."""
    if piece.kind == "section":
        return piece.level > section.level or piece.indent > section.indent
    if piece.kind == "heading" and piece.level:
        return piece.level > section.level > 0
    if piece.kind == "item" and piece.level == section.level == NUMBERED:
        return piece.indent > section.indent  # the next number, without a title
    is_left = piece.indent <= section.indent < content
    return not (is_left and piece.kind == "text")


def _only_line(text: str, found: Sequence[Piece]) -> int | None:
    """The index of the one piece of a solution that is neither announcement nor closing; None if there are more.

    Such a solution is not laid out in steps: its sentences are all that there is.
    """
    content = [i for i, piece in enumerate(found) if not piece.leads and not _may_close(text[piece.start : piece.end])]
    return content[0] if len(content) == 1 and found[content[0]].kind == "text" else None


def _grouped(sentences: list[Piece]) -> list[Piece]:
    """Where some sentences have equations, those without one lead to the next that has one."""
    if not any(sentence.has_equation for sentence in sentences):
        return sentences
    return [replace(sentence, leads=not sentence.has_equation) for sentence in sentences]


def _without_closings(text: str, steps: Sequence[_Step]) -> list[_Step]:
    """The same steps; those that are nothing but a closing, or an announcement of nothing, join the one before."""
    joined: list[_Step] = []
    known: set[str] = set()
    for step in steps:
        if joined and (step.last.leads or _says_again(text[step.start : step.end], joined[-1].numbers, known)):
            joined[-1].end = step.end
            joined[-1].numbers |= step.numbers
        else:
            joined.append(step)
        known |= step.numbers
    return joined


def _may_close(words: str) -> bool:
    bare = words.lstrip(_DECORATION)
    return is_answer_line(words) or any(pattern.match(bare) for pattern in (_FAREWELL, _ANSWER, _THEREFORE))


def _says_again(words: str, before: set[str], known: set[str]) -> bool:
    """Whether a piece is a closing that says again what is known: it computes nothing and has no number of its own.

    An answer may be any number that stood in the text before. The numbers of "So she has 9 left" have to be of the step
    before, because one that is fetched from further away is a conclusion. A conclusion in words alone ("So it is no
    fish.") is always one.
    """
    if is_answer_line(words):
        return True
    words = words.lstrip(_DECORATION)
    if _FAREWELL.match(words):
        return True
    if OPERATOR.search(words):
        return False
    numbers = _numbers(words)
    if _ANSWER.match(words):
        return numbers <= known
    return bool(numbers) and numbers <= before and _THEREFORE.match(words) is not None


def _numbers(words: str) -> set[str]:
    """The numbers in a text; 1,000.50 and 1000.5 are one."""
    plain = (match[0].replace(",", "") for match in _NUMERAL.finditer(words))
    return {number.rstrip("0").rstrip(".") if "." in number else number for number in plain}
