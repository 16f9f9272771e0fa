"""The pictures of an evaluation, a diagnosis and a run. Each function returns how to draw one, or None without data."""

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from rtd_jax.apps.report.drawing import SERIES, Colours, Draw, label_text, series_style

Evaluation = Mapping[str, Any]  # see `eval.metrics.make_report`; what was not measured is absent or empty
Lines = Sequence[Mapping[str, Any]]  # of metrics.jsonl


def choices(models: Mapping[str, Evaluation]) -> Draw | None:
    """Accuracy of every model on multiple-choice questions, plain and per character."""
    if not any("accuracy_norm" in evaluation for evaluation in models.values()):
        return None

    def draw(axes: Axes, colours: Colours) -> None:
        tables = {name: {"acc": e["accuracy"], "acc_norm": e["accuracy_norm"]} for name, e in models.items()}
        _draw_columns(axes, tables, ["acc", "acc_norm"], colours)
        chance = 100 * next(iter(models.values()))["chance"]
        axes.axhline(chance, linestyle=":", color=colours["faint"])
        axes.set(ylabel="questions right, %")

    return draw


def groups(models: Mapping[str, Evaluation], kind: str) -> Draw | None:
    """Accuracy of every model's answers by "subject" or "level"."""
    tables = {
        name: {group: row["answer_flexible"] for group, row in evaluation.get("groups", {}).get(kind, {}).items()}
        for name, evaluation in models.items()
    }
    names = sorted({group for table in tables.values() for group in table})
    if not names:
        return None

    def draw(axes: Axes, colours: Colours) -> None:
        _draw_columns(axes, tables, names, colours)
        axes.set(ylabel="answers right, %")

    return draw


def chain_accuracy(models: Mapping[str, Evaluation]) -> Draw | None:
    """Chain accuracy of every model by depth."""
    depths = _depths(models)
    if not depths:
        return None

    def draw(axes: Axes, colours: Colours) -> None:
        for i, (name, evaluation) in enumerate(models.items()):
            offset = 0.08 * (i - (len(models) - 1) / 2)
            _draw_estimates(axes, evaluation["chain_accuracy"], depths, offset, series_style(colours, i, name))
        _label_depths(axes, depths)

    return draw


def compounding(models: Mapping[str, Evaluation]) -> Draw | None:
    """Chain accuracy of every model by depth, and what it would be if steps failed independently."""
    depths = _depths(models)
    expected = {
        name: table
        for name, e in models.items()
        if (table := e.get("independent_chain_accuracy") or e.get("independent_chain_accuracy_free"))
    }
    if not depths or not expected:
        return None

    def draw(axes: Axes, colours: Colours) -> None:
        for i, (name, table) in enumerate(expected.items()):
            _draw_estimates(axes, models[name]["chain_accuracy"], depths, 0, series_style(colours, i, name))
            _draw_estimates(axes, table, depths, 0, series_style(colours, i, f"{name}: step ^ depth", "--"))
        _label_depths(axes, depths)

    return draw


def cka(text: Mapping[str, Any], published: Mapping[str, float]) -> Draw | None:
    """CKA between student and teacher by step, beside published values."""
    steps = [step for step in text["steps"] if step["step"] >= 1 and step["cka"] and step["cka"]["value"] is not None]
    if not steps:
        return None

    def draw(axes: Axes, colours: Colours) -> None:
        if published:
            x, y = [int(step) for step in published], list(published.values())
            axes.plot(x, y, "--", color=colours["faint"], label="article")
            for i in (0, -1):
                place: Any = {"xytext": (0, -4), "textcoords": "offset points", "ha": "center", "va": "top"}
                axes.annotate(f"{y[i]:.2f}", (x[i], y[i]), fontsize=9, **place)
        same = f"debiased, the same {text['same_chains']['chains']} chains"
        kinds = (("cka", "biased"), ("cka_debiased", "debiased"), ("cka_same_chains", same))
        for i, (key, label) in enumerate(kinds):
            _draw_intervals(axes, steps, key, colours, i, label)
        _label_steps(axes, "linear CKA")

    return draw


def cosines(text: Mapping[str, Any]) -> Draw:
    """Cosines between student and teacher by step, of states and of transitions."""

    def draw(axes: Axes, colours: Colours) -> None:
        steps = [step for step in text["steps"] if step["step"] >= 1]
        for i, (key, label) in enumerate((("boundary_cosine", "states, f"), ("transition_cosine", "transitions, g"))):
            _draw_intervals(axes, steps, key, colours, i, label)
        _label_steps(axes, "cosine, student to teacher")

    return draw


def roc(text: Mapping[str, Any]) -> Draw | None:
    """ROC curves of the transition cosine as a score for a right step, and for a right chain."""
    names = {"next_step": "next step", "same_step": "same step", "chain": "whole chain"}
    curves = {key: points for key, points in text["roc"].items() if points}
    if not curves:
        return None

    def draw(axes: Axes, colours: Colours) -> None:
        axes.plot([0, 1], [0, 1], "--", color=colours["faint"], linewidth=1)
        for i, (key, points) in enumerate(curves.items()):
            area = text["relation"][key]["auroc"]["value"]
            axes.plot(*zip(*points, strict=True), color=colours[SERIES[i]], label=f"{names[key]} ({area:.2f})")
        axes.set(xlabel="wrong ones taken for right", ylabel="right ones found", xlim=(0, 1), ylim=(0, 1.02))
        axes.legend(loc="lower right")

    return draw


