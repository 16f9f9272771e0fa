"""Evaluations as tables of text, printed or on the page. They show what the lists of `rtd_jax.eval.metrics` hold."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from rtd_jax.apps.report.pictures import Evaluation
from rtd_jax.eval import metrics
from rtd_jax.eval.metrics import Metric

TextTable = tuple[list[str], list[list[str]]]  # heads of the columns, and rows


def plus_minus(estimate: Mapping[str, Any] | None, scale: int = 1, digits: int = 3) -> str:
    """An estimate with its standard error: "3.214 ± 0.052"; "–" where there is none, or no finite one."""
    if estimate is None or estimate["mean"] is None:
        return "–"
    error = "" if estimate["stderr"] is None else f" ± {number(scale * estimate['stderr'], digits)}"
    return f"{number(scale * estimate['mean'], digits)}{error}"


def number(value: float | None, digits: int = 3) -> str:
    """A number with so many decimals; a huge one, such as a diverged model's perplexity, by its order of magnitude."""
    if value is None:
        return "–"
    return f"{value:.{digits}f}" if abs(value) < 1e9 else f"{value:.{digits}e}"


percent = partial(plus_minus, scale=100, digits=1)  # an estimate of a share, in percent: "71.3 ± 2.1"


def interval(found: Mapping[str, Any] | None) -> str:
    """A value with its interval: "0.830 (0.790 to 0.870)"."""
    if found is None or found["value"] is None:
        return "–"
    ends = found["low"], found["high"]
    return f"{found['value']:.3f}" + ("" if None in ends else f" ({ends[0]:.3f} to {ends[1]:.3f})")


def depth_table(evaluation: Evaluation) -> TextTable:
    """A row for every depth, and a column for every metric that was measured by depth."""
    columns = [metric for metric in _labelled() if metric.is_column and evaluation.get(metric.name)]
    rows = [
        [depth, str(chains["n"]), *(_cell(metric, evaluation[metric.name].get(depth)) for metric in columns)]
        for depth, chains in evaluation["chain_accuracy"].items()
    ]
    return ["depth", "texts", *map(_head, columns)], rows


def stage_table(stages: Sequence[Mapping[str, Any]]) -> TextTable:
    """A row for every stage of a run: what was measured to end it, the threshold, the last value, and what ended it."""
    names = {"solved": "chains solved", "share": "nothing: equal shares"}
    rows = []
    for stage in stages:
        ends_by = stage.get("ends_by", "coherence")
        value = stage["solved" if ends_by == "solved" else "coherence"]
        figures = (number(x, digits=4) for x in (stage["threshold"], value))
        rows.append([stage["depth"], str(stage["updates"]), names.get(ends_by, ends_by), *figures, stage["ended_by"]])
    return ["stage", "updates", "measured", "threshold", "at the end", "ended by"], rows


def total_lines(evaluation: Evaluation) -> list[str]:
    """The metrics that are shown over all depths only, one a line: "math-verify %: 71.3 ± 2.1"."""
    shown = [metric for metric in _labelled() if not metric.is_column and evaluation.get(metric.name)]
    return [f"{_head(metric)}: {_cell(metric, evaluation[metric.name]['all'])}" for metric in shown]


def group_table(kind: str, groups: Mapping[str, Mapping[str, Any]]) -> TextTable:
    """A row for every group of problems, such as every subject, and a column for every metric that was measured."""
    columns = [metric for metric in _labelled() if any(metric.name in group for group in groups.values())]
    rows = [
        [name, str(group["chain_accuracy"]["n"]), *(_cell(metric, group.get(metric.name)) for metric in columns)]
        for name, group in groups.items()
    ]
    return [kind, "texts", *map(_head, columns)], rows


def _labelled() -> list[Metric]:
    return [
        metric for metric in (*metrics.TEXT_METRICS, *metrics.JUDGE_METRICS, *metrics.MODEL_METRICS) if metric.label
    ]


def _head(metric: Metric) -> str:
    return f"{metric.label} %" if metric.is_share else metric.label


def _cell(metric: Metric, estimate: Mapping[str, Any] | None) -> str:
    return percent(estimate) if metric.is_share else plus_minus(estimate)
