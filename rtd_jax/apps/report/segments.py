"""Pictures of texts that were cut into steps: where the cuts are, and how right they are."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from rtd_jax.apps.report.drawing import label_text
from rtd_jax.base.files import replacing

COLOURS = ("#cfe3f5", "#fbe0c4", "#d5edd0", "#e6d9f0", "#fbd5d5", "#e8e3c8")
COLUMNS = 118  # characters in a line


def plot_examples(path: Path, examples: Sequence[Mapping[str, Any]]) -> None:
    """Draws texts with a colour for each step that was found, and marks cuts that are wrong or were missed.

    Args:
      path: of the PNG.
      examples: each with its `text`, and the characters at which `found` and `annotated` steps end.
    """
    blocks = [_laid_out(example) for example in examples]
    lines = sum(block[-1][1] + 2 for block in blocks)
    figure = Figure(figsize=(12, 0.24 * lines + 0.6))
    axes = figure.add_axes((0.01, 0.0, 0.98, 1.0))
    axes.set(xlim=(0, COLUMNS), ylim=(lines + 1, -1.6))
    axes.axis("off")
    legend = "one colour a step found;  red bar: not annotated there;  red triangle: annotated, but missed"
    axes.text(0.2, -0.8, legend, fontsize=10, va="center")
    style: dict[str, Any] = {"family": "monospace", "fontsize": 9.6, "va": "center", "ha": "center"}
    top = 0
    for example, block in zip(examples, blocks, strict=True):
        found, right = set(example["found"]), set(example["annotated"])
        for index, (column, line) in enumerate(block):
            step = sum(end <= index for end in sorted(found)[:-1])
            colour = COLOURS[step % len(COLOURS)]
            axes.add_patch(Rectangle((column, top + line - 0.5), 1.0, 1.0, facecolor=colour, edgecolor="none"))
            axes.text(column + 0.5, top + line, example["text"][index], **style)
            if index + 1 in found - right:
                axes.plot([column + 1.0] * 2, [top + line - 0.5, top + line + 0.5], color="#c00000", linewidth=2.2)
            if index + 1 in right - found:
                axes.plot(column + 1.0, top + line + 0.42, marker="^", color="#c00000", markersize=6)
        top += block[-1][1] + 2
    _save(figure, path)


def plot_scores(path: Path, tests: Mapping[str, Mapping[str, Any]]) -> None:
    """Draws F1 of classifier and baselines on every set, with 95% intervals, and the classifier's calibration."""
    rows = [
        (name, segmenter, scores)
        for name, result in tests.items()
        for segmenter, scores in {"classifier": result["scores"], **result["baselines"]}.items()
    ]
    figure = Figure(figsize=(13, 0.34 * len(rows) + 1.6))
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    for place, (_, segmenter, scores) in enumerate(rows):
        colour = "#1f5fa8" if segmenter == "classifier" else "#888888"
        for kind, marker in (("all", "o"), ("inner", "|")):
            f1 = scores[kind]["exact"]["f1"]
            error = [[f1["value"] - f1["low"]], [f1["high"] - f1["value"]]]
            error = np.maximum(error, 0.0).tolist()  # rounding may put an end of the interval beyond the value
            left.errorbar(f1["value"], place, xerr=error, fmt=marker, color=colour, capsize=2)
    left.set_yticks(range(len(rows)), [label_text(f"{name}: {segmenter}") for name, segmenter, _ in rows])
    left.invert_yaxis()
    left.set_xlabel("exact F1, 95% interval (o: all steps, |: without each chain's last)")
    left.grid(axis="x", alpha=0.3)
    right.plot([0, 1], [0, 1], color="#bbbbbb", linewidth=1)
    for name, result in tests.items():
        bins = result["calibration"]["bins"]
        right.plot([x["probability"] for x in bins], [x["share"] for x in bins], marker="o", label=label_text(name))
    right.set(xlabel="probability that a step ends here", ylabel="share of tokens where one does")
    right.legend()
    figure.tight_layout()
    _save(figure, path)


def _laid_out(example: Mapping[str, Any]) -> list[tuple[int, int]]:
    """(column, line) of each character; words are kept whole where a line can hold them."""
    text = example["text"]
    places: list[tuple[int, int]] = []
    column, line = 0, 0
    for index, character in enumerate(text):
        word = len(text[index:].split(maxsplit=1)[0]) if not character.isspace() else 0
        begins = word and (not index or text[index - 1].isspace())
        if character == "\n" or column >= COLUMNS or (begins and column and column + word > COLUMNS):
            column, line = 0, line + 1
        places.append((column, line))
        column += character != "\n"
    return places


def _save(figure: Figure, path: Path) -> None:
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)
