"""Texts that something else wrote, or an earlier evaluation: rows of a JSONL file, each checked, and scored again."""

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rtd_jax.base.console import printable
from rtd_jax.base.files import read_jsonl
from rtd_jax.data.schemas.arc import ChoiceQuestion
from rtd_jax.data.trace import Trace, answer_line
from rtd_jax.eval.chains import check_reference, score_texts
from rtd_jax.eval.choices import score_choices
from rtd_jax.eval.judged_texts import verdict_fields
from rtd_jax.eval.metrics import MODEL_KEYS, make_report
from rtd_jax.eval.scored import Record

Row = Mapping[str, Any]
Placed = tuple[Row, str]  # a row, and its place: "texts.jsonl:17"
Scores = tuple[dict[str, Any], list[Record]]  # a report of one model on one task, and its records


def rescore(path: Path, open_from: int | None) -> Iterator[tuple[str, str, Scores]]:
    """(task, model, (report, records)) of the rows of a file; records of `evaluate` give the whole report again.

    A row holds a text (prompt, reference, answer, text) or choices (prompt, choices, answer, log_likelihoods), and may
    name its model and task. All rows are checked before the first is scored.

    Raises:
      ValueError: a row that cannot be scored; names the file, the row, the field, its value, and what was expected.
    """
    groups: dict[tuple[str, str], list[Placed]] = {}
    for place, row in read_jsonl(path):
        _check(row, place, _NAMES)
        name = printable(row.get("task", "")), printable(row.get("model", path.stem))
        rows = groups.setdefault(name, [])
        rows.append((row, place))
        kind = _kind(row, place)
        if kind != _kind(*rows[0]):
            raise ValueError(f"{place}: a row of {kind}, but {rows[0][1]}, of the same task and model, is none")
        _check(row, place, _CHOICES if kind == "choices" else _TEXTS)
    if not groups:
        raise ValueError(f"{path}: the file is empty; expected one JSON object a line")
    problems = {name: _problems(rows) for name, rows in groups.items() if _kind(*rows[0]) == "text"}
    for name, rows in groups.items():
        scores = _score_texts(problems[name], open_from) if name in problems else _score_choices(rows)
        yield *name, scores


def _score_choices(rows: Sequence[Placed]) -> Scores:
    questions = [ChoiceQuestion(row["prompt"], tuple(row["choices"]), row["answer"], place) for row, place in rows]
    forms = sorted({row.get("text_format", "") for row, _ in rows})
    return score_choices(questions, [row["log_likelihoods"] for row, _ in rows], " and ".join(forms))


def _problems(rows: Sequence[Placed]) -> list[tuple[Trace, list[Row]]]:
    """The problems of some rows, each with the rows that are samples of it.

    Samples of a problem have its number, where there are numbers, and its text, reference and answer: files that were
    joined number their problems alike.
    """
    problems: dict[Any, tuple[Trace, list[Row]]] = {}
    first: dict[int, str] = {}  # place of a problem's first row
    for row, place in rows:
        key = row.get("problem"), row["prompt"], tuple(row["reference"]), str(row["answer"])
        if key not in problems:
            trace = _trace(row, place)
            check_reference(trace)
            problems[key] = trace, []
            first[id(problems[key][1])] = place
        problems[key][1].append(row)
    samples = {len(own) for _, own in problems.values()}
    if len(samples) > 1:
        fewest, most = (pick((own for _, own in problems.values()), key=len) for pick in (min, max))
        raise ValueError(
            f"{first[id(fewest)]}: there are {len(fewest)} texts of this problem, but {len(most)} of that of "
            f"{first[id(most)]}; expected the same number for every problem"
        )
    return list(problems.values())


def _score_texts(problems: Sequence[tuple[Trace, list[Row]]], open_from: int | None) -> Scores:
    traces, rows_of = zip(*problems, strict=True)
    texts = [[_text(row) for row in rows] for rows in rows_of]
    records = score_texts(traces, texts, [[row.get("finished", True) for row in rows] for rows in rows_of])
    for record in records:
        row = rows_of[record["problem"]][record["sample"]]
        record |= {key: row[key] for key in MODEL_KEYS if key in row} | verdict_fields(record, row)
    return make_report(records, open_from), records


def _text(row: Row) -> str:
    return row["text"] if "text" in row else "\n".join([*row["completions"], row.get("final", "")])


def _trace(row: Row, place: str) -> Trace:
    """The problem of a row, with its reference chain."""
    answer, steps = str(row["answer"]), row["reference"]
    # MATH's reference states its answer in a box and has no line for it; that decides how its answers are read.
    in_box = any("\\boxed" in step or "\\fbox" in step for step in steps)
    final = answer_line(answer) if answer and not in_box else ""
    trace = Trace.of_steps(row["prompt"], steps, answer, final, place)
    if "reference_text" in row:
        body = row["reference_text"]
        trace = dataclasses.replace(trace, body=body, spans=_spans(body, steps, place))
    return dataclasses.replace(trace, subject=row.get("subject", ""), level=row.get("level", 0))