def training_losses(lines: Lines) -> Draw | None:
    """The losses of a run against its updates."""
    wanted = {"distill/kl_div_T1": "KL at T = 1", "distill/alignment": "alignment", "distill/coherence": "coherence"}
    wanted = {key: label for key, label in wanted.items() if any(line.get(key) for line in lines)}
    if not wanted:
        return None

    def draw(axes: Axes, colours: Colours) -> None:
        for i, (key, label) in enumerate(wanted.items()):
            points = [(line["update"], line[key]) for line in lines if line.get(key)]
            axes.plot(*zip(*points, strict=True), color=colours[SERIES[i]], label=label)
        _label_updates(axes, lines, colours, "loss")

    return draw


def validation(lines: Lines, name: str, label: str) -> Draw | None:
    """What was measured on validation chains against a run's updates, with the threshold of each stage.

    Args:
      name: in the log, behind "validation/". The coherence loss has a logarithmic axis, on which 0 has no place.
    """
    key, is_log = f"validation/{name}", name == "coherence"
    points = [line for line in lines if (line.get(key) if is_log else line.get(key) is not None)]
    if not points:
        return None

    def draw(axes: Axes, colours: Colours) -> None:
        for i, stage in enumerate(dict.fromkeys(line["stage"] for line in points)):
            in_stage = [line for line in points if line["stage"] == stage]
            x = [line["update"] for line in in_stage]
            axes.plot(x, [line[key] for line in in_stage], **series_style(colours, i, f"stage {stage}"))
            thresholds = [line.get("validation/threshold", math.nan) for line in in_stage]  # some stages have none
            axes.plot(x, thresholds, "--", color=colours[SERIES[i % 4]], alpha=0.7)
        _label_updates(axes, lines, colours, label, "log" if is_log else "linear")

    return draw


def _depths(models: Mapping[str, Evaluation]) -> list[str]:
    keys = {key for evaluation in models.values() for key in evaluation.get("chain_accuracy", {}) if key != "all"}
    return sorted(keys, key=lambda key: int(key.rstrip("+")))


def _draw_columns(axes: Axes, tables: Mapping[str, Mapping[str, Any]], names: Sequence[str], colours: Colours) -> None:
    """Draws a column for each name, and in it one estimate for each model."""
    for i, (model, table) in enumerate(tables.items()):
        offset = 0.12 * (i - (len(tables) - 1) / 2)
        _draw_estimates(axes, table, names, offset, series_style(colours, i, model, ""))
    axes.set(ylim=(-3, 103), xlim=(-0.5, len(names) - 0.5), xticks=range(len(names)))
    labels = [label_text(name).replace(" & ", " &\n").replace("Intermediate ", "Interm.\n") for name in names]
    axes.set_xticklabels(labels, rotation=30 if len(names) > 5 else 0, ha="right" if len(names) > 5 else "center")
    axes.legend()


def _draw_estimates(
    axes: Axes, table: Mapping[str, Any], names: Sequence[str], offset: float, style: dict[str, Any]
) -> None:
    """Draws the estimates of `table`, in %, with one standard error, each at the place of its name in `names`."""
    known = [(place + offset, table[name]) for place, name in enumerate(names) if name in table]
    y = [100 * estimate["mean"] for _, estimate in known]
    errors = [100 * (estimate["stderr"] or 0.0) for _, estimate in known]
    axes.errorbar([x for x, _ in known], y, errors, capsize=3, **style)


def _draw_intervals(axes: Axes, steps: Sequence[Any], key: str, colours: Colours, i: int, label: str) -> None:
    """Draws one measure of the steps with its 95% intervals, as the i-th series."""
    known = [(step["step"], step[key]) for step in steps if step[key] is not None and step[key]["value"] is not None]
    if not known:
        return
    y = [found["value"] for _, found in known]
    errors = [
        [0.0 if found[end] is None else abs(found["value"] - found[end]) for _, found in known]
        for end in ("low", "high")
    ]
    x = [x + 0.06 * (i - 1) for x, _ in known]
    axes.errorbar(x, y, errors, capsize=3, **series_style(colours, i, label))


def _label_depths(axes: Axes, depths: Sequence[str]) -> None:
    axes.set(xlabel="reasoning steps of the problem", ylabel="chains right, %", ylim=(-3, 103))
    axes.set_xticks(range(len(depths)), depths)
    axes.legend()


def _label_steps(axes: Axes, label: str) -> None:
    lowest = float(axes.dataLim.intervaly[0])
    lowest = min(0.0, max(lowest, -0.25)) if math.isfinite(lowest) else 0.0  # wide intervals may leave the picture
    axes.set(xlabel="step", ylabel=label, ylim=(lowest - 0.02, 1.05))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend()


def _label_updates(axes: Axes, lines: Lines, colours: Colours, label: str, scale: str = "log") -> None:
    axes.set(xlabel="update", ylabel=label, yscale=scale)
    for before, line in itertools.pairwise(lines):
        if "stage" in line and line["stage"] != before.get("stage"):
            axes.axvline(before["update"], color=colours["faint"], linewidth=0.8, linestyle=":")
    axes.legend()
