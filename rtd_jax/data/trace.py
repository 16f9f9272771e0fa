"""A reasoning trace: a prompt, its steps in order, and the answer; and one parser per published row schema.

Every parser takes one row (a dict with the fields of the schema) and `source`, the place it came from
("train.jsonl:17"), which every error repeats. A row that cannot be a trace raises ValueError: a missing field, a field
of the wrong type, a chain without steps, no answer.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

Row = Mapping[str, Any]

_CALCULATOR_MARK = re.compile(r"<<[^<>\n]*>>")
_GSM8K_ANSWER = re.compile(r"^####[ \t]*(\S.*?)[ \t]*$")
# A sentence ends at . ! or ? before white space and something that can open one; `_closed` keeps formulas whole.
_SENTENCE_END = re.compile(r"(?<=[.!?])[ \t]+(?=[A-Z$\\(])")
_OPTION_LETTERS = "ABCDEFGHIJ"
_LEVEL = re.compile(r"(?:Level )?([1-5])")


@dataclass(frozen=True)
class Trace:
    """A chain of thought cut into steps.

    `final` is the last line of the completion as text ("#### 72"); "" where the last step states the answer (MATH).
    `subject` and `level` are MATH's ("Algebra", 1 to 5); "" and 0 where a row has none.
    `text` is what the steps were cut from, where they are not one a line; "" where they are.
    """

    prompt: str
    steps: tuple[str, ...]
    answer: str
    final: str = ""
    source: str = ""
    subject: str = ""
    level: int = 0
    text: str = ""

    def __post_init__(self) -> None:
        if not self.prompt.strip():
            raise ValueError(f"{self.source or 'trace'}: the prompt is empty; expected the text of the problem")
        if not self.steps:
            raise ValueError(f"{self.source or 'trace'}: the chain is empty; expected at least one reasoning step")
        for index, step in enumerate(self.steps):
            if not step.strip():
                raise ValueError(f"{self.source or 'trace'}: step {index + 1} of {len(self.steps)} is blank")

    @property
    def depth(self) -> int:
        """Number of reasoning steps; the line of the final answer is not one."""
        return len(self.steps)

    @property
    def body(self) -> str:
        """The steps as one text: as they were written, else one a line."""
        return self.text or "\n".join(self.steps)

    @property
    def completion(self) -> str:
        """What the model is to write: the steps, and the final line on a line of its own."""
        return f"{self.body}\n{self.final}" if self.final else self.body


@dataclass(frozen=True)
class ChoiceQuestion:
    """A question with the texts of its choices, in the row's order, and the index of the right one."""

    question: str
    choices: tuple[str, ...]
    answer: int
    source: str = ""


@dataclass(frozen=True)
class Problem:
    """What a teacher is asked: a prompt, and the answer that its chain has to reach.

    `depth` is the number of steps of the reference chain, 0 where there is none. It reads as a reference without steps.
    """

    prompt: str
    answer: str
    depth: int = 0
    source: str = ""
    steps: tuple[str, ...] = ()

    @property
    def final(self) -> str:
        return f"#### {self.answer}"


def from_gsm8k(row: Row, source: str = "row", *, keep_marks: bool = True) -> Trace:
    """`question`, `answer`: one step a line, `<<48/2=24>>` calculator marks, last line `#### 72`."""
    lines = [line.strip() for line in _text(row, "answer", source).splitlines() if line.strip()]
    final = _GSM8K_ANSWER.match(lines[-1]) if lines else None
    if final is None:
        seen = lines[-1] if lines else ""
        raise ValueError(f"{source}: the last line of 'answer' is {seen!r}; expected the answer as '#### 72'")
    steps = lines[:-1]
    if not keep_marks:
        steps = [_CALCULATOR_MARK.sub("", step) for step in steps]
    return Trace(_text(row, "question", source).strip(), tuple(steps), final.group(1), f"#### {final.group(1)}", source)


def from_math(row: Row, source: str = "row") -> Trace:
    r"""`problem`, `level`, `type`, `solution` with the answer in its last `\boxed{}`.

    Copies that say `subject` for `type`, and 4 for "Level 4", are read too; a level like MATH's own "Level ?" is 0.
    Steps are the sentences of the solution: it is cut at line ends and after . ! ? before white space and an opening
    character, but never inside `$...$`, `\[...\]` or an environment, so a displayed derivation stays one step.
    """
    solution = _text(row, "solution", source)
    level = _LEVEL.fullmatch(str(row.get("level", "")).strip())
    return Trace(
        _text(row, "problem", source).strip(),
        tuple(sentences(solution)),
        boxed(solution, source),
        "",
        source,
        subject=str(row.get("type") or row.get("subject") or ""),
        level=int(level[1]) if level else 0,
    )


