"""What a row of data becomes: a reasoning trace, which is one text and the spans of its steps.

Steps are never searched for in the text. Whoever makes a trace says where its steps lie, and whoever cuts it anew says
so again: `dataclasses.replace(trace, spans=...)`.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass

Span = tuple[int, int]  # characters [start, end) of a text

_ANSWER_LINE = re.compile(r"####(?!#)[ \t]*(\S.*?)[ \t]*")
_TITLE = r"\**(?:step|part|case|phase)\s+\w"  # what follows #### in a heading
_HEADING = re.compile(rf"#####|####\s*{_TITLE}", re.IGNORECASE)
_NUMBERS = re.compile(r"\d+(?:[.,:/]\d+)*%?")
_WORDS = re.compile(r"\w+")
_INNER_ANSWER = re.compile(rf"(?<!#)####(?!#)[ \t]*(?!(?i:{_TITLE}))(\S.*)")


@dataclass(frozen=True)
class Trace:
    """A problem and a chain of thought that solves it.

    Attributes:
      prompt: the text of the problem.
      body: the chain of thought as it was written, without the line that states the answer.
      spans: the steps, in characters of `body` (and so of `completion`). They are in order, do not overlap, neither
        begin nor end with white space, and only white space lies before and between them. In the chains of a data set
        nothing but white space follows the last step either; random cuts, a control, leave words there.
      answer: "72"; "" where the chain has no answer of its own.
      final: the last line of the completion ("#### 72"); "" where the last step states the answer, as in MATH.
      source: where the row came from ("train.jsonl:17"); every error names it.
      subject: MATH's ("Algebra"); "" where a row has none.
      level: MATH's, 1 to 5; 0 where a row has none.

    Raises:
      ValueError: the prompt is blank, or the spans are not as above.
    """

    prompt: str
    body: str
    spans: tuple[Span, ...]
    answer: str
    final: str = ""
    source: str = ""
    subject: str = ""
    level: int = 0

    def __post_init__(self) -> None:
        if not self.prompt.strip():
            raise ValueError(f"{self.source or 'trace'}: the prompt is empty; expected the text of the problem")
        check_spans(self.spans, self.body, self.source or "trace")

    @classmethod
    def of_steps(cls, prompt: str, steps: Iterable[str], answer: str, final: str = "", source: str = "") -> "Trace":
        """A trace whose body has one step a line. White space around a step is kept, outside of its span.

        Raises:
          ValueError: there is no step, or one is blank.
        """
        lines, spans, begin = tuple(steps), [], 0
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                raise ValueError(f"{source or 'trace'}: step {number} of {len(lines)} is blank")
            spans.append((begin + len(line) - len(line.lstrip()), begin + len(line.rstrip())))
            begin += len(line) + 1
        return cls(prompt, "\n".join(lines), tuple(spans), answer, final, source)

    @property
    def steps(self) -> tuple[str, ...]:
        """The texts of the steps."""
        return tuple(self.body[start:end] for start, end in self.spans)

    @property
    def depth(self) -> int:
        """Number of reasoning steps. The line that states the answer is not a step."""
        return len(self.spans)

    @property
    def completion(self) -> str:
        """What the model has to write: the body, and the final line on a line of its own."""
        return f"{self.body}\n{self.final}" if self.final else self.body


def conclusion_of(step: str) -> Span:
    """Where a step states what comes out of it: its last number, or its last word where it has none.

    "5 - 3 = 2 pens." concludes in "2". Anything else would need to know what the step is about.
    """
    found = [*_NUMBERS.finditer(step)] or [*_WORDS.finditer(step)]
    return found[-1].span() if found else (len(step) - 1, len(step))


def check_spans(spans: tuple[Span, ...], text: str, source: str = "trace") -> None:
    """Refuses spans that cannot be the steps of `text` (see `Trace.spans`).

    Raises:
      ValueError: names the first span that is wrong.
    """
    if not spans:
        raise ValueError(f"{source}: the chain is empty; expected at least one reasoning step")
    previous = 0
    for number, (start, end) in enumerate(spans, start=1):
        if not previous <= start < end <= len(text):
            raise ValueError(
                f"{source}: span {number} is ({start}, {end}); expected {previous} <= start < end <= {len(text)}"
            )
        if text[start].isspace() or text[end - 1].isspace():
            raise ValueError(f"{source}: span {number} begins or ends with white space: {text[start:end]!r}")
        if before := text[previous:start].strip():
            raise ValueError(
                f"{source}: {before!r} lies before span {number} and in no other; expected only white space between "
                "steps"
            )
        previous = end


def spans_of(text: str, ends: Iterable[int]) -> tuple[Span, ...]:
    """Spans of the steps of `text` that end before the characters `ends`, in ascending order.

    Text after the last end becomes part of the last step, so that only white space belongs to no step.
    """
    spans: list[Span] = []
    start = len(text) - len(text.lstrip())
    for end in ends:
        if step := text[start:end].rstrip():
            spans.append((start, start + len(step)))
            start = len(text) - len(text[end:].lstrip())
    if rest := text[start:].rstrip():
        first = spans.pop()[0] if spans else start
        spans.append((first, start + len(rest)))
    return tuple(spans)


@dataclass(frozen=True)
class LabelledChain:
    """A chain whose steps somebody judged: each label says whether the step is right, None where nobody judged it."""

    trace: Trace
    labels: tuple[bool | None, ...]

    def __post_init__(self) -> None:
        assert len(self.labels) == self.trace.depth, self.trace.source


@dataclass(frozen=True)
class Problem:
    """What a teacher is asked: a prompt, and the answer that its chain has to reach.

    `depth` is the number of steps of the reference chain, 0 where there is none. The evaluation reads a problem as a
    reference chain without steps.
    """

    prompt: str
    answer: str
    depth: int = 0
    source: str = ""
    steps: tuple[str, ...] = ()

    @property
    def final(self) -> str:
        """The line that states the answer."""
        return answer_line(self.answer)


def problem_key(prompt: str) -> str:
    """Equal for two problems that are one, wherever their rows stand: the text up to white space and case."""
    return " ".join(prompt.split()).casefold()


def answer_line(answer: str) -> str:
    """The last line of a completion, in GSM8K's form: `#### 72`."""
    return f"#### {answer}"


def is_answer_line(line: str) -> bool:
    """Whether a line, without white space around it, is one that states the answer; five # are a heading.

    So are four before "Step 2", as Markdown's writers have it.
    """
    return line.startswith("####") and not _HEADING.match(line)


def stated_answer(text: str) -> str:
    """What the first line that begins with `####` states; else what follows `####` inside a line; "" without either.

    References and replies are read by this one function. The first line counts, because a base model may go on with a
    problem of its own after its answer.
    """
    lines = [line.strip() for line in text.splitlines()]
    stated = next((line for line in lines if is_answer_line(line)), None)
    if stated is not None:
        return stated.removeprefix("####").strip()
    inner = _INNER_ANSWER.search("\n".join(lines))
    return inner[1] if inner else ""


def split_answer(text: str) -> tuple[str, str]:
    """(the rest of the text, the answer) of a text whose last line is `#### 72`; the answer is "" where it is not."""
    lines = text.strip().splitlines()
    stated = _ANSWER_LINE.fullmatch(lines[-1].strip()) if lines else None
    return ("\n".join(lines[:-1]).strip(), stated[1]) if stated else (text.strip(), "")
