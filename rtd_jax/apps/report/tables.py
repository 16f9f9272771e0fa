"""Evaluations as tables of text, printed or on the page. They show what the lists of `rtd_jax.eval.metrics` hold."""

from collections.abc import Mapping
from typing import Any

from rtd_jax.apps.report.points import Evaluation, percent, plus_minus
from rtd_jax.eval.metrics import MODEL_METRICS, TEXT_METRICS, Metric

TextTable = tuple[list[str], list[list[str]]]  # heads of the columns, and rows

SHOWN = [metric for metric in (*TEXT_METRICS, *MODEL_METRICS) if metric.label]


def depth_table(evaluation: Evaluation) -> TextTable:
    """A row for every depth, and a column for every metric that was measured by depth."""
    metrics = [metric for metric in SHOWN if metric.is_column and evaluation.get(metric.name)]
    rows = [
        [depth, str(chains["n"]), *(_cell(metric, evaluation[metric.name].get(depth)) for metric in metrics)]
        for depth, chains in evaluation["chain_accuracy"].items()
    ]
    return ["depth", "texts", *map(_head, metrics)], rows


def total_lines(evaluation: Evaluation) -> list[str]:
    """The metrics that are shown over all depths only, one a line: "math-verify %: 71.3 ± 2.1"."""
    metrics = [metric for metric in SHOWN if not metric.is_column and evaluation.get(metric.name)]
    return [f"{_head(metric)}: {_cell(metric, evaluation[metric.name]['all'])}" for metric in metrics]


def group_table(kind: str, groups: Mapping[str, Mapping[str, Any]]) -> TextTable:
    """A row for every group of problems, such as every subject, and a column for every metric that was measured."""
    metrics = [metric for metric in SHOWN if any(metric.name in group for group in groups.values())]
    rows = [
        [name, str(group["chain_accuracy"]["n"]), *(_cell(metric, group.get(metric.name)) for metric in metrics)]
        for name, group in groups.items()
    ]
    return [kind, "texts", *map(_head, metrics)], rows


def _head(metric: Metric) -> str:
    return f"{metric.label} %" if metric.is_share else metric.label


def _cell(metric: Metric, estimate: Mapping[str, Any] | None) -> str:
    return percent(estimate) if metric.is_share else plus_minus(estimate)