def from_strategyqa(row: Row, source: str = "row", *, facts_only: bool = False) -> Trace:
    """`question`, `answer` (bool), `decomposition` (human sub-questions), `facts`.

    Step i is sub-question i followed by fact i where the row has as many facts as sub-questions (fact i then mostly
    answers sub-question i, which the data set does not promise); otherwise the facts come first, one a step, then the
    sub-questions. Copies with the facts as one text and without sub-questions have a sentence of it as a step. The
    article's "steps" of StrategyQA are not published; this keeps every human sentence. With `facts_only` the steps are
    the facts.
    """
    answer = row.get("answer")
    if not isinstance(answer, bool):
        raise ValueError(f"{source}: field 'answer' is {answer!r}; expected true or false")
    as_text = isinstance(row.get("facts"), str)
    facts = sentences(row["facts"]) if as_text else _texts(row, "facts", source)
    questions = [] if as_text and row.get("decomposition") is None else _texts(row, "decomposition", source)
    if facts_only:
        steps: tuple[str, ...] = tuple(facts)
    elif len(questions) == len(facts):
        steps = tuple(f"{question} {fact}" for question, fact in zip(questions, facts, strict=True))
    else:
        steps = (*facts, *questions)
    word = "yes" if answer else "no"
    return Trace(_text(row, "question", source).strip(), steps, word, f"#### {word}", source)


def from_arc(row: Row, source: str = "row", *, reasoning_field: str = "reasoning") -> Trace:
    """`question`, `choices` {text, label}, `answerKey`, and reasoning (text, one step a line, or a list of steps).

    Labels are shown as A, B, C, ... whatever the row uses (a few rows use 1-4), so that one letter means one place.
    """
    problem = arc_problem(row, source)
    given = row.get(reasoning_field)
    if isinstance(given, str):
        steps = tuple(line.strip() for line in given.splitlines() if line.strip())
    elif isinstance(given, list | tuple):
        steps = tuple(_texts(row, reasoning_field, source))
    else:
        raise ValueError(
            f"{source}: field {reasoning_field!r} is {given!r}; ARC itself has no reasoning: add it to each row as "
            "text with one step a line, or as a list of steps"
        )
    return Trace(problem.prompt, steps, problem.answer, problem.final, source)


def arc_problem(row: Row, source: str = "row") -> Problem:
    """`question`, `choices`, `answerKey` of ARC as it is published: without reasoning. The answer is a letter."""
    asked = choices_from_arc(row, source)
    options = "\n".join(f"{name}. {text}" for name, text in zip(_OPTION_LETTERS, asked.choices, strict=False))
    return Problem(f"{asked.question.strip()}\n{options}", _OPTION_LETTERS[asked.answer], 0, source)


def choices_from_arc(row: Row, source: str = "row") -> ChoiceQuestion:
    """`question`, `choices` {text, label}, `answerKey`: ARC as it is published. Text is kept as it is."""
    choices = row.get("choices")
    if not isinstance(choices, Mapping) or "text" not in choices or "label" not in choices:
        raise ValueError(f"{source}: field 'choices' is {choices!r}; expected {{'text': [...], 'label': [...]}}")
    texts, labels = [str(text) for text in choices["text"]], [str(label) for label in choices["label"]]
    if len(texts) != len(labels) or not 2 <= len(texts) <= len(_OPTION_LETTERS):
        raise ValueError(
            f"{source}: {len(texts)} choice texts and {len(labels)} labels; expected as many of each, 2 to 10"
        )
    if not all(text.strip() for text in texts):
        raise ValueError(f"{source}: a choice is blank: {texts}; expected text in each")
    key = _text(row, "answerKey", source).strip()
    if key not in labels:
        raise ValueError(f"{source}: answerKey {key!r} is not among the labels {labels}")
    return ChoiceQuestion(_text(row, "question", source), tuple(texts), labels.index(key), source)


def from_stepwise(row: Row, source: str = "row") -> Trace:
    """`prompt`, `completions` (list of steps)[, `labels` (one bool a step)][, `answer`]: TRL's stepwise schema.

    A false label ends the chain before that step: what follows a wrong step is not a reasoning trace to imitate; such a
    chain has lost its answer line too. Without `answer` the last step states it, and is kept as a step.
    """
    steps = _texts(row, "completions", source)
    answer = row.get("answer")
    labels = row.get("labels")
    if labels is not None:
        if not isinstance(labels, list | tuple) or len(labels) != len(steps):
            raise ValueError(
                f"{source}: field 'labels' is {labels!r}; expected one label for each of the {len(steps)} steps"
            )
        good = next((index for index, label in enumerate(labels) if not label), len(steps))
        if good == 0:
            raise ValueError(f"{source}: the chain is empty: its first step is labelled wrong; leave the row out")
        if good < len(steps):
            steps, answer = steps[:good], None
    prompt = _text(row, "prompt", source).strip()
    if answer is None:
        return Trace(prompt, tuple(steps), "", "", source)
    if isinstance(answer, bool | list | dict):
        raise ValueError(f"{source}: field 'answer' is {answer!r}; expected text or a number")
    return Trace(prompt, tuple(steps), str(answer).strip(), f"#### {str(answer).strip()}", source)


