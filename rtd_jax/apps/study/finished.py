"""Reads what a finished run left: its report and its texts, which have to be of one run, and of a run's shape."""

import ast
import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rtd_jax.apps.study.statistics import Outcome, auroc_within, cka_curve
from rtd_jax.base.files import read_jsonl, read_object
from rtd_jax.base.settings import build
from rtd_jax.eval.estimates import perplexity_estimate


@dataclass(frozen=True)
class _Mean:
    mean: float


@dataclass(frozen=True)
class _Evaluation:
    step_accuracy: dict[str, _Mean]  # by depth, and "all"
    chain_accuracy: dict[str, _Mean]
    perplexity: float | None  # None where it is infinite


@dataclass(frozen=True)
class _Stage:
    depth: str
    updates: int
    threshold: float | None
    coherence: float | None
    ended_by: str


@dataclass(frozen=True)
class _Look:
    update: int
    seconds: float
    chain_accuracy: dict[str, float]


@dataclass(frozen=True)
class _Report:
    """What a study reads of report.json."""

    student: _Evaluation
    updates: int
    wall_seconds: float
    stages: tuple[_Stage, ...]
    train_seconds: float | None = None
    teacher: _Evaluation | None = None
    curve: tuple[_Look, ...] = ()
    drift: dict[str, Any] | None = None
    tokens: dict[str, int] | None = None  # predicted tokens that were trained on, by where the chains came from
    ensemble: dict[str, Any] | None = None  # the seeds of the ensemble that it was trained in
    settings: dict[str, Any] | None = None  # of the run; None where an earlier version wrote the report


@dataclass(frozen=True)
class _Text:
    """What a study reads of a line of generations.jsonl."""

    model: str
    depth: int
    correct: bool
    reference_nats: float | None = None
    reference_tokens: int | None = None


def read_outcome(task: str, method: str, seed: int, workdir: Path, overrides: Sequence[str] = ()) -> Outcome:
    """Reads report.json and generations.jsonl of a finished run.

    Args:
      overrides: that the run was started with, "loss.alpha=0.7".

    Raises:
      ValueError: a file is missing, damaged, or not what a run writes; the two are not of one run; or the report is of
        a run with other settings.
    """
    path, way_out = workdir / "report.json", f"delete {workdir} and run again"
    content = read_object(path, way_out)
    try:
        report = build(_Report, _known(_Report, content), "report")
        _check(report)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        said = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
        raise ValueError(f"{path} is not what a run writes ({said}); {way_out}") from error
    _check_settings(path, report.settings or {}, overrides, way_out)
    texts = [_text(row, place, way_out) for place, row in read_jsonl(workdir / "generations.jsonl", way_out)]
    student = [text for text in texts if text.model == "student"]
    teacher = [text for text in texts if text.model == "teacher"]
    if not student or (teacher and len(teacher) != len(student)):
        raise ValueError(
            f"{workdir / 'generations.jsonl'} has {len(student)} texts of the student and {len(teacher)} of the "
            f"teacher; {way_out}"
        )
    for name, evaluation, found in (("student", report.student, student), ("teacher", report.teacher, teacher)):
        if found and not _are_of(evaluation, found):
            raise ValueError(f"{path} and its generations.jsonl are of two runs (their {name} differs); {way_out}")
    return Outcome(
        task,
        method,
        seed,
        np.array([text.depth for text in student]),
        np.array([text.correct for text in student], bool),
        np.array([text.correct for text in teacher], bool) if teacher else None,
        report.student.step_accuracy["all"].mean,
        _perplexity(report.student),
        report.updates,
        report.wall_seconds if report.train_seconds is None else report.train_seconds,
        {depth: found.mean for depth, found in report.student.step_accuracy.items()},
        None if report.teacher is None else _perplexity(report.teacher),
        report.drift,
        tuple(content.get("curve", ())),
        tuple(content["stages"]),
        None if report.tokens is None else sum(report.tokens.values()),
        len((report.ensemble or {}).get("seeds", ())) or 1,
    )