def _spans(body: str, steps: Sequence[str], place: str) -> tuple[tuple[int, int], ...]:
    """Where the steps lie in the text that they are parts of, one after the other."""
    spans, end = [], 0
    for step in steps:
        start = body.find(step, end)
        if start < 0:
            raise ValueError(f"{place}: field 'reference_text' does not have the step {step[:60]!r} in its place")
        end = start + len(step)
        spans.append((start, end))
    return tuple(spans)


def _kind(row: Row, place: str) -> str:
    """ "text" or "choices"; raises ValueError where a row lacks a field of its kind."""
    kind = "choices" if "choices" in row or "log_likelihoods" in row else "text"
    wanted = ("prompt", "choices", "answer", "log_likelihoods")
    if kind == "text":
        wanted = ("prompt", "reference", "answer", "completions" if "completions" in row else "text")
    missing = [field for field in wanted if field not in row]
    if missing:
        raise ValueError(
            f"{place}: {missing[0]!r} is missing; a row has prompt, reference (a list of steps), answer, and text (or "
            "completions, a list of steps, and final), or prompt, choices, answer (an index) and log_likelihoods"
        )
    return kind


Check = tuple[Callable[[Any, Row], bool], str]  # whether a value of a row is right, and what is right in words


def _check(row: Row, place: str, checks: Mapping[str, Check]) -> None:
    for field, (is_right, expected) in checks.items():
        if field in row and not is_right(row[field], row):
            seen = repr(row[field])
            raise ValueError(
                f"{place}: field {field!r} is {seen if len(seen) < 80 else seen[:77] + '...'}; expected {expected}"
            )


def _is_text(value: Any, row: Row) -> bool:
    return isinstance(value, str)


def _is_said(value: Any, row: Row) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _is_texts(value: Any, row: Row) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def _is_steps(value: Any, row: Row) -> bool:
    return isinstance(value, list) and bool(value) and all(_is_said(item, row) for item in value)


def _is_number(value: Any, row: Row) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_count(value: Any, row: Row) -> bool:
    return type(value) is int and value >= 0


_NAMES: dict[str, Check] = {"task": (_is_text, "a name"), "model": (_is_said, "a name")}
_TEXTS: dict[str, Check] = {
    "prompt": (_is_said, "the text of the problem"),
    "reference": (_is_steps, "a list of texts, one for each step"),
    "answer": (
        lambda value, row: _is_text(value, row) or _is_number(value, row),
        'text or a number (of a yes/no question "yes" or "no")',
    ),
    "text": (_is_text, "the text that was written"),
    "completions": (_is_texts, "a list of texts, one for each step that was written"),
    "final": (_is_text, 'text, "" where no answer was stated'),
    "reference_text": (_is_said, "the text of the whole reference"),
    "problem": (lambda value, row: _is_count(value, row) or _is_text(value, row), "a number or a name"),
    "sample": (_is_count, "a number from 0"),
    "finished": (lambda value, row: isinstance(value, bool), "true or false"),
    "subject": (_is_text, "text"),
    "level": (lambda value, row: _is_count(value, row) and value <= 5, "a number, 1 to 5, or 0 for none"),
    "teacher_forced": (
        lambda value, row: (
            isinstance(value, list)
            and all(isinstance(item, bool) for item in value)
            and len(value) == len(row["reference"])
        ),
        "true or false for each step of the reference",
    ),
    "reference_nats": (
        lambda value, row: value is None or (_is_number(value, row) and value >= 0),
        "a number of nats from 0, or null where it was not finite",
    ),
    "reference_tokens": (lambda value, row: _is_count(value, row) and value > 0, "a number of tokens, at least 1"),
    "judged_by": (_is_said, "the name of the model that judged the text"),
    "judged_text": (_is_text, "the digest of the text that was judged"),
    "judged_first_error": (
        lambda value, row: value is None or (type(value) is int and value >= -1),
        "the index of the first wrong step, -1 for none, or null where the judge gave no verdict",
    ),
    "max_new_tokens": (_is_count, "a number of tokens"),
    "text_format": (_is_text, "text"),
    "decoding": (_is_text, "text"),
}
_CHOICES: dict[str, Check] = {
    "prompt": (_is_said, "the text of the question"),
    "choices": (
        lambda value, row: _is_texts(value, row) and len(value) > 1 and all(value),
        "a list of texts, at least two, none of them empty",
    ),
    "answer": (
        lambda value, row: _is_count(value, row) and value < len(row["choices"]),
        "the index of the right choice, from 0 (0 for A, 1 for B)",
    ),
    "log_likelihoods": (
        lambda value, row: (
            isinstance(value, list)
            and all(_is_number(item, row) for item in value)
            and len(value) == len(row["choices"])
        ),
        "a finite number of nats for each choice",
    ),
    "text_format": (_is_text, "text"),
}