def from_prose(row: Row, source: str = "row") -> Trace:
    """`prompt`, `text`[, `answer`]: a rationale whose steps nobody has marked; a boundary classifier has to cut it.

    The whole text is one step until then. A last line `#### 72` in it is the answer's.
    """
    text, stated = split_answer(_text(row, "text", source))
    if not text:
        raise ValueError(f"{source}: field 'text' is {row['text']!r}; expected a chain of reasoning")
    answer = row.get("answer", stated or None)
    if isinstance(answer, bool | list | dict):
        raise ValueError(f"{source}: field 'answer' is {answer!r}; expected text or a number")
    answer = "" if answer is None else str(answer).strip()
    return Trace(_text(row, "prompt", source).strip(), (text,), answer, f"#### {answer}" if answer else "", source)


def split_answer(text: str) -> tuple[str, str]:
    """(the rest, answer) of a text whose last line is `#### 72`; ("" for an answer that is not stated so)."""
    lines = text.strip().splitlines()
    final = _GSM8K_ANSWER.match(lines[-1].strip()) if lines else None
    return ("\n".join(lines[:-1]).strip(), final.group(1)) if final else (text.strip(), "")


PARSERS: dict[str, Callable[..., Trace]] = {
    "gsm8k": from_gsm8k,
    "math": from_math,
    "strategyqa": from_strategyqa,
    "arc": from_arc,
    "stepwise": from_stepwise,
    "prose": from_prose,
}


def boxed(solution: str, source: str = "row") -> str:
    r"""Content of the last `\boxed{...}` (or `\fbox{...}`, or `\boxed 5`), with balanced braces."""
    start = max(solution.rfind(r"\boxed"), solution.rfind(r"\fbox"))
    if start < 0:
        raise ValueError(rf"{source}: no \boxed{{}} in 'solution'; expected the answer there")
    start = start + len(r"\boxed") if solution.startswith(r"\boxed", start) else start + len(r"\fbox")
    rest = solution[start:].lstrip()
    if not rest.startswith("{"):
        return rest.split("$")[0].split()[0] if rest.split() else _unbalanced(source)
    depth = 0
    for index, character in enumerate(rest):
        if index and rest[index - 1] == "\\" and character in "{}":  # \{ is a printed brace, not a group
            continue
        depth += (character == "{") - (character == "}")
        if depth == 0:
            return rest[1:index].strip()
    return _unbalanced(source)


def _unbalanced(source: str) -> str:
    raise ValueError(rf"{source}: the last \boxed in 'solution' has no balanced {{...}}")


def sentences(solution: str) -> list[str]:
    """`solution` cut at line ends and behind sentences, never inside a formula; each on one line."""
    pieces: list[str] = []
    start = 0
    cuts = [*re.finditer(r"\n+", solution), *_SENTENCE_END.finditer(solution)]
    for match in sorted(cuts, key=re.Match.start):
        if match.start() < start or not _closed(solution[start : match.start()]):
            continue
        pieces.append(solution[start : match.start()])
        start = match.end()
    pieces.append(solution[start:])
    # One line a step: a displayed derivation is joined, or the text could not be cut back at line ends.
    return [" ".join(piece.split()) for piece in pieces if piece.strip()]


def _closed(text: str) -> bool:
    """Whether no formula, display or environment is left open at the end of `text`."""
    dollars = text.replace(r"\$", "").replace("$$", "").count("$")
    return (
        dollars % 2 == 0
        and text.replace(r"\$", "").count("$$") % 2 == 0
        and text.count(r"\[") == text.count(r"\]")
        and text.count(r"\begin{") == text.count(r"\end{")
    )


def _text(row: Row, field: str, source: str) -> str:
    value = row.get(field)
    if value is None:
        raise ValueError(f"{source}: field {field!r} is missing; the row has {sorted(row)}")
    if not isinstance(value, str):
        raise ValueError(f"{source}: field {field!r} is {value!r}; expected text")
    return value


def _texts(row: Row, field: str, source: str) -> list[str]:
    value = row.get(field)
    if value is None:
        raise ValueError(f"{source}: field {field!r} is missing; the row has {sorted(row)}")
    if not isinstance(value, list | tuple) or not all(isinstance(item, str) for item in value):
        raise ValueError(f"{source}: field {field!r} is {value!r}; expected a list of texts")
    if not value:
        raise ValueError(f"{source}: field {field!r} is an empty list; expected at least one step")
    # One line a step, as everywhere: the evaluation reads generated steps back by line.
    return [" ".join(item.split()) for item in value]
