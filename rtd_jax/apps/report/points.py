"""Estimates as text and as points with error bars, for the pictures of the page."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes

Colours = Mapping[str, str]
Draw = Callable[[Axes, Colours], None]
Evaluation = Mapping[str, Any]  # an EvaluationReport as a dict; what was not measured is absent or empty

SERIES = ("c0", "c1", "c2", "c3")
MARKERS = "osD^"


def percent(estimate: Mapping[str, Any] | None) -> str:
    """An estimate of a share in percent, with its standard error: "71.3 ± 2.1"."""
    if estimate is None:
        return "–"
    error = estimate["stderr"]
    return f"{100 * estimate['mean']:.1f}" + ("" if error is None else f" ± {100 * error:.1f}")


def plus_minus(estimate: Mapping[str, Any] | None) -> str:
    """An estimate with its standard error: "3.214 ± 0.052"."""
    if estimate is None:
        return "–"
    return f"{estimate['mean']:.3f}" + ("" if estimate["stderr"] is None else f" ± {estimate['stderr']:.3f}")


def interval(found: Mapping[str, Any] | None) -> str:
    """A value with its interval: "0.830 (0.790 to 0.870)"."""
    if found is None or found["value"] is None:
        return "–"
    return f"{found['value']:.3f}" + ("" if found["low"] is None else f" ({found['low']:.3f} to {found['high']:.3f})")


def line_style(colours: Colours, i: int, line: str = "-") -> dict[str, Any]:
    """Colour and marker of the i-th series; with `line` "" only its points are drawn."""
    return {"color": colours[SERIES[i % 4]], "marker": MARKERS[i % 4], "markersize": 4, "linestyle": line}


def choices(models: Mapping[str, Evaluation]) -> Draw | None:
    """Draws acc and acc_norm of every model; None where no questions with choices were asked."""
    if not any("accuracy_norm" in evaluation for evaluation in models.values()):
        return None

    def draw(axes: Axes, colours: Colours) -> None:
        columns = {name: [evaluation["accuracy"], evaluation["accuracy_norm"]] for name, evaluation in models.items()}
        _side_by_side(axes, columns, ["acc", "acc_norm"], colours)
        chance = 100 * next(iter(models.values()))["chance"]
        axes.axhline(chance, linestyle=":", color=colours["faint"])
        axes.set(ylabel="questions right, %")

    return draw


def groups(models: Mapping[str, Evaluation], kind: str) -> Draw | None:
    """Draws each model's accuracy of answers by "subject" or "level"; None where problems have none."""
    found = {name: evaluation.get("groups", {}).get(kind, {}) for name, evaluation in models.items()}
    names = sorted({group for groups in found.values() for group in groups})
    if not names:
        return None

    def draw(axes: Axes, colours: Colours) -> None:
        columns = {
            name: [groups[group]["answer_flexible"] if group in groups else None for group in names]
            for name, groups in found.items()
        }
        _side_by_side(
            axes,
            columns,
            [name.replace(" & ", " &\n").replace("Intermediate ", "Interm.\n") for name in names],
            colours,
        )
        axes.set(ylabel="answers right, %")

    return draw


def _side_by_side(
    axes: Axes, columns: Mapping[str, Sequence[Mapping[str, Any] | None]], names: Sequence[str], colours: Colours
) -> None:
    """Draws, at the place of each name on the x axis, a point with its standard error for each model (a column)."""
    for i, (label, column) in enumerate(columns.items()):
        points = [(place, entry) for place, entry in enumerate(column) if entry is not None]
        x = [place + 0.12 * (i - (len(columns) - 1) / 2) for place, _ in points]
        y = [100 * entry["mean"] for _, entry in points]
        errors = [100 * (entry["stderr"] or 0.0) for _, entry in points]
        axes.errorbar(x, y, errors, label=label, capsize=3, **line_style(colours, i, ""))
    axes.set(ylim=(-3, 103), xlim=(-0.5, len(names) - 0.5), xticks=range(len(names)))
    axes.set_xticklabels(names, rotation=30 if len(names) > 5 else 0, ha="right" if len(names) > 5 else "center")
    axes.legend()