def _check_settings(path: Path, settings: Mapping[str, Any], overrides: Sequence[str], way_out: str) -> None:
    """Raises ValueError where a run's settings are not those that the overrides make."""
    for key, text in dict(override.split("=", 1) for override in overrides).items():  # the last one of a key holds
        found: Any = settings
        for name in key.split("."):
            found = found.get(name) if isinstance(found, Mapping) else None
        try:
            wanted = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            wanted = text
        wanted = list(wanted) if isinstance(wanted, tuple) else wanted
        # What is of another type was written in another way ("true"), or is a setting that the run did not have.
        are_numbers = all(isinstance(x, int | float) for x in (found, wanted))
        if (are_numbers or type(found) is type(wanted)) and found not in (wanted, text):
            raise ValueError(f"{path} is of another run: its {key} is {found!r}, this run has {text}; {way_out}")


def _text(row: dict[str, Any], place: str, way_out: str) -> _Text:
    try:
        text = build(_Text, _known(_Text, row), "row")
        if text.model not in ("student", "teacher") or text.depth < 1:
            raise ValueError(f"its model is {text.model!r} and its depth {text.depth}")
    except ValueError as error:
        raise ValueError(f"{place}: not what a run writes ({error}); {way_out}") from error
    return text


def _known(cls: Any, value: Any) -> Any:
    """`value` without the keys that `cls` does not have, and so for what is inside it; a run writes much more."""
    if not isinstance(value, dict):
        return value
    known = {field.name: value[field.name] for field in dataclasses.fields(cls) if field.name in value}
    for name in ("step_accuracy", "chain_accuracy"):
        if cls is _Evaluation and isinstance(known.get(name), dict):
            known[name] = {key: _known(_Mean, item) for key, item in known[name].items()}
    for name, item_class in (("student", _Evaluation), ("teacher", _Evaluation), ("stages", _Stage), ("curve", _Look)):
        if cls is _Report and name in known:
            items = known[name]
            is_list = isinstance(items, list)
            known[name] = [_known(item_class, item) for item in items] if is_list else _known(item_class, items)
    return known


def _perplexity(evaluation: _Evaluation) -> float:
    return math.inf if evaluation.perplexity is None else evaluation.perplexity


def _check(report: _Report) -> None:
    """Tries what the statistics read, so that nothing is found wrong after they began."""
    for evaluation in filter(None, (report.student, report.teacher)):
        for table in (evaluation.step_accuracy, evaluation.chain_accuracy):
            _check_depths(table)
    for stage in report.stages:
        if not re.fullmatch(r"\d+(\+|-\d+)?", stage.depth):
            raise ValueError(f"{stage.depth!r} is no stage")
    for look in report.curve:
        _check_depths(look.chain_accuracy)
    drift = report.drift or {}
    parts = [part for part in (report.drift, drift.get("own"), drift.get("own_before")) if part is not None]
    measured = [x for part in parts for x in (*cka_curve(part).values(), auroc_within(part))]
    if not all(isinstance(x, float | int | None) for x in measured):
        raise ValueError("its drift has other values than numbers")


def _check_depths(table: Mapping[str, Any]) -> None:
    """Raises ValueError where a table by depth lacks the row over all depths, or has one that is no depth."""
    odd = [key for key in table if key != "all" and not re.fullmatch(r"\d+\+?", key)]
    if odd or "all" not in table:
        raise ValueError(f"a table by depth has the rows {', '.join(table) or '(none)'}; expected depths and 'all'")


def _are_of(evaluation: _Evaluation | None, texts: list[_Text]) -> bool:
    """Whether a report's numbers are those of the texts: the share that is right, and the perplexity."""
    if evaluation is None:
        return False
    right = float(np.mean([text.correct for text in texts]))
    if not math.isclose(evaluation.chain_accuracy["all"].mean, right, abs_tol=1e-9):
        return False
    nats, tokens = [text.reference_nats for text in texts], [text.reference_tokens for text in texts]
    if None in nats or None in tokens:
        return True  # of a model that diverged
    found = perplexity_estimate([x or 0.0 for x in nats], [x or 0 for x in tokens]).value
    stated = _perplexity(evaluation)
    return found == stated or math.isclose(found, stated, rel_tol=1e-6)
